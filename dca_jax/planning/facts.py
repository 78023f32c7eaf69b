"""What a checkpoint is, in words and figures."""

import math
from pathlib import Path

from rich.filesize import decimal

from dca_jax.config import LlamaConfig, choose_dca
from dca_jax.errors import InputError
from dca_jax.weights.gguf_file import gguf_files, is_gguf
from dca_jax.weights.huggingface import open_checkpoint
from dca_jax.weights.orbax import PARAMS, is_converted
from dca_jax.weights.parameters import parameters


def checkpoint_facts(folder: Path, config: LlamaConfig) -> dict[str, str]:
    """What there is to know of a checkpoint without reading its weights, by name, in order."""
    count = sum(math.prod(row.shape(config)) for row in parameters(config))
    converted = is_converted(folder)
    kind = "Orbax" if converted else "safetensors" if any(folder.glob("*.safetensors")) else "bin"
    files = (folder / PARAMS).rglob("*") if converted else folder.glob(f"*.{kind}")
    if is_gguf(folder):
        packed = open_checkpoint(folder, config).packed
        kind, files = ", ".join(["GGUF", *packed]), gguf_files(folder)
    stored = sum(file.stat().st_size for file in files if file.is_file())
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    rope = config.rope
    scaling = "" if rope.rope_type == "default" else f", factor {rope.factor:g}"
    try:
        chosen = choose_dca("auto", config)
        setting = (
            "" if chosen is None else f"s = {chosen.chunk_len}, Q = {chosen.max_query_position}"
        )
        setting += " (the checkpoint's own)" if config.dca else " (the paper's)"
    except InputError as error:
        setting = str(error)
    return {
        "model": config.model_type,
        "parameters": f"{count:,}",
        "weights": f"{decimal(stored)} ({kind})" if stored else "not here",
        "layers": str(config.num_hidden_layers),
        "hidden, feed-forward": f"{config.hidden_size}, {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "vocabulary": f"{config.vocab_size} ({'tied' if config.tie_word_embeddings else 'untied'})",
        "trained length": f"{config.trained_length} tokens",
        "rope": f"{rope.rope_type}, theta {rope.theta:g}{scaling}",
        "sliding window": f"{config.sliding_window} tokens" if config.sliding_window else "none",
        "DCA (auto)": setting,
        "KV cache": f"{decimal(2 * cached)} a token in bfloat16",
    }
