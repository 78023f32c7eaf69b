"""Orbax checkpoints: trees of plain arrays under stable names, restored onto any mesh.

On disk a checkpoint is Orbax's, one zarr array per parameter, compressed in chunks; any Orbax, and
any zarr reader, opens it. Orbax writes it aside and renames it when it is whole.

A converted folder (`checkpoints_convert`) keeps one as `params/`, beside the model's own
`config.json` and tokenizer files.
"""

import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.weights.files import refuse_existing
from dca_jax.weights.parameters import (
    PIECE_SIZE,
    Parameter,
    Progress,
    Read,
    abstract_params,
    piece_shape,
    pieces,
)
from dca_jax.weights.tensor_files import cast_weights

PARAMS = "params"  # the checkpoint's name inside a converted folder

# zstd at level 1, as Orbax's own arrays: a fifth smaller than bfloat16 weights are.
_COMPRESSOR = {"id": "zstd", "level": 1}


@dataclass(frozen=True, kw_only=True)
class StreamedArray:
    """An array that is saved piece by piece and never exists as a whole.

    Attributes:
        shape, dtype: of the array.
        chunks: shape of a chunk on disk.
        pieces: yields (index, piece); each piece starts at a chunk's corner and fills whole
            chunks, but for the array's own end. Together they cover the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    pieces: Callable[[], Iterator[tuple[tuple[slice, ...], np.ndarray]]]

    @classmethod
    def of(
        cls,
        row: Parameter,
        config: LlamaConfig,
        read: Read,
        dtype: np.dtype,
        progress: Progress | None = None,
    ) -> "StreamedArray":
        """A parameter of a model, read piece by piece when it is written.

        Args:
            row: the parameter. config: the model's shape.
            read: gives its pieces, in `dtype`.
            dtype: of the array.
            progress: told the path and the bytes, after each piece.
        """

        def read_pieces() -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
            for index in pieces(row, config):
                piece = read(row, index)
                yield index, piece
                if progress is not None:
                    progress(row.path, piece.nbytes)

        chunks = piece_shape(row, config)
        return cls(shape=row.shape(config), dtype=dtype, chunks=chunks, pieces=read_pieces)


def save(path: str | Path, tree: dict[str, Any]) -> None:
    """Saves a tree (nested dicts of jax arrays or `StreamedArray`s) as an Orbax checkpoint.

    Atomic: `path` appears when everything is written. With several processes, all call it.

    Raises:
        InputError: `path` exists.
    """
    path = Path(path).absolute()
    refuse_existing(path)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _StreamedArrayHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=handlers)
    # Small chunks, one layer at most, so that an export reads one layer and not all of them.
    chunked = jax.tree.map(
        lambda leaf: ocp.SaveArgs(
            chunk_byte_size=PIECE_SIZE * leaf.dtype.itemsize,
            shard_axes=(0,) if len(leaf.shape) > 2 else (),
        ),
        tree,
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, ocp.args.PyTreeSave(tree, save_args=chunked))


def restore(path: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """Restores a checkpoint into arrays that are `like` a tree of `jax.ShapeDtypeStruct`s.

    Shardings may be any: they need not be those the tree was saved with. A dtype that differs from
    the saved one is converted to.

    Raises:
        InputError: no checkpoint at `path`, other names or shapes than in `like`, or damage.
    """
    path = Path(path).absolute()
    check_arrays(path, like)
    with ocp.StandardCheckpointer() as checkpointer, _damage_reported(path):
        return checkpointer.restore(path, like)


def check_arrays(path: str | Path, like: dict[str, Any]) -> dict[str, np.dtype]:
    """The dtype of every array of a checkpoint, by path, once names and shapes are those of `like`.

    Raises:
        InputError: no checkpoint at `path`, a damaged one, or other names or shapes.
    """
    wanted = {name: tuple(leaf.shape) for name, leaf in _leaves(like).items()}
    found = saved_arrays(path)
    for name in sorted(wanted.keys() ^ found.keys()):
        where = "is missing from" if name in wanted else "is not expected in"
        raise InputError(f"parameter {name} {where} {path}: it belongs to another config.json")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise InputError(
                f"parameter {name} in {path} has shape {found[name].shape}, expected {shape}"
            )
    return {name: leaf.dtype for name, leaf in found.items()}


def saved_arrays(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a checkpoint, by dotted path; no data is read.

    Raises:
        InputError: no checkpoint at `path`, or one whose description is damaged.
    """
    path = Path(path).absolute()
    if not (path / "_METADATA").is_file():
        raise InputError(f"{path} is no Orbax checkpoint (it has no _METADATA)")
    # Orbax's own reader opens all arrays at once, and if one is damaged says neither which nor why.
    with _damage_reported(path):
        described = json.loads((path / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
        names = [".".join(k["key"] for k in leaf["key_metadata"]) for leaf in described.values()]
    if any("/" in name for name in names):
        raise InputError(f"{path / '_METADATA'} names an array outside its folder")
    arrays = {name: _open_array(path, name) for name in names}
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype.numpy_dtype) for k, v in arrays.items()}


