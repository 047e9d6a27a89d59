"""A report draws what counted, compares runs, and needs nothing but its own file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from pretrainkit.errors import ConfigError, InputError
from pretrainkit.report import write_report
from pretrainkit.report.drawing import running_mean
from pretrainkit.report.runs import read_run

TOKENS_PER_STEP = 1_000_000


def row(event: str, step: int, seconds: float, **values: object) -> dict[str, object]:
    return {"event": event, "step": step, "tokens": step * TOKENS_PER_STEP, "time": 1_700_000_000 + seconds, **values}


def train_row(step: int, seconds: float, loss: float) -> dict[str, object]:
    wave = math.sin(step * 1.7)
    values = {
        "loss": loss + 0.05 * wave,
        "learning_rate": 3e-4 * min(step / 20, 1),
        "grad_norm": 1.0 + 0.4 * wave + 5 / step,
        "tokens_per_s": 95_000 + 2_000 * wave,
        "mfu": 0.45 + 0.01 * wave,
        "mfu_causal": 0.42 + 0.01 * wave,
        "data_wait": 0.002,
        "goodput": 0.97 - 0.2 / step,
        "memory_gb": 41.5,
        "skipped": 0,
    }
    return row("train", step, seconds, **values)


def write_run(folder: Path, *, steps: int = 200, speed: float = 1.0) -> Path:
    """A run of 200 steps that was killed after step 120 and resumed from step 100."""
    rows = [row("start", 0, 0, world_size=8)]

    def loss(step: int) -> float:
        return 2.5 + 8 / (1 + step / 10 / speed)

    rows += [train_row(step, step * 10 / speed, loss(step)) for step in range(1, 121)]
    rows += [row("save", 100, 1000, path="step-00000100"), row("resume", 100, 1500, world_size=4)]
    for step in range(101, steps + 1):
        rows.append(train_row(step, 500 + step * 10 / speed, loss(step)))
        if step % 50 == 0:
            values = {"val_loss": loss(step) + 0.1, "val_bits_per_byte": loss(step) / 3, "val_loss/web": loss(step)}
            rows.append(row("validation", step, 501 + step * 10 / speed, **values))
    rows.append(row("end", steps, 520 + steps * 10 / speed, goodput=0.9))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (folder / "config.yaml").write_text(f"out_dir: {folder}\ntrain:\n  global_batch_size: {int(64 * speed)}\n")
    return folder


def write_tiny_run(folder: Path, **values: object) -> Path:
    """One logged step with a loss alone: one picture, so that a report is quick."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(row("train", 1, 0, loss=3.0, **values)) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "first"), write_run(folder / "second", speed=2.0)


def test_report_of_one_run_is_one_file_with_every_picture_in_it(runs: tuple[Path, Path]) -> None:
    path = write_report([runs[0]])
    assert path == runs[0] / "report.html"
    page = path.read_text()
    assert page.count("<svg") == 10
    for title in ("Training loss", "Validation loss", "Learning rate", "Gradient norm", "Throughput", "Goodput"):
        assert title in page
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href")), "the page loads something"
    assert "<script" not in page
    assert (runs[0] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "RUN")
    for name in "ab":
        write_report([tmp_path / "RUN"], output_dir=tmp_path / name)
    for file in ("report.html", "report.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.slow
def test_two_runs_are_compared_in_the_table_and_in_their_configurations(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    page = write_report(list(runs), output_dir=tmp_path).read_text()
    assert "Pretraining first and second" in page
    assert "<td>train.global_batch_size</td><td>64</td><td>128</td>" in page
    assert re.search(r"<td>Time from start to end</td><td>0:42:00</td><td>0:25:20 \(-39\.7%\)</td>", page)
    assert "<td>Resumed</td><td>1</td><td>1</td>" in page


def test_steps_that_a_resume_replaced_are_left_out(runs: tuple[Path, Path]) -> None:
    run = read_run(runs[0])
    assert [line["step"] for line in run.train] == list(range(1, 201))
    assert run.train[110]["time"] == 1_700_000_000 + 500 + 111 * 10  # the second time of step 111
    assert [event["event"] for event in run.events] == ["start", "resume", "end"]


def test_sources_of_a_mixture_get_a_line_each(runs: tuple[Path, Path]) -> None:
    assert read_run(runs[0]).names("val_loss") == ["val_loss", "val_loss/web"]


def test_numbers_that_are_not_finite_are_shown_and_do_not_spoil_the_mean(tmp_path: Path) -> None:
    folder = write_tiny_run(tmp_path / "RUN")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row("train", 2, 10, loss="nan")) + "\n")
        file.write('{"event": "train", "st')  # killed while it wrote
    assert "not finite" in write_report([folder]).read_text()
    assert running_mean([1.0, math.nan, 3.0, 5.0], share=0.5) == [1.0, 2.0, 4.0, 4.0]


def test_a_run_with_few_numbers_gets_the_pictures_they_make(tmp_path: Path) -> None:
    assert write_report([write_tiny_run(tmp_path / "RUN")]).read_text().count("<svg") == 1


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    folder = write_tiny_run(tmp_path / "<b>bold<")
    assert "<b>bold" not in write_report([folder, folder]).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no metrics.jsonl; give the out_dir"), ("", "no logged step yet"), ("{]\n", "no logged step yet")],
)
def test_a_folder_without_metrics_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        write_report([tmp_path])


@pytest.mark.parametrize("values", [{}, {"loss": "high"}, {"loss": None}, {"loss": [1]}, {"loss": 10**400}])
def test_rows_without_a_number_are_refused(tmp_path: Path, values: dict[str, object]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row("train", 1, 0, **values)) + "\n")
    with pytest.raises(InputError, match="its metrics have no number that a report draws, such as loss"):
        write_report([tmp_path])


@pytest.mark.parametrize("values", [{"step": "x"}, {"tokens": None}, {"time": "now"}, {"time": 1e300}, {"event": []}])
def test_a_row_that_does_not_say_where_and_when_is_left_out(
    tmp_path: Path, values: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_run(tmp_path / "RUN")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row("train", 2, 10, loss=9.0) | values) + "\n")
        file.write(json.dumps(row("train", 3, 10, loss="high", grad_norm=2.0)) + "\n")
    (folder / "config.yaml").write_text("train: [\n")
    assert write_report([folder]).read_text().count("<svg") == 2
    assert read_run(folder).values("loss") == [3.0]
    assert "line 2 is not a row of metrics; left out" in caplog.text
    assert "config.yaml is not YAML" in caplog.text


def test_a_run_whose_loss_was_never_finite_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row("train", 1, 0, loss="nan")) + "\n")
    assert "not finite" in write_report([tmp_path]).read_text()


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 run folders; give 1 to 6"):
        write_report([tmp_path] * 7)
