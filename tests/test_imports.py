"""Imports run downwards and in no circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive_align


ROOT = Path(__file__).parents[1]
PACKAGE = Path(contrastive_align.__file__).parent


def module_name(path, root):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(paths, root):
    """Module -> modules that it imports anywhere, also under TYPE_CHECKING and within functions."""
    modules = {module_name(path, root): path for path in paths}
    graph = {}
    for name, path in modules.items():
        found = set()
        parents = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) + 1 - node.level] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                # A name may be a module of its own, or one that the package's __init__ holds.
                names = {f"{source}.{alias.name}" for alias in node.names}
                found |= {n if n in modules else source for n in names}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def circle(graph):
    """A list of modules each of which is imported by the next, first and last being the same; None without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_the_contracts_hold():
    """Those of pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_circle_of_modules():
    graph = imports_of(sorted(PACKAGE.rglob("*.py")), PACKAGE.parent)
    assert len(graph) > 80 and graph["contrastive_align.steps"] == {"contrastive_align.launch.step_commands"}
    found = circle(graph)
    assert found is None, "these import each other: " + " <- ".join(found)


@pytest.mark.parametrize(
    ("second", "wrong"),
    [
        ("", False),
        ("import json\nfrom elsewhere import first", False),
        ("import package.first", True),
        ("from package import first", True),
        ("from package.first import A", True),
        ("from . import first", True),
        ("from .first import A", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.first import A", True),
        ("def f():\n    import package.first", True),
        ("import package", True),
    ],
)
def test_the_finder_sees_each_kind_of_import(second, wrong, tmp_path):
    files = {"__init__": "from package.first import A", "first": "from package.second import B", "second": second}
    (tmp_path / "package").mkdir()
    for name, text in files.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    found = circle(imports_of(sorted(tmp_path.rglob("*.py")), tmp_path))
    assert (found is not None) == wrong, found
