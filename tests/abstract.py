"""Whole models without weights: the programs of `dca_jax`, lowered from shapes alone."""

import contextlib
import math
import re
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
from flax.traverse_util import unflatten_dict
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dca_jax.attention.sparse import Sparse
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.train import Batch, make_update
from dca_jax.finetune.train import abstract_state as abstract_state_of_training
from dca_jax.inference import steps
from dca_jax.inference.sampling import Sampler
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import partition
from dca_jax.weights.layouts import values_layout
from dca_jax.weights.packer import matrices, packed_stack
from dca_jax.weights.parameters import abstract_params, parameters
from dca_jax.weights.placement import parameter_shardings


def lower(
    step: str,
    config: LlamaConfig,
    mesh: Mesh,
    *,
    capacity: int,
    tokens: int = 1,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
    sparse: Sparse | None = None,
    weights: str | None = None,
) -> Any:
    """Lowers `read` (one piece of a prompt), `read_whole` or `decode` for the devices of a mesh."""

    def whole(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    model = abstract_model(config, mesh, dtype, implementation, sparse, weights)
    cache = abstract_cache(config, mesh, batch, capacity, dtype)
    # The mesh names its kind of device, from which the attention chooses its kernel.
    with unchecked(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if step == "read":
            arguments: tuple[Any, ...] = (
                *(model, cache, whole(batch, config.hidden_size, dtype=dtype)),
                *(whole(batch, tokens), whole(batch), whole(batch)),
            )
            return _lowered(jax.jit(steps.read, donate_argnames="cache"), mesh, *arguments)
        if step == "read_whole":
            jitted = jax.jit(steps.read_whole, donate_argnames="cache", keep_unused=True)
            return _lowered(jitted, mesh, model, cache, whole(batch, capacity), whole(batch))
        assert step == "decode"
        jitted = jax.jit(steps.decode, donate_argnames="state")
        arguments = model, abstract_state(cache, mesh), Sampler(), whole(8), whole()
        return _lowered(jitted, mesh, *arguments)


def _lowered(jitted: Any, mesh: Mesh, *arguments: Any) -> Any:
    # Named, since JAX takes "gpu" for the kind in this machine.
    platform = mesh.devices.flat[0].platform
    names = ("cuda" if platform == "gpu" else platform,)
    return jitted.trace(*arguments).lower(lowering_platforms=names)


def lower_update(
    config: LlamaConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    remat: str,
    dtype: Any = jnp.bfloat16,
    state: str = "float32",
) -> Any:
    """Lowers an update of finetuning all weights, for the devices of a mesh."""
    where = parameter_shardings(config, mesh)
    trained = abstract_params(config, dtype=jnp.dtype(state), sharding=where)

    def build(params: Any) -> Llama:
        dca = DCAConfig.paper(config.max_position_embeddings)
        return Llama.from_params(config, params, dca=dca, dtype=dtype, remat=remat)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shape = 1, rows, length
    batch = Batch(array(jnp.int32, *shape), array(jnp.bool_, *shape), array(jnp.int32, *shape[:2]))
    settings = Settings(model="m", output="o", data=(DataFile("d"),), state=state)
    update = jax.jit(make_update(build, settings, 1000), donate_argnums=0)
    with unchecked(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return _lowered(update, mesh, abstract_state_of_training(trained), {}, batch)


def collective_sizes(hlo: str) -> list[int]:
    """The number of elements of every array that a collective of the compiled program returns."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    sizes = []
    for line in hlo.splitlines():
        if found := re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found.group(1))
            sizes += [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
    return sizes


def summed_whole(hlo: str, size: int) -> list[str]:
    """Arrays of at least this many elements that are summed over devices and whole on each.

    If each device gets a part only, TPUs' compiler fuses the sum into an `all-reduce-scatter`.
    """
    found, computation = [], ""
    for line in hlo.splitlines():
        if not line.startswith(" "):
            computation = line
        summed = re.search(r" = (.*) all-reduce(?:-start)?\(", line)  # of one array, or of several
        if summed and "all-reduce-scatter" not in computation:
            shapes = (sizes.split(",") for sizes in re.findall(r"\w\[([\d,]+)\]", summed[1]))
            largest = max((math.prod(map(int, sizes)) for sizes in shapes), default=0)
            found += [line.strip()[:120]] if largest >= size else []
    return found


def abstract_model(
    config: LlamaConfig,
    mesh: Mesh,
    dtype: Any,
    implementation: str | None,
    sparse: Sparse | None = None,
    weights: str | None = None,
) -> Llama:
    place = parameter_shardings(config, mesh)
    leaves: dict[tuple[str, ...], Any] = {
        tuple(row.path.split(".")): row.abstract(config, dtype, place) for row in parameters(config)
    }
    for row in matrices(config) if weights else ():
        path = tuple(row.path.split("."))
        with unchecked(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = jax.eval_shape(partial(packed_stack, form=weights, row=row), leaves[path])
        leaves[path] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
            ),
            found,
        )
        layout = values_layout(row, leaves[path])
        if layout is not None and mesh.devices.flat[0].platform == "tpu":  # as it is loaded
            values = leaves[path].values
            place = Format(layout, values.sharding)
            values = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
            leaves[path] = replace(leaves[path], values=values)
    dca = DCAConfig.paper(config.max_position_embeddings)
    options: dict[str, Any] = {"dca": dca, "dtype": dtype, "implementation": implementation}
    return Llama.from_params(config, unflatten_dict(leaves), sparse=sparse, **options)


def abstract_cache(
    config: LlamaConfig, mesh: Mesh, batch: int, capacity: int, dtype: Any
) -> KVCache:
    """What `KVCache.create` makes."""
    options: dict[str, Any] = {"batch": batch, "capacity": capacity, "dtype": dtype, "mesh": mesh}
    return placed(mesh, lambda: KVCache.create(config, **options))


def abstract_state(cache: KVCache, mesh: Mesh) -> steps.State:
    """A batch after its first tokens."""
    batch = cache.lengths.shape

    def make(cache: KVCache) -> steps.State:
        return steps.State(
            cache=cache,
            token=jnp.zeros(batch, jnp.int32),
            finished=jnp.zeros(batch, bool),
            key=jax.random.split(jax.random.key(0), batch),
            seen=None,
        )

    return placed(mesh, make, cache)


def placed(mesh: Mesh, make: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes that `make` would return: a cache is sharded, everything else replicated."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        letters = {4: "LBSK", 5: "LBSKH"}.get(x.ndim)
        spec = partition(letters, x.shape, mesh.shape) if letters else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with unchecked():
        return jax.tree.map(place, jax.eval_shape(make, *arguments))


@contextlib.contextmanager
def unchecked() -> Generator[None]:
    """Without checks of annotations, since a cache is annotated with arrays, not shapes."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
