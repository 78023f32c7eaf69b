"""A device's total and free memory.

On a GPU or TPU it is read from JAX's allocator. A CPU's arrays are in the process, whose memory is
limited by the machine, by its control group (a container) and by its address space (`ulimit -v`);
the smallest of these counts.
"""

import os
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# Share of a GPU's memory for JAX; the rest is for CUDA, its libraries and NCCL. Commands set this
# share; JAX's default is 0.75 (`XLA_CLIENT_MEM_FRACTION`).
GPU_SHARE = 0.95


def total_bytes(device: Any) -> int | None:
    """Bytes available to arrays and programs on a device; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [_machine("MemTotal"), *(limit for limit, _ in _groups()), _address_space()]
    return min((limit for limit in limits if limit is not None), default=None)


def free_bytes(device: Any) -> int | None:
    """Bytes of it that are free now; None if unknown."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    free = [_machine("MemAvailable"), *(limit - used for limit, used in _groups())]
    space = _address_space()
    if space is not None:
        pages = _first_number("/proc/self/statm") or 0
        free.append(space - pages * os.sysconf("SC_PAGE_SIZE"))
    return min((max(0, some) for some in free if some is not None), default=None)


def _machine(name: str) -> int | None:
    """A value in bytes from /proc/meminfo; without that file, the machine's whole memory."""
    kilobytes = _named(Path("/proc/meminfo"), name + ":")
    if kilobytes:
        return 1024 * kilobytes
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Files with the memory of control groups, by version: folder, limit, usage, and the part of the
# usage that is page cache, which is released when memory is needed.
_GROUPS = {
    True: ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    False: (
        *("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}


def _groups() -> list[tuple[int, int]]:
    """Limit and usage, in bytes, of the control groups of this process that have a limit."""
    found = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit_name, used_name, pages = _GROUPS[not controllers]
        folder = Path(top) / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit, used = (_first_number(group / name) for name in (limit_name, used_name))
            if limit is not None and used is not None:
                found.append((limit, used - _named(group / "memory.stat", pages)))
            if str(group) == top:
                break
    return found


def _named(path: Path, name: str) -> int:
    """The number after a name in a file with one name per line; 0 if the name is missing."""
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), 0)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_number(path: str | Path) -> int | None:
    for line in _lines(path):
        first = line.split()[0]
        return int(first) if first.isdecimal() else None  # "max": no limit
    return None


def _address_space() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
