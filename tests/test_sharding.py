"""One code path on every mesh: logits, loss, gradients and tokens are those of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import collective_sizes, lower
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_llm import DIVISIBLE

from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.buckets import copied, new_cache
from dca_jax.inference.generate import Run, generate
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import read
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import AXES, describe, make_mesh, mesh_of, parse_mesh
from dca_jax.weights.placement import check_mesh, parameter_shardings

CONFIG = DIVISIBLE
DCA = DCAConfig(chunk_len=10, max_query_position=14)
LENGTHS = np.array([37, 5, 1, 20, 36, 30, 2, 19], np.int32)  # no axis divides T = 37
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 37)).astype(np.int32)
PROMPTS = [TOKENS[0].tolist(), TOKENS[1, :5].tolist(), np.tile(TOKENS[2], 4).tolist()]

# Each two axes cut together, fsdp and tensor whole (data cuts rows as fsdp does), and those that
# share a text's work in four. Of the ring among eight, which takes long to compile:
# test_context.py, and the tokens below; of context=2,fsdp=2,tensor=2: test_finetune_train.py.
QUICK = [(2, 2, 1, 2), (1, 1, 4, 2)]
MESHES = [*QUICK, (1, 8, 1, 1), (1, 1, 1, 8), (2, 1, 2, 2)]
# Of those that generate. In data=2,fsdp=2 and in context=4,tensor=2 a text goes on; data=2,
# context=2,tensor=2 draws; test_experts.py generates on fsdp=2,context=2,tensor=2.
SOME = [(1, 1, 8, 1), (1, 1, 1, 8)]


def meshes(sizes: list[tuple[int, ...]]) -> list:
    """As cases of a test, all but the first two slow ones."""
    return [
        pytest.param(dict(zip(AXES, x, strict=True)), marks=[pytest.mark.slow] * (x not in QUICK))
        for x in sizes
    ]


def of_three_phases(sizes: dict[str, int]) -> DCAConfig | None:
    """DCA on the first two, with a ring and without; elsewhere one phase, a third to compile."""
    return DCA if tuple(sizes.values()) in QUICK else None


@functools.cache
def params() -> dict[str, np.ndarray]:
    """Random weights, large enough for the logits to differ."""
    model = Llama(CONFIG, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    leaves = flatten_dict(model.params(), sep=".")
    return {k: np.asarray(v) * np.float32(10 if v.ndim > 2 else 1) for k, v in leaves.items()}


def model_on(sizes: dict[str, int] | None, config: LlamaConfig = CONFIG, **options) -> Llama:
    options = {"dca": DCA, "dtype": jnp.float32} | options
    if sizes is None:
        leaves = {name: jnp.asarray(leaf) for name, leaf in params().items()}
    else:
        place = parameter_shardings(config, make_mesh(sizes))
        leaves = {name: jax.device_put(leaf, place(name)) for name, leaf in params().items()}
    return Llama.from_params(config, unflatten_dict(leaves, sep="."), **options)


def loss_and_logits(model: Llama, tokens: jax.Array, lengths: jax.Array):
    """Summed NLL of what follows each token, and the logits: both of one forward pass."""
    hidden, _ = model.hidden_states(tokens, lengths=lengths)
    nll = model.nll(hidden, jnp.roll(tokens, -1, axis=1))
    counts = jnp.arange(nll.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None] - 1
    return jnp.where(counts, nll, 0).sum() / 100, model.unembed(hidden)


@functools.cache
def graded():
    return jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))


@functools.cache
def expected(dca: DCAConfig | None):
    (loss, logits), gradient = graded()(model_on(None, dca=dca), TOKENS, LENGTHS)
    return float(loss), np.asarray(logits), flatten_dict(gradient.params(), sep=".")


def test_the_meshes_cut_every_two_axes_together():
    """All but fsdp and context: their loss and gradients are test_finetune_train.py's."""
    together = {
        (AXES[one], AXES[other])
        for one, other in itertools.combinations(range(4), 2)
        if any(mesh[one] == mesh[other] == 2 for mesh in MESHES)
    }
    assert together == set(itertools.combinations(AXES, 2)) - {("fsdp", "context")}
    most = {name: max(mesh[axis] for mesh in MESHES) for axis, name in enumerate(AXES)}
    assert most == {"data": 2, "fsdp": 8, "context": 4, "tensor": 8}


@pytest.mark.parametrize("sizes", meshes(MESHES), ids=describe)
def test_logits_loss_and_gradients_are_those_of_one_device(sizes):
    dca = of_three_phases(sizes)
    loss, logits, gradient = expected(dca)
    model = model_on(sizes, dca=dca)
    (got_loss, got_logits), got = graded()(model, TOKENS, LENGTHS)
    is_text = np.arange(37)[None, :] < LENGTHS[:, None]
    np.testing.assert_allclose(float(got_loss), loss, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(got_logits)[is_text], logits[is_text], atol=1e-5)
    for name, leaf in flatten_dict(got.params(), sep=".").items():
        scale = np.abs(gradient[name]).max()
        np.testing.assert_allclose(leaf, gradient[name], atol=1e-5 * scale, err_msg=name)
        parameter = flatten_dict(model.params(), sep=".")[name]
        assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), name


