"""What reads a text for its perplexity, the passkey grid, and their pictures, on tiny models."""

import json
import math
import re

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx
from tiny_llm import LEAST
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.evaluation import answers, passkey
from dca_jax.evaluation.passkey import PasskeyGrid, first_number, passkey_grid
from dca_jax.evaluation.plots import plot_passkey, plot_perplexity
from dca_jax.inference import score as perplexity_module
from dca_jax.inference.llm import LLM
from dca_jax.inference.pieces import scored_pieces
from dca_jax.inference.score import LOGITS, Reader, perplexity, token_nll, window_nlls
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig

VOCAB = 300
# Tokens that each of two rows reads at once.
PIECE = scored_pieces(LEAST, "cpu", packed=False, batch=2).widths[0]
HOT = DCAConfig(
    chunk_len=40, max_query_position=60, trained_length=64, temperature_slope=0.1
)  # its temperature depends on the length of the whole text
NTK = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=64)


def tiny_model(dca: DCAConfig | None = None, rope: RopeConfig = RopeConfig()) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope=rope,
    )
    model = Llama(config, dca=dca, dtype=jnp.float32, rngs=nnx.Rngs(1))
    # Sharp predictions, so that a wrong position shows.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, model)


def some_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, shape)


# --- perplexity --------------------------------------------------------------------------------


def direct_nll(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """From the logits of a whole forward pass, [B, T, V] at once."""
    logits = jax.jit(Llama.__call__)(model, jnp.asarray(tokens, jnp.int32))
    logprobs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
    return -np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    ("dca", "rope", "length"),
    [
        (None, RopeConfig(), 2),
        (None, RopeConfig(), PIECE + 1),  # one whole piece
        (HOT, RopeConfig(), 100),
        # The second piece has one token.
        pytest.param(HOT, RopeConfig(), PIECE + 2, marks=pytest.mark.slow),
        pytest.param(None, NTK, PIECE + 77, marks=pytest.mark.slow),
    ],
)
def test_token_nll_is_that_of_the_whole_forward_pass(dca, rope, length):
    model, tokens = tiny_model(dca, rope), some_tokens(2, length)
    nll = token_nll(model, tokens)
    assert nll.dtype == np.float32
    assert nll.shape == (2, length - 1)
    np.testing.assert_allclose(nll, direct_nll(model, tokens), atol=2e-4)


def test_capacity_changes_no_figure_and_saves_compilations(compilations):
    model, tokens = tiny_model(HOT), some_tokens(1, 700)
    compilations.clear()
    short, long = token_nll(model, tokens[:, :600], capacity=700), token_nll(model, tokens)
    # Both are pieces of 512 and 64 tokens.
    assert compilations.count("jit(read_piece)") <= 2
    np.testing.assert_allclose(short, token_nll(model, tokens[:, :600]), atol=1e-5)
    np.testing.assert_allclose(long, direct_nll(model, tokens), atol=2e-4)


@pytest.mark.parametrize(
    ("batch", "width", "block"), [(1, 2048, 512), (3, 512, 128), (4, 64, 64), (600, 16, 1)]
)
def test_logits_are_bounded_by_a_block(batch, width, block):
    model = tiny_model(HOT)
    cache = perplexity_module.new_cache(model, batch, 128, more_rows=False)
    piece, lengths = np.zeros((batch, width), np.int32), np.full((batch,), width, np.int32)
    read = perplexity_module.read_piece
    program = str(jax.make_jaxpr(read)(model, cache, piece, piece, lengths, lengths))
    with_vocabulary = set(re.findall(rf"f32\[[\d,]*\b{VOCAB}\]", program))
    # One block's logits, and the kernel they come from.
    assert with_vocabulary == {f"f32[{batch},{block},{VOCAB}]", f"f32[32,{VOCAB}]"}
    assert batch * block <= max(LOGITS, batch)


def test_windows_are_texts_of_their_own():
    model, tokens = tiny_model(HOT), some_tokens(260)
    nlls = list(window_nlls(model, tokens, window=100, stride=70))
    starts = [0, 70, 140]
    direct = [direct_nll(model, tokens[None, s : s + 100]).mean() for s in starts]
    assert nlls == pytest.approx(direct, abs=1e-4)
    without_overlap = list(window_nlls(model, tokens[:200], window=100))  # an exact fit
    assert len(without_overlap) == 2
    assert without_overlap[0] == nlls[0]
    mean = sum(without_overlap) / 2
    assert perplexity(model, tokens[:200], window=100) == pytest.approx(math.exp(mean))


