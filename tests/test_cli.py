"""The command line: one signature, two spellings, one clear line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from pretrainkit.arguments import parse
from pretrainkit.cli import run_cli, run_command
from pretrainkit.errors import ConfigError, Interrupted, StorageError
from pretrainkit.report import write_report


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How to step."""

    learning_rate: float = 1e-3
    """Peak step size."""
    steps: int | None = None
    """Number of steps; null for no limit."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate} must be above 0")


def job(
    input_dir: Path,
    output_dir: str = "out",
    count: int = 3,
    mode: Literal["fast", "full"] = "fast",
    dry_run: bool = False,
    model_config: dict[str, Any] | None = None,
    names: list[str] | None = None,
    optimizer: Optimizer = Optimizer(),
) -> None:
    """Do the job.

    Args:
        input_dir: Where the input lies.
        output_dir: Where the output goes.
        count: How many.
        mode: How thorough.
        dry_run: Say what would happen and stop.
        model_config: Free-form overrides.
        names: Some names.
        optimizer: How to step.
    """


DEFAULTS = {
    "input_dir": Path("in"),
    "output_dir": "out",
    "count": 3,
    "mode": "fast",
    "dry_run": False,
    "model_config": None,
    "names": None,
    "optimizer": Optimizer(),
}


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--input_dir=in"], {}),
        (["--input_dir", "in", "--count", "5"], {"count": 5}),
        (["--input_dir=in", "--dry_run"], {"dry_run": True}),
        (["--dry_run", "false", "--input_dir=in"], {}),
        (["--input_dir=in", "--names=[a,b]"], {"names": ["a", "b"]}),
        (["--input_dir=in", "--model_config.n_layer", "2"], {"model_config": {"n_layer": 2}}),
        (["--input_dir=in", "--optimizer.learning_rate", "3e-4"], {"optimizer": Optimizer(learning_rate=3e-4)}),
    ],
)
def test_flags_in_both_forms(arguments, changed):
    assert parse(job, arguments) == DEFAULTS | changed


def test_positional_values_fill_the_named_places_in_order():
    values = parse(job, ["in", "--count=4", "there"], positional=("input_dir", "output_dir"))
    assert values == DEFAULTS | {"output_dir": "there", "count": 4}
    assert parse(job, ["in", "--output_dir=there"], positional=("input_dir", "output_dir"))["output_dir"] == "there"


def test_a_list_takes_all_values_by_place():
    assert parse(job, ["in", "a", "b"], positional=("input_dir", "names"))["names"] == ["a", "b"]


def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("input_dir: in\ncount: 7\noptimizer:\n  learning_rate: 5e-3\n")
    expected = DEFAULTS | {"count": 9, "optimizer": Optimizer(learning_rate=5e-3)}
    assert parse(job, ["--count=9", "--config", str(config)]) == expected
    assert parse(job, [f"--config={config}", "--count", "9"]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input_dri=in"], "unknown flag --input_dri; did you mean --input_dir?"),
        (["--input_dir=in", "--optimizer.learning_rat=1"], "did you mean --optimizer.learning_rate"),
        ([], "--input_dir is missing; see --help"),
        (["--input_dir=in", "--count=x"], "--count=x does not fit; it takes a whole number"),
        (["--input_dir=in", "--mode=slow"], "--mode=slow does not fit; it takes one of fast, full"),
        (["--input_dir=in", "--dry_run=maybe"], "--dry_run=maybe does not fit; it takes true or false"),
        (
            ["--input_dir=in", "--optimizer.steps=q"],
            "--optimizer.steps=q does not fit; it takes a whole number or null",
        ),
        (["--input_dir=in", "--optimizer=q"], "--optimizer is a group; give its keys one by one"),
        (["--input_dir=in", "--optimizer.learning_rate=-1"], "optimizer.learning_rate=-1.0 must be above 0"),
        (["--input_dir=in", "stray"], "'stray' belongs to no flag"),
        (["--input_dir"], "--input_dir needs a value"),
        (["--input_dir=in", "--optimizer.steps=true"], "--optimizer.steps=true does not fit; it takes a whole number"),
    ],
)
def test_a_wrong_flag_gets_one_clear_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(job, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "holds a list, not a mapping"),
        ("count: [\n", "is not YAML"),
        ("count: 3\ncount: 4\n", "line 2: the key 'count' stands twice"),
        ('input_dir: ""\n', "input_dir is empty; give a path"),
        ("config: other.yaml\n", "'config' is a flag, no key of a file; say it as --config"),
        ("optimizer:\n  max_lr: 3\n  steps: 3\n", "unknown key 'optimizer.max_lr'"),
        ("learning_rate: 3\n", "unknown key 'learning_rate'; did you mean optimizer.learning_rate?"),
        ("cuont: 3\n", "unknown key 'cuont'; did you mean count?"),
        (
            "optimizer:\n  learning_rat: 3\n",
            "unknown key 'optimizer.learning_rat'; did you mean optimizer.learning_rate",
        ),
        ("optimizer: 3\n", "optimizer is a group; give its keys one by one, like optimizer.learning_rate"),
        ("optimizer:\n", "optimizer is a group; give its keys one by one, like optimizer.learning_rate"),
    ],
)
def test_a_wrong_config_file_gets_one_clear_line(tmp_path, content, message):
    config = tmp_path / "job.yaml"
    config.write_text(content)
    with pytest.raises(ConfigError, match="job.yaml") as caught:
        parse(job, ["--input_dir=in", f"--config={config}"])
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["count: null\n", "optimizer:\n  learning_rate: null\n"])
def test_null_where_a_value_belongs_is_refused(tmp_path, content):
    config = tmp_path / "job.yaml"
    config.write_text(content)
    with pytest.raises(ConfigError, match="=null does not fit; it takes a "):
        parse(job, ["--input_dir=in", f"--config={config}"])


@pytest.mark.parametrize("content", ["", "# nothing yet\n"])
def test_an_empty_config_file_takes_the_defaults(tmp_path, content):
    config = tmp_path / "job.yaml"
    config.write_text(content)
    assert parse(job, [f"--config={config}", "--input_dir=in"]) == DEFAULTS


def test_a_missing_config_file_names_the_nearest(tmp_path):
    (tmp_path / "pretrain.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*pretrain\.yaml"):
        parse(job, ["--config", str(tmp_path / "pretrian.yaml")])


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(ConfigError, match=f"--config={tmp_path} is a folder; give a YAML file"):
        parse(job, ["--config", str(tmp_path)])


def test_the_home_folder_is_meant_in_flags_and_files_and_a_name_can_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(job, ["--input_dir=~/in"])["input_dir"] == tmp_path / "in"
    (tmp_path / "job.yaml").write_text("input_dir: ~/in\n")
    assert parse(job, [f"--config={tmp_path}/job.yaml"])["input_dir"] == tmp_path / "in"
    folders = parse(write_report, ["~/a", "b"], positional=("run_dirs",))["run_dirs"]
    assert folders == [tmp_path / "a", Path("b")]
    with pytest.raises(StorageError, match=r"--input_dir=a{40}\.\.\. is too long \(256 characters\)"):
        parse(job, [f"--input_dir={'a' * 256}"])


def test_no_message_shows_a_secret(capsys):
    def fails() -> None:
        """Fail."""
        raise ConfigError("s3://KEY:S3C/RET@b/x, https://S3CRET@h/x, http://h/x?sig=S3CRET; abfs://c@a/x, 12:30 a@b")

    with pytest.raises(SystemExit):
        run_cli(fails, [])
    line = "error: s3://***@b/x, https://***@h/x, http://h/x?*** abfs://c@a/x, 12:30 a@b\n"
    assert capsys.readouterr().err == line


def test_exit_codes_and_messages(capsys):
    def fails(kind: str) -> None:
        """Fail."""
        raise {
            "user": ConfigError("a\n  b"),
            "signal": Interrupted("stopped", 15),
            "permission": PermissionError(13, "Permission denied", "a/b.json"),
        }[kind]

    for kind, code, line in [
        ("user", 2, "error: a b\n"),
        ("signal", 143, "stopped\n"),
        ("permission", 2, "error: no permission for a/b.json; have it changed, or give another path\n"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run_cli(fails, ["--kind", kind])
        assert (caught.value.code, capsys.readouterr().err) == (code, line)
    with pytest.raises(ConfigError):
        run_cli(fails, ["--kind=user", "--debug"])


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command("optimise", [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unknown command 'optimise'; did you mean optimize?\n"
