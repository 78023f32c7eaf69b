"""Passkey retrieval: a number hidden in a long filler text, with a question for it at the end.

The prompt is that of Mohtashami and Jaggi (arXiv 2305.16300) in ChunkLlama's wording (An et al.,
arXiv 2402.17463, A.1, figures 5 to 7). There are two forms:

    paper    bit for bit the prompt of ChunkLlama's `passkey/test_passkey.py` (a random depth) and
             `needle_in_a_haystack/retrieve_needle.py` (a grid of 16 depths): a given number of
             characters of filler, cut anywhere and restarted after the key; keys of one to six
             digits. The number of tokens depends on the tokenizer; the results contain it. (The
             paper mentions five digits and 20 keys per depth, its code has 50 and 10.)
    fitted   whole sentences, as many as the length allows, and keys of five digits: a prompt has
             at most the requested number of tokens, usually a few less.

Both forms can use a chat template: the prompt up to "What is the pass key?" is the user's message,
and "The pass key is" the beginning of the answer.

A key is found if the first new tokens are exactly the key's, as in the original. The key is
tokenized both alone and after a space, and either counts: the original drops the first token of
the key as a BOS, which works with SentencePiece only. (As there, 1234 is found in an answer 12345.)
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dca_jax.errors import InputError
from dca_jax.evaluation.answers import Answer, Question, Sample, answer, ask
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.grids import accuracy_table
from dca_jax.evaluation.results import Record, ResultLog
from dca_jax.evaluation.tables import Outcome
from dca_jax.evaluation.texts import encode
from dca_jax.inference.llm import LLM

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
BEGINNING = "The pass key is"  # of the answer
QUESTION = f"What is the pass key? {BEGINNING}"
ANSWER_TOKENS = 8  # room for a space, a number of six digits of a token each, and its end
FORMS = ("paper", "fitted")
FORM = Form(
    key={"method": str, "length": int, "depth": float, "trial": int},
    value={"found": bool, "tokens": int},
    settings={"form": FORMS, "trained_length": int},
    optional=frozenset({"depth"}),
)
NOTES = {  # the paper has figures for these models only
    "llama2-13b": (
        "In the paper: Llama2 13B with DCA finds every key up to 18k tokens (A.1, figure 5).",
    ),
}
SAMPLE = 8 * len(FILLER)  # sentences from which the number of tokens is estimated


class PasskeyPrompt(NamedTuple):
    """A prompt and the digits that must follow it (after a space)."""

    text: str
    key: str


# --- the paper's prompt ------------------------------------------------------------------------


def filler_characters(length: int) -> int:
    """Filler characters for a prompt of about `length` tokens, by ChunkLlama's rough ratio."""
    return int(3.75 * length // 1024 * 1024)


def paper_prompt(characters: int, seed: int, depth: float | None = None) -> PasskeyPrompt:
    """ChunkLlama's prompt, bit for bit, with `characters` characters of filler.

    Args:
        seed: seed of NumPy's legacy generator, which draws the depth (if None) and the key.
        depth: position of the key in the filler's characters, from 0 to 1; None for a random one.
    """
    rng = np.random.RandomState(seed)
    if depth is None:
        before = int(rng.randint(0, characters))
        key = str(rng.randint(1, 50_000))
    else:
        _check_depth(depth)
        before = int(depth * characters)
        key = str(rng.randint(50_000, 500_000))
    sentences = " ".join(FILLER) + " "
    filler = sentences * (characters // len(sentences) + 1)
    lines = [TASK, filler[:before], NEEDLE.format(key=key), filler[: characters - before], QUESTION]
    return PasskeyPrompt(text="\n".join(lines), key=key)


# --- the fitted prompt -------------------------------------------------------------------------


def passkey_prompt(
    count_tokens: Callable[[str], int], length: int, depth: float, rng: np.random.Generator
) -> PasskeyPrompt:
    """The longest passkey prompt of whole filler sentences with at most `length` tokens.

    It is shorter than `length` by less than one sentence.

    Args:
        count_tokens: function that returns the number of tokens of a text, including special ones.
        length: largest number of tokens of the prompt, including the question but not the answer.
        depth: position of the key, from 0 (before all filler) to 1 (after it).
        rng: random generator for the key.

    Raises:
        InputError: the depth is outside [0, 1], or the length is too short even without filler.
    """
    _check_depth(depth)
    key = str(rng.integers(10_000, 100_000))
    bare = count_tokens(passkey_text(0, depth, key))
    if bare > length:
        raise InputError(f"a passkey prompt has at least {bare} tokens, got length {length}")

    @functools.cache
    def tokens(sentences: int) -> int:
        return count_tokens(passkey_text(sentences, depth, key))

    # Filler usually has the same number of tokens everywhere, so a sample gives an estimate, and
    # counting at the estimate gives the exact number. In any case a sentence has at least one
    # token, so `length` sentences never fit.
    each = (tokens(SAMPLE) - bare) / SAMPLE
    guess = int((length - bare) / each)
    guess = max(guess + round((length - tokens(guess)) / each), 0)
    low, high = max(guess - 1, 0), guess + 2
    if not tokens(low) <= length < tokens(high):
        low, high = 0, length
    fits = bisect.bisect_right(range(low, high), length, key=tokens) + low - 1
    return PasskeyPrompt(text=passkey_text(fits, depth, key), key=key)


def passkey_text(sentences: int, depth: float, key: str) -> str:
    """The prompt with `sentences` sentences of filler, `depth` (0 to 1) of them before the key."""
    filler = list(itertools.islice(itertools.cycle(FILLER), sentences))
    before = round(depth * sentences)
    needle = NEEDLE.format(key=key)
    lines = [TASK, " ".join(filler[:before]), needle, " ".join(filler[before:]), QUESTION]
    return "\n".join(line for line in lines if line)


def _check_depth(depth: float) -> None:
    if not 0.0 <= depth <= 1.0:
        raise InputError(f"depth must be between 0 and 1, got {depth}")


# --- the task ----------------------------------------------------------------------------------


def evaluate(
    llm: LLM,
    log: ResultLog,
    *,
    form: str,
    methods: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] | None,
    trials: int,
    chat: bool = False,
    batch: int | None = None,
    capacity: int = 0,
) -> None:
    """Asks for `trials` keys at every length and depth, and records which were found.

    Args:
        form: one of `FORMS`.
        lengths: prompt lengths in tokens, approximate in the paper's form.
        depths: depths from 0 to 1; None for a random one in each trial.
        trials: number of prompts of each length and depth; their seeds are 0, 1 ...
        chat: whether to use the model's chat template. Its tokens are additional in the paper's
            form, and part of the length in the fitted form.
        batch, capacity: as in `ask`.

    Raises:
        InputError: the form is unknown, a depth is invalid, there are no trials, `chat` is set
            for a model without a template, or `ask` raises.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not known; expected one of {', '.join(FORMS)}")
    if not lengths or (depths is not None and not depths) or trials < 1:
        raise InputError("passkey retrieval needs at least one length, one depth and one trial")
    for depth in depths or ():
        _check_depth(depth)
    for length in lengths:
        _check_length(form, length)
    if chat:
        llm.apply_chat_template([{"role": "user", "content": "?"}])  # raises without a template
    where = [{"depth": depth} for depth in depths] if depths is not None else [{}]
    samples = [
        Sample(
            key={"length": length, **place, "trial": trial},
            length=length,
            question=functools.partial(
                _question, llm, form, length, place.get("depth"), trial, chat
            ),
        )
        for length in lengths
        for place in where
        for trial in range(trials)
    ]
    ask(
        llm,
        samples,
        log,
        name="passkey",
        methods=methods,
        max_new_tokens=ANSWER_TOKENS,
        batch=batch,
        capacity=capacity,
    )


def prompt_tokens(llm: LLM, form: str, length: int, *, chat: bool = False) -> int:
    """Tokens of a prompt of nominal length `length`, which is approximate or a maximum.

    Raises:
        InputError: there is no prompt of this length.
    """
    _check_length(form, length)
    if form == "fitted":
        return length
    return len(_ids(llm, paper_prompt(filler_characters(length), seed=0).text, chat))


def _check_length(form: str, length: int) -> None:
    if form == "paper" and not filler_characters(length):
        raise InputError(
            "the form 'paper' has filler of whole 1,024 characters, for 274 tokens or more; got "
            f"{length}: use a greater length, or the form 'fitted'"
        )


def _question(
    llm: LLM, form: str, length: int, depth: float | None, trial: int, chat: bool
) -> Question:
    if form == "paper":
        prompt = paper_prompt(filler_characters(length), trial, depth)
    elif depth is None:
        rng = np.random.default_rng([0, length, trial])
        depth = rng.random()
        prompt = passkey_prompt(lambda text: len(_ids(llm, text, chat)), length, depth, rng)
    else:
        prompt = _cell_prompt(llm, length, depth, trial, seed=0, chat=chat)
    expected = key_tokens(llm, prompt.key)

    def judge(said: Answer) -> dict[str, Any]:
        return {"found": is_found(said.tokens, expected), "key": prompt.key}

    return Question(_ids(llm, prompt.text, chat), judge)


def _ids(llm: LLM, text: str, chat: bool) -> list[int]:
    """The token ids of a prompt, with the chat template if requested."""
    if not chat:
        return llm.tokenize(text)
    asked = text.removesuffix(BEGINNING).rstrip()
    message = llm.apply_chat_template([{"role": "user", "content": asked}])
    return [*message, *encode(llm, BEGINNING)]


def key_tokens(llm: LLM, key: str) -> list[list[int]]:
    """The ids of a key as it may follow the question: alone, and after a space."""
    return [encode(llm, key), encode(llm, f" {key}")]


def is_found(answer: Sequence[int], expected: Sequence[Sequence[int]]) -> bool:
    """Whether an answer begins with one of the expected lists of ids."""
    return any(list(answer[: len(ids)]) == list(ids) for ids in expected)


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Share of keys found by method and length, and also by depth if depths were given."""
    title = f"Passkeys found ({settings['form']} form)"
    return accuracy_table(
        records,
        "found",
        title=title,
        trained_length=settings["trained_length"],
        notes=NOTES.get(paper_model or "", ()),
        depth="depth of the key",
    )


# --- the grid, in one call ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PasskeyGrid:
    """The number of keys that a model found, by length of the text and depth of the key.

    Attributes:
        lengths: maximum prompt lengths in tokens.
        depths: depths of the key, 0 (the beginning) to 1 (the end).
        trials: number of prompts per cell.
        found: number of prompts per cell whose key was found.
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
        """The fields for `json.dump`; `found` is a list with one list per length."""
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
    """Hides a key at each depth in texts of each length, and asks for it; answers are greedy.

    The prompts are fitted. They depend on `seed`, length, depth and trial, but not on the rest of
    the grid, so models and settings are compared on the same prompts. A key is found if it is the
    first number in the answer.

    Args:
        llm: a model with a tokenizer, used with its own settings.
        lengths: maximum prompt lengths in tokens (`passkey_prompt`), including special tokens.
        depths: depths from 0 to 1.
        trials: number of prompts per cell.
        batch: number of prompts read together. All batches have one shape, so there is little to
            compile; the KV cache holds `batch` texts of the greatest length.
        on_tokens: called with the number of prompt tokens read since the last call; the total is
            less than the sum of `lengths` times depths times trials.

    Raises:
        InputError: there is nothing to do, a depth is invalid, or a length is too short.
    """
    if not lengths or not depths or trials < 1 or batch < 1:
        raise InputError(
            "a passkey grid needs lengths, depths and at least one trial and one prompt per batch, "
            f"got lengths {list(lengths)}, depths {list(depths)}, {trials} trials, batch {batch}"
        )
    cells = list(itertools.product(lengths, depths, range(trials)))
    prompts = [_cell_prompt(llm, *cell, seed) for cell in cells]
    capacity = max(lengths) + ANSWER_TOKENS
    found = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        rows = [llm.tokenize(prompt.text) for prompt in some]
        rows += rows[-1:] * (batch - len(rows))  # pad the last batch with copies
        answers = answer(llm, rows, ANSWER_TOKENS, on_tokens, capacity=capacity)
        found += [first_number(a.text) == p.key for a, p in zip(answers, some, strict=False)]
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


def _cell_prompt(
    llm: LLM, length: int, depth: float, trial: int, seed: int, *, chat: bool = False
) -> PasskeyPrompt:
    # Depths are distinguished to a millionth.
    rng = np.random.default_rng([seed, length, round(depth * 1_000_000), trial])
    return passkey_prompt(lambda text: len(_ids(llm, text, chat)), length, depth, rng)