def test_windows_read_together_are_read_as_alone():
    model, tokens = tiny_model(HOT), some_tokens(700)
    alone = list(window_nlls(model, tokens, window=100, stride=90))
    together = list(window_nlls(model, tokens, window=100, stride=90, batch=4))
    assert len(alone) == 7  # a batch of four and one of three, filled up
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_reader_tells_what_it_has_read_and_outlives_a_failure(monkeypatch):
    read: list[int] = []
    model, tokens = tiny_model(), some_tokens(2, 60)
    reader = Reader(model, 2, 2500, read.append)
    expected = direct_nll(model, tokens)
    np.testing.assert_allclose(reader.nll(tokens), expected, atol=2e-4)
    assert sum(read) == 2 * 59
    np.testing.assert_allclose(reader.nll(tokens[:1]), expected[:1], atol=2e-4)
    assert sum(read) == 3 * 59
    whole = perplexity_module.compiled

    def failing(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(perplexity_module, "compiled", lambda *_, **__: failing)
    with pytest.raises(RuntimeError):
        reader.nll(tokens)
    monkeypatch.setattr(perplexity_module, "compiled", whole)
    np.testing.assert_allclose(reader.nll(tokens), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: token_nll(m, some_tokens(1, 1)), "texts of at least 2 tokens, got 1"),
        (lambda m: token_nll(m, some_tokens(1, 20), capacity=19), "19 tokens cannot hold"),
        (lambda m: token_nll(m, np.full((1, 5), VOCAB)), "vocabulary of 300"),
        (lambda m: token_nll(m, np.full((1, 5), -1)), "from -1 to -1"),
        (lambda m: window_nlls(m, some_tokens(9), window=10), "got 9 tokens, fewer than"),
        (lambda m: window_nlls(m, some_tokens(9), window=1), "a window needs at least 2"),
        (lambda m: window_nlls(m, some_tokens(9), window=5, stride=0), "stride"),
        (lambda m: window_nlls(m, some_tokens(9), window=5, batch=0), "batch"),
        (lambda m: window_nlls(m, np.full(9, VOCAB), window=5), "vocabulary"),
    ],
)
def test_bad_input_is_refused_when_called(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny_model())


# --- passkey -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A tiny random model that reads characters."""
    text = passkey.passkey_text(5, 0.5, "0123456789")
    vocab = {char: n for n, char in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode(fast(text).input_ids) == text
    return LLM(model=tiny_model(HOT), tokenizer=fast, stop_ids=frozenset(), cache_dtype=jnp.float32)


def test_grid_counts_each_answer_in_its_cell(llm, monkeypatch):
    """The engine is replaced by a reader that knows its key only where it lies early."""
    batches = []

    def replies(model, rows, *, max_new_tokens, stop_ids, cache, on_piece):
        batches.append((len(rows), cache.capacity))
        assert max(map(len, rows)) + max_new_tokens <= cache.capacity
        texts = [llm.tokenizer.decode(row) for row in rows]
        for text in texts:
            assert text.endswith(passkey.QUESTION)
        keys = [re.search(r"The pass key is ([0-9]{5})", text) for text in texts]
        on_piece(sum(map(len, rows)))
        known = [key.start() < 450 for key in keys]
        return [
            llm.tokenize(f" {key.group(1)} is" if knows else f" {key.group(1)}0")
            for key, knows in zip(keys, known, strict=True)
        ]

    monkeypatch.setattr(answers, "generate", replies)
    read: list[int] = []
    grid = passkey_grid(
        llm, [600, 900], [0.0, 0.5, 1.0], trials=2, seed=3, batch=5, on_tokens=read.append
    )
    assert len(set(batches)) == 1  # one shape
    assert [size for size, _ in batches] == [5, 5, 5]
    assert len(read) == 3
    # 600 characters: the last third begins after 450; 900: so does the middle.
    assert grid.found.tolist() == [[2, 2, 0], [2, 0, 0]]
    assert grid.accuracy.tolist() == [[1, 1, 0], [1, 0, 0]]
    saved = json.loads(json.dumps(grid.to_dict()))
    assert saved == {
        "lengths": [600, 900],
        "depths": [0.0, 0.5, 1.0],
        "trials": 2,
        "found": [[2, 2, 0], [2, 0, 0]],
    }


def test_a_cells_prompts_do_not_depend_on_the_grid(llm):
    prompt = passkey._cell_prompt(llm, 600, 0.5, 1, seed=3)
    assert prompt == passkey._cell_prompt(llm, 600, 0.5, 1, seed=3)
    others = [(600, 0.5, 0, 3), (600, 0.4, 1, 3), (700, 0.5, 1, 3), (600, 0.5, 1, 4)]
    assert prompt.key not in {passkey._cell_prompt(llm, *other).key for other in others}


def test_a_random_model_finds_nothing(llm):
    grid = passkey_grid(llm, [500], [0.0, 1.0], batch=2)
    assert grid.found.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (" 12345.", "12345"),
        ("12345 67890", "12345"),
        (" 123456", "123456"),
        (" is 7", "7"),
        ("no", None),
        ("", None),
    ],
)
def test_first_number(answer, number):
    assert first_number(answer) == number


