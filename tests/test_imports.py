"""The layers of docs/design.md, and what may be loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pretrainkit.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pretrainkit"

# A module imports from its own row and the rows above it, never from one below. Source: docs/design.md, "Layers".
LAYERS = [
    ["_version"],
    ["errors"],
    ["values"],
    ["config"],
    ["arrow", "deferred", "direct", "leave", "locks", "memory", "registry", "remote", "signals", "storage", "topology"],
    ["arguments", "metadata", "records", "statistics"],
    ["verify", "formats"],
    ["documents", "tokenizers", "models", "launchers", "plan"],
    ["progress", "units"],
    ["executors"],
    ["optimize"],
    ["merge"],
    ["stream"],
    ["train"],
    ["export"],
    ["report", "inspect"],
    ["cli"],
    ["__init__", "__main__"],
]
HEAVY = [
    "torch",
    "litdata",
    "lightning",
    "litgpt",
    "ray",
    "wandb",
    "transformers",
    "matplotlib",
    "numpy.random",
    "pandas",
]


def top_module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too; type-checking-only imports left out."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    assert {top_module(path) for path in FILES} <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    own = top_module(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "pretrainkit" and len(parts) > 1 and parts[1] in rank:
            assert rank[parts[1]] <= rank[own], f"{own} imports {parts[1]}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_litgpt_is_imported_in_models_and_export_alone(path):
    if any(name.split(".")[0] == "litgpt" for name in imported_modules(path)):
        assert top_module(path) in ("models", "export")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def heavy_modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert heavy_modules_after("import pretrainkit; dir(pretrainkit)") == set()


def test_no_help_loads_anything_heavy():
    statement = f"""
import contextlib, io
from pretrainkit.cli import run_command
for name in {list(COMMANDS)!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run_command(name, ["--help"])
    assert "usage:" in out.getvalue(), name
"""
    assert heavy_modules_after(statement) == set()


def test_public_names_are_these():
    import pretrainkit

    assert pretrainkit.__all__ == [
        "DatasetInfo",
        "PretrainDataset",
        "PretrainKitError",
        "__version__",
        "consolidate_checkpoint",
        "convert_pretrained_checkpoint",
        "export_hf",
        "inspect_dataset",
        "merge_datasets",
        "optimize_dataset",
        "pretrain",
        "write_report",
    ]
    for name in pretrainkit.__all__:
        assert getattr(pretrainkit, name) is not None
