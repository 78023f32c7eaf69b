"""The sharding of a model's parameters on a mesh, and the meshes that a model supports."""

import logging
import math
from collections.abc import Callable, Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dca_jax.config import LlamaConfig, LoraConfig, axis_sizes
from dca_jax.errors import InputError
from dca_jax.sharding import RULES, STORED, partition
from dca_jax.weights.parameters import Parameter, lora_parameters, parameters

log = logging.getLogger(__name__)


_NAMES = {
    "N": "query heads",
    "F": "elements of the MLP",
    "M": "elements of an expert",
    "V": "ids of the vocabulary",
    "D": "hidden size",
    "E": "number of experts",
}


def cut_by_tensor(config: LlamaConfig) -> str:
    """Letters of the axes that `tensor` must divide (kv heads may be fewer, or not split)."""
    return "N" + "F" * config.has_mlp + "M" * (config.mixture is not None) + "V"


def cut_by_fsdp(config: LlamaConfig) -> str:
    """Letters of the axes that `fsdp` must divide."""
    return "D" + "E" * (config.mixture is not None)


def check_mesh(config: LlamaConfig, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that a model cannot be split over.

    Raises:
        InputError: an axis that does not divide the sizes it splits; the message lists sizes that
            do.
    """
    tensor, found = sizes["tensor"], axis_sizes(config)
    letters = cut_by_tensor(config)
    fits = math.gcd(*(found[letter] for letter in letters))
    for letter in letters:
        if found[letter] % tensor:
            raise InputError(
                f"tensor={tensor} does not divide the model's {found[letter]} {_NAMES[letter]}; "
                f"sizes that do: {_divisors(fits)}"
            )
    kv_heads = found["K"]
    if kv_heads % tensor and tensor % kv_heads:
        both = [n for n in _divisors(fits) if not kv_heads % n or not n % kv_heads]
        raise InputError(
            f"tensor={tensor} neither divides the model's {kv_heads} kv heads nor is a multiple of "
            f"them; sizes that are: {both}"
        )
    for letter in cut_by_fsdp(config):
        if found[letter] % sizes["fsdp"]:
            fits = math.gcd(*(found[letter] for letter in cut_by_fsdp(config)))
            raise InputError(
                f"fsdp={sizes['fsdp']} does not divide the {_NAMES[letter]} {found[letter]}; sizes "
                f"that do: {_divisors(fits)}"
            )
    if tensor > kv_heads:
        log.warning(
            "tensor=%d is more than the model's %d kv heads: each is kept %d times, and so is its "
            "part of the KV cache; context=%d would cut the cache instead",
            *(tensor, kv_heads, tensor // kv_heads, tensor // kv_heads),
        )


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, min(n, 512) + 1) if n % size == 0]


def parameter_shardings(
    config: LlamaConfig, mesh: Mesh, *, lora: LoraConfig | None = None
) -> Callable[[str], NamedSharding]:
    """The sharding of each parameter by path, as the `sharding` argument of the loaders.

    With `lora`, this includes the adapters.

    Raises:
        InputError: as in `check_mesh`.
    """
    check_mesh(config, mesh.shape)
    adapters = [] if lora is None else lora_parameters(config, lora)
    rows = {row.path: row for row in [*parameters(config), *adapters]}

    def sharding(path: str) -> NamedSharding:
        return NamedSharding(mesh, parameter_partition(rows[path], config, mesh.shape))

    return sharding


def parameter_partition(
    row: Parameter, config: LlamaConfig, sizes: Mapping[str, int]
) -> PartitionSpec:
    """The partition spec of a parameter on a mesh with these sizes."""
    letters = "L" * row.stacked + row.ours.replace(" ", "")
    # A norm's scale has only a few kilobytes and is replicated.
    rules = STORED if len(row.ours.split()) > 1 else RULES
    return partition(letters, row.shape(config), sizes, rules)
