"""The model against the golden data and against transformers, family by family."""

import json
from pathlib import Path
from typing import Any

import dense_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.model import REMAT, Llama
from dca_jax.rope import RopeConfig
from dca_jax.weights.folder import load_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent / "golden" / "chunkllama"
GOLDEN_DCA = DCAConfig(chunk_len=40, max_query_position=48)

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # the usual 0.02 gives logits too small to tell anything
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Real models' settings at a tiny size: (transformers' config class, what differs from TINY).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-3": ("LlamaConfig", {"rope_theta": 500_000.0}),
    "llama-3.1": ("LlamaConfig", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3}),
    "llama-3.2": (
        "LlamaConfig",
        {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "vicuna-16k": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic-ntk": ("LlamaConfig", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("LlamaConfig", {"rope_scaling": YARN}),
    "mistral-v0.1": ("MistralConfig", {"sliding_window": 128}),
    "mistral-v0.2": ("MistralConfig", {"sliding_window": None, "rope_theta": 1_000_000.0}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1_000_000.0}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2.5-yarn": ("Qwen2Config", {"rope_scaling": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rope_theta": 1_000_000.0, "attention_bias": True}),
}


def save_tiny(folder: Path, family: str) -> Any:
    """A tiny random model of the family, saved as transformers saves it; with nonzero biases."""
    config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(TINY | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Llama:
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    params = load_weights(folder, config, dtype=jnp.float32)
    return Llama.from_params(config, params, dtype=jnp.float32, **options)


run = jax.jit(lambda model, tokens, lengths=None: model(tokens, lengths))


def step(
    model: Llama, tokens: jax.Array, lengths: jax.Array | None, cache: KVCache, context: jax.Array
) -> tuple[jax.Array, KVCache | None]:
    hidden, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context
    )
    return model.unembed(hidden), cache_after


step = jax.jit(step, donate_argnames="cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path, family)
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 100)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = load(tmp_path)
    logits = run(model, jnp.asarray(tokens))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    # Up to a chunk, DCA is the model itself; it composes with every rope type beyond.
    dca = DCAConfig(chunk_len=48, max_query_position=63)
    whole, chunk = (tokens, np.full(2, 100, np.int32)), (tokens, np.full(2, 48, np.int32))
    if family != "dynamic-ntk":  # whose frequencies depend on how long the text is
        within = run(load(tmp_path, dca=dca), *chunk)
        np.testing.assert_allclose(within[:, :48], expected[:, :48], atol=1e-4, rtol=0)
    if family == "llama-2" or "rope_scaling" in FAMILIES[family][1]:
        reference = run(load(tmp_path, dca=dca, implementation="reference"), *whole)
        ours = run(load(tmp_path, dca=dca), *whole)
        np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)


def test_golden_logits_and_decoding() -> None:
    """What ChunkLlama computed, without a cache and through it, and the same greedy tokens."""
    with np.load(GOLDEN / "tiny_llama_golden.npz") as golden:
        tokens = jnp.asarray(golden["input_ids"], jnp.int32)
        expected = {name: golden[name] for name in golden}
    model = load(GOLDEN / "tiny_llama", dca=GOLDEN_DCA)
    np.testing.assert_allclose(run(model, tokens), expected["logits"], atol=1e-3, rtol=0)

    cache = KVCache.create(model.config, batch=2, capacity=330, dtype=jnp.float32)
    logits, cache = step(model, tokens, None, cache, jnp.asarray([300, 300], jnp.int32))
    for number in range(24):
        chosen = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        np.testing.assert_array_equal(chosen, expected["greedy_tokens"][:, number])
        logits, cache = step(model, chosen[:, None], None, cache, cache.lengths + 1)
        np.testing.assert_allclose(
            logits[:, 0], expected["greedy_step_logits"][:, number], atol=1e-3, rtol=0
        )


@pytest.fixture(scope="module")
def tiny() -> Llama:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    dca = DCAConfig(chunk_len=12, max_query_position=15, trained_length=16, temperature_slope=0.1)
    model = Llama(config, dca=dca, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: x * 20 if x.ndim > 2 else x, model)  # logits worth comparing


@pytest.mark.parametrize("split", [[61], [1] * 61, [12, 12, 12, 25], [11, 13, 1, 36], [60, 1]])
def test_any_split_of_a_prefill_is_the_same(tiny: Llama, split: list[int]) -> None:
    tokens = jax.random.randint(jax.random.key(1), (2, 61), 0, 64)
    expected = run(tiny, tokens)
    cache = KVCache.create(tiny.config, batch=2, capacity=64, dtype=jnp.float32)
    context = jnp.asarray([61, 61], jnp.int32)  # the temperature sees the whole prompt
    pieces, start = [], 0
    for size in split:
        logits, cache = step(tiny, tokens[:, start : start + size], None, cache, context)
        pieces.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=2e-5, rtol=0)


