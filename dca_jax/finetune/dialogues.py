"""Dialogues and texts from the files that people have; what a file holds its first entry tells.

    ShareGPT       {"conversations": [{"from": "human", "value": "..."}, ...]}, or under "items"
    messages       {"messages": [{"role": "user", "content": "..."}, ...]}, with tools or without
    Alpaca         {"instruction": "...", "input": "...", "output": "..."}
    ChunkLlama's   {"inputs": ["...", ...], "outputs": ["...", ...]}, or both in "conversations"
    marked text    {"conversation": "USER: ... ASSISTANT: ... USER: ..."}
    completions    {"prompt": ..., "completion": ...}, both texts or both messages
    plain text     {"text": "..."}, or a .txt file, which is one text

Real files have flaws. An entry that is a dialogue, but one that cannot be trained on, is left out
and counted by reason, as Vicuna's and LongChat's scripts leave it out without a word; an entry that
is no dialogue at all is an error, for then the file is not what it was taken for.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.finetune.forms import FORMS, LISTS, Dropped, NotADialogue, form_of, unequal
from dca_jax.finetune.turns import Dialogue, Text, Turn
from dca_jax.text_files import json_lines, parse_json, read_text_file

# Who may speak after whom.
NEXT = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
BINARY = (".parquet", ".arrow")


def read_dialogues(
    path: str | Path, *, gpt4_only: bool = False
) -> tuple[list[Dialogue | Text], dict[str, int]]:
    """What a JSON file (a list), a file of JSON lines, or a .txt file holds, in its order.

    Every dialogue returned begins with the user (or the system, then the user), ends with the
    assistant, and has no empty turn; user and assistant alternate, with turns of tools between
    those of the assistant. A first turn of the assistant and last ones of others are cut off, as
    FastChat does. Of ChunkLlama's form with lists of different lengths only the first round is
    kept, as in its script: which answer belongs to which question is not known for the others.

    Turns of the assistant are trained on, those excepted that the file gives a "weight" of 0, as in
    OpenAI's form of messages, or that belong to a "prompt".

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
    dialogues: list[Dialogue | Text] = []
    counts, form = Counter[str](), None
    for place, entry in _entries(path):
        try:
            if not isinstance(entry, dict):
                raise NotADialogue(f"is a JSON {type(entry).__name__}")
            form = form or form_of(entry)
            found, cuts = _checked(form.parse(entry, gpt4_only))
        except NotADialogue as error:
            expected = form.example if form else "one of " + ", ".join(f.example for f in FORMS)
            raise InputError(f"{path}: {place} {error}; expected {expected}") from None
        except Dropped as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        if isinstance(found, Dialogue) and not any(turn.trained for turn in found.turns):
            counts[f"dropped: no reply {'by GPT-4' if gpt4_only else 'to train on'}"] += 1
            continue
        if form is LISTS and unequal(entry):
            cuts.append("all rounds but the first (unequal numbers of inputs and outputs)")
        counts.update(f"cut: {cut}" for cut in cuts)
        dialogues.append(found)
    return dialogues, dict(counts)


def _checked(found: Dialogue | Text) -> tuple[Dialogue | Text, list[str]]:
    """What can be trained on, and what was cut off."""
    cuts: list[str] = []
    if isinstance(found, Text):
        if not found.text.strip():
            raise Dropped("an empty text")
        plain: Any = [found.prompt, found.text]
    else:
        turns, cuts = _tidied(found.turns)
        found = Dialogue(turns, found.tools)
        plain = [[turn.text, dict(turn.more)] for turn in turns] + list(found.tools)
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, which no tokenizer takes
        raise Dropped("half a character") from None
    return found, cuts


def _tidied(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns that can be trained on, and what was cut off."""
    if turns and turns[0].role == "system":
        head, rest = turns[:1], turns[1:]
        head = head if head[0].text.strip() else ()  # an empty one says nothing
    else:
        head, rest = (), turns
    cuts = []
    if rest and rest[0].role == "assistant":
        rest = rest[1:]
        cuts.append("a first turn of the assistant")
    if rest and rest[-1].role == "user":
        rest = rest[:-1]
        cuts.append("a last turn of the user")
    if rest and rest[-1].role == "tool":
        while rest and rest[-1].role == "tool":
            rest = rest[:-1]
        cuts.append("last turns of tools")
    if len(rest) < 2:
        raise Dropped("fewer than two turns")
    before = None
    for turn in rest:
        if turn.role not in NEXT[before]:
            raise Dropped("roles that do not alternate")
        before = turn.role
    if any(_is_empty(turn) for turn in rest):
        raise Dropped("an empty turn")
    return (*head, *rest), cuts


def _is_empty(turn: Turn) -> bool:
    """Whether a turn says nothing; a tool may return nothing, and a call needs no words."""
    return not turn.text.strip() and turn.role != "tool" and not turn.more.get("tool_calls")


EXPECTED = "; expected a list of dialogues, or one dialogue a line"


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file, each with where it stands."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .json, .jsonl or .txt file")
    kind = path.suffix.lower()
    if kind in BINARY:
        raise InputError(
            f"{path} is a binary table; save it as JSON lines first, for example by "
            "pandas.read_parquet(...).to_json(..., orient='records', lines=True)"
        )
    text = read_text_file(path)
    if not text.strip():
        raise InputError(f"{path} is empty; expected a JSON list of dialogues, or one a line")
    if kind == ".txt":
        yield "the text", {"text": text}
        return
    if text.lstrip().startswith("["):
        entries = parse_json(text, f"{path}", expected=EXPECTED)
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, entry in json_lines(text, f"{path}", expected=EXPECTED):
        yield f"line {number}", entry
