"""Finetunes the demo model with DCA at 8 times its context, and measures the gain.

    python examples/finetune_demo.py --out outputs/finetune-demo

Four models from one checkpoint with context c (512), all using DCA (`paper`):

    training-free   the checkpoint as it is
    exact           trained on rows of 8 c tokens with the gradient of `dca_jax`
    detached        the same rows, with the gradient of ChunkLlama's code (`detached_merge.py`)
    short           as many updates with as many tokens of the same text, in rows of c tokens: the
                    effect of more training alone

Each reads held-out text in windows of c to 32 c tokens, and is asked for passkeys at 8, 16 and 32
c. `exact` and `detached` are trained once per seed, which selects the rows. OUT gets results.json
and two plots, updated after every model. Meant for one GPU; on a CPU use a smaller plan
(`--updates`, `--tokens`, `--windows`, ...).
"""

import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import demo_data
import demo_prompts
import finetune_report
import jax
import jax.numpy as jnp
import numpy as np
import rich
import typer
from detached_merge import DetachedMerge, gradient_error
from pretrain_demo import Data, Recipe, prepare, sample_batch
from tokenizers import Tokenizer

import dca_jax
from dca_jax.attention.op import BACKENDS
from dca_jax.errors import InputError
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.train import Batch, Params, State, make_update, start
from dca_jax.inference.llm import LLM
from dca_jax.model import Llama
from dca_jax.weights.files import refuse_existing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All settings of training and testing, except the model and the text."""

    times: int = 8  # trained lengths per training row
    tokens: int = 65_536  # of an update
    updates: int = 250
    retrieval_every: int = 8  # one update in this many uses retrieval prompts
    learning_rate: float = 2e-4
    seeds: int = 2
    corpus_mb: float = 40.0  # of long files
    long_file: int = 32_768  # characters: more than two training rows have
    windows: int = 100  # maximum number of held-out windows of the greatest length
    depths: int = 8  # of passkeys, from 0 to 1
    trials: int = 4  # passkeys per length and depth
    batch: int = 8  # texts read together


# --- training ----------------------------------------------------------------------------------


def read_texts(plan: Plan) -> list[str]:
    """Long files of the pretraining's text, so that most rows are of one file."""
    texts, left = [], plan.corpus_mb * 1e6
    for _, text in demo_data.training_files(seed=0):
        if len(text) >= plan.long_file:
            texts.append(text)
            left -= len(text)
            if left <= 0:
                break
    if not texts:
        raise InputError(f"there is no Python file of {plan.long_file} characters to train on")
    return texts


def row_recipe(plan: Plan, vocab_size: int, length: int) -> Recipe:
    """The material from which `pretrain_demo` draws an update's rows of `length` tokens."""
    rows = plan.tokens // length
    return Recipe(vocab_size=vocab_size, context=length - 1, batch=rows, templates=64 * rows)


def draw_batches(data: Data, recipe: Recipe, plan: Plan, seed: int) -> Iterator[Batch]:
    """The rows of each update: all text, or all retrieval prompts.

    Of a prompt, only the digits that can be known are trained on. Mixed with text they would be one
    token in thousands of an update's mean, so they have updates of their own.
    """
    sample = jax.jit(sample_batch, static_argnames="recipe")
    for step in range(plan.updates):
        prompts = step % plan.retrieval_every == plan.retrieval_every - 1
        rows = dataclasses.replace(recipe, retrieval=recipe.batch if prompts else 0)
        tokens, kind = sample(jax.random.fold_in(jax.random.key(seed), step), data, recipe=rows)
        lengths = jnp.full((1, recipe.batch), tokens.shape[1], jnp.int32)
        yield Batch(tokens[None], (kind == (2 if prompts else 0))[None], lengths)


def compiled_update(llm: LLM, plan: Plan, implementation: str | None) -> Callable[..., Any]:
    """The library's update with a given attention; bfloat16, or float32 on a CPU."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    settings = Settings(
        model="-",
        output="-",
        data=(DataFile("-"),),
        learning_rate=plan.learning_rate,
        warmup=0.1,
        beta2=0.95,  # as in pretraining; there are few updates
    )
    options = {"dca": llm.model.dca, "dtype": dtype, "implementation": implementation}

    def build(params: Params) -> Llama:
        return Llama.from_params(llm.model.config, params, **options)

    return jax.jit(make_update(build, settings, plan.updates), donate_argnums=0)


def finetune(
    update: Callable[..., Any], params: Params, batches: Iterator[Batch], say: Callable[[str], None]
) -> tuple[Params, Params, dict[str, Any]]:
    """The trained weights; the first update's gradient, on the host; and a log of all updates."""
    state, told, gradient = start(jax.tree.map(jnp.copy, params)), [], {}
    begin = time.monotonic()
    for step, batch in enumerate(batches):
        state, metrics = update(state, {}, batch)
        told.append(metrics)
        if step % 50 == 0:
            say(f"  update {step + 1}: {float(metrics.loss):.3f} nats a trained token")
        if step == 0:
            gradient = first_gradient(state, float(metrics.grad_norm))
            begin = time.monotonic()  # everything is compiled by now
    losses, norms, tokens, finite = map(np.stack, zip(*jax.device_get(told), strict=True))
    seconds = (time.monotonic() - begin) / max(1, len(told) - 1)
    if not finite.all():
        raise InputError(f"update {1 + finite.argmin()} was not finite; lower the learning rate")
    log = {"loss": losses, "grad_norm": norms, "trained": tokens}
    lists = {name: values.tolist() for name, values in log.items()}
    return state.params, gradient, {"seconds_an_update": seconds, **lists}


