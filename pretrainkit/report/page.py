"""The HTML page of a report: a table of what came out, the pictures, the events, what the configurations differ in."""

from __future__ import annotations

import html
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import yaml

from pretrainkit._version import __version__
from pretrainkit.report.drawing import COLOURS
from pretrainkit.report.runs import RunMetrics

_log = logging.getLogger(__name__)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafafa; max-width: 1240px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }}
figure, table {{ background: #fff; border: 1px solid #e4e4e4; border-radius: 6px; }}
figure {{ margin: 0; padding: .5rem; }}
figure svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .3rem .8rem; border-top: 1px solid #eee; }}
td {{ font-variant-numeric: tabular-nums; }}
pre {{ background: #fff; border: 1px solid #e4e4e4; border-radius: 6px; padding: 1rem; overflow-x: auto; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }}
footer {{ color: #777; margin-top: 2rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<h2>What came out</h2>
{summary}
<h2>How it went</h2>
<div class="pictures">
{pictures}
</div>
<h2>Events</h2>
{events}
<h2>{config_title}</h2>
{config}
<footer>pretrainkit {version}. Dotted lines: the run was resumed or went back to a checkpoint.</footer>
</body>
</html>
"""


def page(runs: Sequence[RunMetrics], pictures: Mapping[str, str]) -> str:
    """The whole page; everything in it is text or inline SVG."""
    names = " and ".join(run.name for run in runs)
    comparing = len(runs) > 1
    return _PAGE.format(
        title=html.escape(f"Pretraining {names}"),
        summary=_table([["", *map(_heading, runs, COLOURS)], *_summary(runs)], escaped=True),
        pictures="\n".join(f"<figure>{picture}</figure>" for picture in pictures.values()),
        events=_table([["When (UTC)", "Run", "Event", "Step", "Tokens"], *_events(runs)]),
        config_title="What the configurations differ in" if comparing else "Configuration",
        config=_differences(runs) if comparing else _configuration(runs[0]),
        version=__version__,
    )


def _heading(run: RunMetrics, colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>{html.escape(run.name)}'


def _table(rows: Sequence[Sequence[str]], *, escaped: bool = False) -> str:
    head, *body = [[cell if escaped else html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>" + "".join(lines) + "</table>"


# --- Summary --------------------------------------------------------------------------------------------------------


def _last(key: str) -> Callable[[RunMetrics], float | None]:
    return lambda run: values[-1] if (values := run.values(key)) else None


def _best(key: str) -> Callable[[RunMetrics], float | None]:
    return lambda run: min(run.values(key), default=None)


def _median(key: str) -> Callable[[RunMetrics], float | None]:
    return lambda run: statistics.median(values) if (values := run.values(key)) else None


def _recent_loss(run: RunMetrics) -> float | None:
    values = run.values("loss")
    return statistics.fmean(values[-max(1, len(values) // 20) :]) if values else None


def _count(event: str) -> Callable[[RunMetrics], float | None]:
    return lambda run: float(sum(row["event"] == event for row in run.events))


def _elapsed(run: RunMetrics) -> float | None:
    times = [row["time"] for row in (*run.events, *run.train)]
    return float(max(times) - min(times))


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _fine(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


_SUMMARY: tuple[tuple[str, Callable[[RunMetrics], float | None], Callable[[float], str]], ...] = (
    ("Steps", lambda run: float(run.train[-1]["step"]), _whole),
    ("Tokens", lambda run: float(run.train[-1]["tokens"]), _whole),
    ("Loss, mean of the last twentieth", _recent_loss, _fine),
    ("Validation loss, last", _last("val_loss"), _fine),
    ("Validation loss, best", _best("val_loss"), _fine),
    ("Bits per byte, last", _last("val_bits_per_byte"), _fine),
    ("Tokens per second, median", _median("tokens_per_s"), _whole),
    ("MFU, full attention, median", _median("mfu"), _percent),
    ("MFU, causal attention, median", _median("mfu_causal"), _percent),
    ("Waiting for data, median", _median("data_wait"), _percent),
    ("Goodput", _last("goodput"), _percent),
    ("Time from start to end", _elapsed, lambda value: str(timedelta(seconds=round(value)))),
    ("Memory, GB", _last("memory_gb"), lambda value: f"{value:.1f}"),
    ("Skipped steps", lambda run: sum(run.values("skipped")), _whole),
    ("Resumed", _count("resume"), _whole),
    ("Went back to a checkpoint", _count("rewind"), _whole),
)


def _summary(runs: Sequence[RunMetrics]) -> list[list[str]]:
    rows = []
    for title, measure, write in _SUMMARY:
        values = [measure(run) for run in runs]
        if any(value is not None for value in values):
            cells = [_with_difference(values, place, write) for place in range(len(runs))]
            rows.append([html.escape(title), *cells])
    return rows


def _with_difference(values: Sequence[float | None], place: int, write: Callable[[float], str]) -> str:
    """A value, and for every run but the first how it differs from the first."""
    value, first = values[place], values[0]
    if value is None:
        return "-"
    if place == 0 or not first or value == first:
        return write(value)
    return f"{write(value)} ({value / first - 1:+.1%})"


# --- Events and configuration ---------------------------------------------------------------------------------------

_EVENTS = {
    "start": "started",
    "resume": "resumed",
    "rewind": "went back to a checkpoint and past the data since",
    "stop": "stopped by a signal",
    "end": "finished",
}


def _events(runs: Sequence[RunMetrics]) -> list[list[str]]:
    rows = []
    happened = [(event, run.name) for run in runs for event in run.events]
    for event, name in sorted(happened, key=lambda pair: pair[0]["time"]):
        when = datetime.fromtimestamp(event["time"], tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        what = _EVENTS.get(event["event"]) or str(event["event"])
        if "world_size" in event:
            what += f" on {event['world_size']} rank(s)"
        rows.append([when, name, what, f"{event['step']:,}", f"{event['tokens']:,}"])
    return rows


def _read_config(run: RunMetrics) -> dict[str, Any]:
    path = run.folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _log.warning("%s is not YAML (%s); left out", path, " ".join(str(error).split()))
        content = {}
    return content if isinstance(content, dict) else {}


def _configuration(run: RunMetrics) -> str:
    config = _read_config(run)
    if not config:
        return "<p>The run's folder has no config.yaml that can be read.</p>"
    return f"<pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre>"


def _differences(runs: Sequence[RunMetrics]) -> str:
    flat = [_flatten(_read_config(run)) for run in runs]
    keys = sorted({key for config in flat for key in config})
    different = [key for key in keys if len({config.get(key, "-") for config in flat}) > 1]
    if not different:
        return "<p>Nothing.</p>"
    return _table(
        [["Key", *(run.name for run in runs)], *([key, *(c.get(key, "-") for c in flat)] for key in different)]
    )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat
