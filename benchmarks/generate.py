"""A whole model: prefill and decoding with DCA, against transformers without it, or on a mesh.

    python benchmarks/generate.py measure --lengths 32k --out outputs/generate.json
    python benchmarks/generate.py measure --presets llama-2-70b --lengths 16k --engines dca \
        --mesh tensor=2

Models have the shapes of Llama-2, Llama-3 and Qwen3's mixture of experts, with random bfloat16
weights generated on the device, and packed there if `--weights` asks for it; no checkpoint is
read, and the text is meaningless. Ours goes through `dca_jax.inference.generate.Run`, like every
caller: prompts in pieces (on a mesh with `context`, at once), tokens in segments. The peer is the
same model in transformers on PyTorch with its defaults, on one GPU: plain attention by SDPA, its
default KV cache, the logits of the last token only.

Engines run one after the other, each in its own process, so that they do not share memory. `share`
is the time that reading a device's weights and cache once takes at its copy bandwidth (measured in
the same run), divided by the time per token. That time is taken from the longest segments: the
first ones are short, so that text streams, and every call has a cost of its own. `TFLOP/s` is that
of the prefill, per device: two operations for every weight that a token is multiplied with, and
causal attention's. Speeds are relative to transformers.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import (
    Report,
    copy_bandwidth,
    machine,
    merged,
    numbers,
    reason,
    say,
    show,
)
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dca_jax import DCAConfig, Llama, RopeConfig
from dca_jax.attention.backend import PLAIN as PLAIN_CONFIG
from dca_jax.attention.op import choose_implementation
from dca_jax.config import LlamaConfig, MixtureConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference.buckets import new_cache, pieces_of
from dca_jax.inference.generate import Run
from dca_jax.memory import GPU_SHARE
from dca_jax.planning.shapes import SHAPES
from dca_jax.products.packed import FORMS, Packed, pack
from dca_jax.sharding import make_mesh, mesh_of
from dca_jax.weights.packer import matrices, packer
from dca_jax.weights.parameters import Parameter, count_parameters, parameters
from dca_jax.weights.placement import parameter_shardings

PRESETS = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
    ),
    "llama-2-70b": LlamaConfig(
        vocab_size=32_000,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"],
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    ),
}
PRESETS["tiny-experts"] = replace(
    PRESETS["tiny"],
    model_type="qwen3_moe",
    qk_norm=True,
    mixture=MixtureConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
)
OURS, PLAIN, PEER = "dca_jax", "dca_jax, plain", "transformers"
ENGINES = {"dca": OURS, "plain": PLAIN, "transformers": PEER}
PREFILLS, PREFILL_SECONDS = 3, 5.0  # seconds; prefills are repeated until they have taken this long
KEY = ("model", "weights", "tokens", "engine", "mesh")
COLUMNS = (*KEY, "attention", "prefill ms", "TFLOP/s", "first token ms", "ms/token", "tokens/s")
COLUMNS += ("share", "peak GB", "prefill speed", "decode speed", "warm-up s")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/generate.json"
    ),
    presets: Annotated[
        str, typer.Option(help=f"Models, separated by commas, of: {', '.join(PRESETS)}.")
    ] = "llama-2-7b,llama-3-8b",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompt, separated by commas; 4k is 4096.")
    ] = "16k,32k,128k",
    engines: Annotated[
        str, typer.Option(help="Among dca, plain (dca_jax with plain attention) and transformers.")
    ] = "dca,transformers",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt.")] = 33,
    implementation: Annotated[
        str | None,
        typer.Option(help="Attention implementation of dca_jax (default: the best on the device)."),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Mesh of dca_jax, such as context=2,tensor=2 (default: one device)."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help=f"Weights of dca_jax, separated by commas, among bfloat16, {', '.join(FORMS)}."
        ),
    ] = "bfloat16",
    minutes: Annotated[
        float, typer.Option(help="Start no further length after this many minutes.")
    ] = math.inf,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times prefill, first token and decoding at each length, for each model and engine."""
    found = sorted(numbers(lengths))
    if child:
        start, config = time.monotonic(), PRESETS[presets]
        rows = PROCESSES[child](config, found, new_tokens, implementation, mesh, weights)
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if time.monotonic() - start > 60 * minutes:
                break
        return
    names, wanted, packed = (
        [x.strip() for x in text.split(",")] for text in (presets, engines, weights)
    )
    known_names = [(names, PRESETS), (wanted, ENGINES), (packed, ("bfloat16", *FORMS))]
    for name, known in [(n, known) for given, known in known_names for n in given]:
        if name not in known:
            raise InputError(f"{name!r} is not one of {', '.join(known)}")
    if new_tokens < 3:
        raise InputError(f"new_tokens must be at least 3, to time some, got {new_tokens}")
    report = Report(out, {"benchmark": "generate", "new tokens": new_tokens}, minutes=minutes)
    for name, engine in itertools.product(names, wanted):
        for form in packed if engine != "transformers" else ["bfloat16"]:
            if report.out_of_time():
                break
            options = ["--presets", name, "--lengths", ",".join(map(str, found))]
            options += ["--new-tokens", str(new_tokens), "--minutes", str(report.minutes_left())]
            options += ["--weights", form]
            row = {"model": name, "weights": form, "engine": ENGINES[engine]}
            if implementation:
                options += ["--implementation", implementation]
            if mesh and engine != "transformers":
                options += ["--mesh", mesh]
                row["mesh"] = mesh
            _run_child(report, row, engine, options)
    show(f"Generation on {report.facts.get('device')}", COLUMNS, report.rows)


