"""Length of the TPU compiler's schedule for one block of a kernel, without a TPU.

    python benchmarks/tpu_schedule.py --chips v5e,v6e --tiles 1024x1024,512x512

libtpu compiles the attention kernels for a chip and dumps the instruction bundles it has scheduled;
a TensorCore issues one bundle per cycle unless it stalls. So the number of bundles compares tiles
and variants of a kernel on one chip. It is not a time: stalls for memory and matrix units are not
included. Needs Linux on x86-64 and `pip install '.[dev]'`.
"""

import itertools
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies

from dca_jax.attention.mosaic_tpu import tiles
from dca_jax.attention.mosaic_tpu.dkv import dkv
from dca_jax.attention.mosaic_tpu.dq import dq
from dca_jax.attention.mosaic_tpu.flash_forward import flash_forward
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.rotation import rotation_tables
from dca_jax.attention.op import make_rows
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
LENGTH = 16_384
UNIT = 1024 * 1024  # logits


def prepare(dump: str) -> None:
    """Tells libtpu, before it is loaded, what to dump and that there is no TPU."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [
            f"--xla_jf_dump_to={dump}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=final_bundles",
        ]
    )
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")


class Schedule(NamedTuple):
    """Bundles of an unmasked block and of a masked one."""

    unmasked: int
    masked: int


def compile_kernel(kernel: str, chip: str, tile: tuple[int, int], heads: Heads) -> None:
    """Compiles "forward", "dq" or "dkv" in bfloat16 for one chip."""
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip], **options
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    # Chunk lengths that are multiples of the key block.
    dca = DCAConfig(chunk_len=4 * tile[1], max_query_position=5 * tile[1])

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def run(query: Any, key: Any, value: Any, layer: Any, do: Any, lse: Any, delta: Any) -> Any:
        rows = make_rows((1, LENGTH, heads.query, heads.head_dim), dca=dca, rope=RopeConfig())
        vmem = tiles.CHIPS[topology.devices[0].device_kind].vmem
        sizes: dict[str, Any] = {"dca": dca, "phases": PHASES, "tile": tile, "vmem_bytes": vmem}
        if kernel == "forward":
            query = query.reshape(1, LENGTH, heads.query, heads.head_dim)
            key, value = (x.reshape(*x.shape[:3], heads.kv, -1) for x in (key, value))
            return flash_forward(query, key, value, layer, rows, heads, with_lse=False, **sizes)
        cos_sin = rotation_tables(LENGTH, rows, dca, PHASES)
        inputs = query, key, value, cos_sin, do, lse, delta
        return (dq if kernel == "dq" else dkv)(inputs, layer, rows, heads, **sizes)

    query = like(1, LENGTH, heads.query * heads.head_dim)
    cache = like(1, 1, LENGTH, heads.kv * heads.head_dim)
    stat = like(1, heads.query, 1, LENGTH, dtype=jnp.float32)
    layer = like(dtype=jnp.int32)
    jax.jit(run).lower(query, cache, cache, layer, query, stat, stat).compile()


def read_schedule(kernel: str, dump: str) -> Schedule:
    """The two regions of the last compiled kernel that multiply matrices."""
    files = sorted(Path(dump).glob(f"*-dca_tpu_{kernel}.*-final_bundles.txt"))
    files = [file for file in files if "schedule-analysis" not in file.name]
    begin, last, products, regions = 0, 0, 0, []
    for line in files[-1].read_text().splitlines():
        if bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+(PF|LE|LB)?[^:]*:", line):
            last = int(bundle[1], 16)
            if bundle[2]:
                regions.append((products, last - begin))
                begin, products = last, 0
        products += line.count("vmatmul")
    regions.append((products, last - begin))
    most = max(count for count, _ in regions)
    sizes = sorted(size for count, size in regions if count > most / 2)
    for file in files:
        file.unlink()
    return Schedule(sizes[0], sizes[-1])


@exit_on_input_error()
def main(
    chips: Annotated[str, typer.Option(help="Names separated by commas.")] = ",".join(TOPOLOGIES),
    sizes: Annotated[
        str, typer.Option("--tiles", help="Queries x keys, separated by commas.")
    ] = "1024x1024,512x512",
    kernels: Annotated[str, typer.Option(help="Names separated by commas.")] = "forward,dq,dkv",
    head_dim: Annotated[int, typer.Option(help="64, 128 or 256.")] = 128,
) -> None:
    """Prints the bundles per block for each size and chip, in Markdown."""
    unknown = {*chips.split(",")} - {*TOPOLOGIES} | {*kernels.split(",")} - {"forward", "dq", "dkv"}
    if unknown or not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", sizes):
        raise InputError(
            f"expected chips of {', '.join(TOPOLOGIES)}, kernels of forward, dq, dkv, and tiles "
            f"such as 1024x512; got {chips}, {kernels}, {sizes}"
        )
    heads = Heads(query=4, kv=2, head_dim=head_dim)
    print("| chip | kernel | queries x keys | unmasked | masked | unmasked, per 1024 x 1024 |")
    print("| --- | --- | --- | --- | --- | --- |")
    cases = itertools.product(chips.split(","), kernels.split(","), sizes.split(","))
    with tempfile.TemporaryDirectory() as dump:
        prepare(dump)
        for chip, kernel, size in cases:
            queries, keys = map(int, size.split("x"))
            row = [chip, kernel, size]
            try:
                compile_kernel(kernel, chip, (queries, keys), heads)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row += ["exceeds VMEM", "", ""]
            else:
                schedule = read_schedule(kernel, dump)
                each = schedule.unmasked * UNIT / (queries * keys * heads.q_per_pack)
                row += [*map(str, schedule), f"{each:.0f}"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
