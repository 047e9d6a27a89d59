"""What a run did, in pictures: `metrics.jsonl` of one run, or of several compared -> `report.html` and `report.png`.

Comes in: run folders, finished or still training. Goes out: one HTML file with everything inside (SVG pictures, a
table, the events, what the configurations differ in), and the same pictures as PNG. Guarantee: what a resume or a
rewind replaced is not drawn twice; the files are whole or not there.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pretrainkit.errors import ConfigError
from pretrainkit.report.drawing import MAX_RUNS, draw
from pretrainkit.report.page import page
from pretrainkit.report.runs import read_run
from pretrainkit.storage import write_atomic

__all__ = ["write_report"]

_log = logging.getLogger(__name__)


def write_report(run_dirs: list[Path], output_dir: Path | None = None) -> Path:
    """A report of one run, or of several compared: `report.html` (self-contained) and `report.png`.

    Args:
        run_dirs: Folders that pretraining wrote, with `metrics.jsonl`; the first is the one compared with.
        output_dir: Where the report goes; None takes the first run's folder.

    Returns:
        Path of the HTML file.

    Raises:
        InputError: A folder has no metrics, no logged step yet, or no number to draw.
        ConfigError: Too many runs, or matplotlib is not installed.

    Example:
        >>> write_report(["RUN"])
        PosixPath('RUN/report.html')
    """
    if not 1 <= len(run_dirs) <= MAX_RUNS:
        raise ConfigError(f"{len(run_dirs)} run folders; give 1 to {MAX_RUNS}")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    try:
        pictures, png = draw(runs)
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}; pip install 'pretrainkit[report]'") from error
    folder = Path(output_dir) if output_dir is not None else Path(run_dirs[0])
    write_atomic(folder / "report.png", png)
    write_atomic(folder / "report.html", page(runs, pictures))
    _log.info("wrote %s", folder / "report.html")
    return folder / "report.html"