def first_gradient(state: State, norm: float) -> Params:
    """The gradient from AdamW's mean after one update: a tenth of it, clipped to norm 1."""
    scale = np.float32(10 * max(1.0, norm))
    return jax.tree.map(lambda x: scale * x, jax.device_get(state.mean))


# --- the run -----------------------------------------------------------------------------------


def compare(out: Path, folder: Path, plan: Plan, held_out_text: str) -> dict[str, Any]:
    """Trains and tests all models; returns the content of results.json.

    Raises:
        InputError: `out` exists (before any work), or there is too little text.
    """
    refuse_existing(out)
    begin = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {what}", flush=True)

    llm = dca_jax.load(folder, dca="paper", dtype="float32")
    trained, vocab_size = llm.model.config.trained_length, llm.model.config.vocab_size
    # Not committed to a device, like the output of `start`; else the first update would be compiled
    # twice.
    params = jax.tree.map(jnp.array, jax.device_get(llm.model.params()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = [n * plan.times * trained for n in (1, 2, 4)]
    passkeys = finetune_report.draw_passkeys(llm, asked, depths=plan.depths, trials=plan.trials)
    longest = max(asked)
    text = demo_prompts.encode(tokenizer, [held_out_text])[0].astype(np.int32)
    text = text[: min(plan.windows, len(text) // longest) * longest]
    if not text.size or plan.tokens < plan.times * trained:
        raise InputError(f"held-out text, and updates, need {longest:,} tokens and a row's")
    texts = read_texts(plan)
    lengths = {"exact": plan.times * trained, "detached": plan.times * trained, "short": trained}
    recipes = {n: row_recipe(plan, vocab_size, n) for n in set(lengths.values())}
    data = {length: prepare(texts, tokenizer, recipe) for length, recipe in recipes.items()}
    BACKENDS.setdefault("detached", DetachedMerge())
    attention = {"detached": "detached"}
    updates = {name: compiled_update(llm, plan, attention.get(name)) for name in lengths}
    results: dict[str, Any] = {
        "plan": dataclasses.asdict(plan),
        "model": folder.name,
        "trained_length": trained,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
        "text_tokens": {"trained": data[trained].text.size, "held out": text.size},
        "gradient_error": [],
        "models": [],
    }
    out.mkdir(parents=True)

    def test(name: str, seed: int, params: Params, log: dict[str, Any]) -> None:
        since = time.monotonic()
        found = finetune_report.evaluate(llm, params, text, passkeys, batch=plan.batch)
        log = log | {"seconds_tested": time.monotonic() - since}
        results["models"].append({"name": name, "seed": seed, **found, **log})
        results["seconds"] = time.monotonic() - begin
        finetune_report.save(out, results)
        say(f"{name}, seed {seed}: {found['loss'][longest]:.3f} nats at {longest:,} tokens")

    say(f"{len(texts):,} long files; {text.size:,} held-out tokens to test on")
    test("training-free", 0, params, {})
    for seed in range(plan.seeds):
        gradients: dict[str, Params] = {}
        for name in lengths if seed == 0 else ("exact", "detached"):
            say(f"{name}, seed {seed}: rows of {lengths[name]:,} tokens")
            batches = draw_batches(data[lengths[name]], recipes[lengths[name]], plan, seed)
            tuned, gradients[name], log = finetune(updates[name], params, batches, say)
            test(name, seed, tuned, {"training": log})
        error = gradient_error(gradients["exact"], gradients["detached"])
        results["gradient_error"].append(error)
    finetune_report.save(out, results)
    return results


def main(
    out: Annotated[Path, typer.Option(help="New folder for results and figures.")],
    model: Annotated[Path, typer.Option(help="The demo model's folder.")] = Path(
        "models/demo-python-7m"
    ),
    updates: Annotated[int, typer.Option(min=2, help="Updates per training.")] = Plan.updates,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Plan.learning_rate,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each gradient.")] = Plan.seeds,
    times: Annotated[int, typer.Option(min=1, help="Row length, in trained lengths.")] = Plan.times,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per update.")] = Plan.tokens,
    corpus_mb: Annotated[
        float, typer.Option(help="Megabytes of text to train on.")
    ] = Plan.corpus_mb,
    windows: Annotated[int, typer.Option(min=1, help="Number of held-out windows.")] = Plan.windows,
    depths: Annotated[int, typer.Option(min=1, help="Number of passkey depths.")] = Plan.depths,
    trials: Annotated[int, typer.Option(min=1, help="Passkeys per cell.")] = Plan.trials,
) -> None:
    """Finetune the demo model with both gradients, test all models, and plot the results."""
    given = dict(locals())
    plan = Plan(**{f.name: given[f.name] for f in dataclasses.fields(Plan) if f.name in given})
    try:
        results = compare(out, model, plan, demo_data.held_out_text())
    except InputError as error:
        rich.print(f"[red]error:[/red] {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(finetune_report.table(results))


if __name__ == "__main__":
    typer.run(main)
