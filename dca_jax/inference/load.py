"""Loads an `LLM` from a folder, a file or a name on the Hugging Face Hub."""

import difflib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dca_jax.attention.bands import PositionMethod
from dca_jax.attention.op import check_implementation
from dca_jax.attention.sparse import Sparse, choose_sparse
from dca_jax.config import LlamaConfig, choose_dca
from dca_jax.dca import DCAConfig
from dca_jax.distributed import several_processes
from dca_jax.dtypes import parse_cache_dtype, parse_dtype
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.llm import LLM
from dca_jax.inference.tokenizer import find_stop_ids, load_tokenizer
from dca_jax.lengths import parse_tokens
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig
from dca_jax.sharding import axis_size, make_mesh
from dca_jax.weights.folder import kept_forms, load_weights
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import LONG_CONFIG, config_file, read_config
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import matrices, packer, packing
from dca_jax.weights.parameters import abstract_params
from dca_jax.weights.placement import parameter_shardings

log = logging.getLogger(__name__)

# Names that other libraries use for arguments of `load`, or equivalents of their arguments.
_ELSEWHERE = {
    "attn_implementation": "implementation",
    "device": "JAX_PLATFORMS in the environment, or mesh for several devices",
    "device_map": "mesh, as 'tensor=4'",
    "kv_cache_dtype": "cache_dtype",
    "load_in_4bit": "weights='int4'",
    "load_in_8bit": "weights='int8'",
    "lora_path": "adapter",
    "max_model_len": "context",
    "method": "dca",
    "n_ctx": "context",
    "peft": "adapter",
    "quantization": "weights",
    "rope_scaling": "rope, a RopeConfig",
    "tensor_parallel_size": "mesh, as 'tensor=4'",
    "torch_dtype": "dtype",
    "trust_remote_code": "not needed: code from a checkpoint is never run",
}


class NoOthers(TypedDict):
    """Unsupported keyword arguments, which are only accepted for a helpful error message."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint that has been read and checked, except for its weights.

    Attributes:
        llm: the result of `load`, with shapes (`jax.ShapeDtypeStruct`) in place of the weights; it
            can tokenize texts, and the sizes of its arrays are known.
        read_weights: function that reads and returns the parameters.
        weights: the form in which weights are packed while loading; None if they are not.
        kept: the form of weights that stay packed as stored, by path.
    """

    llm: LLM
    read_weights: Callable[[], dict[str, Any]]
    weights: str | None
    kept: Mapping[str, Kept]

    def load(self) -> LLM:
        """Reads the weights.

        Raises:
            InputError: the weights are damaged, missing, or do not fit into memory.
        """
        model = self.llm.model
        loaded = Llama.from_params(
            model.config,
            self.read_weights(),
            dca=model.dca,
            dtype=model.dtype,
            implementation=model.implementation,
            sparse=model.sparse,
        )
        return replace(self.llm, model=loaded)


def load(
    path: str | Path,
    *,
    dca: DCAConfig | PositionMethod | str | None = "auto",
    rope: RopeConfig | None = None,
    dtype: DTypeLike | None = None,
    cache_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mesh: Mesh | str | None = None,
    adapter: str | Path | None = None,
    context: int | str | None = None,
    config: str | Path | None = None,
    weights: str | None = None,
    sparse: Sparse | str | None = "auto",
    **others: Unpack[NoOthers],
) -> LLM:
    """Loads a model and its tokenizer.

    Args:
        path: a Hugging Face folder, a folder converted by `checkpoints_convert`, a GGUF file, or,
            if there is no such path, a model's name on the Hugging Face Hub ("owner/name"),
            which is then downloaded into its cache.
        dca: a choice for `choose_dca`: by default the checkpoint's own setting, else the paper's
            setting for its trained length; None for plain attention. Or another position method
            (`dca_jax.inference.baselines`).
        rope: RoPE to use instead of the checkpoint's own, to compare scalings.
        dtype: dtype of weights and activations, or its name (default: bfloat16; float32 on a CPU).
        cache_dtype: dtype of the KV cache, or its name (default: `dtype`). "int8" and "fp8" take
            half the memory of bfloat16 and make decoding after a long text faster.
        implementation: attention implementation; None picks the best on this device.
        mesh: a mesh of `dca_jax.sharding.make_mesh`, or its argument: "context=2,tensor=4". Every
            device gets its part of the weights, and every process reads only those of its devices.
            None uses the first device.
        adapter: folder of a LoRA adapter, from PEFT or `dca-jax finetune`, to merge into the
            weights while loading.
        context: number of tokens of the longest text, such as 1048576 or "1M". If a checkpoint has
            a second config for longer texts (Qwen's `config_1m.json`), it is used if needed, and a
            message is logged. This does not limit the length of texts.
        config: a config file to use instead of the folder's `config.json`.
        weights: how to pack the weights while loading (`dca_jax.products.packed.FORMS`): "int8" per
            output, "int4" in groups of 64 ("int4:32", "int4:128" for other groups), "fp8" in blocks
            of 128 x 128; weights that the checkpoint already has in this form are kept. "stored"
            keeps packed weights as stored if one of these forms represents them exactly, and packs
            no others; "unpacked" unpacks them. Default: "stored"; on a CPU, where that is slower,
            "unpacked". Products are always computed in `dtype`.
        sparse: sparse prefill of long prompts (`dca_jax.attention.sparse.NAMES`): "auto" follows
            the checkpoint, and is dense if it has no setting; "off" or None is dense; "rows" keeps
            the tenth of the key blocks to which a few queries of each tile attend most, "rows:0.05"
            a twentieth. Decoding is always dense.
        **others: unsupported; names that other libraries use are answered with the names here.

    Raises:
        InputError: an unknown argument; nothing at `path`; a checkpoint that is damaged or not
            supported; or a mesh that does not fit the devices or the model. Everything but the
            weights is checked before any of them is read.
    """
    _refuse_names(others)
    if sparse == "auto" and not isinstance(dca, DCAConfig | str):
        sparse = "off"  # the checkpoint's own sparse setting is for its DCA
    opened = open_model(
        path,
        dca=dca,
        rope=rope,
        dtype=dtype,
        cache_dtype=cache_dtype,
        implementation=implementation,
        mesh=mesh,
        adapter=adapter,
        context=context,
        config=config,
        weights=weights,
        sparse=sparse,
    )
    return opened.load()


