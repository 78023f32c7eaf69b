"""The roofline on paper: its arithmetic, and that docs/lab/tpu.md shows what the script prints."""

from pathlib import Path

import pytest
import tpu_roofline

from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.planning.shapes import SHAPES

pytestmark = pytest.mark.benchmarks

PAGE = Path(__file__).resolve().parent.parent / "docs/lab/tpu.md"


def test_the_page_shows_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tpu_roofline.main()
    page = PAGE.read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page, f"run benchmarks/tpu_roofline.py and put its tables into {PAGE}"


def test_prefill_counts_the_causal_triangle_and_decode_the_cache() -> None:
    heads = Heads(query=8, kv=2, head_dim=128)
    prefill = tpu_roofline.attention_prefill(2048, heads, 1024)
    assert prefill.flops == 4 * 128 * 8 * sum(range(1, 2049))
    # Of each head: keys and values twice for the first 1024, queries and outputs, cos and sin.
    assert prefill.moved == 8 * (2 * 2 * 128 * 3072 + 2 * 2 * 128 * 2048 + 3 * 4 * 128 * 2048)
    decode = tpu_roofline.attention_decode(1000, heads)
    assert decode.moved == 2 * 1000 * 2 * 128 * 2
    assert decode.flops / decode.moved == heads.query / heads.kv


def test_a_time_is_that_of_the_slower_of_arithmetic_and_memory() -> None:
    chip = tpu_roofline.Chip("x", "X", flops=100.0, bandwidth=10.0, memory=1.0)
    assert tpu_roofline.Work(200.0, 1.0).seconds(chip) == 2.0
    assert tpu_roofline.Work(1.0, 50.0).seconds(chip) == 5.0
    assert chip.ridge == 10.0
    assert [tpu_roofline.spelled(x) for x in (2.5, 0.0321, 4e-6)] == ["2.5 s", "32.1 ms", "4 us"]


def test_parameters_and_cache_of_llama_2_7b() -> None:
    config = SHAPES["llama-2-7b"]
    table = config.vocab_size * config.hidden_size
    assert tpu_roofline.weights(config) + table == pytest.approx(6.74e9, rel=0.001)
    assert tpu_roofline.cache_bytes(4096, config) == 2 * 32 * 4096 * 4096 * 2