def is_converted(folder: str | Path) -> bool:
    """Whether `folder` is a converted one (Orbax weights) and not a Hugging Face one."""
    return (Path(folder) / PARAMS).is_dir()


def open_converted(
    folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, np.dtype], Read]:
    """The dtype of each array of a converted folder, by path, and what reads pieces of them in it.

    Raises:
        InputError: what `check_arrays` refuses; when reading, a damaged array, or a weight that is
            NaN or infinite.
    """
    path = Path(folder) / PARAMS
    dtypes = check_arrays(path, abstract_params(config, dtype=jnp.float32))
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, jnp.dtype(dtype))

    def read(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        return cast_weights(read_piece(path, row.path, index), dtypes[row.path], row.path)

    return dtypes, read


def read_piece(path: str | Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """The piece `[index]` of a checkpoint's array `name` (its dotted path), without the rest of it.

    Raises:
        InputError: the array is not there, or it or a chunk of the piece is damaged.
    """
    path = Path(path).absolute()
    array = _open_array(path, name)
    with _damage_reported(path):
        return array[index].read().result()


def _open_array(path: Path, name: str) -> ts.TensorStore:
    if (path / "manifest.ocdbt").exists():  # what Orbax writes when left to its defaults
        store: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{path / name}/"}
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    with _damage_reported(path):
        return ts.open(spec, open=True, read=True).result()


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises a bare one for a chunk that it cannot read
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).partition("\n")[0].partition(" [tensorstore_spec")[0]
        raise InputError(f"{path} is damaged ({reason}); convert or save it again") from error


def _leaves(tree: Any) -> dict[str, Any]:
    return cast(dict[str, Any], flatten_dict(tree, sep="."))


class _StreamedArrayHandler(ocp.type_handlers.TypeHandler):
    """Writes a `StreamedArray` as Orbax writes a `jax.Array`, one piece after another.

    One process reads and writes; with several, Orbax has all wait for it.
    """

    def typestr(self) -> str:
        return "jax.Array"  # so it is recorded, and restored, as one

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        if not is_primary():
            return []
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{info.path}/"},
                "metadata": {
                    "shape": value.shape,
                    "chunks": value.chunks,
                    "compressor": _COMPRESSOR,
                },
                "store_data_equal_to_fill_value": True,  # Orbax takes an absent chunk for damage
            }
            store = await ts.open(spec, dtype=value.dtype, create=True, context=info.ts_context)
            written: Awaitable[None] | None = None
            for index, piece in value.pieces():
                # The last piece is compressed while this one was read; never more than the two.
                if written is not None:
                    await written
                written = store[index].write(piece, can_reference_source_data_indefinitely=True)
            if written is not None:
                await written
        return []  # nothing is left to wait for

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is restored as a jax.Array")

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is restored as a jax.Array")