def _refuse_names(others: Collection[str]) -> None:
    for name in others:
        known = [each for each in inspect.signature(load).parameters if each != "others"]
        near = difflib.get_close_matches(name, known, n=1)
        meant = _ELSEWHERE.get(name, near[0] if near else None)
        meant = f"here it is {meant}" if meant else f"there are {', '.join(known)}"
        raise InputError(f"load has no argument {shown(name, quote=False)!r}; {meant}")


def open_model(
    path: str | Path,
    *,
    dca: DCAConfig | PositionMethod | str | None = "auto",
    rope: RopeConfig | None = None,
    dtype: DTypeLike | None = None,
    cache_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mesh: Mesh | str | None = None,
    adapter: str | Path | None = None,
    context: int | str | None = None,
    config: str | Path | None = None,
    weights: str | None = None,
    sparse: Sparse | str | None = "auto",
) -> Opened:
    """Everything that `load` does before reading the weights; same arguments and errors."""
    check_implementation(implementation)
    form, keep = packing(weights, on_cpu=jax.default_backend() == "cpu")
    folder = find_folder(path)
    shape = _read_config(folder, context, config)
    if rope is not None:
        shape = replace(shape, rope=rope)
    chosen = dca if isinstance(dca, PositionMethod) else choose_dca(dca, shape)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            f"mesh must be a string such as tensor=4, or a jax Mesh, got {shown(mesh)}"
        )
    if mesh is None and several_processes():
        raise InputError(
            f"{jax.process_count()} processes share one model: give a mesh over all their "
            f"{jax.device_count()} devices, such as tensor={jax.device_count()}"
        )
    how = _choose_sparse(sparse, shape, mesh)
    if how is not None:
        how = how.for_method(chosen)
    sharding = None if mesh is None else parameter_shardings(shape, mesh)
    on_cpu = jax.default_backend() == "cpu"
    own = jnp.float32 if on_cpu else jnp.bfloat16
    dtype = parse_dtype(own if dtype is None else dtype)
    kept = parse_cache_dtype(dtype if cache_dtype is None else cache_dtype)
    tokenizer = load_tokenizer(folder)
    stop_ids = find_stop_ids(folder, shape, tokenizer)
    like = abstract_params(shape, dtype=dtype, sharding=sharding)
    options = {"dtype": dtype, "implementation": implementation, "sparse": how}
    model = Llama.from_params(shape, like, dca=chosen, **options)

    then = None if form is None else packer(matrices(shape), form)
    keep = None if adapter is not None else keep

    def read_weights() -> dict[str, Any]:
        options = {"dtype": dtype, "sharding": sharding, "adapter": adapter, "keep": keep}
        return load_weights(folder, shape, then=then, **options)

    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        cache_dtype=kept,
    )
    kept = kept_forms(folder, shape, keep)
    return Opened(llm=llm, read_weights=read_weights, weights=form, kept=kept)


def _read_config(folder: Path, context: int | str | None, config: str | Path | None) -> LlamaConfig:
    """The checkpoint's shape; logs which config is used, if not the usual one."""
    tokens = None if context is None else parse_tokens(str(context))
    file = config_file(folder, context=tokens, file=config)
    shape = read_config(folder, file=file)
    if file.name == LONG_CONFIG and config is None:
        log.warning(
            "%s is loaded with its %s, for a text of %d tokens", folder, LONG_CONFIG, tokens
        )
    return shape


def _choose_sparse(
    asked: Sparse | str | None, shape: LlamaConfig, mesh: Mesh | None
) -> Sparse | None:
    """The sparse prefill setting; logs it if it comes from the checkpoint."""
    sizes = {"layers": shape.num_hidden_layers, "heads": shape.num_attention_heads}
    how = choose_sparse(asked, shape.sparse_attention, **sizes)
    if how is None:
        return None
    if axis_size(mesh, "context") > 1:
        reason = "this mesh splits texts along `context`, where prefill is dense"
        if not how.by_checkpoint:
            raise InputError(f"{how.selector.name}: {reason}; use tensor or data, or sparse='off'")
        log.warning("the checkpoint enables sparse attention, but %s", reason)
        return None
    if how.by_checkpoint:
        log.warning(
            "prompts of more than %d tokens are read sparsely (%s), as set in the checkpoint; "
            "sparse='off' reads them densely",
            how.threshold,
            how.selector.name,
        )
    return how