def test_a_ragged_batch_is_each_row_alone(tiny: Llama) -> None:
    """Padding is never written: one row may be full while another has a token left."""
    tokens = jax.random.randint(jax.random.key(2), (3, 40), 0, 64)
    lengths = jnp.asarray([40, 1, 25], jnp.int32)
    cache = KVCache.create(tiny.config, batch=3, capacity=40, dtype=jnp.float32)
    together, cache = step(tiny, tokens, lengths, cache, lengths)
    whole = run(tiny, tokens, lengths)
    for row, length in enumerate([40, 1, 25]):
        alone = run(tiny, tokens[row : row + 1, :length])[0]
        np.testing.assert_allclose(together[row, :length], alone, atol=2e-5, rtol=0)
        np.testing.assert_allclose(whole[row, :length], alone, atol=2e-5, rtol=0)
    assert cache.lengths.tolist() == [40, 1, 25]
    # A second piece: the full row gets none, and nothing it holds is touched.
    before = np.asarray(cache.key[:, 0])
    more, cache = step(tiny, tokens[:, :7], jnp.asarray([0, 7, 3]), cache, lengths + 7)
    np.testing.assert_array_equal(cache.key[:, 0], before)
    assert cache.lengths.tolist() == [40, 8, 28]
    assert np.isfinite(more).all()


@pytest.mark.parametrize("dtype", [jnp.float32, "int8"])
def test_rollback_is_exact(tiny: Llama, dtype: Any) -> None:
    tokens = jax.random.randint(jax.random.key(3), (1, 50), 0, 64)
    context = jnp.asarray([50], jnp.int32)
    cache = KVCache.create(tiny.config, batch=1, capacity=64, dtype=dtype)
    _, cache = step(tiny, tokens[:, :30], None, cache, context)
    first, cache = step(tiny, tokens[:, 30:], None, cache, context)
    _, cache = step(tiny, tokens[:, :9], None, cache.rollback(jnp.asarray([30])), context)
    again, _ = step(tiny, tokens[:, 30:], None, cache.rollback(jnp.asarray([30])), context)
    np.testing.assert_array_equal(first, again)


# --- a cache in 8 bits -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("fp8", 448)])
def test_a_cache_in_8_bits_is_what_is_read(tiny: Llama, dtype: str, largest: float) -> None:
    """Float64 makes of the numbers in the cache what the model does, its own piece's included.

    And they are its keys and values to half a step of the largest of the head.
    """
    dca = DCAConfig(chunk_len=12, max_query_position=15)
    model = Llama.from_params(tiny.config, tiny.params(), dca=dca, dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(6), (2, 61), 0, 64)
    empty = KVCache.create(tiny.config, batch=2, capacity=64, dtype=dtype)
    logits, cache = step(model, tokens, None, empty, jnp.asarray([61, 61], jnp.int32))
    arrays = {name: np.asarray(array) for name, array in cache.stored._asdict().items()}

    def kept(layer: int, name: str, own: np.ndarray) -> np.ndarray:
        numbers = np.float64(arrays[name][layer, :, :61]).reshape(own.shape)
        scale = np.float64(arrays[f"{name}_scale"][layer, :, 0, :, :61]).swapaxes(1, 2)
        np.testing.assert_allclose(scale, np.abs(own).max(axis=-1) / largest, rtol=1e-5)
        read, step = numbers * scale[..., None], scale[..., None] + 0 * own
        if dtype == "fp8":  # 3 bits of mantissa, from 2^-6 on
            step = step * 2 ** np.maximum(np.floor(np.log2(np.abs(numbers) + 1e-9)), -6) / 8
        assert np.all(np.abs(read - own) <= 0.51 * step)
        return read

    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params())
    expected = dense_llama.logits(wide, np.asarray(tokens), tiny.config, 12, 15, kept, xp=np)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_any_split_reads_a_cache_in_8_bits_alike(tiny: Llama) -> None:
    """All but what rounding decides: a key that lies between two numbers may become either."""
    tokens = jax.random.randint(jax.random.key(1), (1, 96), 0, 64)
    context = jnp.asarray([96], jnp.int32)

    def read(size: int, dtype: str) -> tuple[np.ndarray, KVCache]:
        cache = KVCache.create(tiny.config, batch=1, capacity=104, dtype=dtype)
        pieces = []
        for start in range(0, 96, size):
            count = min(size, 96 - start)
            piece = np.pad(tokens[:, start : start + size], ((0, 0), (0, size - count)))
            logits, cache = step(tiny, piece, jnp.full(1, count, jnp.int32), cache, context)
            pieces.append(logits[:, :count])
        return np.concatenate(pieces, axis=1), cache

    whole, one = read(96, "int8")
    lost = np.linalg.norm(whole - run(tiny, tokens))
    assert 1e-3 < lost / np.linalg.norm(whole) < 0.1
    for size in (3, 64):
        split, other = read(size, "int8")
        moved = np.abs(np.int32(one.key) - np.int32(other.key))
        assert moved.max() <= 1
        assert moved.mean() < 1e-3
        assert np.linalg.norm(split - whole) < 0.1 * lost


