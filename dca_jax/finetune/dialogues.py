"""Dialogues and texts from files in common formats; the first entry determines the format.

    ShareGPT       {"conversations": [{"from": "human", "value": "..."}, ...]}, or under "items"
    messages       {"messages": [{"role": "user", "content": "..."}, ...]}, with tools or without
    Alpaca         {"instruction": "...", "input": "...", "output": "..."}
    ChunkLlama's   {"inputs": ["...", ...], "outputs": ["...", ...]}, or both in "conversations"
    marked text    {"conversation": "USER: ... ASSISTANT: ... USER: ..."}
    completions    {"prompt": ..., "completion": ...}, both texts or both messages
    plain text     {"text": "..."}, or a .txt file, which is one text

Real files have flaws. A dialogue that cannot be trained on is dropped and counted by reason
(Vicuna's and LongChat's scripts drop them silently). An entry that is not a dialogue at all is an
error, because then the file has another format.
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

# Roles that may follow each other.
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
    """Reads the dialogues in a JSON list, a JSON lines file or a .txt file, in order.

    Every returned dialogue begins with the user (or system, then user), ends with the assistant and
    has no empty turn; user and assistant alternate, with tool turns between those of the assistant.
    A first turn of the assistant, and last turns of others, are cut off, as in FastChat. If
    ChunkLlama's lists have different lengths, only the first round is kept, as in its script,
    because the matching of the other answers is unknown.

    Turns of the assistant are trained on, except those with a "weight" of 0, as in OpenAI's
    messages, and those in a "prompt".

    Args:
        gpt4_only: whether to train only on replies by GPT-4, if the file names models (`"model":
            "Model: GPT-4"`, for a dialogue or a turn). A reply without such a mark counts as
            GPT-4's, as in FastChat; most files have no marks.

    Returns:
        The dialogues, and the numbers of those "dropped: ..." or with turns "cut: ...", by reason.

    Raises:
        InputError: a file that cannot be read, is not UTF-8 JSON, or has none of these formats; an
            entry whose format differs from the first one's.
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
    """The part that can be trained on, and the reasons for cuts."""
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
    except UnicodeEncodeError:  # JSON can contain a lone surrogate, which no tokenizer accepts
        raise Dropped("half a character") from None
    return found, cuts


def _tidied(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns that can be trained on, and the reasons for cuts."""
    if turns and turns[0].role == "system":
        head, rest = turns[:1], turns[1:]
        head = head if head[0].text.strip() else ()  # drop an empty system turn
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
    """Whether a turn is empty; a tool's result may be, and a call needs no text."""
    return not turn.text.strip() and turn.role != "tool" and not turn.more.get("tool_calls")


EXPECTED = "; expected a list of dialogues, or one dialogue per line"


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file with their positions."""
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
        raise InputError(f"{path} is empty; expected a JSON list of dialogues, or one per line")
    if kind == ".txt":
        yield "the text", {"text": text}
        return
    if text.lstrip().startswith("["):
        entries = parse_json(text, f"{path}", expected=EXPECTED)
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, entry in json_lines(text, f"{path}", expected=EXPECTED):
        yield f"line {number}", entry
