"""Dialogues from the files that people have: ShareGPT, Alpaca, ChunkLlama's, messages, plain text.

What a file holds is told by the keys of its first entry:

    ShareGPT       {"conversations": [{"from": "human", "value": "..."}, ...]}, or under "items"
    messages       {"messages": [{"role": "user", "content": "..."}, ...]}
    Alpaca         {"instruction": "...", "input": "...", "output": "..."}
    ChunkLlama's   {"inputs": ["...", ...], "outputs": ["...", ...]}, or both in "conversations"
    plain text     {"conversation": "USER: ... ASSISTANT: ... USER: ..."}

Real files have flaws. An entry that is a dialogue, but one that cannot be trained on, is left out
and counted by reason, as Vicuna's and LongChat's scripts leave it out without a word; an entry that
is no dialogue at all is an error, for then the file is not what it was taken for.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import json_lines, parse_json, read_text_file

Role = Literal["system", "user", "assistant"]

ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
GPT4 = re.compile(r"gpt[-_ ]?4", re.IGNORECASE)  # "Model: GPT-4" (ShareGPT), "gpt4" (FastChat)
MARKERS = re.compile(r"(?:\A|(?<=\s))(USER|ASSISTANT):(?=\s|\Z)")


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: system, user or assistant.
        text: as the file has it.
        trained: whether the loss counts it; True for turns of the assistant only.
    """

    role: Role
    text: str
    trained: bool


@dataclass(frozen=True)
class Dialogue:
    """Turns in order: perhaps one of the system, then user and assistant by turns."""

    turns: tuple[Turn, ...]


def read_dialogues(
    path: str | Path, *, gpt4_only: bool = False
) -> tuple[list[Dialogue], dict[str, int]]:
    """The dialogues of a JSON file (a list) or of a file of JSON lines, in the file's order.

    Every dialogue returned begins with the user (or the system, then the user), alternates, ends
    with the assistant and has no empty turn. A first turn of the assistant and a last one of the
    user are cut off, as FastChat does. Of ChunkLlama's form with lists of different lengths only
    the first round is kept, as in its script: which answer belongs to which question is not known
    for the others.

    Turns of the assistant are trained on, those excepted that the file gives a "weight" of 0, as in
    OpenAI's form of messages.

    Args:
        gpt4_only: where the file names a model (`"model": "Model: GPT-4"`, of a dialogue or of a
            turn), only replies by GPT-4 are trained on. A reply without any such mark counts as
            GPT-4's, as in FastChat: most files have none.

    Returns:
        The dialogues; and how many were "dropped: ..." and had turns "cut: ...", by reason.

    Raises:
        InputError: a file that cannot be read, is not JSON or not UTF-8, or holds none of these
            forms; an entry that has not the form of the first one.
    """
    path = Path(path)
    dialogues, counts = [], Counter[str]()
    form = None
    for place, entry in _entries(path):
        try:
            if not isinstance(entry, dict):
                raise _NotADialogue(f"is a JSON {type(entry).__name__}")
            form = form or _form(entry)
            turns = form.parse(entry, gpt4_only)
            turns, cuts = _tidied(turns)
        except _NotADialogue as error:
            expected = form.example if form else "one of " + ", ".join(f.example for f in FORMS)
            raise InputError(f"{path}: {place} {error}; expected {expected}") from None
        except _Dropped as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        if not any(turn.trained for turn in turns):
            counts[f"dropped: no reply {'by GPT-4' if gpt4_only else 'to train on'}"] += 1
            continue
        if form is LISTS and _unequal(entry):
            cuts.append("all rounds but the first (unequal numbers of inputs and outputs)")
        counts.update(f"cut: {cut}" for cut in cuts)
        dialogues.append(Dialogue(turns))
    return dialogues, dict(counts)


class _NotADialogue(Exception):
    """The entry has another form; the message says what it has."""


