"""From a checkpoint's folder, or its name on the Hugging Face Hub, to an `LLM`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dca_jax.attention.op import check_implementation
from dca_jax.bands import PositionMethod
from dca_jax.checkpoint import is_converted, open_converted
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.distributed import several_processes
from dca_jax.dtypes import parse_dtype
from dca_jax.errors import InputError
from dca_jax.files import read_json
from dca_jax.huggingface import open_checkpoint, read_config
from dca_jax.llm import LLM
from dca_jax.model import Llama
from dca_jax.parameters import Parameter, Read, Shardings, load_tree, parameters
from dca_jax.rope import RopeConfig
from dca_jax.sharding import make_mesh, parameter_shardings

PRESETS: dict[str, Callable[[int], DCAConfig]] = {
    "paper": DCAConfig.paper,
    "chunkllama": DCAConfig.chunkllama,
    "chunkllama_ppl": DCAConfig.chunkllama_ppl,
    "chunkllama_flash_decoding": DCAConfig.chunkllama_flash_decoding,
}

# What is fetched from the Hub, of a repository's top folder: weights; and configs, tokenizers and
# chat templates.
WEIGHTS = ("*.safetensors",)
COMPANIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")


def load(
    path: str | Path,
    *,
    dca: DCAConfig | PositionMethod | str | None = "auto",
    rope: RopeConfig | None = None,
    dtype: DTypeLike | None = None,
    cache_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mesh: Mesh | str | None = None,
) -> LLM:
    """Loads a model and its tokenizer.

    Args:
        path: a Hugging Face folder, a folder converted by `checkpoints_convert`, or, where there is
            no such folder, a model's name on the Hugging Face Hub ("owner/name"), which is then
            downloaded into its cache.
        dca: what `choose_dca` takes: by default what the checkpoint asks for, else the paper's
            setting for its trained length. None is plain attention. Or another way of giving
            positions (`dca_jax.position_methods`).
        rope: in place of the checkpoint's own, to compare RoPE scalings.
        dtype: of weights and activations, also by name; default: bfloat16, on a CPU float32.
        cache_dtype: of the KV cache; default: `dtype`.
        implementation: of the attention; None for the best on this device.
        mesh: what `dca_jax.sharding.make_mesh` makes, or takes: "context=2,tensor=4". Every device
            gets its own part of the weights, and every process reads those of its devices only.
            None is the first device.

    Raises:
        InputError: nothing at `path`, a checkpoint that is damaged or not supported, or a mesh that
            does not fit the devices or the model; all but the weights are checked before any is
            read.
    """
    check_implementation(implementation)
    folder = find_folder(path)
    config = read_config(folder)
    if rope is not None:
        config = replace(config, rope=rope)
    chosen = dca if isinstance(dca, PositionMethod) else choose_dca(dca, config)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if mesh is None and several_processes():
        raise InputError(
            f"{jax.process_count()} processes share one model: give a mesh of all their "
            f"{jax.device_count()} devices, such as tensor={jax.device_count()}"
        )
    sharding = None if mesh is None else parameter_shardings(config, mesh)
    on_cpu = jax.default_backend() == "cpu"
    dtype = _dtype(dtype, jnp.float32 if on_cpu else jnp.bfloat16)
    tokenizer = load_tokenizer(folder)
    stop_ids = find_stop_ids(folder, config, tokenizer)
    params = load_weights(folder, config, dtype=dtype, sharding=sharding)
    model = Llama.from_params(
        config, params, dca=chosen, dtype=dtype, implementation=implementation
    )
    return LLM(
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        cache_dtype=_dtype(cache_dtype, dtype),
    )


def load_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike,
    sharding: Shardings = None,
    then: Callable[[Parameter, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> dict[str, Any]:
    """The parameters of a Hugging Face or a converted folder, each device its own part.

    Args:
        folder: of the checkpoint. config: its own.
        dtype: of the arrays as they are read.
        sharding: one for all, or a function of the path; None is the first local device.
        then: as in `dca_jax.parameters.load_tree`.

    Raises:
        InputError: as `dca_jax.huggingface.load_params` and `dca_jax.checkpoint.load_converted`.
    """
    like = {row.path: row.abstract(config, dtype, sharding) for row in parameters(config)}
    return load_tree(config, like, open_weights(folder, config, dtype=dtype), then=then)


def open_weights(folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike) -> Read:
    """What reads pieces of the weights of a Hugging Face or a converted folder, in `dtype`.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config; when reading, a weight
            that is NaN or infinite.
    """
    if is_converted(Path(folder)):
        return open_converted(folder, config, dtype=dtype)[1]
    return partial(open_checkpoint(folder, config).read, dtype=jnp.dtype(dtype))


def choose_dca(choice: DCAConfig | str | None, config: LlamaConfig) -> DCAConfig | None:
    """The DCA setting for a model.

    Args:
        choice: a DCAConfig; a name of `PRESETS`, taken for the model's trained length
            (`max_position_embeddings`); "auto" for what the checkpoint itself asks for, or else
            "paper"; None or "none" for plain attention.
        config: the model's.

    Raises:
        InputError: an unknown name, or a trained length that the preset cannot be made for.
    """
    if choice is None or isinstance(choice, DCAConfig):
        return choice
    if choice == "none":
        return None
    if choice == "auto" and config.dca is not None:
        return config.dca
    return preset_dca("paper" if choice == "auto" else choice, config.max_position_embeddings)


def parse_dca(setting: str) -> DCAConfig | str:
    """A DCAConfig from "S,Q"; any other setting is left to `choose_dca`.

    Raises:
        InputError: something with a comma that is not two integers, or makes no sense.
    """
    if "," not in setting:
        return setting
    try:
        chunk_len, max_query_position = (int(part) for part in setting.split(","))
    except ValueError:
        raise InputError(
            f"DCA's setting as S,Q is two integers, such as 3072,4095; got {setting}"
        ) from None
    return DCAConfig(chunk_len=chunk_len, max_query_position=max_query_position)


def preset_dca(name: str, trained_length: int) -> DCAConfig:
    """A published setting, by its name in `PRESETS`, for a trained length in tokens.

    Raises:
        InputError: an unknown name, or a trained length that the preset cannot be made for.
    """
    if name not in PRESETS:
        raise InputError(
            f"DCA setting {name!r} is not known; expected auto, none, or one of "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[name](trained_length)


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint; one on the Hugging Face Hub is downloaded.

    Args:
        path: as in `load`.
        weights: False downloads all but the weights.

    Raises:
        InputError: neither a folder nor a model that can be downloaded.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the folder that holds config.json and weights")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise InputError(
            f"{path} is no folder, and no name of a model on the Hugging Face Hub ('owner/name')"
        )
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        wanted = [*COMPANIONS, *(WEIGHTS if weights else ())]
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # whatever stops a download, it is outside this program
        raise InputError(
            f"there is no folder {path}, and it could not be downloaded from the Hugging Face Hub "
            f"either (offline, misspelled, or not yours to read): {error}"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, by `transformers`; None if there is none.

    Raises:
        InputError: one that cannot be read, or that would run code from the checkpoint.
    """
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # it raises whatever its many parsers raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def find_stop_ids(folder: Path, config: LlamaConfig, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a text, by config.json, generation_config.json or the tokenizer.

    Chat versions often name theirs in one of the three only.
    """
    ids: set[int | None] = set(config.eos_token_ids)
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder, "generation_config.json").get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else {eos}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(i for i in ids if isinstance(i, int))


def _dtype(dtype: DTypeLike | None, default: DTypeLike) -> jnp.dtype:
    dtype = default if dtype is None else dtype
    return parse_dtype(dtype) if isinstance(dtype, str) else jnp.dtype(dtype)
