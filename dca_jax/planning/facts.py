"""A summary of a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.filesize import decimal

from dca_jax.attention.sparse import choose_sparse
from dca_jax.config import LlamaConfig, choose_dca
from dca_jax.dtypes import parse_cache_dtype
from dca_jax.errors import InputError
from dca_jax.kv_cache import cache_arrays
from dca_jax.products.packed import STORED
from dca_jax.sharding import AXES
from dca_jax.weights.files import PARAMS, is_converted
from dca_jax.weights.folder import kept_forms
from dca_jax.weights.gguf_file import gguf_files, is_gguf
from dca_jax.weights.huggingface import LONG_CONFIG, open_checkpoint, read_config
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import matrices
from dca_jax.weights.parameters import count_parameters, parameters


def checkpoint_facts(folder: Path, file: Path | None = None) -> dict[str, str]:
    """Facts about a checkpoint without reading its weights, by name, in order.

    They come from its `config.json` and, if present, `config_1m.json`; or only from `file`.

    Raises:
        InputError: as in `read_config`.
    """
    config = read_config(folder, file=file)
    converted = is_converted(folder)
    kind = "Orbax" if converted else "safetensors" if any(folder.glob("*.safetensors")) else "bin"
    files = (folder / PARAMS).rglob("*") if converted else folder.glob(f"*.{kind}")
    if converted:
        kind = ", ".join(["Orbax", *_forms(kept_forms(folder, config, STORED), config)])
    if is_gguf(folder):
        packed = open_checkpoint(folder, config).packed
        kind, files = ", ".join(["GGUF", *packed]), gguf_files(folder)
    stored = sum(file.stat().st_size for file in files if file.is_file())
    rope = config.rope
    stays = _of_packed(folder, config) if stored else {}

    def cached(dtype: str) -> int:
        one = {"batch": 1, "capacity": 1, "dtype": parse_cache_dtype(dtype)}
        arrays = cache_arrays(config, sizes=dict.fromkeys(AXES, 1), **one)
        return sum(math.prod(shape) * each.itemsize for _, shape, each in arrays.values())

    width = config.intermediate_size
    if config.mixture is not None and not config.has_mlp:
        width = config.mixture.moe_intermediate_size
    scaling = "" if rope.rope_type == "default" else f", factor {rope.factor:g}"
    return {
        "model": config.model_type,
        "parameters": f"{count_parameters(config):,}",
        **_of_experts(config),
        "weights": f"{decimal(stored)} ({kind})" if stored else "not here",
        **stays,
        "layers": str(config.num_hidden_layers),
        "hidden, feed-forward": f"{config.hidden_size}, {width}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "vocabulary": f"{config.vocab_size} ({'tied' if config.tie_word_embeddings else 'untied'})",
        "rope": f"{rope.rope_type}, theta {rope.theta:g}{scaling}",
        "sliding window": f"{config.sliding_window} tokens" if config.sliding_window else "none",
        **_of_length(config),
        **_of_long_config(folder, file),
        "KV cache": f"{decimal(cached('bfloat16'))} a token in bfloat16, "
        f"{decimal(cached('int8'))} in int8 or fp8",
    }


def _of_packed(folder: Path, config: LlamaConfig) -> dict[str, str]:
    """The weights that stay packed, and the resulting memory."""
    kept = kept_forms(folder, config, STORED)
    if not kept:
        return {}
    size = 0
    for row in parameters(config):
        shape = row.shape(config)
        if row.path in kept:
            size += math.prod(shape[: row.leading]) * kept[row.path].bytes(row, row.inner(shape))
        else:
            size += 2 * math.prod(shape)
    told = f"{len(kept)} of {len(matrices(config))} matrices stay packed; a CPU unpacks them"
    forms = ", ".join(_forms(kept, config))
    return {"in memory": f"{decimal(size)} in bfloat16 and {forms} ({told})"}


def _forms(kept: Mapping[str, Kept], config: LlamaConfig) -> list[str]:
    """Their names."""
    rows = [row for row in matrices(config) if row.path in kept]
    return sorted({kept[row.path].name(row, row.inner(row.shape(config))) for row in rows})


def _of_experts(config: LlamaConfig) -> dict[str, str]:
    mixture = config.mixture
    if mixture is None:
        return {}
    dense = f", an MLP in {len(config.dense_layers)} layers" if config.has_mlp else ""
    return {
        "of them for a token": f"{count_parameters(config, active=True):,}",
        "experts": f"{mixture.num_experts} of {mixture.moe_intermediate_size} in "
        f"{len(config.sparse_layers)} layers, {mixture.num_experts_per_tok} for a token{dense}",
    }


def _of_length(config: LlamaConfig) -> dict[str, str]:
    """The maximum length of texts, and how they are read."""
    try:
        chosen = choose_dca("auto", config)
        setting = (
            "" if chosen is None else f"s = {chosen.chunk_len}, Q = {chosen.max_query_position}"
        )
        if chosen is not None and chosen.temperature_slope:
            setting += f", temperature from {chosen.trained_length} tokens"
        setting += " (the checkpoint's own)" if config.dca else " (the paper's)"
    except InputError as error:
        setting = str(error)
    facts = {
        "texts": f"up to {config.max_position_embeddings} tokens",
        "trained length": f"{config.trained_length} tokens",
        "DCA (auto)": setting,
    }
    sparse = config.sparse_attention
    if sparse is not None and sparse.wanted:
        sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
        try:
            how = choose_sparse("auto", sparse, **sizes)
            facts["long prompts (auto)"] = "densely" if how is None else how.described
        except InputError as error:
            facts["long prompts (auto)"] = str(error)
    return facts


def _of_long_config(folder: Path, file: Path | None) -> dict[str, str]:
    """Facts from a checkpoint's second config for long texts."""
    if file is not None or not (folder / LONG_CONFIG).is_file():
        return {}
    facts = _of_length(read_config(folder, file=folder / LONG_CONFIG))
    return {f"{fact}, {LONG_CONFIG}": value for fact, value in facts.items()}
