"""Full disks, folders that cannot be written, signals, a second driver: one clear line, nothing damaged, go on later.

The disks are real: a tmpfs of a few kilobytes, mounted for the test. Each case ends in the bytes of a run that nothing
disturbed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrainkit.errors import Interrupted, StorageError
from pretrainkit.locks import folder_lock
from pretrainkit.merge import merge_datasets
from pretrainkit.optimize import optimize_dataset
from pretrainkit.storage import process_mark, write_atomic
from tests.chaos.oracle import check_visible, differences, tree
from tests.conftest import make_texts, write_parquet

ROOT = Path(__file__).parent.parent
FLAGS = {"engine": "tokenizers", "unit_bytes": 20_000, "val_fraction": 0.2, "chunk_bytes": 4096}
FULL = "the disk is full; free space and run the same command again, finished work is kept"
READ_ONLY = "the file system is read-only; give a folder that can be written"
NO_PERMISSION = "no permission; give a folder that can be written"

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2


@pytest.fixture(scope="module")
def input_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruptions")
    for index in range(3):
        write_parquet(folder / f"{index}.parquet", make_texts(60, seed=index), row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def undisturbed(input_dir, tokenizer_dir, tmp_path_factory):
    """Folder with the output of an optimize and a merge that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    optimize_dataset(tokenizer_dir, folder / "out", input_dir, num_workers=0, **FLAGS)
    merge_datasets(folder / "out/train", folder / "data", mode="copy")
    return folder


class Disk:
    """A file system of its own whose size can be changed while it is in use."""

    def __init__(self, path):
        self.path = path

    def remount(self, **options):
        """size: bytes; nr_inodes: files and folders; ro, rw."""
        words = [name if value is True else f"{name}={value}" for name, value in options.items()]
        subprocess.run(["mount", "-o", ",".join(["remount", *words]), self.path], check=True)

    def fill(self):
        """Leave no space at all."""
        status = os.statvfs(self.path)
        self.remount(size=(status.f_blocks - status.f_bfree) * status.f_frsize)

    def enlarge(self):
        self.remount(rw=True, size="64m", nr_inodes=100_000)


@pytest.fixture
def disk(tmp_path):
    """A tmpfs; only root may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def optimize_here(input_dir, tokenizer_dir, output_dir):
    return optimize_dataset(tokenizer_dir, output_dir, input_dir, num_workers=0, **FLAGS)


def optimize_command(input_dir, tokenizer_dir, output_dir, **flags):
    flags = {**FLAGS, "input_dir": input_dir, "tokenizer_dir": tokenizer_dir, "output_dir": output_dir, **flags}
    return [sys.executable, "optimize_dataset.py", *[f"--{key}={value}" for key, value in flags.items()]]


def merge_command(source_dir, target_dir):
    return [sys.executable, "merge_files.py", f"--source_dir={source_dir}", f"--target_dir={target_dir}"]


def only_line(command, **options):
    """What a command that must end with exit code 2 says, besides how far it was when that took long."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "tokens/s" not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def run_command(command):
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)


def hidden(folder):
    """Names below a folder that no user should ever see; a lock is for good."""
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".lock")


@pytest.mark.slow
@pytest.mark.parametrize("size", [48 << 10, 112 << 10, 200 << 10], ids=["beginning", "middle", "end"])
def test_optimize_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    disk, input_dir, tokenizer_dir, undisturbed, size
):
    out = disk.path / "out"
    command = optimize_command(input_dir, tokenizer_dir, out, num_workers=2)
    disk.remount(size=size)
    line = only_line(command)
    assert line.startswith(f"error: cannot write {out}"), line
    assert line.endswith(FULL), line
    assert [check_visible(index.parent) for index in out.glob("*/*/index.json")] == []
    assert hidden(out) == []
    disk.enlarge()
    run_command(command)
    assert differences(tree(out), tree(undisturbed / "out")) == []


