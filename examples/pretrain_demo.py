"""Trains the demo model: a 7M-parameter Llama with a context of 512 tokens, from scratch.

    python examples/pretrain_demo.py --out models/demo-python-7m --minutes 4

It is trained on the Python source on this machine (`demo_data.py`) and on prompts that hide a
number in 512 tokens. Nothing in training is longer than 512 tokens, so whatever the model does
beyond them is due to Dual Chunk Attention. Runs on one GPU; on a CPU it takes days.
"""

import dataclasses
import functools
import importlib.metadata
import math
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import demo_data
import demo_prompts
import demo_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import typer
from flax import nnx
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.model import Llama
from dca_jax.weights.files import refuse_existing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of training, except the time and the text."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 512  # tokens
    batch: int = 128  # sequences of `context` tokens
    retrieval: int = 24  # number of them that are retrieval prompts
    templates: int = 16_384  # retrieval prompts; their keys are drawn anew at each use
    answer_weight: float = 10.0  # weight of the loss on a key's digits where they can be known
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    steps_per_call: int = 50  # steps on the accelerator between two looks of the host
    seed: int = 0

    def config(self) -> LlamaConfig:
        """The model's shape; the tokenizer's one special token has id 0."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_ids=(0,),
            pad_token_id=0,
        )


def read_corpus(megabytes: float, seed: int) -> tuple[list[str], dict[str, int]]:
    """The first `megabytes` of training text, and how many characters each package gave."""
    texts, packages = [], Counter()
    for package, text in demo_data.training_files(seed):
        texts.append(text)
        packages[package] += len(text)
        if packages.total() >= megabytes * 1e6:
            break
    return texts, dict(packages.most_common())


# --- training ----------------------------------------------------------------------------------


class Data(NamedTuple):
    """Training data on the device."""

    text: jax.Array  # [tokens] uint16
    templates: jax.Array  # [templates, context + 1] uint16
    digits: jax.Array  # [10] int32, the token ids of "0" to "9"


class State(NamedTuple):
    """The state of training. Parameters and moments are float32."""

    params: dict[str, Any]
    optimizer: optax.OptState
    step: jax.Array  # int32


def prepare(texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> Data:
    """Tokenizes the prompts, and the text into one array with END_OF_TEXT after each document."""
    end = np.zeros(1, np.uint16)
    parts = [part for ids in demo_prompts.encode(tokenizer, texts) for part in (ids, end)]
    templates = demo_prompts.retrieval_templates(
        tokenizer,
        texts,
        count=recipe.templates,
        length=recipe.context + 1,
        vocab_size=recipe.vocab_size,
        seed=recipe.seed,
    )
    digits = [tokenizer.token_to_id(digit) for digit in "0123456789"]
    return Data(
        text=jnp.asarray(np.concatenate(parts)),
        templates=jnp.asarray(templates),
        digits=jnp.asarray(digits, jnp.int32),
    )


def sample_batch(key: jax.Array, data: Data, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Tokens [batch, context + 1] int32, and which are key digits: 0 none, 1 stated, 2 repeated.

    The text is cut at arbitrary places, so that every position and every distance is trained.
    """
    where, which, draw = jax.random.split(key, 3)
    length = recipe.context + 1
    texts = recipe.batch - recipe.retrieval
    starts = jax.random.randint(where, (texts,), 0, data.text.shape[0] - length)
    text = data.text[starts[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]]
    rows = jax.random.randint(which, (recipe.retrieval,), 0, data.templates.shape[0])
    tokens = jnp.concatenate([text, data.templates[rows]]).astype(jnp.int32)
    slot, slots = tokens - recipe.vocab_size, demo_prompts.SLOTS
    drawn = data.digits[jax.random.randint(draw, (recipe.batch, slots), 0, 10)]
    keys = jnp.take_along_axis(drawn, jnp.maximum(slot, 0) % slots, axis=1)
    kind = jnp.where(slot < 0, 0, jnp.where(slot < slots, 1, 2))
    return jnp.where(slot < 0, tokens, keys), kind


