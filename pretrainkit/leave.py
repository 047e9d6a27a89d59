"""How a process ends that has trained together with others: without taking the interpreter apart.

gloo's threads outlive their process group, which DTensor keeps. One that has just ended a collective may still hold
its tensors, and takes the GIL to let go of them. Once the interpreter is being taken apart, CPython (up to 3.13)
answers by ending the thread, inside of a C++ destructor, and C++ then ends the process with SIGABRT: a finished run
that looks like a failed one, rarely. Source: CPython's Python/ceval_gil.h, take_gil; PyTorch's
torch/csrc/PyInterpreter.cpp, decref.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

_had_process_group = threading.Event()


def note_process_group() -> None:
    """Let `leave` know that this process has had one."""
    _had_process_group.set()


def leave(code: int) -> NoReturn:
    """End this process.

    Raises:
        SystemExit: In a process that never had a process group: everybody's way to end.
    """
    if not _had_process_group.is_set():
        sys.exit(code)
    # What CPython does before it takes an interpreter apart, in its order. Source: Python/pylifecycle.c, Py_FinalizeEx.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
