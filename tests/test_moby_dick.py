"""NLL of a real model on a real book, at every length and setting, against the original code.

The golden figures are those of the released ChunkLlama on `../shared`'s 656k-parameter Llama
(trained on 512 tokens) reading Moby Dick; see `tests/golden/chunkllama`.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from dca_jax.dca import DCAConfig
from dca_jax.inference.score import perplexity, token_nll
from dca_jax.model import Llama
from dca_jax.weights import huggingface
from dca_jax.weights.folder import load_weights

GOLDEN = Path(__file__).parent / "golden" / "chunkllama" / "tinystories_656k_moby.json"
ROWS = json.loads(GOLDEN.read_text())["rows"]
SETTINGS = {
    "plain_rope": None,
    "chunkllama": DCAConfig.chunkllama(512),
    "chunkllama_ppl": DCAConfig.chunkllama_ppl(512),
    "chunkllama_flash_decoding": DCAConfig.chunkllama_flash_decoding(512),
}
LONGEST = 8192
HEAD_DIM = 16


def folder_of(shared: Path, name: str) -> Path:
    path = shared / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return path


@pytest.fixture(scope="module")
def tokens(shared) -> np.ndarray:
    return read_tokens(shared)


def read_tokens(shared: Path) -> np.ndarray:
    book = folder_of(shared, "data/books/moby-dick.txt").read_text(encoding="utf-8")
    start = book.index("Call me Ishmael")
    tokenizer = Tokenizer.from_file(
        str(folder_of(shared, "models/tinystories-656k/tokenizer.json"))
    )
    encoding = tokenizer.encode(book[start : start + 60_000], add_special_tokens=False)
    tokens = np.array(encoding.ids[:LONGEST], np.int32)
    assert tokens[:16].tolist() == json.loads(GOLDEN.read_text())["first_tokens"]
    return tokens


def load(
    shared: Path,
    dca: DCAConfig | None,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Llama:
    folder = folder_of(shared, "models/tinystories-656k")
    config = huggingface.read_config(folder)
    params = load_weights(folder, config, dtype=jnp.float32)
    options = {"dca": dca, "dtype": dtype, "implementation": implementation}
    return Llama.from_params(config, params, **options)


# The whole text by one setting: time grows with its square, and a quarter of it is five chunks.
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_nll_at_every_length(shared, tokens, setting):
    # Attention is causal, so the window [0, L) is the beginning of the longest one.
    longest = LONGEST if setting == "chunkllama_ppl" else LONGEST // 4
    nll = token_nll(load(shared, SETTINGS[setting]), tokens[None, :longest])[0]
    rows = [row for row in ROWS if row["setting"] == setting and row["L"] <= longest]
    lengths = [300, 512, 1024, 2048, 4096, LONGEST]
    assert [row["L"] for row in rows] == [n for n in lengths if n <= longest]
    ours = [float(nll[: row["L"] - 1].mean()) for row in rows]
    assert ours == pytest.approx([row["nll"] for row in rows], abs=1e-3)


@pytest.mark.parametrize("setting", ["plain_rope", "chunkllama_ppl"])
def test_golden_perplexity_of_a_window_of_its_own(shared, tokens, setting):
    model = load(shared, SETTINGS[setting])
    golden = {row["L"]: row["nll"] for row in ROWS if row["setting"] == setting}
    for length in (300, 1024):
        ours = perplexity(model, tokens[:length], window=length, capacity=1024)
        assert np.log(ours) == pytest.approx(golden[length], abs=1e-3)
