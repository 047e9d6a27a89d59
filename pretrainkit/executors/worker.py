"""A local worker process: `python -m pretrainkit.executors.worker FD`.

Comes in, through a socket: which engines to load, then the job and the node's name, then unit numbers and None. Goes
out, through the same socket: one result per unit, or an error. Guarantee: it dies with its driver, at once, whatever it
is doing; Ctrl+C is the driver's business.

A process of its own, started by name, needs no importable `__main__`, inherits no threads, and works from a notebook.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from pretrainkit.errors import PretrainKitError
from pretrainkit.units.runner import UnitRunner, preload


def main(descriptor: int) -> None:
    """Serve one driver until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_driver, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        engines = preload(*connection.recv())
        job, node = connection.recv()
        runner = UnitRunner(job, node, engines)
        del engines  # one that the job does not use goes
        _tell(connection, None)  # ready
        while True:
            # Units until a None, which asks for what is still in hand.
            for result in runner.run_all(iter(connection.recv, None)):
                _tell(connection, result)
    except EOFError:
        return
    except (PretrainKitError, OSError) as error:
        _tell(connection, error)


def _tell(connection: Connection, message: Any) -> None:
    """Send to the driver; when it is ending, to whom would an error be told?"""
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)


def _die_with_driver(descriptor: int) -> None:
    """End this process when the other end of the connection is closed, which the kernel does however a driver dies."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
