"""Dual Chunk Attention in JAX: run language models far beyond their trained length, training-free.

>>> import dca_jax
>>> llm = dca_jax.load("path/to/a/hugging-face/checkpoint")
>>> print(llm.generate("Once upon a time")[0].text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dca_jax.attention.op import dual_chunk_attention
    from dca_jax.config import LlamaConfig
    from dca_jax.dca import DCAConfig
    from dca_jax.errors import InputError
    from dca_jax.inference.llm import LLM, Generation
    from dca_jax.inference.load import load
    from dca_jax.inference.options import Options
    from dca_jax.inference.prefix import Prefix
    from dca_jax.inference.sampling import Sampler
    from dca_jax.kv_cache import KVCache
    from dca_jax.model import Llama
    from dca_jax.rope import RopeConfig

__version__ = "0.2.0"

# Imported on first access (PEP 562): using only the attention needs no checkpoint library.
_HOMES = {
    "LLM": "dca_jax.inference.llm",
    "DCAConfig": "dca_jax.dca",
    "Generation": "dca_jax.inference.llm",
    "InputError": "dca_jax.errors",
    "KVCache": "dca_jax.kv_cache",
    "Llama": "dca_jax.model",
    "LlamaConfig": "dca_jax.config",
    "Options": "dca_jax.inference.options",
    "Prefix": "dca_jax.inference.prefix",
    "RopeConfig": "dca_jax.rope",
    "Sampler": "dca_jax.inference.sampling",
    "dual_chunk_attention": "dca_jax.attention.op",
    "load": "dca_jax.inference.load",
}

__all__ = [
    "LLM",
    "DCAConfig",
    "Generation",
    "InputError",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Options",
    "Prefix",
    "RopeConfig",
    "Sampler",
    "__version__",
    "dual_chunk_attention",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
