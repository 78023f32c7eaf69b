"""LoRA: low-rank adapters over a frozen base (arXiv 2106.09685), bfloat16 or int8.

A projection that has adapters computes y = x W + alpha / rank (x A) B (`dca_jax.model.Linear`).
Adapters are float32 arrays beside the kernel they adapt, `lora_a` [L, inputs, R] and `lora_b`
[L, R, outputs], and lie on a mesh as its inputs and its outputs do. A run is:

    base = load_weights(folder, config, ..., then=quantizer(config))    # or without `then`
    adapters = init_lora(config, lora, key, sharding)
    model = Llama.from_params(config, join(adapters, base), lora=lora, quantized=True)

with gradients of `adapters` alone. `dca_jax.weights.adapters` reads and writes them, and merges
them into the base. int8 is of weights only, a scale for each output of each layer (W8A16); it
needs qwix.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int8, Key

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.errors import InputError
from dca_jax.model import Llama
from dca_jax.weights.adapters import ADAPTERS, flat
from dca_jax.weights.parameters import Parameter, Shardings, lora_parameters, projections


def init_lora(
    config: LlamaConfig, lora: LoraConfig, key: Key[Array, ""], sharding: Shardings = None
) -> dict[str, Any]:
    """New adapters, float32: A uniform in +-1 / sqrt(inputs), B zero, so that nothing changes yet.

    Args:
        config: the model's shape.
        lora: which projections have adapters, and their rank.
        key: of the random numbers; they do not depend on the sharding.
        sharding: one for all, or a function of the path (`parameter_shardings(..., lora=lora)`);
            None is the first local device.

    Returns:
        The adapters' tree, as `split` gives it.
    """
    rows = lora_parameters(config, lora)
    leaves = {row.path: row.abstract(config, jnp.float32, sharding).sharding for row in rows}

    def make(key: Array) -> dict[str, Any]:
        # Of all that the model draws, the compiler keeps the adapters.
        return split(Llama(config, lora=lora, rngs=nnx.Rngs(key)).params())[0]

    return jax.jit(make, out_shardings=unflatten_dict(leaves, sep="."))(key)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters, which are trained, and the base, which is not: two trees without copies."""
    adapters, base = {}, {}
    for path, leaf in flat(params).items():
        (adapters if path.rpartition(".")[2] in ADAPTERS else base)[path] = leaf
    return unflatten_dict(adapters, sep="."), unflatten_dict(base, sep=".")


def join(adapters: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`: what `Llama.from_params(..., lora=lora)` takes."""
    return unflatten_dict(flat(base) | flat(adapters), sep=".")


def quantizer(config: LlamaConfig) -> Callable[[Parameter, Array], dict[str, Array]]:
    """What makes int8 weights of a model's: `then` of `dca_jax.weights.folder.load_weights`.

    A layer's kernel becomes int8 `kernel` and float32 `kernel_scale`, on the devices it lies on; it
    is about their product, and no weight is off by more than half its scale, which has size 1 along
    the inputs. The kernel is deleted, so that no more than one is held. All else stays as it is.

    Raises:
        InputError: qwix is not installed.
    """
    try:
        import qwix  # of the extra `train`
    except ImportError:
        raise InputError(
            "int8 weights need qwix, which is not installed; pip install 'dca_jax[train]'"
        ) from None

    @partial(jax.jit, static_argnames="channels")
    def quantize(
        kernel: Float[Array, "L ..."], channels: tuple[int, ...]
    ) -> tuple[Int8[Array, "L ..."], Float[Array, "L ..."]]:
        def one_layer(kernel: Float[Array, "..."]) -> tuple[Array, Array]:
            # In bfloat16 it would divide, and keep the scale, with 8 bits: too few to round to 8.
            found = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=channels)
            return found.qvalue, found.scale

        return jax.lax.map(one_layer, kernel)

    kernels = {row.path for row in projections(config)}

    def quantized(row: Parameter, kernel: Array) -> dict[str, Array]:
        if row.path not in kernels:
            return {row.path: kernel}
        channels = tuple(range(len(row.groups[1]), kernel.ndim - 1))
        values, scale = jax.block_until_ready(quantize(kernel, channels))
        kernel.delete()
        return {row.path: values, f"{row.path}_scale": scale}

    return quantized
