"""Packages whose own code waits: only the time of loading may differ."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from pretrainkit.deferred import compiler_aside, defer, defer_functions

ROOT = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of this name, and the list of what its code has done."""
    name = "heavy_package"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import builtins\nfrom .part import VALUE\nbuiltins.log.append('init')\nOWN = 1\n"
    )
    (folder / "part.py").write_text(
        "import builtins\nbuiltins.log.append('part')\nVALUE = object()\ndef f(x): return x + 1\n"
    )
    log: list[str] = []
    monkeypatch.setattr("builtins.log", log, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield name, log
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_a_part_loads_without_the_rest(package):
    name, log = package
    defer(name)
    part = importlib.import_module(f"{name}.part")
    assert log == ["part"]
    assert sys.modules[name].part is part
    assert log == ["part"]


def test_what_is_the_packages_own_runs_its_code_once_and_finds_the_loaded_parts(package):
    name, log = package
    defer(name)
    part = importlib.import_module(f"{name}.part")
    assert sys.modules[name].OWN == 1
    assert log == ["part", "init"]
    assert sys.modules[name].VALUE is part.VALUE
    assert type(sys.modules[name]) is type(sys)
    with pytest.raises(AttributeError, match="heavy_package"):
        _ = sys.modules[name].missing
    assert log == ["part", "init"]


def test_a_loaded_package_stays_as_it_is(package):
    name, log = package
    before = importlib.import_module(name)
    defer(name)
    assert sys.modules[name] is before
    assert log == ["part", "init"]


def test_code_that_fails_is_run_again_when_asked_again(package, tmp_path):
    name, log = package
    (tmp_path / name / "__init__.py").write_text("import builtins\nbuiltins.log.append('tried')\nraise OSError('no')\n")
    defer(name)
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            _ = sys.modules[name].OWN
    assert log == ["tried", "tried"]


def test_a_function_loads_its_module_when_it_is_called(package):
    name, log = package
    defer(name)
    defer_functions(f"{name}.part", "f")
    function = importlib.import_module(f"{name}.part").f
    assert log == []
    assert function(1) == 2
    assert log == ["part"]
    assert importlib.import_module(f"{name}.part").f is not function


def test_a_missing_package_is_said():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        defer("no_such_package")


def test_the_compiler_is_only_aside_within_the_block(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with compiler_aside():
        from torch._dynamo import OptimizedModule
    assert "torch._dynamo" not in sys.modules
    assert not isinstance(object(), OptimizedModule)


def run_python(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.slow
def test_litgpt_and_lightning_are_whole_for_everyone_else():
    output = run_python("""
import sys
import pretrainkit.models.architectures as ours
assert "lightning.fabric" not in sys.modules and "torchmetrics.functional" not in sys.modules
import lightning, litgpt, torchmetrics
from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, qkv_reassemble
from lightning.fabric import Fabric
assert lightning.Fabric is Fabric and lightning.Trainer
assert litgpt.GPT is ours.GPT and litgpt.LLM and litgpt.config.Config is ours.Config
assert torchmetrics.Metric and torchmetrics.__version__.startswith("1.")
import torch
from litgpt import model
assert qkv_reassemble(torch.arange(36.0).reshape(12, 3), ours.Config(n_embd=4, n_head=2)).shape == (12, 3)
print("whole")
""")
    assert output == ["whole"]


@pytest.mark.slow
def test_compiled_modules_are_known_as_such_when_the_compiler_was_loaded_later():
    output = run_python("""
import sys
from pretrainkit.deferred import compiler_aside, defer
defer("torchmetrics", "lightning")
with compiler_aside():
    from lightning.fabric.wrappers import _unwrap_compiled
assert "torch._dynamo" not in sys.modules
import torch
layer = torch.nn.Linear(2, 2)
assert _unwrap_compiled(layer)[0] is layer
compiled = torch.compile(layer, backend="eager")
assert _unwrap_compiled(compiled)[0] is layer
print("known")
""")
    assert output == ["known"]