@app.command("show")
@exit_on_input_error()
def show_files(
    files: Annotated[list[Path], typer.Argument(help="JSON files from `measure`.")],
) -> None:
    """Prints the rows of one or more files as a table; of repeated rows, the last one."""
    facts, rows = merged(files, KEY)
    show(f"Generation on {facts['device']}", COLUMNS, rows)


def _run_child(report: Report, row: dict[str, Any], engine: str, options: list[str]) -> None:
    """Runs an engine in its own process, and adds its rows as they arrive."""
    command = [sys.executable, __file__, "measure", "--child", engine, *options]
    # One engine at a time has the device and its memory, unfragmented: a cache that takes most of
    # it would not fit between another engine's allocations.
    environment = os.environ | {"XLA_CLIENT_MEM_FRACTION": str(GPU_SHARE)}
    say(f"{row['model']}, {row['weights']}, {row['engine']}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                say(line.rstrip())  # printed by a library
                continue
            if "tokens" in found:
                report.add(_rated(row | found, report))
            else:
                report.facts |= found
    if process.returncode:
        report.add(row | {"failed": f"ended with exit code {process.returncode}; see above"})


def _rated(row: dict[str, Any], report: Report) -> dict[str, Any]:
    """Adds what depends on other rows: share, and our speeds relative to transformers."""
    copied, seconds = report.facts.get("copy GB/s"), row.get("ms/token", math.nan) / 1e3
    if copied and seconds > 0:
        row["share"] = row["GB/token"] / copied / seconds
    alike = [r for r in report.rows if all(r.get(n) == row[n] for n in ("model", "tokens"))]
    peers = [r for r in [*alike, row] if r["engine"] == PEER]
    for ours in [r for r in [*alike, row] if r["engine"] != PEER]:
        for peer in peers:
            for name, column in (("prefill speed", "prefill ms"), ("decode speed", "ms/token")):
                if column in ours and column in peer:
                    ours[name] = peer[column] / ours[column]
    return row


# --- ours --------------------------------------------------------------------------------------


def measure_ours(
    dca: bool,
    config: LlamaConfig,
    lengths: list[int],
    new_tokens: int,
    implementation: str | None,
    mesh: str | None,
    weights: str,
) -> Iterator[dict[str, Any]]:
    """Facts about the device, then a row per length."""
    bandwidth = copy_bandwidth(2.0 if jax.default_backend() == "gpu" else 0.01)
    yield machine() | {"copy GB/s": bandwidth / 1e9}
    start = time.perf_counter()
    devices = None if mesh is None else make_mesh(mesh)
    model = random_model(
        config, dca=dca, implementation=implementation, mesh=devices, weights=weights
    )
    held = _device_bytes(jax.block_until_ready(model.params()))
    progress(f"{held / 1e9:.2f} GB of weights per device, {time.perf_counter() - start:.1f} s")
    for length in lengths:
        try:
            yield {"tokens": length} | _time_ours(model, length, new_tokens)
        except Exception as error:  # out of memory
            yield {"tokens": length, "failed": reason(error)}


def random_model(
    config: LlamaConfig,
    *,
    dca: bool,
    implementation: str | None,
    mesh: Mesh | None = None,
    weights: str = "bfloat16",
) -> Llama:
    """A model with normal weights, generated in bfloat16 on the devices one layer at a time.

    Weights are packed layer by layer on one device, and after the last layer on a mesh.
    """
    options: dict[str, Any] = {
        "dca": DCAConfig.paper(config.max_position_embeddings) if dca else None,
        "dtype": jnp.bfloat16,
        "implementation": implementation,
    }
    abstract = jax.eval_shape(
        lambda: Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)
    )

    def normal(key: Array, shape: tuple[int, ...]) -> Array:
        if len(shape) < 3:
            return jnp.bfloat16(0.02) * jax.random.normal(key, shape, jnp.bfloat16)
        return jax.lax.map(lambda key: normal(key, shape[1:]), jax.random.split(key, shape[0]))

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract.params())
    names = [".".join(entry.key for entry in path) for path, _ in leaves]
    places = [None] * len(leaves)
    if mesh is not None:
        places = list(map(parameter_shardings(config, mesh), names))
    keys = [jax.random.key(number, impl="rbg") for number in range(len(leaves))]  # quick, and good

    def normal_packed(key: Array, shape: tuple[int, ...], row: Parameter) -> Packed:
        if len(shape) > len(row.axes):
            keys = jax.random.split(key, shape[0])
            return jax.lax.map(lambda key: normal_packed(key, shape[1:], row), keys)
        order = row.inner_order
        matrix = 0.02 * jax.random.normal(key, [shape[axis] for axis in order], jnp.bfloat16)
        return pack(matrix, weights, len(row.groups[1]), order=order)

    def start(name: str, leaf: Any, place: Any) -> Future:
        make = partial(normal, shape=leaf.shape)
        if name.endswith("scale"):
            make = partial(jnp.ones, leaf.shape, leaf.dtype)
            return pool.submit(jax.jit(make, out_shardings=place).lower().compile)
        if mesh is None and name in packed:
            make = partial(normal_packed, shape=leaf.shape, row=rows[name])
        return pool.submit(jax.jit(make, out_shardings=place).lower(keys[0]).compile)

    rows = {row.path: row for row in parameters(config)}
    packed = [row.path for row in matrices(config)] if weights != "bfloat16" else []

    with ThreadPoolExecutor() as pool:
        makers = [
            start(name, leaf, place)
            for name, (_, leaf), place in zip(names, leaves, places, strict=True)
        ]
    then = packer(matrices(config), weights) if packed and mesh is not None else None
    made = []
    for name, maker, key in zip(names, makers, keys, strict=True):
        leaf = maker.result()(*([] if name.endswith("scale") else [key]))
        change = None if then is None else then(rows[name])
        made.append(leaf if change is None else change(leaf))
    return Llama.from_params(config, jax.tree.unflatten(structure, made), **options)