def until_it_fits(disk, target, action, limit, step):
    """Run `action` on disks that grow until one suffices; yields after each failure, then after a large one."""
    failures, problem = 0, ""
    while True:
        disk.remount(**{limit: (failures + 1) * step})
        try:
            action()
        except StorageError as error:
            problem = str(error)
        else:
            assert failures > 3, "the steps are too large to see anything"
            return
        assert problem.startswith(f"cannot write {target}"), problem
        assert problem.endswith(FULL), problem
        failures += 1
        yield
        disk.enlarge()
        action()
        yield
        shutil.rmtree(target)


@pytest.mark.parametrize(
    ("limit", "step"),
    [
        ("size", 44 << 10),
        ("nr_inodes", 12),
        pytest.param("size", 4 << 10, marks=pytest.mark.slow),
        pytest.param("nr_inodes", 1, marks=pytest.mark.slow),
    ],
)
def test_wherever_the_disk_fills_up_optimize_ends_in_the_same_bytes(
    disk, input_dir, tokenizer_dir, undisturbed, limit, step
):
    out, expected = disk.path / "out", tree(undisturbed / "out")
    tries = until_it_fits(disk, out, lambda: optimize_here(input_dir, tokenizer_dir, out), limit, step)
    for _ in tries:
        for index in out.glob("*/*/index.json"):
            assert check_visible(index.parent) == []
            assert (index.parent / "tokenizer/tokenizer.json").exists(), "what is visible is complete"
        next(tries)
        assert differences(tree(out), expected) == []


@pytest.mark.slow
def test_merge_on_a_full_disk_says_so_and_goes_on_when_there_is_space(disk, undisturbed):
    data = disk.path / "data"
    command = merge_command(undisturbed / "out/train", data)
    disk.remount(size=64 << 10)
    line = only_line(command)
    assert line.startswith(f"error: cannot write {data}"), line
    assert line.endswith(FULL), line
    assert not (data / "index.json").exists()
    disk.enlarge()
    run_command(command)
    assert differences(tree(data), tree(undisturbed / "data")) == []
    assert hidden(data) == []


@pytest.mark.parametrize(("limit", "step"), [("size", 8 << 10), ("nr_inodes", 2)])
def test_wherever_the_disk_fills_up_merge_ends_in_the_same_bytes(disk, undisturbed, limit, step):
    data, expected = disk.path / "data", tree(undisturbed / "data")
    tries = until_it_fits(disk, data, lambda: merge_datasets(undisturbed / "out/train", data), limit, step)
    for _ in tries:
        assert not (data / "index.json").exists()
        next(tries)
        assert differences(tree(data), expected) == []
        assert hidden(data) == []


def test_finished_work_on_a_full_disk_is_only_looked_at(disk, input_dir, tokenizer_dir, undisturbed):
    shutil.copytree(undisturbed, disk.path, dirs_exist_ok=True)
    before = tree(disk.path)
    disk.fill()
    optimize_here(input_dir, tokenizer_dir, disk.path / "out")
    merge_datasets(undisturbed / "out/train", disk.path / "data")
    assert tree(disk.path) == before


@pytest.mark.slow
@pytest.mark.parametrize("place", ["out", "missing/out"])
def test_optimize_into_a_read_only_place_is_refused_in_one_line(disk, input_dir, tokenizer_dir, place):
    disk.remount(ro=True)
    line = only_line(optimize_command(input_dir, tokenizer_dir, disk.path / place))
    assert line.startswith(f"error: cannot write {disk.path / place}"), line
    assert line.endswith(READ_ONLY), line


@pytest.mark.slow
def test_a_disk_that_became_read_only_keeps_what_is_there(disk, input_dir, tokenizer_dir, undisturbed):
    out = disk.path / "out"
    command = optimize_command(input_dir, tokenizer_dir, out)
    disk.remount(size=112 << 10)
    only_line(command)
    disk.enlarge()
    before = tree(out)
    assert any("/units/" in name for name in before), "some units are finished"
    disk.remount(ro=True)
    line = only_line(command)
    assert line.startswith(f"error: cannot write {out}"), line
    assert line.endswith(READ_ONLY), line
    assert tree(out) == before
    disk.enlarge()
    run_command(command)
    assert differences(tree(out), tree(undisturbed / "out")) == []