@functools.cache
def expected_tokens(sampler: Sampler | None = None):
    options = {} if sampler is None else {"sampler": sampler, "seed": 3}
    return generate(model_on(None), PROMPTS, max_new_tokens=12, stop_ids=[7], **options)


@pytest.mark.parametrize("sizes", meshes(SOME), ids=describe)
def test_generated_tokens_are_those_of_one_device(sizes):
    """Three prompts, one longer than a chunk twelve times: rows, slots and heads are all cut."""
    model = model_on(sizes)
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids=[7]) == expected_tokens()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"context": 4, "tensor": 2}, {"data": 2, "fsdp": 2}], ids=describe
)
def test_a_cache_in_8_bits_is_cut_with_its_scales(sizes):
    """A text read at once, its cache copied and grown, then a second turn in pieces, and tokens.

    Slots are cut in two blocks for each of four devices; or rows.
    """
    model, alone = model_on(sizes), model_on(None)
    first, both = PROMPTS[0], PROMPTS[0] + PROMPTS[2]
    tokens = []
    for reader in (model, alone):
        run = Run(reader, [first], max_new_tokens=1, cache_dtype="int8")
        run.read_prompts()
        cache = run.cache.rollback([len(first)])
        if "context" in sizes:
            cache = copied(reader, cache, 1, 256)
            for scale in (cache.key_scale, cache.value_scale):
                assert scale.sharding.shard_shape(scale.shape)[2] == (2 if reader is model else 1)
        again = Run(reader, [both], max_new_tokens=6, cache=cache)
        tokens.append([token for (new,) in again for token in new])
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_draws_are_those_of_one_device():
    sampler = Sampler(temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    sizes = {"data": 2, "context": 2, "tensor": 2}
    options = {"max_new_tokens": 12, "stop_ids": [7], "sampler": sampler, "seed": 3}
    assert generate(model_on(sizes), PROMPTS, **options) == expected_tokens(sampler)


@pytest.mark.slow
def test_a_text_goes_on_in_a_cache_cut_along_context():
    """A prompt read at once, then a second turn after it in pieces, in a cache that has grown."""
    model = model_on({"context": 4, "tensor": 2})
    first, both = PROMPTS[0], PROMPTS[0] + PROMPTS[2]
    cache = new_cache(model, 1, len(first) + 1)
    run = Run(model, [first], max_new_tokens=1, cache=cache)
    run.read_prompts()
    cache = copied(model, run.cache.rollback([len(first)]), 1, 256)
    assert cache.key.sharding.spec[2] in ("context", ("context",))
    again = Run(model, [both], max_new_tokens=12, cache=cache)
    assert [t for (new,) in again for t in new] == generate(
        model_on(None), [both], max_new_tokens=12
    )[0]


def test_plain_attention_and_tied_embeddings_run_on_a_mesh_too():
    from dataclasses import replace

    config = replace(CONFIG, tie_word_embeddings=True)
    leaves = {name: leaf for name, leaf in params().items() if name != "lm_head.kernel"}
    place = parameter_shardings(config, make_mesh("fsdp=2,context=2,tensor=2"))
    there = {name: jax.device_put(leaf, place(name)) for name, leaf in leaves.items()}
    here = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    got, want = (
        jax.jit(Llama.__call__)(
            Llama.from_params(config, unflatten_dict(x, sep="."), dtype=jnp.float32),
            TOKENS,
            LENGTHS,
        )
        for x in (there, here)
    )
    is_text = np.arange(37)[None, :] < LENGTHS[:, None]
    np.testing.assert_allclose(np.asarray(got)[is_text], np.asarray(want)[is_text], atol=1e-5)


# --- what moves between devices ----------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["context=2,tensor=2", "data=2,tensor=2"])
def test_no_collective_moves_the_cache_or_the_weights(sizes):
    """Reading a piece exchanges activations, which are far smaller than either."""
    model = model_on(parse_mesh(sizes))
    tokens, lengths = np.zeros((2, 4), np.int32), np.full(2, 4, np.int32)

    @jax.jit
    def piece(model: Llama, key: jax.Array, value: jax.Array, held: jax.Array, *inputs: jax.Array):
        cache = KVCache(key=key, value=value, lengths=held, frequency_lengths=held)
        return read(model, cache, jnp.zeros((2, 32), jnp.float32), *inputs)

    cache = new_cache(model, 2, 1024, more_rows=False)
    arrays = cache.key, cache.value, cache.lengths, tokens, lengths, lengths
    program = piece.lower(model, *arrays).compile()
    moved = collective_sizes(program.as_text())
    assert moved, "devices that exchange nothing share no work"
    assert max(moved) < cache.key[0].size // 8


@pytest.mark.parametrize("sizes", ["tensor=4", "context=2,tensor=2"])
def test_no_collective_of_a_drawn_token_moves_a_weight(sizes):
    """Not even the table of tokens, of which one row is read."""
    lowered = lower("decode", CONFIG, make_mesh(sizes), capacity=1024, dtype=jnp.float32)
    moved = collective_sizes(lowered.compile().as_text())
    smallest = min(leaf.size for leaf in params().values() if leaf.ndim > 2)
    assert 0 < max(moved) < smallest // CONFIG.num_hidden_layers
    assert max(moved) < params()["embed_tokens.embedding"].size


# --- meshes ------------------------------------------------------------------------------------


def test_a_mesh_is_written_by_its_axes():
    assert parse_mesh("context=2, tensor=4") == {"data": 1, "fsdp": 1, "context": 2, "tensor": 4}
    assert describe(parse_mesh("")) == "one device"
    assert describe(parse_mesh("tensor=2,data=2")) == "data=2,tensor=2"
    assert dict(make_mesh("tensor=4").shape) == parse_mesh("tensor=4")
    assert dict(make_mesh().shape) == parse_mesh("tensor=8")


@pytest.mark.parametrize("text", ["model=2", "tensor", "tensor=0", "tensor=two", "tensor=-1"])
def test_a_mesh_that_is_none(text):
    with pytest.raises(InputError, match="expected a mesh such as context=2,tensor=4"):
        parse_mesh(text)


def test_an_axis_named_twice():
    with pytest.raises(InputError, match="names the axis tensor twice"):
        parse_mesh("tensor=2,tensor=4")


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="tensor=16 needs 16 devices, but there are 8"):
        make_mesh("tensor=16")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("tensor=3", r"tensor=3 does not divide the model's 8 query heads; .*\[1, 2, 4, 8\]"),
        ("fsdp=5", r"fsdp=5 does not divide the hidden size 32; .*\[1, 2, 4, 8, 16, 32\]"),
    ],
)
def test_sizes_that_do_not_divide_name_those_that_would(sizes, message):
    with pytest.raises(InputError, match=message):
        check_mesh(CONFIG, parse_mesh(sizes))


