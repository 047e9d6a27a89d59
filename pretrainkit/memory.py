"""The memory of a worker or a training process: how much it has, what it keeps, what it gives back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

# Source: mallopt(3), malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
# A batch's arrays are of some megabytes; what a huge document needed goes back to the system.
_KEEP_BLOCKS_UP_TO = 32 << 20
_KEEP_IN_ALL = 128 << 20


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    # Source: proc(5), statm: size, resident, ... in pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def keep_freed_memory() -> None:
    """Let malloc, and Arrow by way of malloc, use again what was freed; for a process that does nothing else.

    Left alone, both return it to the system after every batch, which then clears it page by page for the next one.
    """
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    _set_malloc({_M_MMAP_THRESHOLD: _KEEP_BLOCKS_UP_TO, _M_TRIM_THRESHOLD: _KEEP_IN_ALL})


def keep_all_freed_memory() -> None:
    """Let malloc use again whatever was freed, as PyTorch does with a GPU's memory; for a process that trains.

    Every step needs the same blocks as the one before. Left alone, malloc returns those above 32 MiB each time: half
    of a step on a CPU may go into clearing pages.
    """
    _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def _set_malloc(options: dict[int, int]) -> None:
    with contextlib.suppress(AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


def return_free_memory() -> None:
    """Give what malloc keeps for later back to the system: loading a vocabulary of 128,000 leaves 150 MB behind."""
    # Source: malloc_trim(3); only glibc has it.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
