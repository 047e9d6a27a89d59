"""A run's numbers as pictures: one SVG per panel, and all of them in one PNG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrainkit.errors import InputError
from pretrainkit.report.runs import RunMetrics

# Okabe and Ito's colours, which stay apart for colour-blind eyes and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MAX_RUNS = len(COLOURS)
_LINES = ("-", "--", ":", "-.")
_STYLE = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, sharp, and it can be searched
    "svg.hashsalt": "pretrainkit",  # the same run gives the same bytes
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture: which numbers, over what, in which unit."""

    title: str
    """Heading."""
    unit: str
    """Label of the vertical axis."""
    keys: tuple[str, ...]
    """Numbers drawn, each in a line style of its own."""
    labels: tuple[str, ...] = ("",)
    """What each number is called in the legend, beside the run's name."""
    x: str = "tokens"
    """Horizontal axis: "tokens" or "hours"."""
    scale: float = 1.0
    """Factor from the metrics' unit to the shown one."""
    log: bool = False
    """Logarithmic vertical axis."""
    smooth: bool = False
    """Draw the values faint, and their running mean strong."""
    from_zero: bool = False
    """The vertical axis begins at zero."""


PANELS = (
    Panel(title="Training loss", unit="nats per token", keys=("loss",), smooth=True),
    Panel(title="Validation loss", unit="nats per token", keys=("val_loss",)),
    Panel(title="Validation, bits per byte", unit="bits per byte of text", keys=("val_bits_per_byte",)),
    Panel(title="Learning rate", unit="", keys=("learning_rate",), from_zero=True),
    Panel(title="Gradient norm", unit="before clipping", keys=("grad_norm",), log=True, smooth=True),
    Panel(title="Throughput", unit="tokens per second", keys=("tokens_per_s",), from_zero=True),
    Panel(
        title="Model FLOPs utilisation",
        unit="%",
        keys=("mfu", "mfu_causal"),
        labels=("full attention", "causal attention"),
        scale=100,
        from_zero=True,
    ),
    Panel(title="Waiting for data", unit="% of the step", keys=("data_wait",), scale=100, from_zero=True),
    Panel(title="Goodput", unit="% of the time that counted", keys=("goodput",), x="hours", scale=100, from_zero=True),
    Panel(title="Memory", unit="GB, the most ever held", keys=("memory_gb",), from_zero=True),
)


def draw(runs: Sequence[RunMetrics]) -> tuple[dict[str, str], bytes]:
    """Every panel that the runs have numbers for: title -> SVG, and all of them in one PNG.

    Raises:
        InputError: They have none.
    """
    from matplotlib import rc_context

    panels = [panel for panel in PANELS if any(run.series(key, panel.x)[1] for run in runs for key in panel.keys)]
    if not panels:
        raise InputError(f"{runs[0].folder}: its metrics have no number that a report draws, such as loss")
    pictures = {}
    with rc_context(_STYLE):
        for panel in panels:
            figure = _new_figure(rows=1, columns=1)
            _draw_panel(figure.subplots(), panel, runs)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            pictures[panel.title] = buffer.getvalue()[buffer.getvalue().index("<svg") :]
        columns = min(2, len(panels))
        figure = _new_figure(rows=math.ceil(len(panels) / columns), columns=columns)
        axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, runs)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return pictures, png.getvalue()


def _new_figure(*, rows: int, columns: int) -> Any:
    """An empty figure with fixed room for the labels: measuring them, as matplotlib can, takes twice the time."""
    from matplotlib.figure import Figure

    width, height = 6.2 * columns, 3.1 * rows  # inches
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.35 / height, wspace=0.2, hspace=0.42
    )
    return figure


def _draw_panel(axis: Any, panel: Panel, runs: Sequence[RunMetrics]) -> None:
    from matplotlib.ticker import EngFormatter

    shown: list[float] = []
    for colour, run in zip(COLOURS, runs, strict=False):
        for (key, label), line in zip(_lines_of(panel, run), itertools.cycle(_LINES), strict=False):
            x, y = run.series(key, panel.x)
            y = [value * panel.scale for value in y]
            name = ", ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)
            shown += _draw_line(axis, panel, x, y, color=colour, linestyle=line, label=name or None)
        for event in run.events:
            if event["event"] in ("resume", "rewind") and panel.x == "tokens":
                axis.axvline(event["tokens"], color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("tokens" if panel.x == "tokens" else "hours since the beginning")
    axis.set_xlim(left=0)
    if panel.x == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(shown, default=0.0) >= 10_000:
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif not panel.log:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _set_range(axis, panel, shown)
    if axis.get_legend_handles_labels()[1]:
        axis.legend()


def _lines_of(panel: Panel, run: RunMetrics) -> list[tuple[str, str]]:
    """(number, label) of every line: the panel's own, and one for each source of a mixture."""
    lines = []
    for key, label in zip(panel.keys, panel.labels, strict=True):
        lines += [(name, label or name[len(key) + 1 :]) for name in run.names(key)]
    return lines


def _draw_line(axis: Any, panel: Panel, x: list[float], y: list[float], **options: Any) -> list[float]:
    """Draw one number; returns the finite values, for the axis."""
    marker = "o" if len(x) <= 30 else None
    if panel.smooth and len(x) > 30:
        axis.plot(x, y, color=options["color"], alpha=0.25, linewidth=0.8)
        axis.plot(x, running_mean(y), linewidth=1.6, **options)
    else:
        axis.plot(x, y, linewidth=1.4, marker=marker, markersize=3, **options)
    broken = [(place, value) for place, value in zip(x, y, strict=True) if not math.isfinite(value)]
    if broken:  # NaN would simply be a gap; say where it was
        axis.plot([place for place, _ in broken], [0.02] * len(broken), "x", color="#cc0000", clip_on=False,
                  transform=axis.get_xaxis_transform(), label="not finite")  # fmt: skip
    return [value for value in y if math.isfinite(value)]


def _set_range(axis: Any, panel: Panel, shown: list[float]) -> None:
    from matplotlib.ticker import NullFormatter

    if panel.log and min(shown, default=0.0) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if max(shown) < 20 * min(shown) else NullFormatter())
        return
    if panel.from_zero:
        axis.set_ylim(bottom=0, top=max(shown, default=0.0) * 1.08 or 1.0)
        return
    ordered = sorted(shown)
    # The 98th percentile, rounded up: among fewer than 50 values none is a spike.
    usual = ordered[math.ceil(0.98 * (len(ordered) - 1))] if ordered else 0.0
    low = ordered[0] if ordered else 0.0
    if ordered and ordered[-1] - low > 3 * (usual - low) > 0:  # a spike would press everything else flat
        axis.set_ylim(low - 0.05 * (usual - low), usual + 0.5 * (usual - low))


def running_mean(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Mean over a window of `share` of all values around each one; values that are not finite are left out."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = max(1, round(len(array) * share / 2))
    places = np.arange(len(array))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(array))
    with np.errstate(invalid="ignore"):
        means: list[float] = ((sums[last] - sums[first]) / (counts[last] - counts[first])).tolist()
    return means
