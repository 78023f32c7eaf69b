"""Orbax checkpoints: trees of plain arrays with stable names, which can be restored on any mesh.

A checkpoint has one zarr array per parameter, compressed in chunks; any version of Orbax and any
zarr reader can open it. Orbax writes it under a temporary name and renames it when it is complete.
Packed matrices have an array for each of their parts (`dca_jax.weights.orbax_packed`).

A converted folder (`checkpoints_convert`) has one in `params/`, next to the model's own
`config.json` and tokenizer files.
"""

import asyncio
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict

from dca_jax import fields
from dca_jax.config import LlamaConfig
from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import decode, parse_json, read_text_file
from dca_jax.weights.files import refuse_existing
from dca_jax.weights.parameters import (
    PIECE_SIZE,
    Parameter,
    Progress,
    Read,
    piece_shape,
    pieces,
)
from dca_jax.weights.tensor_files import FLOATS

ZARRAY = ".zarray"  # the description of an array
ZARRAY_BYTES = 2**14  # maximum size of it; those of weights have about 300

# zstd at level 1, as for Orbax's own arrays: a fifth smaller than bfloat16 weights.
_COMPRESSOR = {"id": "zstd", "level": 1}


# Pieces of one or several arrays, each with its index, by the name of the array.
Pieces = dict[str, tuple[tuple[slice, ...], np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class StreamedArray:
    """An array that is saved piece by piece and is never in memory as a whole.

    Attributes:
        shape, dtype: those of the array.
        chunks: shape of a chunk on disk.
        pieces: function that yields pieces; each starts at the corner of a chunk and fills whole
            chunks, except at the end of its array. Together they cover the array. It is called once
            for all arrays with the same function, which are read together.
        name: name of the array in `pieces`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    pieces: Callable[[], Iterator[Pieces]]
    name: str = "values"

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
            row: the parameter.
            config: the model's shape.
            read: reads its pieces, in `dtype`.
            dtype: dtype of the array.
            progress: function called with the path and the bytes, after each piece.
        """

        def read_pieces() -> Iterator[Pieces]:
            for index in pieces(row, config):
                piece = read(row, index)
                yield {"values": (index, piece)}
                if progress is not None:
                    progress(row.path, piece.nbytes)

        chunks = piece_shape(row, config)
        return cls(shape=row.shape(config), dtype=dtype, chunks=chunks, pieces=read_pieces)


def save(path: str | Path, tree: dict[str, Any]) -> None:
    """Saves a tree (nested dicts of jax arrays or `StreamedArray`s) as an Orbax checkpoint.

    This is atomic: `path` appears only when everything is written. With several processes, all must
    call it.

    SIGTERM and Ctrl-C take effect only when no write is in progress: after a piece of a
    `StreamedArray`, or at the end.

    Raises:
        InputError: `path` exists.
    """
    path = Path(path).absolute()
    refuse_existing(path)
    signals = _HeldSignals()
    handlers = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _StreamedArrayHandler(signals)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=handlers)
    # Small chunks of at most one layer, so that an export can read a single layer.
    chunked = jax.tree.map(
        lambda leaf: ocp.SaveArgs(
            chunk_byte_size=PIECE_SIZE * leaf.dtype.itemsize,
            shard_axes=(0,) if len(leaf.shape) > 2 else (),
        ),
        tree,
    )
    with signals, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, ocp.args.PyTreeSave(tree, save_args=chunked))


