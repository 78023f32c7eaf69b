"""Formats of dialogues and texts, recognized by an entry's keys, and their parsers."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dca_jax.fields import shown
from dca_jax.finetune.turns import Dialogue, Role, Text, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",  # LLaMA-Factory: the call itself, as JSON
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
CALL_ROLE = "function_call"
MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
GPT4 = re.compile(r"gpt[-_ ]?4", re.IGNORECASE)  # "Model: GPT-4" (ShareGPT), "gpt4" (FastChat)
MARKERS = re.compile(r"(?:\A|(?<=\s))(USER|ASSISTANT):(?=\s|\Z)")

Entry = dict[str, Any]


class NotADialogue(Exception):
    """The entry has another format; the message describes it."""


class Dropped(Exception):
    """The entry is a dialogue that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class Form:
    """One of `FORMS`: its appearance and its parser (called with `gpt4_only`)."""

    example: str
    parse: Callable[[Entry, bool], Dialogue | Text]


def form_of(entry: Entry) -> Form:
    """The format of an entry, from its keys.

    Raises:
        NotADialogue: none of `FORMS`.
    """
    if _turn_list(entry) is not None:
        return TURNS
    if _lists(entry) is not None:
        return LISTS
    if "instruction" in entry and "output" in entry:
        return ALPACA
    if isinstance(entry.get("conversation"), str):
        return PLAIN
    if "prompt" in entry and "completion" in entry:
        return COMPLETION
    if isinstance(entry.get("text"), str):
        return TEXT
    raise NotADialogue(f"has the keys {shown(list(entry))}")


# --- lists of turns ----------------------------------------------------------------------------


def _turn_list(entry: Entry) -> list[Any] | None:
    lists = (entry.get(key) for key in ("conversations", "items", "messages", "conversation"))
    return next((value for value in lists if isinstance(value, list)), None)


def _parse_turns(entry: Entry, gpt4_only: bool) -> Dialogue:
    items = _turn_list(entry)
    if items is None:
        raise NotADialogue("has no list of turns")
    turns = _turns(items, entry, gpt4_only)
    if turns and turns[0].role != "system" and "system" in entry:
        turns = [Turn("system", _text(entry["system"], "system"), False), *turns]
    return Dialogue(tuple(turns), _tools(entry))


def _turns(items: list[Any], entry: Entry, gpt4_only: bool) -> list[Turn]:
    return [_turn(item, number, entry, gpt4_only) for number, item in enumerate(items, start=1)]


def _turn(item: Any, number: int, entry: Entry, gpt4_only: bool) -> Turn:
    is_call = isinstance(item, dict) and ("tool_calls" in item or "function_call" in item)
    keys = ("from", "value") if isinstance(item, dict) and "from" in item else ROLE_KEYS
    needed = keys[:1] if is_call else keys
    if not isinstance(item, dict) or any(key not in item for key in needed):
        raise NotADialogue(f"has a turn {number} that is not an object with {' and '.join(keys)}")
    name, value = item[keys[0]], item.get(keys[1])
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Dropped("a turn of neither system, user, assistant nor tool")
    weight = item.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise NotADialogue(
            f"has a turn {number} of weight {shown(weight)}, where 0 (not trained on) or 1 should "
            "be"
        )
    text, more = _text(value, f"turn {number}"), _more(item, number)
    if isinstance(name, str) and name.lower() == CALL_ROLE:
        text, more = "", more | {"tool_calls": _calls(_from_json(text), number)}
    ours = not gpt4_only or _by_gpt4(item.get("model", entry.get("model")))
    return Turn(role, text, role == "assistant" and ours and weight != 0, more)


def _more(item: Entry, number: int) -> dict[str, Any]:
    """Other keys of a turn for templates; OpenAI's older `function_call` becomes a list."""
    found = {key: item[key] for key in MORE if item.get(key) is not None}
    calls = found.pop("tool_calls", None) or item.get("function_call")
    return found | ({"tool_calls": _calls(calls, number)} if calls else {})


def _calls(value: Any, number: int) -> list[Any]:
    """Tool calls with arguments as objects, as in templates; OpenAI's are strings."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Dropped("a call of a tool that is not an object with a name")
        function = {**function, "arguments": _from_json(function.get("arguments")) or {}}
        outer = call if "function" in call else {"type": "function"}
        found.append({**outer, "function": function})
    return found


def _tools(entry: Entry) -> tuple[Any, ...]:
    """The descriptions of an entry's tools; some data sets have the list as a string."""
    value = _from_json(entry.get("tools") or entry.get("functions"))
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise NotADialogue(f"has tools that are not a list of objects: {shown(value)}")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in value)