@pytest.mark.parametrize(
    ("lengths", "depths", "options", "message"),
    [
        ([], [0.5], {}, "needs lengths"),
        ([500], [], {}, "needs lengths, depths"),
        ([500], [0.5], {"trials": 0}, "0 trials"),
        ([500], [0.5], {"batch": 0}, "batch 0"),
        ([500], [1.5], {}, "between 0 and 1"),
        ([20], [0.5], {}, "at least"),
    ],
)
def test_bad_grids_are_refused(llm, lengths, depths, options, message):
    with pytest.raises(InputError, match=message):
        passkey_grid(llm, lengths, depths, **options)


# --- pictures ----------------------------------------------------------------------------------

LENGTHS = (512, 1024, 8192)


def grid_of(*found: tuple[int, ...]) -> PasskeyGrid:
    return PasskeyGrid(lengths=LENGTHS, depths=(0.0, 1.0), trials=4, found=np.array(found))


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_pictures_are_saved_whole_and_leave_matplotlib_alone(tmp_path):
    settings, backend = dict(mpl.rcParams), mpl.get_backend()
    curves = {"RoPE": dict(zip(LENGTHS, (8.0, 40.0, 900.5), strict=True)), "DCA": {512: 8.0}}
    for _ in range(2):  # the second run replaces the first one's files
        plot_perplexity(curves, tmp_path / "perplexity.png", trained_length=512)
        grids = {"RoPE": grid_of((4, 3), (0, 0), (0, 0)), "DCA": grid_of((4, 4), (4, 4), (4, 2))}
        plot_passkey(grids, tmp_path / "passkey.png", trained_length=512)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passkey.png", "perplexity.png"]
    for path in tmp_path.iterdir():
        width, height = png_size(path)
        assert width >= 1000
        assert height >= 600
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == settings
    assert mpl.get_backend() == backend


def test_pictures_show_the_figures(tmp_path, monkeypatch):
    """What is drawn, read back from the figure's own objects."""
    from dca_jax.evaluation import plots

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    curves = {"RoPE": {512: 8.0, 1024: 90.0}, "DCA": {512: 8.0, 1024: 7.5}}
    plot_perplexity(curves, tmp_path / "a.png", trained_length=512)
    plot_passkey({"DCA": grid_of((4, 3), (2, 1), (0, 4))}, tmp_path / "b.png", trained_length=512)
    (axes,) = figures[0].axes
    drawn = {
        line.get_label(): line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 2
    }
    assert {name: list(drawn[name]) for name in curves} == {"RoPE": [8, 90], "DCA": [8, 7.5]}
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 3
    heat_map = figures[1].axes[0]
    np.testing.assert_array_equal(heat_map.images[0].get_array(), [[1, 0.5, 0], [0.75, 0.25, 1]])
    cells = [text.get_text() for text in heat_map.texts]
    assert cells == ["100%", "50%", "0%", "75%", "25%", "100%"]


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.5])
def test_what_is_no_perplexity_is_not_drawn(tmp_path, value):
    with pytest.raises(InputError, match="finite and at least 1"):
        plot_perplexity({"RoPE": {512: value}}, tmp_path / "a.png", trained_length=512)
    assert not list(tmp_path.iterdir())


def test_empty_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected 1 to"):
        plot_perplexity({}, tmp_path / "a.png", trained_length=512)
    with pytest.raises(InputError, match="no passkey grid"):
        plot_passkey({}, tmp_path / "a.png", trained_length=512)