def restore(path: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """Restores a checkpoint into arrays as described by `like`, a tree of `jax.ShapeDtypeStruct`s.

    Shardings may differ from those at saving. Arrays are converted to the dtypes in `like`.

    Raises:
        InputError: no checkpoint at `path`, other names or shapes than in `like`, or damage.
    """
    path = Path(path).absolute()
    check_arrays(path, like)
    with ocp.StandardCheckpointer() as checkpointer, _damage_reported(path):
        return checkpointer.restore(path, like)


def check_arrays(path: str | Path, like: dict[str, Any]) -> dict[str, np.dtype]:
    """Checks names and shapes of a checkpoint against `like`; returns the dtypes by path.

    Raises:
        InputError: no checkpoint at `path`, a damaged one, other names or shapes, or a dtype that
            weights cannot have.
    """
    wanted, found = _leaves(like), saved_arrays(path)
    for name in sorted(wanted.keys() ^ found.keys()):
        where = "is missing from" if name in wanted else "is not expected in"
        raise InputError(
            f"parameter {shown(name, quote=False)} {where} {path}: it belongs to another "
            "config.json"
        )
    for name, leaf in wanted.items():
        if found[name].shape != tuple(leaf.shape):
            raise InputError(
                f"parameter {name} in {path} has shape {shown(found[name].shape)}, expected "
                f"{tuple(leaf.shape)}"
            )
        if leaf.dtype in FLOATS.values() and found[name].dtype not in FLOATS.values():
            raise InputError(
                f"parameter {name} in {path} has dtype {found[name].dtype}; expected one of "
                f"{', '.join(map(str, FLOATS.values()))}"
            )
    return {name: leaf.dtype for name, leaf in found.items()}


def saved_arrays(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a checkpoint, by dotted path; no data is read.

    Raises:
        InputError: no checkpoint at `path`, a damaged description, or a link to a place outside.
    """
    path = Path(path).absolute()
    if not (path / "_METADATA").is_file():
        raise InputError(f"{path} is not an Orbax checkpoint (it has no _METADATA)")
    _refuse_links(path)
    # Orbax's own reader opens all arrays at once; if one is damaged, it does not say which or why.
    described = parse_json(read_text_file(path / "_METADATA"), f"{path / '_METADATA'}")
    with _damage_reported(path):
        leaves = described["tree_metadata"].values()
        names = [".".join(k["key"] for k in leaf["key_metadata"]) for leaf in leaves]
    if any("/" in name or name in ("", ".", "..") for name in names):
        raise InputError(f"{path / '_METADATA'} names an array outside its folder")
    return {name: _described_array(path, name) for name in names}


def read_piece(path: str | Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads only the piece `[index]` of a checkpoint's array `name` (its dotted path).

    Raises:
        InputError: the array is missing, or it or a chunk of the piece is damaged.
    """
    path = Path(path).absolute()
    array = _open_array(path, name)
    with _damage_reported(path):
        return array[index].read().result()


def _open_array(path: Path, name: str) -> ts.TensorStore:
    spec = {"driver": "zarr", "kvstore": _store(path, name), "fill_missing_data_reads": False}
    with _damage_reported(path):
        return ts.open(spec, open=True, read=True).result()


def _store(path: Path, name: str) -> dict[str, Any]:
    if (path / "manifest.ocdbt").exists():  # Orbax's default format
        return {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{path / name}/"}


def _described_array(path: Path, name: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array from its `.zarray`, checked before TensorStore reads it.

    TensorStore allocates whole chunks of any declared size, and its parser follows any depth of
    nesting; either could end the process.
    """
    where = f"{path / name / ZARRAY}"
    with _damage_reported(path):
        found = ts.KvStore.open(_store(path, name)).result().read(ZARRAY).result()
    if found.state != "value":
        raise InputError(f"{path} is damaged ({where} is missing); convert or save it again")
    if len(found.value) > ZARRAY_BYTES:
        raise InputError(f"{where} has {len(found.value)} bytes, expected at most {ZARRAY_BYTES}")
    described = parse_json(decode(found.value, where), where)
    if not isinstance(described, dict):
        raise InputError(f"{where} holds a JSON {type(described).__name__}, expected an object")
    shape, chunks = (_axes(described, key, where) for key in ("shape", "chunks"))
    if len(chunks) != len(shape) or min(chunks, default=1) < 1:
        raise InputError(
            f"{where}: chunks must have a positive size for each of {len(shape)} axes, got "
            f"{shown(list(chunks))}"
        )
    if math.prod(chunks) > max(math.prod(shape), PIECE_SIZE):
        raise InputError(f"{where}: chunks of {shown(list(chunks))} are larger than the array")
    dtype = fields.text(described, "dtype", where)
    with _damage_reported(path):  # NumPy knows those of ml_dtypes by name
        known = np.dtype(dtype or "no dtype")
    return jax.ShapeDtypeStruct(shape, known)


def _axes(described: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    sizes = described.get(key)
    if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise InputError(f"{where}: {key} must be a list of sizes, got {shown(sizes)}")
    return tuple(sizes)


def _refuse_links(path: Path) -> None:
    home = path.resolve()
    for inner in path.rglob("*"):
        if inner.is_symlink() and not inner.resolve().is_relative_to(home):
            raise InputError(
                f"{inner} is a link that leads out of its folder (to {inner.resolve()}); put the "
                "file itself there"
            )


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises a plain Exception for a chunk that it cannot read
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).partition("\n")[0].partition(" [tensorstore_spec")[0]
        reason = shown(reason or type(cause).__name__, quote=False)
        raise InputError(f"{path} is damaged ({reason}); convert or save it again") from error


def _leaves(tree: Any) -> dict[str, Any]:
    return cast(dict[str, Any], flatten_dict(tree, sep="."))


class _HeldSignals:
    """Defers SIGTERM and SIGINT in a block, for handlers that raise.

    An exception in the middle of Orbax ends the event loop while TensorStore still writes, which
    then prints a traceback for each report to the closed loop.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # only it can handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._keep)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came is not None:
            signal.raise_signal(self._came)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._came = number

    def deliver(self) -> None:
        """Delivers a deferred signal; raises what its handler raises."""
        if self._came is None:
            return
        number, self._came = self._came, None
        signal.signal(number, self._before[number])
        try:
            signal.raise_signal(number)
        finally:
            signal.signal(number, self._keep)


class _StreamedArrayHandler(ocp.type_handlers.TypeHandler):
    """Writes a `StreamedArray` like a `jax.Array` in Orbax, one piece after another.

    Only one process reads and writes; with several, Orbax makes the others wait.
    """

    def __init__(self, signals: _HeldSignals) -> None:
        self._signals = signals

    def typestr(self) -> str:
        return "jax.Array"  # so that it is restored as one

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        if not is_primary():
            return []
        together: dict[Callable[[], Iterator[Pieces]], dict[str, ts.TensorStore]] = {}
        for value, info in zip(values, infos, strict=True):
            together.setdefault(value.pieces, {})[value.name] = await self._created(value, info)
        for read, stores in together.items():
            written: list[Awaitable[None]] = []
            try:
                for found in read():
                    # The last pieces were compressed while these were read; at most two of an array
                    # are in memory.
                    await _finished(written)
                    written = []
                    self._signals.deliver()
                    for name, (index, piece) in found.items():
                        store = stores[name][index]
                        written.append(
                            store.write(piece, can_reference_source_data_indefinitely=True)
                        )
            finally:
                await _finished(written)
        return []  # nothing is left to wait for

    async def _created(self, value: StreamedArray, info: Any) -> ts.TensorStore:
        await info.await_path_creation()
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{info.path}/"},
            "metadata": {"shape": value.shape, "chunks": value.chunks, "compressor": _COMPRESSOR},
            "store_data_equal_to_fill_value": True,  # Orbax treats a missing chunk as damage
        }
        return await ts.open(spec, dtype=value.dtype, create=True, context=info.ts_context)

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is restored as a jax.Array")

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("a StreamedArray is restored as a jax.Array")


async def _finished(writes: Sequence[Awaitable[None]]) -> None:
    """Waits for all of them, also if one fails."""
    for found in await asyncio.gather(*writes, return_exceptions=True):
        if found is not None:
            raise found