class _Dropped(Exception):
    """The entry is a dialogue that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class _Form:
    example: str
    parse: Callable[[dict[str, Any], bool], list[Turn]]


def _form(entry: dict[str, Any]) -> _Form:
    """What an entry is, by its keys."""
    if _turn_list(entry) is not None:
        return TURNS
    if _lists(entry) is not None:
        return LISTS
    if "instruction" in entry and "output" in entry:
        return ALPACA
    if isinstance(entry.get("conversation"), str):
        return PLAIN
    raise _NotADialogue(f"has the keys {shown(list(entry))}")


def _turn_list(entry: dict[str, Any]) -> list[Any] | None:
    lists = (entry.get(key) for key in ("conversations", "items", "messages", "conversation"))
    return next((value for value in lists if isinstance(value, list)), None)


def _lists(entry: dict[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """Inputs and outputs, from wherever the entry has them."""
    inner = entry.get("conversations")
    holder = inner if isinstance(inner, dict) else entry
    inputs, outputs = holder.get("inputs"), holder.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return None
    return inputs, outputs


def _unequal(entry: dict[str, Any]) -> bool:
    lists = _lists(entry)
    return lists is not None and len(lists[0]) != len(lists[1])


def _parse_turns(entry: dict[str, Any], gpt4_only: bool) -> list[Turn]:
    items = _turn_list(entry)
    if items is None:
        raise _NotADialogue("has no list of turns")
    turns = []
    for number, item in enumerate(items, start=1):
        keys = ("from", "value") if isinstance(item, dict) and "from" in item else ROLE_KEYS
        if not isinstance(item, dict) or any(key not in item for key in keys):
            raise _NotADialogue(
                f"has a turn {number} that is not an object with {' and '.join(keys)}"
            )
        name, text = (item[key] for key in keys)
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise _Dropped("a turn of neither system, user nor assistant")
        ours = not gpt4_only or _by_gpt4(item.get("model", entry.get("model")))
        weight = item.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise _NotADialogue(
                f"has a turn {number} of weight {shown(weight)}, where 0 (not trained on) or 1 "
                "should be"
            )
        trained = role == "assistant" and ours and weight != 0
        turns.append(Turn(role, _text(text, f"turn {number}"), trained))
    return turns


def _parse_lists(entry: dict[str, Any], gpt4_only: bool) -> list[Turn]:
    lists = _lists(entry)
    if lists is None:
        raise _NotADialogue("has no lists of inputs and outputs")
    inputs, outputs = lists
    rounds = list(zip(inputs, outputs, strict=False))
    if _unequal(entry):
        rounds = rounds[:1]
    return [
        turn for question, answer in rounds for turn in _round(entry, question, answer, gpt4_only)
    ]


def _parse_alpaca(entry: dict[str, Any], gpt4_only: bool) -> list[Turn]:
    if "instruction" not in entry or "output" not in entry:
        raise _NotADialogue("lacks instruction or output")
    instruction = _text(entry["instruction"], "its instruction")
    more = _text(entry.get("input"), "its input")
    question = f"{instruction}\n\n{more}" if more.strip() else instruction
    return _round(entry, question, entry["output"], gpt4_only)


def _parse_plain(entry: dict[str, Any], gpt4_only: bool) -> list[Turn]:
    text = entry.get("conversation")
    if not isinstance(text, str):
        raise _NotADialogue("has no conversation that is text")
    # Split at its markers, a text is what stands before the first, then marker, turn, marker, ...
    before, *rest = MARKERS.split(text)
    if not rest:
        raise _NotADialogue('has a conversation without "USER:" and "ASSISTANT:"')
    ours = not gpt4_only or _by_gpt4(entry.get("model"))
    turns = [Turn("system", before.strip(), False)]
    for marker, said in zip(rest[::2], rest[1::2], strict=True):
        role = ROLES[marker.lower()]
        turns.append(Turn(role, said.strip(), ours and role == "assistant"))
    return turns


def _round(entry: dict[str, Any], question: Any, answer: Any, gpt4_only: bool) -> list[Turn]:
    ours = not gpt4_only or _by_gpt4(entry.get("model"))
    return [
        Turn("user", _text(question, "a question"), False),
        Turn("assistant", _text(answer, "an answer"), ours),
    ]


def _by_gpt4(model: Any) -> bool:
    return model is None or GPT4.search(str(model)) is not None


def _text(value: Any, what: str) -> str:
    """A turn's text; null is an empty one, as dumps write it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _NotADialogue(f"has a JSON {type(value).__name__} where the text of {what} should be")
    return value


ROLE_KEYS = ("role", "content")
TURNS = _Form(
    '{"conversations": [{"from": ..., "value": ...}]} or {"messages": [...]}', _parse_turns
)
LISTS = _Form('{"inputs": [...], "outputs": [...]}', _parse_lists)
ALPACA = _Form('{"instruction": ..., "input": ..., "output": ...}', _parse_alpaca)
PLAIN = _Form('{"conversation": "USER: ... ASSISTANT: ..."}', _parse_plain)
FORMS = (TURNS, LISTS, ALPACA, PLAIN)


def _tidied(turns: list[Turn]) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns that can be trained on, and what was cut off."""
    if turns and turns[0].role == "system":
        head, rest = turns[:1], turns[1:]
        head = head if head[0].text.strip() else []  # an empty one says nothing
    else:
        head, rest = [], turns
    cuts = []
    if rest and rest[0].role == "assistant":
        rest = rest[1:]
        cuts.append("a first turn of the assistant")
    if rest and rest[-1].role == "user":
        rest = rest[:-1]
        cuts.append("a last turn of the user")
    if len(rest) < 2:
        raise _Dropped("fewer than two turns")
    if any(turn.role != ("user", "assistant")[n % 2] for n, turn in enumerate(rest)):
        raise _Dropped("roles that do not alternate")
    if any(not turn.text.strip() for turn in rest):
        raise _Dropped("an empty turn")
    try:
        "".join(turn.text for turn in [*head, *rest]).encode()
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, which no tokenizer takes
        raise _Dropped("half a character") from None
    return (*head, *rest), cuts


EXPECTED = "; expected a list of dialogues, or one dialogue a line"


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file, each with where it stands."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .json or .jsonl file of dialogues")
    text = read_text_file(path)
    if not text.strip():
        raise InputError(f"{path} is empty; expected a JSON list of dialogues, or one a line")
    if text.lstrip().startswith("["):
        entries = parse_json(text, f"{path}", expected=EXPECTED)
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, entry in json_lines(text, f"{path}", expected=EXPECTED):
        yield f"line {number}", entry
