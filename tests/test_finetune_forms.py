"""Today's forms of data: parts, tools, completions, plain text; and dialogues that are long."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llm import fast_tokenizer

from dca_jax.errors import InputError
from dca_jax.finetune import written
from dca_jax.finetune.dialogues import read_dialogues
from dca_jax.finetune.templates import render
from dca_jax.finetune.turns import Dialogue, Text, Turn
from dca_jax.inference.chat_templates import ChatTemplates

# As Qwen's: tools are described in front, calls are JSON, and answers of tools share a turn.
TOOLS = """\
{%- if tools %}{{ '<<SYS>>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{ '[tools]' }}{% endif %}{{ '[r]' + m.content + '[/r]' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '[/tools]\n' }}{% endif %}
{%- else %}{{ '[' + m.role + ']' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '[call]' + call.function | tojson }}{% endfor %}
{{- '</s>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
CALL = {"id": "1", "function": {"name": "sea", "arguments": '{"from": "here"}'}}
CALLED = {"id": "1", "function": {"name": "sea", "arguments": {"from": "here"}}}
TOOL = {"type": "function", "function": {"name": "sea", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast_tokenizer()


def read(folder: Path, *entries: Any) -> tuple[list[Any], dict[str, int]]:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return read_dialogues(path)


def asked(text: str = "How far?") -> Turn:
    return Turn("user", text, False)


def test_tools_are_read_from_every_form(tmp_path: Path) -> None:
    openai = {
        "messages": [
            {"role": "developer", "content": "Brief."},
            {"role": "user", "content": "How far?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "10"},
            {"role": "assistant", "content": "Ten."},
        ],
        "tools": json.dumps([TOOL]),  # as some sets have them
    }
    older = {
        "messages": [
            {"role": "user", "content": "How far?"},
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "sea", "content": "10"},
            {"role": "assistant", "content": "Ten."},
        ],
        "functions": [TOOL["function"]],
    }
    factory = {
        "conversations": [
            {"from": "human", "value": "How far?"},
            {"from": "function_call", "value": json.dumps(CALLED["function"])},
            {"from": "observation", "value": "10"},
            {"from": "gpt", "value": "Ten."},
        ],
        "system": "Brief.",
        "tools": json.dumps([TOOL["function"]]),
    }
    found, counts = read(tmp_path, openai, older, factory)
    assert counts == {}
    system, call = Turn("system", "Brief.", False), {"tool_calls": [CALLED]}
    bare = {"tool_calls": [{"type": "function", "function": CALLED["function"]}]}
    end = Turn("assistant", "Ten.", True)
    first = (system, asked(), Turn("assistant", "", True, call))
    result = Turn("tool", "10", False, {"tool_call_id": "1"})
    assert found[0] == Dialogue((*first, result, end), (TOOL,))
    named = Turn("tool", "10", False, {"name": "sea"})
    calling = Turn("assistant", "", True, bare)
    assert found[1] == Dialogue((asked(), calling, named, end), (TOOL,))
    plain = Turn("tool", "10", False)
    assert found[2] == Dialogue((system, asked(), calling, plain, end), (TOOL,))


def test_parts_completions_and_texts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "far?"}]
    seen = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Ten."}]}
    found, counts = read(
        tmp_path,
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "user", "content": seen}, answer]},
    )
    assert found == [Dialogue((asked(), Turn("assistant", "Ten.", True)))]
    assert counts == {"dropped: a part that is not text": 1}
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    question = {"role": "user", "content": "How far?"}
    found, _ = read(
        tmp_path,
        {"prompt": "How far?", "completion": " Ten."},
        {"prompt": [*history, question], "completion": [answer]},
    )
    before = (asked("a"), Turn("assistant", "b", False))  # of the prompt: not trained on
    assert found[0] == Text(" Ten.", "How far?")
    assert found[1] == Dialogue((*before, asked(), Turn("assistant", "Ten.", True)))
    found, counts = read(tmp_path, {"text": "Call me"}, {"text": " "}, {"text": "half \ud800"})
    assert found == [Text("Call me")]
    assert counts == {"dropped: an empty text": 1, "dropped: half a character": 1}
    (tmp_path / "book.txt").write_text("[Call] me\nIshmael.\n")
    assert read_dialogues(tmp_path / "book.txt") == ([Text("[Call] me\nIshmael.\n")], {})
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is a binary table; save it as JSON lines"):
        read_dialogues(tmp_path / "a.parquet")


def test_turns_of_tools_that_do_not_fit(tmp_path: Path) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "x"} for role in roles]}

    found, counts = read(
        tmp_path,
        turns("user", "assistant", "tool", "tool", "assistant", "user", "assistant", "tool"),
        turns("user", "tool", "assistant"),
        turns("user", "assistant", "tool", "user", "assistant"),
    )
    assert [len(one.turns) for one in found] == [7]
    assert counts == {"cut: last turns of tools": 1, "dropped: roles that do not alternate": 2}


