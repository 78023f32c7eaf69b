"""ChunkLlama's tiny model and what ChunkLlama computes with it (chunks of 40 tokens)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dca_jax.dca import DCAConfig
from dca_jax.model import Llama
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config

FOLDER = Path(__file__).resolve().parent / "golden" / "chunkllama"
CAPACITY = 352  # of the cache that its prompts get by default


def load_outputs() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "tiny_llama_golden.npz"))


def load_setting() -> DCAConfig:
    setting = json.loads((FOLDER / "tiny_llama_golden.json").read_text())
    return DCAConfig(
        chunk_len=setting["chunk_len"], max_query_position=setting["max_query_position"]
    )


def load_model(dca: DCAConfig | None) -> Llama:
    config = read_config(FOLDER / "tiny_llama")
    params = load_weights(FOLDER / "tiny_llama", config, dtype=jnp.float32)
    return Llama.from_params(config, params, dca=dca, dtype=jnp.float32)
