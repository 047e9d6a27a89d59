"""The private folder in which one attempt at a unit makes its files before they are published."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

from pretrainkit.storage import is_remote, process_mark
from pretrainkit.units.work import STAGE_PREFIX


class Stage:
    """A folder on the file system of the output where that is local, else a temporary one; made when it is first used.

    Args:
        output_dir: Folder or URL of the job's output.
        node: Name of this node's folders.
        unit: Number of the unit.
    """

    def __init__(self, output_dir: str, node: str, unit: int) -> None:
        self._output_dir, self._node, self._unit = output_dir, node, unit
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
            OSError: It cannot be made.
        """
        if self._path is None:
            self._path = Path(self._make())
        return self._path

    def _make(self) -> str:
        if is_remote(self._output_dir):
            return tempfile.mkdtemp(prefix="pretrainkit-")
        node = Path(self._output_dir) / "train" / self._node
        node.mkdir(parents=True, exist_ok=True)
        # The mark tells whoever sweeps later whether this process still lives.
        prefix = f"{STAGE_PREFIX}{socket.gethostname()}-{process_mark(os.getpid())}-{self._unit}-"
        return tempfile.mkdtemp(prefix=prefix, dir=node)

    def remove(self) -> None:
        """Take the folder away, with whatever is still in it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
