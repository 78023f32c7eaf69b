"""Compares a few figures of the study with transformers' own model of the dequantized weights."""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import say

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation import passkey
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.llm import LLM
from dca_jax.inference.methods import with_method
from dca_jax.inference.score import token_nll

FACTOR = 4  # of YaRN's window, so that even short texts differ from RoPE
TOLERANCE = 1e-3  # nats of a mean NLL: float32 sums in another order


@exit_on_input_error()
def check(
    model: Annotated[Path, typer.Argument(help="A GGUF file or a Hugging Face folder.")],
    text: Annotated[Path, typer.Option(help="A book (UTF-8) for perplexity.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the window.")] = 1024,
    asked: Annotated[int, typer.Option(min=1, help="Tokens per passkey prompt.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Number of passkey prompts.")] = 3,
) -> None:
    """Compares a window's perplexity (RoPE, YaRN) and answers to passkeys with transformers'.

    Both compute in float32. Needs `pip install torch transformers gguf`; nothing is downloaded.
    """
    llm = dca_jax.load(model, dca=None, dtype="float32", weights="unpacked")
    ids = np.asarray(read_text(llm, text).tokens[:tokens], np.int32)
    wrong = 0
    for name, rope in (("rope", None), (f"rope+yarn:{FACTOR}", "yarn")):
        theirs = peer(model, rope, llm.model.config.trained_length)
        ours = float(token_nll(with_method(llm.model, name, tokens), ids[None]).mean())
        expected = their_nll(theirs, ids)
        good = abs(ours - expected) < TOLERANCE
        say(
            f"{name}, {tokens:,} tokens: perplexity {math.exp(ours):.4f}, by transformers "
            f"{math.exp(expected):.4f}: {'equal' if good else 'NOT EQUAL'}"
        )
        wrong += not good
        if rope is None:
            wrong += sum(not same for same in passkeys(llm, theirs, asked, samples))
    if wrong:
        raise InputError(f"{wrong} figures differ from transformers'")


def peer(model: Path, rope: str | None, trained: int) -> Any:
    """transformers' model, with weights dequantized by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"gguf_file": model.name} if model.is_file() else {}
    folder = model.parent if model.is_file() else model
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **where)
    if rope is not None:
        own = {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": rope}
        limits = {"factor": float(FACTOR), "original_max_position_embeddings": trained}
        config.rope_parameters = own | limits
    options = {"config": config, "dtype": torch.float32, "local_files_only": True, **where}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def their_nll(theirs: Any, ids: np.ndarray) -> float:
    """Mean NLL of all tokens but the first, by transformers."""
    import torch

    with torch.no_grad():
        given = torch.tensor(ids[None].astype(np.int64))
        return float(theirs(given, labels=given).loss)


def passkeys(llm: LLM, theirs: Any, length: int, samples: int) -> list[bool]:
    """Whether each answer equals transformers' greedy one."""
    import torch

    found = []
    for trial in range(samples):
        rng = np.random.default_rng([0, length, trial])
        prompt = passkey.passkey_prompt(
            lambda text: len(llm.tokenize(text)), length, rng.random(), rng
        )
        ids = llm.tokenize(prompt.text)
        new = passkey.ANSWER_TOKENS
        ours = list(llm.generate([ids], max_new_tokens=new, progress=False)[0].tokens)
        with torch.no_grad():
            options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
            whole = theirs.generate(torch.tensor([ids]), **options)[0]
        expected = whole[len(ids) :].tolist()[: len(ours)]
        hit = passkey.is_found(ours, passkey.key_tokens(llm, prompt.key))
        same = ours == expected
        say(
            f"passkey {prompt.key} in {len(ids):,} tokens: {'found' if hit else 'not found'}; "
            f"the answer is {'the same' if same else f'NOT THE SAME: {ours}, {expected}'}"
        )
        found.append(same)
    return found