def test_merge_into_a_read_only_place_is_refused(disk, undisturbed):
    disk.remount(ro=True)
    for place in ("data", "missing/data"):
        with pytest.raises(StorageError, match=f"cannot write {disk.path / place}.*{READ_ONLY}"):
            merge_datasets(undisturbed / "out/train", disk.path / place)


def test_merge_reads_from_a_read_only_place_and_never_moves_from_it(disk, tmp_path, undisturbed):
    shutil.copytree(undisturbed / "out", disk.path / "out")
    disk.remount(ro=True)
    source, expected = disk.path / "out/train", tree(undisturbed / "data")
    merge_datasets(source, tmp_path / "auto")
    assert differences(tree(tmp_path / "auto"), expected) == []
    with pytest.raises(StorageError, match=READ_ONLY):
        merge_datasets(source, tmp_path / "moved", mode="move")
    assert not (tmp_path / "moved/index.json").exists()
    merge_datasets(source, tmp_path / "moved", mode="copy")
    assert differences(tree(tmp_path / "moved"), expected) == []


def obey_permissions():
    """Take from root, before it runs another program, the right to read and write where permissions say no."""
    if os.geteuid() == 0:
        for right in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_CAPBSET_DROP, right, 0, 0, 0)


@pytest.fixture
def locked_folder(tmp_path):
    """A folder that nobody may write to."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["units", "metadata.json", "index.json", "chunk-0-0.bin"])
def test_what_may_not_be_read_is_named_in_one_line(tmp_path, undisturbed, name):
    shutil.copytree(undisturbed / "out/train", tmp_path / "train")
    (node,) = (tmp_path / "train").iterdir()
    (node / name).chmod(0)
    line = only_line(merge_command(tmp_path / "train", tmp_path / "data"), preexec_fn=obey_permissions)
    (node / name).chmod(0o700)
    assert line == f"error: no permission for {node / name}; have it changed, or give another path"
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_folder_without_permission_is_refused_in_one_line(
    locked_folder, input_dir, tokenizer_dir, tmp_path, undisturbed
):
    for command in (
        optimize_command(input_dir, tokenizer_dir, locked_folder),
        optimize_command(input_dir, tokenizer_dir, locked_folder / "out"),
        merge_command(undisturbed / "out/train", locked_folder / "data"),
    ):
        line = only_line(command, preexec_fn=obey_permissions)
        assert line.startswith(f"error: cannot write {locked_folder}"), line
        assert line.endswith(NO_PERMISSION), line
    assert list(locked_folder.iterdir()) == []


@pytest.mark.slow
def test_a_second_driver_is_refused_in_one_line_and_changes_nothing(input_dir, tokenizer_dir, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/out/train")
    before = tree(tmp_path / "copy")
    for folder, command in (
        ("out", optimize_command(input_dir, tokenizer_dir, tmp_path / "copy/out")),
        ("data", merge_command(undisturbed / "out/train", tmp_path / "copy/data")),
    ):
        (tmp_path / "copy/data/index.json").unlink(missing_ok=True)
        before.pop("data/index.json", None)
        with folder_lock(tmp_path / "copy" / folder, "test"):
            line = only_line(command)
        where = tmp_path / "copy" / folder
        assert line.startswith(f"error: {where} is in use by another process (pid {os.getpid()} on "), line
        assert "; wait for it or " in line
    assert tree(tmp_path / "copy") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_stopped_by_a_signal_says_how_to_go_on(tmp_path, undisturbed, monkeypatch, number):
    from pretrainkit import merge

    place = merge.place_whole

    def place_and_stop(*arguments):
        os.kill(os.getpid(), number)
        return place(*arguments)

    monkeypatch.setattr(merge, "place_whole", place_and_stop)
    with pytest.raises(
        Interrupted, match=f"stopped by {number.name}; nothing is lost: run the same command"
    ) as stopped:
        merge_datasets(undisturbed / "out/train", tmp_path / "data", mode="copy")
    assert stopped.value.exit_code == 128 + number
    assert not (tmp_path / "data/index.json").exists()
    monkeypatch.undo()
    merge_datasets(undisturbed / "out/train", tmp_path / "data", mode="copy")
    assert differences(tree(tmp_path / "data"), tree(undisturbed / "data")) == []


def test_a_signal_is_never_taken_for_bad_input(tmp_path, input_dir, tokenizer_dir, undisturbed, monkeypatch):
    from pretrainkit.documents import parquet

    open_shard = parquet._open

    def open_and_stop(source, **how):
        if how:  # to read it, not to plan
            signal.raise_signal(signal.SIGTERM)
        return open_shard(source, **how)

    monkeypatch.setattr(parquet, "_open", open_and_stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; what is finished in .* is kept"):
        optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, on_bad_input="skip", **FLAGS)
    monkeypatch.undo()
    optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, on_bad_input="skip", **FLAGS)
    assert differences(tree(tmp_path / "out"), tree(undisturbed / "out")) == []


def test_ctrl_c_waits_for_no_store_that_is_silent(tmp_path, input_dir, tokenizer_dir, monkeypatch):
    answer = threading.Event()

    def ask(*_):
        os.kill(os.getpid(), signal.SIGINT)
        answer.wait(60)

    monkeypatch.setattr("pretrainkit.plan.inspect_shard", ask)
    start = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        optimize_dataset(tokenizer_dir, tmp_path / "out", input_dir, num_workers=0, **FLAGS)
    assert time.monotonic() - start < 30
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    answer.set()


def test_drafts_and_stages_of_dead_processes_are_swept_and_no_others(input_dir, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    optimize_here(input_dir, tokenizer_dir, out)
    (node,) = (out / "train").iterdir()
    before = tree(out)
    host, dead = socket.gethostname(), subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    mark = process_mark(dead.pid)
    dead.communicate()
    theirs = [
        out / f".plan.json.{host}-{mark}-abcdefgh.tmp",
        out / f"tokenizer/.tokenizer.json.{host}-{mark}-abcdefgh.tmp",
        node / f".index.json.{host}-{mark}-abcdefgh.tmp",
        out / f"val/{node.name}/tokenizer/.tokenizer_config.json.{host}-{mark}-a_cd3fgh.tmp",
        node / f".stage-{host}-{mark}-3-abcdefgh/chunk-3-0.bin",
        # The number of a living process, which started at another time.
        node / f".metadata.json.{host}-{os.getpid()}-1-abcdefgh.tmp",
    ]
    living = process_mark(os.getpid())
    others = [
        out / f".plan.json.{host}-{living}-abcdefgh.tmp",
        node / f".stage-{host}-{living}-3-abcdefgh/chunk-3-0.bin",
        out / f".plan.json.elsewhere-{mark}-abcdefgh.tmp",
        # A machine whose name begins with the name of this one.
        node / f".stage-{host}-{mark}-7-3-abcdefgh/chunk-3-0.bin",
        out / f".plan.json.{host}-1-{mark}-abcdefgh.tmp",
        out / ".notes.tmp",
        out / f".plan.json.{host}-{mark}.tmp",
    ]
    for path in [*theirs, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    optimize_here(input_dir, tokenizer_dir, out)
    assert [path for path in theirs if path.exists()] == []
    assert [path for path in others if not path.exists()] == []
    for path in others:
        path.unlink()
    assert differences(tree(out), before) == []


def test_a_killed_write_leaves_a_draft_that_the_sweep_knows(input_dir, tokenizer_dir, tmp_path):
    optimize_here(input_dir, tokenizer_dir, tmp_path / "out")
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(tmp_path / "out/plan.json", "half")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (name,) = hidden(tmp_path / "out")
    assert name.startswith(".plan.json.")
    optimize_here(input_dir, tokenizer_dir, tmp_path / "out")
    assert hidden(tmp_path / "out") == []
