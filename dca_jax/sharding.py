"""Sharding of arrays over a mesh: one table of rules for parameters and activations.

On one device there is no mesh, and the same code runs. A mesh has four axes of size 1 or more:

    data      rows of a batch; each device has all parameters
    fsdp      rows of a batch too, and parameters split along D; a layer's are gathered when it
              runs. Experts are split by number, and tokens are sent to them (`dca_jax.experts`)
    context   tokens of each text (`dca_jax.attention.parallel.context`), and of its KV cache
    tensor    heads, the inner dimension of MLP and experts, and the vocabulary

Arrays are sharded explicitly: the sharding is part of their type, and JAX refuses mismatches
instead of moving data silently. `make_mesh` makes a mesh, `parameter_shardings` returns the
sharding of a model's parameters, and inside a model `Shards` is derived from the parameters. So
nothing depends on a mesh set from outside, though one may be set.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dca_jax.errors import InputError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "context", "tensor")

# The mesh axes that split each array axis, by its letter (T is a text's tokens, S a cache's slots).
# D is split only in stored parameters, H and L never.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("context",),
    "S": ("context",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "E": ("fsdp",),
    "M": ("tensor",),
    "V": ("tensor",),
}
STORED = RULES | {"D": ("fsdp",)}


# --- meshes ------------------------------------------------------------------------------------


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis from "context=2,tensor=4"; axes not named are 1.

    Raises:
        InputError: an unknown or repeated axis, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    named = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"expected a mesh such as context=2,tensor=4, with axes {', '.join(AXES)} and "
                f"positive sizes; got {part!r}"
            )
        if axis in named:
            raise InputError(f"the mesh names the axis {axis} twice: {text!r}")
        named.add(axis)
        sizes[axis] = int(size)
    return sizes


def make_mesh(
    sizes: str | Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all four axes, explicitly sharded.

    Args:
        sizes: a string for `parse_mesh`, or its result; None puts all devices on `tensor`.
        devices: the devices (default: all devices of all processes). A single process may use only
            some of its devices.

    Raises:
        InputError: more devices than available, or fewer with several processes; also as in
            `parse_mesh`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if sizes is None:
        sizes = {"tensor": len(devices)}
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else dict.fromkeys(AXES, 1) | dict(sizes)
    count = math.prod(sizes.values())
    several = len({device.process_index for device in devices}) > 1
    if count > len(devices) or (several and count < len(devices)):
        raise InputError(
            f"the mesh {describe(sizes)} needs {count} devices, but there are {len(devices)}; "
            + ("several processes must use all of them" if several else "give smaller axes")
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, (AxisType.Explicit,) * len(AXES), devices=devices[:count])


def describe(sizes: Mapping[str, int]) -> str:
    """The mesh as a string, such as "context=2,tensor=4", or "one device" if all sizes are 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


# --- parameters and caches ---------------------------------------------------------------------


def partition(
    letters: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """The partition of an array with these axes; kv heads that do not divide are not split.

    A mesh axis splits an array only once: the first array axis that the rules assign to it (if
        experts E are split, D is not).
    """
    entries: list[tuple[str, ...] | None] = []
    for letter, size in zip(letters, shape, strict=True):
        axes = rules.get(letter)
        if axes is not None and any(axes == taken for taken in entries):
            axes = None
        if letter == "K" and axes is not None and size % math.prod(sizes[axis] for axis in axes):
            axes = None
        entries.append(axes)
    return PartitionSpec(*entries)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of a tree of arrays (a model or a cache); None on a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and set(AXES) == set(sharding.mesh.axis_names):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def axis_size(mesh: Mesh | AbstractMesh | None, *axes: str) -> int:
    """Devices along these axes together; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def replicated(x: Any, mesh: Mesh | None) -> Any:
    """Host arrays, equal in every process, as arrays replicated on every device."""
    if mesh is None:
        return jax.device_put(x)  # compiles nothing
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding), x)


# --- inside a model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The shardings of a model's arrays while it is traced; `mesh` is None on one device."""

    mesh: AbstractMesh | None

    @classmethod
    def of(cls, parameter: Any) -> "Shards":
        """The shards for the mesh of a parameter, which is an array or a packed matrix."""
        mesh = jax.typeof(jax.tree.leaves(parameter)[0]).sharding.mesh
        return cls(mesh if set(mesh.axis_names) == set(AXES) else None)

    def size(self, *axes: str) -> int:
        """Devices along these axes together."""
        return axis_size(self.mesh, *axes)

    def spec(self, letters: str, *, whole: str = "") -> PartitionSpec:
        """The partition spec of an array with these axes; axes in `whole` are not split."""
        return PartitionSpec(*(None if c in whole else RULES.get(c) for c in letters))

    def out(self, letters: str, *, whole: str = "") -> NamedSharding | None:
        """`spec` as an `out_sharding` argument; None on one device."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, self.spec(letters, whole=whole))

    def product(self, subscripts: str, x: Array, kernel: Array) -> NamedSharding | None:
        """The `out_sharding` of an einsum: axes keep their split, and sums are complete."""
        if self.mesh is None:
            return None
        operands, _, out = subscripts.partition("->")
        cut: dict[str, Any] = {}
        for letters, operand in zip(operands.split(","), (x, kernel), strict=True):
            cut |= zip(letters, jax.typeof(operand).sharding.spec, strict=True)
        return NamedSharding(self.mesh, PartitionSpec(*(cut[letter] for letter in out)))

    def specs(self, tree: Any) -> Any:
        """The present partition spec of each array of a tree."""
        return jax.tree.map(lambda x: PartitionSpec(*jax.typeof(x).sharding.spec), tree)

    def put(self, x: Array, spec: PartitionSpec | None) -> Array:
        """`x` resharded to `spec` (None: replicated); unchanged on one device."""
        if self.mesh is None:
            return x
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec or PartitionSpec()))

    def gathered(self, parameter: Any) -> Any:
        """A layer's stored parameter for computation: gathered along `fsdp`."""
        if self.mesh is None:
            return parameter

        def gather(part: Array) -> Array:
            spec = jax.typeof(part).sharding.spec
            cut = (None if entry in ("fsdp", ("fsdp",)) else entry for entry in spec)
            return self.put(part, PartitionSpec(*cut))

        return jax.tree.map(gather, parameter)

    def local(
        self, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """`function` applied to each device's part of its arguments, which are resharded first."""
        if self.mesh is None:
            return function
        # check_vma refuses Pallas kernels (see `dca_jax.attention.parallel.context`).
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

        def call(*args: Any) -> Any:
            specs = jax.tree.broadcast(
                in_specs, args, is_leaf=lambda x: isinstance(x, PartitionSpec)
            )
            return mapped(*jax.tree.map(self.put, args, specs))

        return call