def _device_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _prefill_flops(model: Llama, length: int) -> float:
    """FLOP: two for every weight that a token is multiplied by, and causal attention's products."""
    config = model.config
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    weights = count_parameters(config, active=True) - tables
    inner = config.num_attention_heads * config.head_dim
    return 2 * weights * length + 2 * config.num_hidden_layers * inner * length**2


def _time_ours(model: Llama, length: int, new_tokens: int) -> dict[str, Any]:
    """Compiles with a short prompt in a full-size cache, then times the long prompt."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, length).tolist()
    cache, mesh = new_cache(model, 1, length + new_tokens), mesh_of(model)
    # Only one row of the embedding table is read, and only the chosen experts.
    weights = _device_bytes(model.params()) - _device_bytes(model.embed_tokens.embedding[...])
    mixture = model.config.mixture
    if mixture is not None:
        idle = 1 - mixture.num_experts_per_tok / mixture.num_experts
        experts = model.params()["layers"]["experts"]
        weights -= idle * _device_bytes(
            [leaf for name, leaf in experts.items() if name != "router"]
        )
    token_bytes = _device_bytes((cache.key, cache.value)) // cache.capacity
    pieces = pieces_of(model)
    width, piece = pieces.widths[0], pieces.widest(length)
    query = (1, piece, model.config.num_attention_heads, model.config.head_dim)
    attention = choose_implementation(
        model.implementation,
        jax.ShapeDtypeStruct(query, model.dtype),
        jax.ShapeDtypeStruct(
            (*cache.key.shape[:3], model.config.num_key_value_heads, model.config.head_dim),
            cache.key.dtype,
        ),
        model.dca or PLAIN_CONFIG,
    )
    short = length if length <= width else width + length % width  # pieces of the same shapes
    start = time.perf_counter()
    run = Run(model, [prompt[:short]], max_new_tokens=3, cache=cache)
    del cache
    _clocked(run)
    warm_up = time.perf_counter() - start
    progress(f"{length} tokens: compiled and warm in {warm_up:.1f} s")

    prefills: list[float] = []
    firsts: list[float] = []
    segments: list[tuple[float, int]] = []
    while len(prefills) < PREFILLS and sum(prefills) < PREFILL_SECONDS:
        run = Run(model, [prompt], max_new_tokens=new_tokens, cache=_emptied(run))
        start = time.perf_counter()
        jax.block_until_ready(run.read_prompts())
        prefills.append(time.perf_counter() - start)
        run = Run(model, [prompt], max_new_tokens=new_tokens, cache=_emptied(run))
        (first, _), *rest = _clocked(run)
        firsts.append(first)
        segments += rest
        progress(f"{length} tokens: prefill {prefills[-1]:.3f} s, first token {first:.3f} s")
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    peak = max(filter(None, peaks), default=None)
    flops = _prefill_flops(model, length) / len(peaks)
    longest = max(count for _, count in segments)
    return {
        "prefill ms": statistics.median(prefills) * 1e3,
        "TFLOP/s": flops / statistics.median(prefills) / 1e12,
        "first token ms": statistics.median(firsts) * 1e3,
        "ms/token": statistics.median(s / n for s, n in segments if n == longest) * 1e3,
        "tokens/s": sum(count for _, count in segments) / sum(seconds for seconds, _ in segments),
        "GB/token": (weights + token_bytes * (length + new_tokens / 2)) / 1e9,
        "peak GB": peak and peak / 1e9,
        "warm-up s": warm_up,
        "piece": piece,
        "attention": attention,
    }


def _clocked(run: Run) -> list[tuple[float, int]]:
    """Runs to the end: seconds and tokens of each segment, the first being the prompt's."""
    times, counts = [time.perf_counter()], []
    for (tokens,) in run:
        times.append(time.perf_counter())
        counts.append(len(tokens))
    return list(zip((b - a for a, b in itertools.pairwise(times)), counts, strict=True))