def _from_json(value: Any) -> Any:
    """A string parsed as JSON, if that gives an object or a list; otherwise unchanged."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


# --- questions and answers by name -------------------------------------------------------------


def _lists(entry: Entry) -> tuple[list[Any], list[Any]] | None:
    """The lists of inputs and outputs, wherever the entry has them."""
    inner = entry.get("conversations")
    holder = inner if isinstance(inner, dict) else entry
    inputs, outputs = holder.get("inputs"), holder.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return None
    return inputs, outputs


def unequal(entry: Entry) -> bool:
    """Whether an entry's `inputs` and `outputs` have different lengths."""
    lists = _lists(entry)
    return lists is not None and len(lists[0]) != len(lists[1])


def _parse_lists(entry: Entry, gpt4_only: bool) -> Dialogue:
    lists = _lists(entry)
    if lists is None:
        raise NotADialogue("has no lists of inputs and outputs")
    rounds = list(zip(*lists, strict=False))
    return _rounds(entry, rounds[:1] if unequal(entry) else rounds, gpt4_only)


def _parse_alpaca(entry: Entry, gpt4_only: bool) -> Dialogue:
    if "instruction" not in entry or "output" not in entry:
        raise NotADialogue("lacks instruction or output")
    instruction = _text(entry["instruction"], "its instruction")
    more = _text(entry.get("input"), "its input")
    question = f"{instruction}\n\n{more}" if more.strip() else instruction
    history = entry.get("history") or []  # LLaMA-Factory: the earlier rounds
    if not isinstance(history, list) or not all(
        isinstance(both, list | tuple) and len(both) == 2 for both in history
    ):
        raise NotADialogue(f"has a history that is not a list of pairs: {shown(history)}")
    rounds = [*(tuple(both) for both in history), (question, entry["output"])]
    return _rounds(entry, rounds, gpt4_only)


def _rounds(entry: Entry, rounds: list[Any], gpt4_only: bool) -> Dialogue:
    ours = not gpt4_only or _by_gpt4(entry.get("model"))
    turns = []
    if isinstance(entry.get("system"), str):
        turns.append(Turn("system", entry["system"], False))
    for question, answer in rounds:
        turns.append(Turn("user", _text(question, "a question"), False))
        turns.append(Turn("assistant", _text(answer, "an answer"), ours))
    return Dialogue(tuple(turns))


def _parse_plain(entry: Entry, gpt4_only: bool) -> Dialogue:
    text = entry.get("conversation")
    if not isinstance(text, str):
        raise NotADialogue("has no conversation that is text")
    # Split at its markers, a text is the part before the first, then marker, turn, marker, ...
    before, *rest = MARKERS.split(text)
    if not rest:
        raise NotADialogue('has a conversation without "USER:" and "ASSISTANT:"')
    ours = not gpt4_only or _by_gpt4(entry.get("model"))
    turns = [Turn("system", before.strip(), False)]
    for marker, said in zip(rest[::2], rest[1::2], strict=True):
        role = ROLES[marker.lower()]
        turns.append(Turn(role, said.strip(), ours and role == "assistant"))
    return Dialogue(tuple(turns))


# --- texts -------------------------------------------------------------------------------------


def _parse_completion(entry: Entry, gpt4_only: bool) -> Dialogue | Text:
    """TRL's format: the completion is trained on; both are strings or both lists of messages."""
    prompt, completion = entry.get("prompt"), entry.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(completion, prompt)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise NotADialogue("has a prompt and a completion that are not both texts or both lists")
    turns = _turns([*prompt, *completion], entry, gpt4_only)
    asked = [Turn(t.role, t.text, False, t.more) for t in turns[: len(prompt)]]
    return Dialogue((*asked, *turns[len(prompt) :]), _tools(entry))


def _parse_text(entry: Entry, gpt4_only: bool) -> Text:
    if not isinstance(entry.get("text"), str):
        raise NotADialogue("has no text")
    return Text(entry["text"])


def _by_gpt4(model: Any) -> bool:
    return model is None or GPT4.search(str(model)) is not None


def _text(value: Any, what: str) -> str:
    """A turn's text with its parts joined; null means empty, as in some dumps."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise NotADialogue(f"has a JSON {type(value).__name__} where the text of {what} should be")
    return value


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise NotADialogue(f"has a part {shown(part)} in {what} that is not an object with a type")
    if part["type"] not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise Dropped("a part that is not text")
    return part["text"]


ROLE_KEYS = ("role", "content")
TURNS = Form(
    '{"conversations": [{"from": ..., "value": ...}]} or {"messages": [...]}', _parse_turns
)
LISTS = Form('{"inputs": [...], "outputs": [...]}', _parse_lists)
ALPACA = Form('{"instruction": ..., "input": ..., "output": ...}', _parse_alpaca)
PLAIN = Form('{"conversation": "USER: ... ASSISTANT: ..."}', _parse_plain)
COMPLETION = Form('{"prompt": ..., "completion": ...}', _parse_completion)
TEXT = Form('{"text": ...}', _parse_text)
FORMS = (TURNS, LISTS, ALPACA, PLAIN, COMPLETION, TEXT)
