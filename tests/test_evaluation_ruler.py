"""`eval ruler`: prompts against RULER's own generators, its scores, and the command."""

import json
from typing import Any

import golden_ruler
import pytest

from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.ruler.benchmark import WORDINGS
from dca_jax.evaluation.ruler.drawing import Room
from dca_jax.evaluation.ruler.sources import (
    Essays,
    Sources,
    WordLists,
    read_hotpotqa,
    read_squad,
)

CASES = json.loads(golden_ruler.GOLDEN.read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The stand-ins of which the golden prompts were made."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "squad.json").write_text(json.dumps(golden_ruler.SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(golden_ruler.HOTPOTQA))
    return Sources(
        words=WordLists(golden_ruler.NOUNS, golden_ruler.ADJECTIVES, golden_ruler.VERBS),
        more_words=list(golden_ruler.MORE_WORDS.values()),
        essays=Essays(golden_ruler.ESSAYS, golden_ruler.sentences_of),
        questions={
            "qa_1": read_squad(folder / "squad.json"),
            "qa_2": read_hotpotqa(folder / "hotpotqa.json"),
        },
    )


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['task']}-{c['length']}-{c['seed']}")
def test_prompts_are_those_of_rulers_own_generator(case: dict[str, Any], sources: Sources):
    room = Room(
        length=case["length"],
        template=len(golden_ruler.tokens_of(golden_ruler.CHAT_TEMPLATE)) if case["chat"] else 0,
        new_tokens=WORDINGS[case["task"]].new_tokens,
        count_tokens=lambda text: len(golden_ruler.tokens_of(text)),
    )
    drawn, found = ruler.stream(room, sources, case["task"], case["seed"]), []
    for number in range(len(case["samples"])):
        sample = drawn.sample(number)
        found.append(golden_ruler.record(*sample, room.tokens(sample) + room.new_tokens))
    assert found == case["samples"]
