"""Exports a finished run as folders: a model, and the LoRA adapter."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Int

from dca_jax.config import LlamaConfig
from dca_jax.dca import SPARSE, DCAConfig
from dca_jax.disk import writing
from dca_jax.distributed import from_primary, is_primary
from dca_jax.errors import InputError
from dca_jax.finetune.setup import Setup
from dca_jax.finetune.train import all_finite
from dca_jax.weights.adapters import flat, merge_lora, on_host, save_adapter
from dca_jax.weights.files import PARAMS, read_json
from dca_jax.weights.folder import copy_description, open_weights
from dca_jax.weights.orbax import StreamedArray, save
from dca_jax.weights.parameters import Parameter, Read, parameters
from dca_jax.weights.safetensors_folder import write_weights


def export(setup: Setup, output: Path, params: dict[str, Any]) -> None:
    """Writes `output/model`, and `output/adapter` if adapters were trained.

    The model is a converted folder for `dca_jax.load` or, with `export: hf`, a Hugging Face folder
    for `transformers` too. Weights have the dtype of the activations. Its config.json has the DCA
    setting of the training, and its tokenizer the template of the dialogues (except chunkllama's,
    which is not a template). It appears only when it is complete; after an interruption the same
    command writes it.

    With LoRA it is the base with merged adapters, read from its folder piece by piece.

    Args:
        params: the trained parameters.

    Raises:
        InputError: non-finite parameters, or a full disk; then there is no model.
    """
    settings, config, dtype = setup.settings, setup.config, jnp.dtype(setup.settings.dtype)
    if setup.lora is None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if not bool(all_finite(params)):
        raise InputError(
            f"the trained parameters are not all finite in {settings.dtype}: there is no model to "
            "write; start again with a lower learning rate"
        )
    if setup.lora is None:
        read = layers_on_host(params)
    else:
        if not (output / "adapter").exists():
            with writing(output / "adapter"):
                base = settings.model
                save_adapter(output / "adapter", params, config, setup.lora, base_model=base)
        read = open_weights(setup.folder, config, dtype=dtype).read
        read = merge_lora(read, params, setup.lora)
    aside = output / ".model.partial"

    def begin() -> None:
        with writing(output / "model"):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            copy_description(setup.folder, aside)
            _write_config(setup, aside)

    def end() -> None:
        with writing(output / "model"):
            aside.rename(output / "model")

    try:
        from_primary(begin)
        with writing(output / "model"):
            if settings.export == "hf":
                dtypes = {row.path: dtype for row in parameters(config)}
                write_weights(aside, config, read, dtypes)
            elif setup.lora is None:
                save(aside / PARAMS, params)
            else:
                rows = parameters(config)
                leaves = {row.path: StreamedArray.of(row, config, read, dtype) for row in rows}
                save(aside / PARAMS, unflatten_dict(leaves, sep="."))
        from_primary(end)
    except (OSError, ValueError, RuntimeError) as error:  # Orbax's errors for a full disk
        if is_primary():
            shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).partition("\n")[0][:300]
        if not isinstance(error, InputError):
            reason = f"{output / 'model'} cannot be written ({type(error).__name__}: {reason})"
        raise InputError(
            f"{reason}. The last checkpoint has the training: the same command resumes from it"
        ) from error


def layers_on_host(params: Mapping[str, Any]) -> Read:
    """Reads pieces of arrays that may be sharded, also over processes; all must read the same.

    Only one layer of one array is on the host at a time.
    """
    leaves, held = flat(params), ("", -1)
    layer = np.zeros(0)

    def read(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        nonlocal held, layer
        number = index[0].start if row.stacked else 0
        if held != (row.path, number):
            leaf = leaves[row.path]
            layer = on_host(_layer(leaf, number) if row.stacked else leaf)
            held = row.path, number
        return layer[None][:, *index[1:]] if row.stacked else layer[index]

    return read


@jax.jit
def _layer(leaf: Array, number: int | Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def exported_config(
    config: dict[str, Any], *, dtype: str, dca: DCAConfig | None, trained_length: int
) -> dict[str, Any]:
    """A base's config.json with the dtype and the DCA setting of a run.

    Without DCA, a trained length that only the base's DCA setting had becomes
    `max_position_embeddings`.

    Args:
        config: the base's config.json.
        trained_length: the base's trained length (`LlamaConfig.trained_length`), in tokens.
    """
    config = config | {"dtype": dtype}
    config.pop("torch_dtype", None)  # the name in older files
    before = config.pop("dual_chunk_attention_config", None) or {}
    if dca is not None:
        sparse = {key: value for key, value in before.items() if key.startswith(SPARSE)}
        config["dual_chunk_attention_config"] = dca.to_hf() | sparse
    elif LlamaConfig.from_hf(config).trained_length != trained_length:
        config["max_position_embeddings"] = trained_length
    return config


def _write_config(setup: Setup, folder: Path) -> None:
    """Writes config.json (`exported_config`) and the chat template of the training."""
    config = exported_config(
        read_json(folder, "config.json"),
        dtype=setup.settings.dtype,
        dca=setup.dca,
        trained_length=setup.config.trained_length,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if setup.chat_template is not None:
        (folder / "chat_template.jinja").write_text(setup.chat_template, encoding="utf-8")
