"""Imports point one way: read from the sources, and seen in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import scorer

ROOT = Path(__file__).parents[1]

# The wings, the lowest first: a module imports from its own wing and from those below it.
WINGS = (
    "base",  # the modules that lie in scorer/ itself, but for those of the command line
    "storage",
    "scores",
    "files",
    "data",
    "encoding",
    "models",
    "engines",
    "runs",
    "selection",
    "agreement",
    "clusters",
    "learning",
    "validation",
    "reporting",
    "commands",
)
COMMAND_LINE = {"scorer.console", "scorer.commands", "scorer.__main__"}
# What the command line may import before a command needs more.
COMMANDS_AT_THEIR_TOP = {
    "click",
    "scorer.agreement.config",
    "scorer.config",
    "scorer.options",
    "scorer.printing",
    "scorer.selection.config",
    "scorer.types",
    "scorer.validation.config",
}
# Wings and modules that never import torch, not even inside a function, nor anything of ours that does.
TORCH_FREE_WINGS = {"base", "storage", "scores", "files", "data", "encoding", "selection", "agreement", "reporting"}
TORCH_FREE_MODULES = {
    "scorer.runs",
    "scorer.runs.directory",
    "scorer.runs.shard_file",
    "scorer.runs.extras",
    "scorer.runs.manifest",
    "scorer.runs.progress",
    "scorer.validation.comparison",
    "scorer.validation.directory",
    "scorer.validation.statistics",
    "scorer.validation.tables",
}
SCORING = {"scorer.selection.filtering"}
TORCH_BOUND = {"torch", "transformers", "safetensors", "triton", "scorer_kernels"}
KERNEL_USERS = {"scorer.engines.architecture", "scorer.engines.packed", "scorer.engines.vllm_plugin"}
KERNELS_NEED = {"torch", "triton"}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KERNELS = {module_name(p, ROOT / "kernels"): p for p in (ROOT / "kernels" / "scorer_kernels").rglob("*.py")}
SOURCES = {module_name(p, ROOT): p for p in (ROOT / "scorer").rglob("*.py")}
NAMES = {*SOURCES, *KERNELS}


def wing(module: str) -> str:
    parts = module.split(".")
    if module in COMMAND_LINE:
        return "commands"
    return parts[1] if len(parts) > 1 and (ROOT / "scorer" / parts[1]).is_dir() else "base"


MODULES = sorted(SOURCES.keys() - {"scorer"})
TORCH_FREE = {name for name in MODULES if wing(name) in TORCH_FREE_WINGS} - SCORING | TORCH_FREE_MODULES


@dataclass(frozen=True)
class Import:
    """A module that a source names, and whether importing the source imports it."""

    module: str
    at_top: bool


def imports(path: Path, name: str) -> set[Import]:
    """All import statements of a file. `from scorer import config` counts as scorer.config."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {
        Import(module, id(node) not in inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in named(node, package)
    }


def named(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join((*parts[: len(parts) - node.level + 1], *([base] if base else [])))
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        yield inner if inner in NAMES else base


def ours(found: set[Import]) -> set[str]:
    return {i.module for i in found if i.module.split(".")[0] in ("scorer", "scorer_kernels", "bench", "tests")}


def foreign(found: set[Import]) -> set[str]:
    """The top names of what is neither ours nor of the standard library."""
    names = {i.module.split(".")[0] for i in found - {i for i in found if i.module in ours(found)}}
    return names - set(sys.stdlib_module_names)


def loaded(statement: str) -> set[str]:
    """The top names of all modules that a fresh process holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_relative_and_nested_imports_are_read(tmp_path: Path) -> None:
    """A test of the reader of imports, which every test below relies on."""
    path = tmp_path / "packed.py"
    path.write_text(
        "import torch.nn\nfrom .packing import pack\nfrom .. import config\nfrom scorer.selection import ranking as s\n"
        "if True:\n    from ..types import Span\n"
        "class A:\n    def f(self):\n        import polars as pl\n        from scorer.files.reader import *\n"
    )
    assert imports(path, "scorer.engines.packed") == {
        Import("torch.nn", True),
        Import("scorer.engines.packing", True),
        Import("scorer.config", True),
        Import("scorer.selection.ranking", True),
        Import("scorer.types", True),
        Import("polars", False),
        Import("scorer.files.reader", False),
    }
    assert foreign(imports(path, "scorer.engines.packed")) == {"torch", "polars"}


def test_every_wing_is_in_the_order() -> None:
    assert {wing(name) for name in MODULES} == set(WINGS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    found = ours(imports(SOURCES[name], name)) - {"scorer"}
    assert found <= set(MODULES) | set(KERNELS)
    assert not {m for m in found - set(KERNELS) if WINGS.index(wing(m)) > WINGS.index(wing(name))}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: ours(imports(SOURCES[name], name)) - {"scorer"} for name in MODULES}
    assert set(TopologicalSorter(graph).static_order()) >= set(MODULES)


def test_lazy_names_are_at_home_where_they_may_be() -> None:
    assert {*scorer.HOMES, "__version__"} == set(scorer.__all__)
    assert set(scorer.HOMES.values()) == ours(imports(SOURCES["scorer"], "scorer"))
    assert all(getattr(scorer, name).__module__ == home for name, home in scorer.HOMES.items())


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_no_torch(name: str) -> None:
    found = imports(SOURCES[name], name)
    assert foreign(found).isdisjoint(TORCH_BOUND)
    assert ours(found) <= TORCH_FREE


def test_no_torch_in_the_process_either() -> None:
    names = sorted(TORCH_FREE)
    assert len(names) >= 12
    assert loaded(f"import {', '.join(names)}").isdisjoint({"torch", "transformers", "triton"})


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_kernels_know_nothing_of_scorer(name: str) -> None:
    found = imports(KERNELS[name], name)
    assert ours(found) <= set(KERNELS)
    assert foreign(found) <= KERNELS_NEED


def test_who_uses_the_kernels() -> None:
    users = {name for name, path in SOURCES.items() if ours(imports(path, name)) & set(KERNELS)}
    assert "scorer.engines.packed" in users
    assert users <= KERNEL_USERS


def test_the_command_line_is_light_at_its_top() -> None:
    found = {i for i in imports(SOURCES["scorer.commands"], "scorer.commands") if i.at_top}
    assert ours(found) | foreign(found) <= COMMANDS_AT_THEIR_TOP


@pytest.mark.parametrize("name", ["scorer", "scorer.commands"])
def test_importing_loads_nothing_heavy(name: str) -> None:
    found = loaded(f"import {name}")
    assert "scorer" in found
    assert found.isdisjoint({"torch", "transformers", "polars", "rich", "jinja2", "numpy", "vllm", "matplotlib"})
