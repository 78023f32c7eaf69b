"""The benchmark of reading a long text: it runs, and its shares make sense."""

import common
import generate
import jax
import numpy as np
import perplexity
import pytest

pytestmark = pytest.mark.benchmarks


def test_a_window_and_its_attention_are_measured(monkeypatch):
    monkeypatch.setattr(common, "WARM_UP", 0.0)
    monkeypatch.setattr(common, "BLOCK", 1e-3)
    model = generate.random_model(generate.PRESETS["tiny"], dca=True, implementation=None)
    row = perplexity.measured(model, 300)
    assert row["tokens/s"] == pytest.approx(300 / row["s"])
    assert row["share"] == pytest.approx(row["attention s"] / row["s"])
    assert row["attention s"] > 0
    assert np.isfinite(row["peak GB"]) == (jax.default_backend() == "gpu")
