"""LoRA: low-rank adapters on a frozen, possibly packed base (arXiv 2106.09685).

A projection with adapters computes y = x W + alpha / rank (x A) B (`dca_jax.layers.Linear`).
Adapters are float32 arrays next to the kernel they adapt, `lora_a` [L, inputs, R] and `lora_b`
[L, R, outputs], and are sharded like its inputs and outputs. A run is:

    base = load_weights(folder, config, ..., then=packer(projections(config), "int4"))  # or without
    adapters = init_lora(config, lora, key, sharding)
    model = Llama.from_params(config, join(adapters, base), lora=lora)

with gradients only for `adapters`. `dca_jax.weights.adapters` reads, writes and merges them. In a
packed base (`dca_jax.products.packed`; QLoRA, arXiv 2305.14314, uses another 4-bit format) the
layers' kernels are packed, and unpacked for computation.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Key

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.model import Llama
from dca_jax.weights.adapters import ADAPTERS, flat
from dca_jax.weights.parameters import Shardings, lora_parameters


def init_lora(
    config: LlamaConfig, lora: LoraConfig, key: Key[Array, ""], sharding: Shardings = None
) -> dict[str, Any]:
    """New float32 adapters: A uniform in +-1 / sqrt(inputs), B zero, so the output is unchanged.

    Args:
        config: the model's shape.
        lora: which projections have adapters, and their rank.
        key: random key; the numbers do not depend on the sharding.
        sharding: one sharding for all, or a function of the path (`parameter_shardings(...,
            lora=lora)`); None is the first local device.

    Returns:
        The adapters' tree, as from `split`.
    """
    rows = lora_parameters(config, lora)
    leaves = {row.path: row.abstract(config, jnp.float32, sharding).sharding for row in rows}

    def make(key: Array) -> dict[str, Any]:
        # The compiler removes the initialization of everything but the adapters.
        return split(Llama(config, lora=lora, rngs=nnx.Rngs(key)).params())[0]

    return jax.jit(make, out_shardings=unflatten_dict(leaves, sep="."))(key)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into the trained adapters and the frozen base, without copies."""
    adapters, base = {}, {}
    for path, leaf in flat(params).items():
        (adapters if path.rpartition(".")[2] in ADAPTERS else base)[path] = leaf
    return unflatten_dict(adapters, sep="."), unflatten_dict(base, sep=".")


def join(adapters: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`; returns parameters for `Llama.from_params(..., lora=lora)`."""
    return unflatten_dict(flat(base) | flat(adapters), sep=".")