def loss_fn(
    params: dict[str, Any], tokens: jax.Array, kind: jax.Array, recipe: Recipe
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted cross-entropy in nats per token; also its mean over text, and over repeated keys."""
    model = Llama.from_params(recipe.config(), params, dtype=jnp.bfloat16)
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    plain, repeated = (kind[:, 1:] == 0).astype(jnp.float32), (kind[:, 1:] == 2).astype(jnp.float32)
    weight = plain + recipe.answer_weight * repeated
    parts = {
        "text": losses[: recipe.batch - recipe.retrieval].mean(),
        "key": (losses * repeated).sum() / jnp.maximum(repeated.sum(), 1.0),
    }
    return (losses * weight).sum() / weight.sum(), parts


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate, which depends on how many steps fit into the time."""

    def decayed(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
    )


def learning_rate(step: jax.Array, total_steps: jax.Array, recipe: Recipe) -> jax.Array:
    """A linear warm-up, then a cosine that reaches zero at `total_steps`."""
    step = step.astype(jnp.float32)
    warmup = (step + 1) / recipe.warmup_steps
    done = jnp.clip(step / total_steps.astype(jnp.float32), 0.0, 1.0)
    return recipe.peak_learning_rate * jnp.minimum(warmup, 0.5 * (1 + jnp.cos(math.pi * done)))


@functools.partial(jax.jit, static_argnames="recipe", donate_argnums=0)
def train_steps(
    state: State, key: jax.Array, data: Data, total_steps: jax.Array, recipe: Recipe
) -> tuple[State, dict[str, jax.Array]]:
    """Runs `recipe.steps_per_call` steps on the device; the host only reads the losses."""

    def one_step(state: State, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        tokens, kind = sample_batch(key, data, recipe)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, parts), grads = grad_fn(state.params, tokens, kind, recipe)
        updates, moments = optimizer(recipe).update(grads, state.optimizer, state.params)
        rate = learning_rate(state.step, total_steps, recipe)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return State(params, moments, state.step + 1), parts

    return jax.lax.scan(one_step, state, jax.random.split(key, recipe.steps_per_call))


def train(data: Data, recipe: Recipe, minutes: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains for `minutes` after the first compiled step; returns parameters and the log."""
    model = Llama(recipe.config(), param_dtype=jnp.float32, rngs=nnx.Rngs(recipe.seed))
    params = model.params()
    state = State(params, optimizer(recipe).init(params), jnp.int32(0))
    key = jax.random.key(recipe.seed)
    calls, total_calls, curve, begin = 0, 10_000, [], 0.0  # number of calls: known after two
    columns = [TextColumn("training"), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        bar = progress.add_task("training", total=None, loss="compiling")
        while calls < total_calls:
            total_steps = jnp.int32(total_calls * recipe.steps_per_call)
            call_key = jax.random.fold_in(key, calls)
            state, parts = train_steps(state, call_key, data, total_steps, recipe)
            loss = {name: float(part.mean()) for name, part in parts.items()}  # waits for the call
            if not all(map(math.isfinite, loss.values())):
                raise FloatingPointError(f"the loss is {loss} after {calls} calls")
            calls += 1
            if calls == 1:
                begin = time.monotonic()
            if calls == 2:
                total_calls = 1 + max(1, int(minutes * 60 / (time.monotonic() - begin)))
            step, total = calls * recipe.steps_per_call, total_calls * recipe.steps_per_call
            curve.append({"step": step, **loss})
            shown = f"text {loss['text']:.3f}, key {loss['key']:.3f} nats a token"
            progress.update(bar, completed=step, total=total if calls > 1 else None, loss=shown)
            if calls % max(1, total_calls // 10) == 0:  # for a log file
                progress.console.print(f"step {step:,} of {total:,}: {shown}")
    steps = calls * recipe.steps_per_call
    timed = (calls - 1) * recipe.steps_per_call * recipe.batch * recipe.context
    seconds = time.monotonic() - begin
    log = {
        "steps": steps,
        "tokens": steps * recipe.batch * recipe.context,
        "seconds": seconds,
        "tokens_per_second": timed / seconds,
        "curve": curve,
    }
    return state.params, log


def pretrain(
    folder: Path, recipe: Recipe, *, minutes: float, corpus_mb: float, held_out_text: str
) -> dict[str, Any]:
    """From the Python files on this machine to a Hugging Face folder; returns the log.

    Raises:
        InputError: `folder` exists (before any work).
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def say(what: str) -> None:
        rich.print(f"{time.monotonic() - begin:5.0f} s  {what}")

    config = recipe.config()
    texts, packages = read_corpus(corpus_mb, recipe.seed)
    characters = sum(packages.values())
    say(f"{len(texts):,} files of {len(packages)} packages, {characters:,} characters")
    sample = texts[:: max(1, len(texts) // 4000)]
    tokenizer = demo_prompts.train_tokenizer(sample, recipe.vocab_size)
    say(f"trained the tokenizer on {len(sample):,} of them")
    data = prepare(texts, tokenizer, recipe)
    say(f"{data.text.size:,} tokens of text, {data.templates.shape[0]:,} retrieval prompts")
    params, training = train(data, recipe, minutes)
    say(f"trained: {training['steps']:,} steps, {training['tokens_per_second']:,.0f} tokens/s")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    evaluation = demo_report.evaluate(config, params, tokenizer, held_out_text, recipe.seed)
    log = {
        "minutes": minutes,
        "corpus_mb": corpus_mb,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "text_tokens": data.text.size,
        "recipe": dataclasses.asdict(recipe),
        "evaluation": evaluation,
        "training": training,
        "corpus": packages,
    }
    demo_report.save(folder, config, params, tokenizer, log)
    say(f"wrote {folder}")
    return log


def main(
    out: Annotated[Path, typer.Option(help="New folder to write, in Hugging Face format.")],
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Training time, without reading and testing.")
    ] = 4.0,
    corpus_mb: Annotated[
        float, typer.Option("--corpus-mb", min=0.1, help="Maximum megabytes of Python source.")
    ] = 200.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the text's order, the initial weights and the batches.")
    ] = 0,
) -> None:
    """Train the 7M-parameter demo model (context 512) from the Python source on this machine.

    Needs one GPU and no network. Writes the weights, the tokenizer, a model card with the figures
    of the run, and training_log.json with all of them.
    """
    try:
        log = pretrain(
            out,
            Recipe(seed=seed),
            minutes=minutes,
            corpus_mb=corpus_mb,
            held_out_text=demo_data.held_out_text(),
        )
    except InputError as error:
        rich.print(f"[red]error:[/red] {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    for name, value in log["evaluation"]["perplexity"].items():
        rich.print(f"perplexity  {name:>10}  {value:8.2f}")
    for name, shares in log["evaluation"]["passkey"].items():
        rich.print(f"passkey     {name:>10}  {np.mean(shares):8.1%}")


if __name__ == "__main__":
    typer.run(main)
