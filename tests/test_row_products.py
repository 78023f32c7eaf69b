"""Products of one row: against float64, and in a model that draws a token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dca_jax import experts
from dca_jax.config import LlamaConfig, LoraConfig, MixtureConfig
from dca_jax.dca import DCAConfig
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.products import cpu_rows, row_products

DENSE = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    qkv_bias=True,
)
# A layer with an MLP, then one with experts; queries and keys are normed.
SPARSE = replace(
    DENSE,
    model_type="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    mixture=MixtureConfig(
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=32, dense_layers=(0,)
    ),
)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_rows_times_their_own_matrices(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several widths in one launch; each row with its own number."""
    monkeypatch.setattr(row_products, "INTERPRET", jax.default_backend() == "cpu")
    rng, numbers = np.random.default_rng(0), np.array([2, 0, 2], np.int32)
    x = jnp.asarray(rng.standard_normal((3, 320)), dtype)
    stacks = [jnp.asarray(rng.standard_normal((3, 320, n)), dtype) for n in (256, 64, 192)]
    assert row_products.can_multiply(x, stacks)
    got = jax.jit(row_products.row_products)(x, stacks, numbers)
    for ours, stack in zip(got, stacks, strict=True):
        own = np.asarray(stack, np.float64)[numbers]
        expected = np.einsum("ri,rio->ro", np.asarray(x, np.float64), own)
        np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU multiplies")
def test_a_cpu_copies_no_matrix_to_draw_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's memory besides its arguments is less than a layer's smallest wide matrix."""
    monkeypatch.setattr(cpu_rows, "BLOCK", 2**18)
    config = replace(DENSE, hidden_size=512, intermediate_size=1024)
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def next_hidden(model: Llama, tokens: jax.Array) -> jax.Array:
        cache = KVCache.create(config, batch=1, capacity=16, dtype=jnp.float32)
        return model.hidden_states(tokens, cache=cache)[0]

    compiled = jax.jit(next_hidden).lower(model, jnp.zeros((1, 1), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 512 * 1024


def test_what_no_tile_divides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "INTERPRET", True)
    x = jnp.zeros((1, 64))
    assert row_products.can_multiply(x, [jnp.zeros((1, 64, 48))])
    assert not row_products.can_multiply(x, [jnp.zeros((1, 64, 48)), jnp.zeros((1, 64, 24))])
    wide = jax.ShapeDtypeStruct((1, 64), np.dtype(np.float64))
    assert not row_products.can_multiply(wide, [jnp.zeros((1, 64, 48))])


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("config", "launches"),
    [
        (DENSE, 4),  # q, k and v; o; gate and up; down; one program for both layers
        (SPARSE, 4 + 5),  # and of the layer with experts q, k and v; o; router; gate and up; down
    ],
)
def test_a_token_is_drawn_by_few_launches(
    config: LlamaConfig, launches: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes out as it does when the text is read whole, by other products."""
    lora = None if config.mixture else LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    options = {"dca": DCAConfig(chunk_len=6, max_query_position=9), "dtype": jnp.float32}
    model = Llama(config, lora=lora, rngs=nnx.Rngs(0), **options)
    model = jax.tree.map(lambda leaf: leaf + 0.03, model)  # biases and LoRA count
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 0, config.vocab_size)
    whole = model(tokens)[0, -1]

    def last(model: Llama, tokens: jax.Array) -> jax.Array:
        cache = KVCache.create(config, batch=1, capacity=16, dtype=jnp.float32)
        _, cache = model.hidden_states(tokens[:, :-1], cache=cache)
        hidden, _ = model.hidden_states(tokens[:, -1:], cache=cache)
        return model.unembed(hidden[:, 0])[0]

    monkeypatch.setattr(row_products, "INTERPRET", kernel)
    monkeypatch.setattr(cpu_rows, "BLOCK", 4 * 96 * 16)  # several blocks
    monkeypatch.setattr(experts, "are_few", lambda rows, groups: 2 * rows <= groups)
    assert str(jax.make_jaxpr(last)(model, tokens)).count("pallas_call[") == launches * kernel
    got = jax.jit(last)(model, tokens)
    np.testing.assert_allclose(got, whole, atol=1e-5 * np.abs(whole).max())
