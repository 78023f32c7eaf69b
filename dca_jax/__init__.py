"""Dual Chunk Attention in JAX: language models read many times their trained length, untrained.

>>> import dca_jax
>>> llm = dca_jax.load("path/to/a/hugging-face/checkpoint")
>>> print(llm.generate("Once upon a time")[0].text)
"""

from dca_jax.attention import dual_chunk_attention
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.llm import LLM, Generation
from dca_jax.loading import load
from dca_jax.model import Llama
from dca_jax.prefix import Prefix
from dca_jax.rope import RopeConfig
from dca_jax.sampling import Sampler

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "DCAConfig",
    "Generation",
    "InputError",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Prefix",
    "RopeConfig",
    "Sampler",
    "__version__",
    "dual_chunk_attention",
    "load",
]