def test_kv_heads_fewer_than_devices_are_repeated_with_a_warning(caplog):
    check_mesh(CONFIG, parse_mesh("tensor=8"))
    assert "each is kept 4 times" in caplog.text


def test_kv_heads_that_fit_no_way():
    from dataclasses import replace

    config = replace(CONFIG, num_attention_heads=12, num_key_value_heads=6)
    config = replace(config, intermediate_size=96)
    with pytest.raises(InputError, match=r"neither divides the model's 6 kv heads nor .*\[1, 2, 3"):
        check_mesh(config, parse_mesh("tensor=4"))


def test_a_batch_that_does_not_divide():
    model = model_on({"data": 4})
    with pytest.raises(InputError, match="a batch of 2 rows does not divide over the mesh's 4"):
        model(jnp.asarray(TOKENS[:2]))


def test_mesh_of_a_model():
    assert mesh_of(model_on(None)) is None
    mesh = mesh_of(model_on({"tensor": 2}))
    assert mesh is not None
    assert mesh.shape["tensor"] == 2


# --- on GPUs -----------------------------------------------------------------------------------

WIDE = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=512,
)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ["tensor=2", "context=2", "data=2", "fsdp=2"])
def test_two_gpus_give_what_one_does(sizes):
    """The kernels on a mesh, bfloat16: loss, gradients and the next tokens' logits."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    dca = DCAConfig(chunk_len=200, max_query_position=300)
    start = Llama(WIDE, dca=dca, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    leaves = flatten_dict(jax.tree.map(lambda x: x * 2, start.params()), sep=".")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 1500)).astype(np.int32)
    lengths = np.array([1500, 777], np.int32)
    place = parameter_shardings(WIDE, make_mesh(sizes))

    def run(params: dict[str, jax.Array]):
        options = {"dca": dca, "dtype": jnp.bfloat16, "implementation": "mosaic_gpu"}
        model = Llama.from_params(WIDE, unflatten_dict(params, sep="."), **options)
        (loss, _), gradient = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(
            model, tokens, lengths
        )
        cache = new_cache(model, 2, 1600)
        prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        hidden = Run(model, prompts, max_new_tokens=4, cache=cache).read_prompts()
        return float(loss), flatten_dict(gradient.params(), sep="."), np.asarray(hidden)

    loss, gradient, hidden = run(leaves)
    got_loss, got, got_hidden = run({k: jax.device_put(v, place(k)) for k, v in leaves.items()})
    assert abs(got_loss / loss - 1) < 1e-3
    for name, leaf in got.items():
        want = np.asarray(gradient[name])
        assert np.linalg.norm(np.asarray(leaf) - want) < 0.03 * np.linalg.norm(want), name
    difference = (got_hidden[:2] - hidden[:2]).astype(np.float32)
    assert np.linalg.norm(difference) < 0.03 * np.linalg.norm(hidden[:2].astype(np.float32))
