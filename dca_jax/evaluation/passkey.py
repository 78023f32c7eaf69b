"""Passkey retrieval: a five-digit key hidden at a given depth of a long, dull text.

The prompt is that of Mohtashami and Jaggi (arXiv 2305.16300), as ChunkLlama words it (An et al.,
arXiv 2402.17463, figure 5).
"""

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dca_jax.errors import InputError
from dca_jax.generate import generate, new_cache
from dca_jax.llm import LLM

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER_TOKENS = 8  # room for a space, five digits of a token each, and what shows that they end


class PasskeyPrompt(NamedTuple):
    """A prompt and the five digits that must follow it (after a space)."""

    text: str
    key: str


def passkey_prompt(
    count_tokens: Callable[[str], int], length: int, depth: float, rng: np.random.Generator
) -> PasskeyPrompt:
    """The longest passkey prompt of at most `length` tokens, made of whole filler sentences.

    So it has `length` tokens, less the few that one more sentence would need.

    Args:
        count_tokens: the number of tokens of a text, special tokens included.
        length: tokens of the prompt at most, the question included and the answer not.
        depth: where the key is, from 0 (before all filler) to 1 (after it).
        rng: draws the key.

    Raises:
        InputError: a depth outside [0, 1], or a length that the prompt does not fit without filler.
    """
    if not 0.0 <= depth <= 1.0:
        raise InputError(f"depth must be between 0 and 1, got {depth}")
    key = str(rng.integers(10_000, 100_000))
    bare = count_tokens(passkey_text(0, depth, key))
    if bare > length:
        raise InputError(f"a passkey prompt has at least {bare} tokens, got length {length}")
    # A sentence has at least one token, so `length` of them never fit beside the bare prompt.
    sentences = bisect.bisect_right(
        range(length), length, key=lambda n: count_tokens(passkey_text(n, depth, key))
    )
    return PasskeyPrompt(text=passkey_text(sentences - 1, depth, key), key=key)


def passkey_text(sentences: int, depth: float, key: str) -> str:
    """The prompt with `sentences` sentences of filler, `depth` (0 to 1) of them before the key."""
    filler = list(itertools.islice(itertools.cycle(FILLER), sentences))
    before = round(depth * sentences)
    needle = NEEDLE.format(key=key)
    lines = [TASK, " ".join(filler[:before]), needle, " ".join(filler[before:]), QUESTION]
    return "\n".join(line for line in lines if line)


# --- the grid ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PasskeyGrid:
    """How many keys a model found, by length of the text and depth of the key.

    Attributes:
        lengths: tokens of the prompts, at most.
        depths: where the key was, 0 (the beginning) to 1 (the end).
        trials: prompts a cell.
        found: of them, those whose key was answered.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    found: Int[np.ndarray, "lengths depths"]

    @property
    def accuracy(self) -> Float[np.ndarray, "lengths depths"]:
        """Share of keys found in each cell."""
        return self.found / self.trials

    def to_dict(self) -> dict[str, Any]:
        """For `json.dump`: the fields, `found` as lists of one length each."""
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "trials": self.trials,
            "found": self.found.tolist(),
        }


def passkey_grid(
    llm: LLM,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 1,
    seed: int = 0,
    batch: int = 4,
    on_tokens: Callable[[int], None] | None = None,
) -> PasskeyGrid:
    """Hides a key in texts of each length, at each depth, and asks for it; answers are greedy.

    A cell's prompts depend on `seed`, length, depth and trial, not on the rest of the grid: so
    models and settings are compared on the same prompts. A key is found if the first number of
    the answer is the key.

    Args:
        llm: with a tokenizer.
        lengths: tokens of the prompts at most (`passkey_prompt`), special tokens included.
        depths: from 0 to 1.
        trials: prompts a cell.
        batch: prompts read together. All batches have one shape, so there is little to compile;
            the KV cache holds `batch` texts of the greatest length.
        on_tokens: told how many prompt tokens have been read since the last call; in all, less
            than the sum of `lengths` times depths times trials.

    Raises:
        InputError: nothing to do, a bad depth, or a length too short for a prompt.
    """
    if not lengths or not depths or trials < 1 or batch < 1:
        raise InputError(
            "a passkey grid needs lengths, depths and at least one trial and one prompt a batch, "
            f"got lengths {list(lengths)}, depths {list(depths)}, {trials} trials, batch {batch}"
        )
    cells = list(itertools.product(lengths, depths, range(trials)))
    prompts = [_cell_prompt(llm, *cell, seed) for cell in cells]
    found = []
    for start in range(0, len(prompts), batch):
        answers = _answers(llm, prompts[start : start + batch], batch, max(lengths), on_tokens)
        keys = [prompt.key for prompt in prompts[start : start + batch]]
        found += [first_number(a) == key for a, key in zip(answers, keys, strict=True)]
    shape = (len(lengths), len(depths), trials)
    return PasskeyGrid(
        lengths=tuple(lengths),
        depths=tuple(depths),
        trials=trials,
        found=np.array(found).reshape(shape).sum(axis=-1),
    )


def first_number(text: str) -> str | None:
    """The first run of digits in a text; None if it has no digit."""
    match = re.search(r"[0-9]+", text)
    return match and match.group()


def _cell_prompt(llm: LLM, length: int, depth: float, trial: int, seed: int) -> PasskeyPrompt:
    # Depths are told apart to a millionth.
    rng = np.random.default_rng([seed, length, round(depth * 1_000_000), trial])
    return passkey_prompt(lambda text: len(llm.tokenize(text)), length, depth, rng)


def _answers(
    llm: LLM,
    prompts: list[PasskeyPrompt],
    batch: int,
    longest: int,
    on_tokens: Callable[[int], None] | None,
) -> list[str]:
    """What the model says after each prompt. The last batch is filled up with copies."""
    rows = [llm.tokenize(prompt.text) for prompt in prompts]
    rows += rows[-1:] * (batch - len(rows))
    cache = new_cache(llm.model, batch, longest + ANSWER_TOKENS, llm.cache_dtype)
    answers = generate(
        llm.model,
        rows,
        max_new_tokens=ANSWER_TOKENS,
        stop_ids=llm.stop_ids,
        cache=cache,
        on_piece=on_tokens,
    )
    return [llm.tokenizer.decode(ids) for ids in answers[: len(prompts)]]