def test_a_dtype_that_no_cache_has_is_refused(tiny: Llama) -> None:
    for dtype, name in (("int4", "int4"), (jnp.float8_e5m2, "float8_e5m2")):
        with pytest.raises(InputError, match=f"cache dtype '{name}' .* one of .*int8, fp8"):
            KVCache.create(tiny.config, batch=1, capacity=8, dtype=dtype)


def test_dynamic_ntk_keeps_its_frequencies_while_decoding() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=16,
        rope=RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16),
    )
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 40), 0, 64)
    expected = run(model, tokens)
    cache = KVCache.create(config, batch=1, capacity=48, dtype=jnp.float32)
    context = jnp.asarray([40], jnp.int32)
    first, cache = step(model, tokens[:, :30], None, cache, context)
    second, cache = step(model, tokens[:, 30:], None, cache, jnp.asarray([99], jnp.int32))
    logits = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradient_with_and_without_remat(tiny: Llama) -> None:
    tokens = jax.random.randint(jax.random.key(4), (1, 40), 0, 64)

    def grads(remat: str | None) -> Any:
        model = Llama.from_params(
            tiny.config,
            tiny.params(),
            dca=tiny.dca,
            dtype=jnp.float32,
            remat=remat,
        )
        loss = jax.jit(jax.grad(lambda model: jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1))))
        return loss(model).params()

    expected = grads(None)
    for remat in REMAT:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())),
            grads(remat),
            expected,
        )


def test_one_row_has_the_logits_that_it_has_among_others(tiny: Llama) -> None:
    hidden = jax.random.normal(jax.random.key(5), (3, 32), jnp.bfloat16)
    rows, one = tiny.unembed(hidden), tiny.unembed(hidden[:1])
    assert one.shape == (1, 64)
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, rows[:1], rtol=1e-5)


def test_a_table_is_multiplied_where_it_lies() -> None:
    """Tied unembedding of one row on a CPU: no transposed table is written down, nor read across.

    XLA made a loop of its own of such a product instead of a call of its library.
    """
    config = LlamaConfig.from_hf(
        TINY | {"model_type": "llama", "vocab_size": 2048, "tie_word_embeddings": True}
    )
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    hidden = np.random.default_rng(0).standard_normal((1, 32), np.float32)
    table = np.asarray(model.embed_tokens.embedding[...])
    unembed = jax.jit(lambda model, hidden: model.unembed(hidden))
    logits = unembed(model, hidden)
    np.testing.assert_allclose(np.asarray(logits), hidden @ table.T, rtol=1e-5, atol=1e-5)
    hlo = unembed.lower(model, hidden).compile().as_text()
    if jax.default_backend() == "cpu":
        assert "f32[32,2048]" not in hlo


def test_params_round_trip_and_names(tiny: Llama) -> None:
    params = tiny.params()
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].shape == (2, 32, 4, 8)
    again = Llama.from_params(tiny.config, params, dca=tiny.dca, dtype=jnp.float32)
    assert jax.tree.structure(again) == jax.tree.structure(tiny)
    del params["norm"]
    with pytest.raises(InputError, match=r"norm\.scale is missing"):
        Llama.from_params(tiny.config, params)
    params = tiny.params() | {"extra": {"scale": jnp.ones(3)}}
    with pytest.raises(InputError, match=r"unexpected parameters: extra\.scale"):
        Llama.from_params(tiny.config, params)
    params = tiny.params() | {"norm": {"scale": jnp.ones(3)}}
    with pytest.raises(InputError, match=r"norm\.scale has shape \(3,\), expected \(32,\)"):
        Llama.from_params(tiny.config, params)


def test_plain_attention_refuses_more_than_its_sliding_window(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mistral-v0.1")
    tokens = jnp.zeros((1, 129), jnp.int32)
    with pytest.raises(InputError, match="sliding window of 128 tokens"):
        load(tmp_path)(tokens)
    load(tmp_path, dca=GOLDEN_DCA)(tokens)


def test_bfloat16_is_near_float32(tiny: Llama) -> None:
    tokens = jax.random.randint(jax.random.key(4), (1, 40), 0, 64)
    half = Llama.from_params(tiny.config, tiny.params(), dca=tiny.dca, dtype=jnp.bfloat16)
    expected, logits = run(tiny, tokens), run(half, tokens)
    assert logits.dtype == jnp.float32
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05


def test_empty_cache_is_refused() -> None:
    config = LlamaConfig.from_hf(json.loads((GOLDEN / "tiny_llama/config.json").read_text()))
    with pytest.raises(InputError, match="at least 1"):
        KVCache.create(config, batch=0, capacity=16)
