"""The paper's own examples, the presets, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dca_jax.dca import (
    PHASES,
    DCAConfig,
    key_range,
    phases_within,
    query_position,
    relative_positions,
    temperature,
)
from dca_jax.errors import InputError
from dca_jax.planning.explain import explain, plot_relative_positions


def test_figure_2_of_the_paper() -> None:
    dca = DCAConfig(chunk_len=6, max_query_position=9)
    succ = query_position(jnp.arange(6, 12), "succ", dca)
    assert succ.tolist() == [6, 7, 8, 9, 9, 9]
    matrix = relative_positions(12, dca)
    assert matrix[11].tolist() == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]
    assert matrix[6].tolist() == [6, 5, 4, 3, 2, 1, 0, -1, -1, -1, -1, -1]


def test_figure_8_of_the_paper() -> None:
    dca = DCAConfig(chunk_len=4, max_query_position=7)
    assert query_position(jnp.arange(4, 8), "succ", dca).tolist() == [4, 5, 6, 7]
    assert query_position(jnp.arange(8, 12), "inter", dca).tolist() == [7, 7, 7, 7]
    assert relative_positions(12, dca)[11].tolist() == [7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0]


# Few lengths, because each is compiled.
@given(st.integers(1, 9), st.integers(0, 12), st.sampled_from([1, 2, 9, 10, 19, 40]))
def test_relative_positions_are_the_definition(s: int, extra: int, length: int) -> None:
    matrix = relative_positions(length, DCAConfig(chunk_len=s, max_query_position=s + extra))
    for i in range(length):
        for j in range(length):
            expected = oracle.relative_position(i, j, s, s + extra) if j <= i else -1
            assert matrix[i, j] == expected


@given(
    st.integers(1, 20), st.integers(0, 20), st.sampled_from([1, 2, 5, 10, 11, 20, 21, 40, 41, 80])
)
def test_local_window_identity_range_and_bound(s: int, extra: int, length: int) -> None:
    dca = DCAConfig(chunk_len=s, max_query_position=s + extra)
    matrix = relative_positions(length, dca)
    i, j = np.indices(matrix.shape)
    near = (j <= i) & (i - j <= dca.local_window)
    np.testing.assert_array_equal(matrix[near], (i - j)[near])
    assert matrix.max() == min(length - 1, 2 * s - 1, s + extra)
    same = (i < dca.identity_range) & (j <= i)
    np.testing.assert_array_equal(matrix[same], (i - j)[same])
    if length > dca.identity_range:  # and no token more
        assert matrix[dca.identity_range].tolist() != (i - j)[dca.identity_range].tolist()


@given(st.integers(1, 9), st.integers(0, 60))
def test_the_three_key_ranges_are_all_keys_once(s: int, i: int) -> None:
    dca = DCAConfig(chunk_len=s, max_query_position=s)
    keys: list[int] = []
    for phase in PHASES:
        start, stop = (int(x) for x in key_range(jnp.asarray(i), phase, dca))
        keys += range(start, stop)
    assert keys == list(range(i + 1))


def test_phases_within() -> None:
    dca = DCAConfig(chunk_len=4, max_query_position=4)
    met = {n: phases_within(n, dca) for n in (1, 4, 5, 8, 9)}
    assert met[1] == met[4] == ("intra",)
    assert met[5] == met[8] == ("succ", "intra")
    assert met[9] == ("inter", "succ", "intra")


@pytest.mark.parametrize(
    ("preset", "s", "largest"),
    [
        ("paper", 3072, 4095),
        ("chunkllama", 2560, 3072),
        ("chunkllama_ppl", 2048, 3072),
        ("chunkllama_flash_decoding", 2816, 3072),
    ],
)
def test_presets(preset: str, s: int, largest: int) -> None:
    dca = getattr(DCAConfig, preset)(4096)
    assert (dca.chunk_len, dca.max_query_position, dca.trained_length) == (s, largest, 4096)
    assert dca.temperature_slope == 0.0
    with pytest.raises(InputError, match="multiple"):
        getattr(DCAConfig, preset)(4097)


def test_from_hf_qwen_1m() -> None:
    config = {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
        "sparse_attention_config": "sparse.json",
        "sparse_attention_enabled": True,
    }
    dca = DCAConfig.from_hf(config)
    assert (dca.chunk_len, dca.max_query_position) == (253952, 262144)
    assert dca.temperature_slope == 0.1
    again = DCAConfig.from_hf(json.loads(json.dumps(dca.to_hf())))
    assert again == dca


def test_a_setting_without_temperature_comes_back_without_one() -> None:
    """Hugging Face's key for the trained length asks for the temperature too: it is not written."""
    for setting in (DCAConfig.paper(4096), DCAConfig(chunk_len=3, max_query_position=5)):
        written = json.loads(json.dumps(setting.to_hf()))
        assert "original_max_position_embeddings" not in written
        assert DCAConfig.from_hf(written) == setting
    with pytest.raises(InputError, match=r"slopes 0 and 0\.1, got 0\.05"):
        DCAConfig.paper(64, temperature_slope=0.05).to_hf()


def test_temperature() -> None:
    dca = DCAConfig.paper(64, temperature_slope=0.05)
    tau = np.asarray(temperature(jnp.asarray([1, 64, 400]), dca))
    np.testing.assert_allclose(tau, [1.0, 1.0, 1.0916290731874154**2], rtol=1e-6)
    assert temperature(jnp.asarray([400]), DCAConfig.paper(64)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunk_len": 10, "max_query_position": 9}, "must not exceed max_query_position"),
        ({"chunk_len": 0, "max_query_position": 9}, "positive integer"),
        ({"chunk_len": True, "max_query_position": 9}, "positive integer"),
        ({"chunk_len": 4, "max_query_position": 9, "trained_length": 8}, "trained length"),
        ({"chunk_len": 4, "max_query_position": 9, "temperature_slope": -1.0}, "at least 0"),
        ({"chunk_len": 4, "max_query_position": 9, "temperature_slope": 0.1}, "trained_length"),
    ],
)
def test_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DCAConfig(**kwargs)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"chunk_size": 8},
        {"chunk_size": 8, "local_size": 8},
        {"chunk_size": "8", "local_size": 1},
    ],
)
def test_from_hf_refuses(config: dict) -> None:
    with pytest.raises(InputError, match="dual_chunk_attention_config"):
        DCAConfig.from_hf(config)


def test_explain_and_plot() -> None:
    text = explain(DCAConfig.chunkllama(4096, temperature_slope=0.1), 100_000)
    for fact in ("4096", "2560", "up to 3073 tokens", "513 apart", "99999", "1.7"):
        assert fact in text
    import matplotlib.pyplot as plt

    axes = plot_relative_positions(12, DCAConfig(chunk_len=6, max_query_position=9))
    assert "9" in {text.get_text() for text in axes.texts}
    plt.close("all")
