"""Consolidate and convert take every form a checkpoint comes in, and nothing that is damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from litgpt import GPT, LLM, Config
from litgpt.tokenizer import Tokenizer

from pretrainkit.errors import CheckpointError, ModelError, PretrainKitError, StorageError, TokenizerError
from pretrainkit.export import consolidate_checkpoint, convert_pretrained_checkpoint, export_hf
from pretrainkit.train.manifest import hash_files, write_manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> GPT:
    """A tiny Llama-type model with random weights."""
    torch.manual_seed(0)
    return GPT(
        Config.from_name(
            "Llama-3.2-1B", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, head_size=8, intermediate_size=48,
            block_size=64, vocab_size=512, padded_vocab_size=512, rope_adjustments=None,
        )
    ).eval()  # fmt: skip


def save_sharded(folder: Path, state: dict[str, object]) -> None:
    """Write a DCP folder the way training does, in one process."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is not initialised: that is meant
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def training_state(model: GPT) -> dict[str, object]:
    """Model and Adam state, as training saves them."""
    optimizer = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    return {"model": model.state_dict(), "optimizer": {"state": optimizer}, "step": 7}


def save_checkpoint(folder: Path, model: GPT, tokenizer_dir: Path, step: int = 7) -> Path:
    """A checkpoint folder as docs/design.md describes it."""
    save_sharded(folder / "lit_model.pth", training_state(model))
    torch.save({"step": 7}, folder / "lit_model.pth" / "meta.pt")  # without it Lightning's tool refuses the folder
    (folder / "model_config.yaml").write_text(yaml.dump(asdict(model.config)))
    (folder / "state.json").write_text(json.dumps({"state": {"step": step, "tokens": 448}}))
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, step, hash_files(folder, names))
    return folder


@pytest.fixture(scope="module")
def saved(model: GPT, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/final, read only."""
    return save_checkpoint(tmp_path_factory.mktemp("run") / "RUN" / "final", model, tokenizer_dir)


@pytest.fixture
def final(saved: Path, tmp_path: Path) -> Path:
    """A copy of RUN/final to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "RUN" / "final"))