def trained(tokenizer: Any, dialogue: Dialogue, template: str) -> list[str]:
    rendered = render(dialogue, tokenizer, template)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.trained, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(rendered.tokens[start:end].tolist()) for start, end in runs]


def test_calls_are_trained_on_and_what_tools_return_is_not(tmp_path: Path, tokenizer: Any) -> None:
    """As TRL's loss on the assistant's turns alone."""
    (tmp_path / "t.jinja").write_text(TOOLS)
    turns = (
        asked(),
        Turn("assistant", "", True, {"tool_calls": [CALLED]}),
        Turn("tool", "10", False),
        Turn("tool", "miles", False),
        Turn("assistant", "Ten miles.", True),
    )
    template = str(tmp_path / "t.jinja")
    call = json.dumps(CALLED["function"])
    found = trained(tokenizer, Dialogue(turns, (TOOL,)), template)
    assert found == [f"[call]{call}</s>", "Ten miles.</s>"]
    whole = render(Dialogue(turns, (TOOL,)), tokenizer, template)
    theirs = tokenizer.apply_chat_template(
        [turn.message() for turn in turns], chat_template=TOOLS, tools=[TOOL], return_dict=False
    )
    assert whole.tokens.tolist() == theirs


# --- long dialogues ----------------------------------------------------------------------------

SPACED = "{% for m in messages %}{{ (m.role + ': ' + m.content) | trim + '</s>\n' }}{% endfor %}"
COUNTED = "{% for m in messages %}{{ loop.index ~ m.role + ': ' + m.content + '</s>' }}{% endfor %}"


def long(rounds: int) -> Dialogue:
    both = ((f" Q{n}? ", f"A{n}. ") for n in range(rounds))
    turns = (
        turn
        for question, answer in both
        for turn in (asked(question), Turn("assistant", answer, True))
    )
    return Dialogue((Turn("system", "Be brief.", False), *turns))


@pytest.mark.parametrize("template", ["llama-2", SPACED, COUNTED, TOOLS])
def test_a_long_dialogue_is_masked_as_by_its_beginnings(
    tmp_path: Path, tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a template counts turns, so that no round is as it is elsewhere."""
    if template != "llama-2":
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    some = long(3 * written.FEW)
    by_rounds = render(some, tokenizer, template)
    monkeypatch.setattr(written, "FEW", 1000)
    by_beginnings = render(some, tokenizer, template)
    np.testing.assert_array_equal(by_rounds.tokens, by_beginnings.tokens)
    np.testing.assert_array_equal(by_rounds.trained, by_beginnings.trained)
    assert by_rounds.trained.any()


def test_the_work_is_that_of_the_turns_and_not_of_their_square(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in messages that the template writes."""
    work, write_all = 0, ChatTemplates.write_all

    def counting(self: ChatTemplates, *args: Any, **options: Any) -> Any:
        nonlocal work
        work += sum(count for one in args[2] for count, _ in one.cuts)
        return write_all(self, *args, **options)

    monkeypatch.setattr(ChatTemplates, "write_all", counting)
    seen = []
    for rounds in (50, 100):
        work = 0
        render(long(rounds), tokenizer, "llama-2")
        seen.append(work)
    assert seen[1] < 2.1 * seen[0]