def _emptied(run: Run) -> Any:
    """A run's cache, emptied, in the same memory."""
    return run.cache.rollback([0])


# --- transformers ------------------------------------------------------------------------------


def measure_transformers(
    config: LlamaConfig,
    lengths: list[int],
    new_tokens: int,
    implementation: str | None,
    mesh: str | None,
    weights: str,
) -> Iterator[dict[str, Any]]:
    """A row per length, with PyTorch."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    hf = transformers.AutoConfig.for_model(**config.to_hf())
    start = time.perf_counter()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            hf, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    held = sum(p.nbytes for p in model.parameters())
    idle = 2 * (count_parameters(config) - count_parameters(config, active=True))
    moved = held - model.get_input_embeddings().weight.nbytes - idle
    progress(f"{held / 1e9:.2f} GB of weights in {time.perf_counter() - start:.1f} s")
    for length in lengths:
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with torch.inference_mode():
                row = _time_transformers(model, length, new_tokens)
            heads = 2 * config.num_hidden_layers * config.num_key_value_heads
            token_bytes = heads * config.head_dim * 2
            row["GB/token"] = (moved + token_bytes * (length + new_tokens / 2)) / 1e9
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
            yield {"tokens": length} | row
        except Exception as error:  # out of memory
            yield {"tokens": length, "failed": reason(error)}
        if on_gpu:
            torch.cuda.empty_cache()


def _time_transformers(model: Any, length: int, new_tokens: int) -> dict[str, Any]:
    """Prefill, first token and further steps, by the device's clock."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)

    def step(tokens: Any, cache: Any) -> Any:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1)

    start = time.perf_counter()
    cache = DynamicCache(config=model.config)
    token = step(prompt[:, : min(length, 2048)], cache)
    step(token, cache).cpu()
    warm_up = time.perf_counter() - start
    samples: list[float] = []
    firsts: list[float] = []
    while len(samples) < PREFILLS and sum(samples) < PREFILL_SECONDS:
        cache = None  # frees the previous length's memory
        cache = DynamicCache(config=model.config)
        start, clock = time.perf_counter(), _clock()
        token = step(prompt, cache)
        samples.append(clock())
        token.cpu()
        firsts.append(time.perf_counter() - start)
        progress(f"{length} tokens: prefill in {samples[-1]:.3f} s")
    steps: list[float] = []
    for _ in range(new_tokens - 1):
        clock = _clock()
        token = step(token, cache)
        steps.append(clock())
    return {
        "prefill ms": statistics.median(samples) * 1e3,
        "first token ms": statistics.median(firsts) * 1e3,
        "ms/token": statistics.median(steps) * 1e3,
        "tokens/s": len(steps[1:]) / sum(steps[1:]),
        "warm-up s": warm_up,
    }


def _clock() -> Callable[[], float]:
    """Starts a clock. Calling the result waits for the device and returns seconds by its clock."""
    import torch

    if not torch.cuda.is_available():
        begin = time.perf_counter()
        return lambda: time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def seconds() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def progress(text: str) -> None:
    """Prints a line of progress to standard error; a child's standard output carries its rows."""
    print(f"          {text}", file=sys.stderr, flush=True)


PROCESSES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "dca": lambda *args: measure_ours(True, *args),
    "plain": lambda *args: measure_ours(False, *args),
    "transformers": measure_transformers,
}


if __name__ == "__main__":
    app()