def assert_same(found: dict[str, torch.Tensor], model: GPT) -> None:
    expected = model.state_dict()
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def load(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("model", content)


# --- Every form is taken ---------------------------------------------------------------------------------------------


def test_consolidate_writes_the_model_alone_beside_the_weights(final: Path, model: GPT) -> None:
    target = consolidate_checkpoint(final)
    assert target == final / "lit_model.pth.consolidated"
    content = torch.load(target, weights_only=True)
    assert list(content) == ["model"]
    assert_same(content["model"], model)


def test_lightnings_own_tool_reads_the_same_folder(final: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    assert_same(_load_distributed_checkpoint(final / "lit_model.pth")["model"], model)


def forms(final: Path, model: GPT) -> dict[str, Path]:
    """Every form of the same checkpoint; those without a model_config.yaml of their own lie beside one."""
    run = final.parent
    config = final / "model_config.yaml"
    paths = {"run": run, "checkpoint folder": final, "sharded folder": final / "lit_model.pth"}

    def beside(name: str, content: object) -> Path:
        (run / name).mkdir()
        shutil.copy(config, run / name)
        torch.save(content, run / name / "lit_model.pth")
        return run / name

    weights = model.state_dict()
    paths["our consolidated file"] = consolidate_checkpoint(final, run / "one" / "file.pth")
    shutil.copy(config, run / "one")
    paths["litgpt's checkpoint"] = beside("litgpt", {"model": weights, "optimizer": {"x": torch.ones(3)}, "step": 1})
    paths["litgpt's folder"] = beside("flat", weights)
    paths["the Trainer's file"] = beside("trainer", {"state_dict": {f"model.{n}": v for n, v in weights.items()}})
    paths["a compiled model"] = beside("compiled", {"model": {f"_orig_mod.{n}": v for n, v in weights.items()}})
    hparams = {"model": weights, "hyper_parameters": {"path": Path("x"), "config": model.config}}
    paths["a file with other objects"] = beside("objects", hparams)
    flat = run / "flat_dcp"
    save_sharded(flat, dict(weights))
    shutil.copy(config, flat)
    paths["a sharded folder of the bare model"] = flat
    wrapped = {
        f"transformer.h.0._orig_mod.{n[16:]}" if n.startswith("transformer.h.0.") else n: v for n, v in weights.items()
    }
    save_sharded(run / "blocks" / "lit_model.pth", {"model": wrapped})
    shutil.copy(config, run / "blocks")
    paths["compiled blocks"] = run / "blocks"
    paths["a folder with the consolidated file alone"] = run / "alone"
    (run / "alone").mkdir()
    shutil.copy(config, run / "alone")
    shutil.copy(paths["our consolidated file"], run / "alone" / "lit_model.pth.consolidated")
    return paths


def test_convert_takes_every_form_of_a_checkpoint(final: Path, model: GPT, tmp_path: Path) -> None:
    for number, (form, path) in enumerate(forms(final, model).items()):
        output = convert_pretrained_checkpoint(path, tmp_path / f"out-{number}")
        content = torch.load(output / "lit_model.pth", weights_only=True)
        assert sorted(content) == sorted(model.state_dict()), form
        assert_same(content, model)


def test_export_hf_takes_a_run_as_it_lies(final: Path, model: GPT, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_hf(final.parent, tmp_path / "hf", verify=True)
    tokens = torch.arange(40).view(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        assert (loaded(tokens).logits - model(tokens)).abs().max() <= 1e-4
    assert "| Training steps | 7 |" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(130)
def test_shards_of_several_ranks_are_joined(model: GPT, tmp_path: Path) -> None:
    """Two processes save DTensors; rows are split unevenly."""
    script = tmp_path / "save.py"
    script.write_text(TWO_RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    store = tmp_path / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(store), str(tmp_path / "sharded")], env=environment
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    target = consolidate_checkpoint(tmp_path / "sharded", tmp_path / "file.pth")
    found = load(target)
    assert torch.equal(found["rows"], torch.arange(15.0).view(5, 3))
    assert torch.equal(found["bias"], torch.arange(3.0))


TWO_RANKS = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
rows = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
dcp.save({"model": {"rows": rows, "bias": torch.arange(3.0)}, "optimizer": {"rows": rows * 9}}, checkpoint_id=folder)
dist.destroy_process_group()
os._exit(0)  # see pretrainkit/leave.py
"""


# --- What the litgpt folder is good for ------------------------------------------------------------------------------


def test_converted_folder_loads_in_litgpt_and_generates(final: Path, model: GPT, tmp_path: Path) -> None:
    folder = convert_pretrained_checkpoint(final, tmp_path / "lit")
    assert {"lit_model.pth", "model_config.yaml", "tokenizer.json", "config.json"} <= set(os.listdir(folder))
    assert Config.from_file(folder / "model_config.yaml") == model.config
    llm = LLM.load(str(folder), init="pretrained")
    assert llm.prompt_style.apply("text") == "text"
    found = llm.model.state_dict()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in model.state_dict().items())
    assert len(llm.generate("The quick", max_new_tokens=5, top_k=1)) > 0


def test_missing_tokenizer_settings_are_filled_in(final: Path, tmp_path: Path) -> None:
    (final / "tokenizer_config.json").unlink()
    (final / "manifest.json").unlink()
    (final / "state.json").unlink()
    (final / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    folder = convert_pretrained_checkpoint(final, tmp_path / "lit")
    assert Tokenizer(folder).eos_id == 511
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 511}


def test_a_special_token_that_does_not_exist_is_refused(final: Path, tmp_path: Path) -> None:
    (final / "manifest.json").unlink()
    (final / "state.json").unlink()
    (final / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(TokenizerError, match="eos_token='<nowhere>' is not a token"):
        convert_pretrained_checkpoint(final, tmp_path / "lit")


def test_dtype_changes_the_weights_alone(final: Path, tmp_path: Path) -> None:
    folder = convert_pretrained_checkpoint(final, tmp_path / "lit", dtype="bfloat16")
    assert {value.dtype for value in load(folder / "lit_model.pth").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


# --- Nothing is half-written or overwritten --------------------------------------------------------------------------


def test_running_again_replaces_the_earlier_output(final: Path, tmp_path: Path) -> None:
    for command in (convert_pretrained_checkpoint, export_hf):
        output = tmp_path / command.__name__
        first = command(final, output)
        before = {path.name: path.read_bytes() for path in first.iterdir()}
        assert {path.name: path.read_bytes() for path in command(final, output).iterdir()} == before
    assert consolidate_checkpoint(final).read_bytes() == consolidate_checkpoint(final).read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_with_other_files_is_left_alone(final: Path, tmp_path: Path) -> None:
    output = convert_pretrained_checkpoint(final, tmp_path / "lit")
    (output / "notes.txt").write_text("mine")
    for command in (convert_pretrained_checkpoint, export_hf):
        with pytest.raises(StorageError, match="which this command did not write"):
            command(final, output)
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(StorageError, match="is a file"):
        export_hf(final, output / "notes.txt")


def test_consolidate_does_not_overwrite_what_is_no_checkpoint(final: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt is there and is no checkpoint"):
        consolidate_checkpoint(final, tmp_path / "notes.txt")
    with pytest.raises(StorageError, match="is the checkpoint itself"):
        consolidate_checkpoint(consolidate_checkpoint(final), final / "lit_model.pth.consolidated")


def test_a_full_disk_leaves_nothing_behind(final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from pretrainkit.export import writing

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(writing, "_write_archive", full)
    for output in (final / "c.pth", tmp_path / "lit"):
        command = consolidate_checkpoint if output.suffix else convert_pretrained_checkpoint
        with pytest.raises(StorageError, match="the disk is full"):
            command(final, output)
        assert not output.exists()
    assert not [path for folder in (final, tmp_path) for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_export_left_is_swept_and_what_a_living_one_writes_is_not(final: Path, tmp_path: Path) -> None:
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    killed, living = (tmp_path / f".lit.{host}-{pid}.tmp" for pid in (dead.pid, os.getppid()))
    elsewhere = tmp_path / ".lit.othernode-1.tmp"
    for folder in (killed, living, elsewhere):
        folder.mkdir()
        (folder / "half").write_text("written")
    convert_pretrained_checkpoint(final, tmp_path / "lit")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, elsewhere.name, "RUN", "lit"])


def test_a_refused_checkpoint_makes_no_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert_pretrained_checkpoint(tmp_path / "nowhere", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


# --- Damage is found -------------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(final: Path, tmp_path: Path) -> None:
    flip_bit(next((final / "lit_model.pth").glob("*.distcp")))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        consolidate_checkpoint(final)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        convert_pretrained_checkpoint(final / "lit_model.pth", tmp_path / "lit")
    assert not (tmp_path / "lit").exists()


def test_an_export_is_checked_before_it_is_used_again(final: Path, tmp_path: Path) -> None:
    folder = convert_pretrained_checkpoint(final, tmp_path / "lit")
    flip_bit(folder / "lit_model.pth")
    with pytest.raises(CheckpointError, match=r"lit_model\.pth is not what was saved"):
        export_hf(folder, tmp_path / "hf")


def test_of_a_run_the_newest_whole_checkpoint_is_taken(
    model: GPT, tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "RUN"
    for step in (2, 10, 9):
        save_checkpoint(run / f"step-{step:08d}", model, tokenizer_dir, step)
    flip_bit(next((run / "step-00000010" / "lit_model.pth").glob("*.distcp")))
    (run / "step-00000011" / "lit_model.pth").mkdir(parents=True)  # killed in the middle of a save
    with caplog.at_level("INFO"):
        convert_pretrained_checkpoint(run, tmp_path / "lit")
    messages = " ".join(record.message for record in caplog.records)
    assert "passed over" in messages
    assert "step-00000010" in messages
    assert "taking" in messages
    assert "step-00000009" in messages
    shutil.rmtree(run / "step-00000009")
    shutil.rmtree(run / "step-00000002")
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        convert_pretrained_checkpoint(run, tmp_path / "lit")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda final: (final / "manifest.json").unlink(), "its save was not finished"),
        (lambda final: (final / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda final: (final / "model_config.yaml").unlink(), "model_config.yaml is missing"),
        (lambda final: (final / "lit_model.pth" / ".metadata").unlink(), "its save was not finished"),
        (lambda final: os.truncate(next((final / "lit_model.pth").glob("*.distcp")), 100), "has 100 bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_one_clear_line(
    spoil: object, message: str, final: Path, tmp_path: Path
) -> None:
    spoil(final)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        convert_pretrained_checkpoint(final, tmp_path / "lit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RUN"]


@pytest.mark.parametrize("name", ["truncated.pth", "empty.pth", "text.pth"])
def test_a_file_that_is_no_checkpoint_is_refused(name: str, final: Path) -> None:
    path = final / name
    content = consolidate_checkpoint(final).read_bytes()
    path.write_bytes({"truncated.pth": content[: len(content) // 2], "empty.pth": b"", "text.pth": b"hello"}[name])
    with pytest.raises(CheckpointError, match=r"cannot be read|is not a checkpoint file"):
        consolidate_checkpoint(path, final / "out.pth")


def test_missing_paths_are_answered_with_the_nearest(final: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder; did you mean .*final\?"):
        consolidate_checkpoint(final.parent / "finl")
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run"):
        consolidate_checkpoint(tmp_path)


def test_weights_of_another_model_are_refused(final: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lacks .* more weights of pythia-14m"):
        convert_pretrained_checkpoint(final, tmp_path / "lit", model_name="pythia-14m")
    (final / "model_config.yaml").unlink()
    (final / "manifest.json").unlink()
    (final / "state.json").unlink()
    with pytest.raises(ModelError, match=r"no model_config\.yaml; put it there, or say --model_name NAME"):
        convert_pretrained_checkpoint(final, tmp_path / "lit")


# --- Checkpoints run no code -----------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch /tmp/pretrainkit-evil-was-here",))


EVIL_MARK = Path("/tmp/pretrainkit-evil-was-here")


def test_metadata_that_names_code_is_refused(final: Path) -> None:
    (final / "manifest.json").unlink()
    (final / "state.json").unlink()
    (final / "lit_model.pth" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"wants to load posix\.system.*do not trust"):
        consolidate_checkpoint(final)
    assert not EVIL_MARK.exists()


def test_objects_in_a_file_are_never_made(final: Path, model: GPT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict(), "hook": Evil()}, tmp_path / "evil.pth")
    assert_same(load(consolidate_checkpoint(tmp_path / "evil.pth", tmp_path / "clean.pth")), model)
    assert not EVIL_MARK.exists()


def test_metadata_cannot_reach_outside_of_its_folder(final: Path) -> None:
    (final / "manifest.json").unlink()
    (final / "state.json").unlink()
    path = final / "lit_model.pth" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="names a file outside of it"):
        consolidate_checkpoint(final)


# --- The file itself -------------------------------------------------------------------------------------------------


def test_written_file_is_what_torch_save_would_write(tmp_path: Path) -> None:
    from pretrainkit.export.reading import in_memory
    from pretrainkit.export.writing import write_torch_file

    fused = torch.arange(24.0).view(6, 4)
    content = {
        "a": fused,
        "view": fused[2:4],
        "transposed": fused.t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "ids": torch.arange(3),
    }
    path = tmp_path / "ä" / "file.pth"  # not ASCII
    path.parent.mkdir()
    write_torch_file(path, {name: in_memory(tensor) for name, tensor in content.items()})
    for options in ({"weights_only": True}, {"mmap": True, "weights_only": True}):
        found = torch.load(path, **options)
        assert list(found) == list(content)
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in content.items()
        )
    assert zipfile.ZipFile(path).testzip() is None  # checksums are right
    assert path.stat().st_size < 10_000


def test_consolidation_reads_the_model_only_and_one_tensor_at_a_time(
    final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrainkit.export import reading

    read: list[str] = []
    original = reading._read_piece

    def spy(name: str, *arguments: object) -> torch.Tensor:
        read.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(reading, "_read_piece", spy)
    consolidate_checkpoint(final)
    assert all(name.startswith("model.") for name in read)
    assert len(read) == len(set(read))


# --- The commands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_three_commands_in_a_row_and_what_reads_their_output(final: Path, tmp_path: Path) -> None:
    """DESIGN's commands as processes, then litgpt and lm_eval on what they wrote."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command: str, stdin: str = "") -> str:
        result = subprocess.run(
            command,
            input=stdin,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    scripts, bin_folder = ROOT / "scripts", Path(sys.executable).parent
    lit, hf = str(tmp_path / "EXPORTED"), str(tmp_path / "HF")
    run(sys.executable, str(scripts / "consolidate_checkpoint.py"), str(final))
    run(sys.executable, str(scripts / "convert_pretrained_checkpoint.py"), str(final), lit)
    run(sys.executable, str(scripts / "export_hf.py"), lit, hf, "--verify", "true")
    run(sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(final / "lit_model.pth"),
        "--output_file", str(tmp_path / "lightning.pth"))  # fmt: skip
    assert ">> Reply:" in run(str(bin_folder / "litgpt"), "chat", lit, "--max_new_tokens", "8", stdin="Hi\n\n")
    assert "The quick" in run(
        str(bin_folder / "litgpt"), "generate", lit, "--prompt", "The quick", "--max_new_tokens", "8"
    )
    task = write_toy_task(tmp_path)
    run(str(bin_folder / "litgpt"), "evaluate", lit, "--tasks", str(task), "--device", "cpu")
    assert "toy" in json.loads((tmp_path / "EXPORTED" / "evaluate" / "results.json").read_text())["results"]
    table = run(str(bin_folder / "lm_eval"), "--model", "hf", "--model_args", f"pretrained={hf}", "--include_path",
                str(tmp_path), "--tasks", "toy", "--device", "cpu")  # fmt: skip
    assert "acc" in table


def write_toy_task(folder: Path) -> Path:
    """A multiple-choice task of three questions that needs no network."""
    rows = [{"q": "The quick brown", "choices": ["fox", "sea"], "label": 0}] * 3
    (folder / "toy.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "toy.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "toy.yaml").write_text(yaml.dump(task))
    return folder / "toy.yaml"


def test_mistakes_are_one_line_with_exit_code_2(
    final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrainkit.cli import run_command

    for command, arguments in (("consolidate", ["nowhere"]), ("convert", [str(final)]), ("export-hf", ["--dtyp=x"])):
        with pytest.raises(SystemExit) as stopped:
            run_command(command, arguments)
        assert stopped.value.code == PretrainKitError.exit_code == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert error[0].startswith("error: ")
