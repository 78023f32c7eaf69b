"""The demo model's evaluation, files and model card."""

import json
from pathlib import Path
from typing import Any

import demo_data
import jax.numpy as jnp
import numpy as np
from demo_prompts import END_OF_TEXT, encode
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.evaluation.passkey import passkey_grid
from dca_jax.inference.llm import LLM
from dca_jax.inference.score import perplexity as window_perplexity
from dca_jax.model import Llama
from dca_jax.weights.files import written_aside
from dca_jax.weights.parameters import parameters

DEPTHS = tuple(float(depth) for depth in np.linspace(0, 1, 11))
PROMPTS_PER_DEPTH = 8
# multiples of the trained length for perplexity, and for passkeys
READ, SEARCHED = (1, 4, 16), (1, 8)
BATCH_TOKENS = 8192  # tokens of windows read together


def perplexity(model: Llama, tokens: np.ndarray, length: int) -> float:
    """Perplexity over the windows of `length` tokens that `tokens` divides into."""
    ids = tokens.astype(np.int32)
    return window_perplexity(model, ids, window=length, batch=max(1, BATCH_TOKENS // length))


def passkey_accuracy(model: Llama, tokenizer: Tokenizer, length: int, seed: int) -> list[float]:
    """Share of keys found at each depth of `DEPTHS`, by greedy decoding."""
    llm = LLM(
        model=model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        stop_ids=frozenset(model.config.eos_token_ids),
        cache_dtype=model.dtype,
    )
    trials = PROMPTS_PER_DEPTH
    grid = passkey_grid(llm, [length], DEPTHS, trials=trials, seed=seed, batch=trials)
    return grid.accuracy[0].tolist()


def evaluate(
    config: LlamaConfig, params: dict[str, Any], tokenizer: Tokenizer, held_out_text: str, seed: int
) -> dict[str, Any]:
    """Held-out perplexity and passkey accuracy by depth, at the trained length and beyond it."""
    context = config.max_position_embeddings
    plain = Llama.from_params(config, params, dtype=jnp.float32)
    dca = Llama.from_params(config, params, dca=DCAConfig.paper(context), dtype=jnp.float32)
    held_out = encode(tokenizer, [held_out_text])[0]
    characters_per_token = len(held_out_text) / len(held_out)
    longest = max(READ) * context
    held_out = held_out[: len(held_out) // longest * longest]  # one text at any length
    return {
        "held_out_tokens": len(held_out),
        "characters_per_token": characters_per_token,
        "perplexity": {
            f"{name} {times * context}": perplexity(model, held_out, times * context)
            for name, model in (("RoPE", plain), ("DCA", dca))
            for times in READ
        },
        "passkey": {
            f"{name} {times * context}": passkey_accuracy(model, tokenizer, times * context, seed)
            for name, model in (("RoPE", plain), ("DCA", dca))
            for times in SEARCHED
        },
    }


def save(
    folder: Path,
    config: LlamaConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    log: dict[str, Any],
) -> None:
    """Writes the Hugging Face folder aside, then renames it.

    Raises:
        InputError: `folder` exists, or its parent does not.
    """
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    with written_aside(folder) as aside:
        save_file(to_hugging_face(config, params), aside / "model.safetensors", {"format": "pt"})
        tokenizer.save(str(aside / "tokenizer.json"))
        for name, value in (
            ("config.json", config.to_hf() | {"dtype": "bfloat16"}),
            ("tokenizer_config.json", tokenizer_config),
            ("training_log.json", log),
        ):
            (aside / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(card(folder.name, log), encoding="utf-8")


def to_hugging_face(config: LlamaConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under Hugging Face's names and in its layout."""
    ours = flatten_dict(params, sep=".")
    tensors: dict[str, np.ndarray] = {}
    for row in parameters(config):
        array = np.asarray(ours[row.path])
        layers = array if row.stacked else array[None]
        for name, layer in zip(row.their_names(config), layers, strict=True):
            tensors[name] = np.ascontiguousarray(row.to_theirs(layer))
    return tensors


CARD = """---
license: apache-2.0
library_name: dca_jax
tags: [dual-chunk-attention, long-context, python]
---
# {name}

A Llama of {parameters:,} parameters, trained from scratch in {minutes:.1f} minutes on one
{device} with a context of {context} tokens. It exists to show Dual Chunk Attention: with DCA it
reads texts many times longer than anything it was trained on, with no further training. It is no
programmer; it knows what Python looks like, and it copies from what it has read.

## How it was made

`python examples/pretrain_demo.py --minutes {budget:g} --corpus-mb {corpus_mb:g} --seed {seed}`

- **Shape**: {layers} layers, width {width}, {heads} query and {kv_heads} kv heads of {head_dim},
  feed-forward {ffw}, tied embeddings, RoPE theta 10000; stored in bfloat16.
- **Tokenizer**: byte-level BPE of {vocab} tokens, trained on the same text; every digit is a token.
  {chars_per_token:.2f} characters a token on the held-out text.
- **Text**: {text_tokens:,} tokens of Python source: the standard library and {packages} installed
  packages under permissive licenses ({top} and others; all in
  `training_log.json`).
- **Retrieval prompts**: {retrieval} of {batch} sequences hide up to four numbers in at most
  {context} tokens of filler or code and ask for one; half of them are the passkey prompt of the
  evaluation. The numbers are drawn anew each time.
- **Training**: {steps:,} steps of {batch} x {context} tokens, {tokens:.2f} billion tokens in all,
  at {speed:.2f} million a second; AdamW, peak rate {rate:g}, cosine to zero; bfloat16 arithmetic,
  float32 parameters. Last loss: {text_loss:.3f} nats a token on text, {key_loss:.4f} on the
  numbers.

## What came out

Held out, never trained on: the standard library's
{held_out}
({held_out_tokens:,} tokens of Python {python}'s). Perplexity of one and the same text, cut into
windows; passkey accuracy over {depths} depths, {prompts} prompts each.

| tokens | RoPE | DCA |
|---|---|---|
{perplexity_rows}

| passkey at tokens | RoPE | DCA |
|---|---|---|
{passkey_rows}

DCA is `DCAConfig.paper({context})`, with no temperature. The figures are the training script's own,
computed in float32 from the bfloat16 weights.
"""


def card(name: str, log: dict[str, Any]) -> str:
    """The model card, with the figures of the run."""
    recipe, result, training = log["recipe"], log["evaluation"], log["training"]

    def rows(table: dict[str, Any], text: str) -> str:
        lengths = [label.split()[1] for label in table if label.startswith("RoPE")]
        return "\n".join(
            f"| {n} | "
            + " | ".join(text.format(np.mean(table[f"{method} {n}"])) for method in ("RoPE", "DCA"))
            + " |"
            for n in lengths
        )

    top = [package for package in log["corpus"] if package != "python"][:6]
    return CARD.format(
        name=name,
        parameters=log["parameters"],
        minutes=training["seconds"] / 60,
        device=log["device"],
        context=recipe["context"],
        budget=log["minutes"],
        corpus_mb=log["corpus_mb"],
        seed=recipe["seed"],
        layers=recipe["num_layers"],
        width=recipe["hidden_size"],
        heads=recipe["num_heads"],
        kv_heads=recipe["num_kv_heads"],
        head_dim=recipe["head_dim"],
        ffw=recipe["intermediate_size"],
        vocab=recipe["vocab_size"],
        chars_per_token=result["characters_per_token"],
        text_tokens=log["text_tokens"],
        packages=len([package for package in log["corpus"] if package != "python"]),
        top=", ".join(top),
        retrieval=recipe["retrieval"],
        batch=recipe["batch"],
        steps=training["steps"],
        tokens=training["tokens"] / 1e9,
        speed=training["tokens_per_second"] / 1e6,
        rate=recipe["peak_learning_rate"],
        text_loss=training["curve"][-1]["text"],
        key_loss=training["curve"][-1]["key"],
        held_out=", ".join(f"`{name}`" for name in demo_data.HELD_OUT),
        held_out_tokens=result["held_out_tokens"],
        depths=len(DEPTHS),
        prompts=PROMPTS_PER_DEPTH,
        python=log["python"],
        perplexity_rows=rows(result["perplexity"], "{:.2f}"),
        passkey_rows=rows(result["passkey"], "{:.0%}"),
    )
