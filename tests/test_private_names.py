"""No file but trl_seam.py names a private or inner member of TRL or of transformers' Trainer."""

import ast
import functools
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import transformers
import trl

import contrastive_align


PACKAGE = Path(contrastive_align.__file__).parent
SEAM = PACKAGE / "trl_seam.py"
TRAINERS = (trl.DPOTrainer, trl.RLOOTrainer, trl.SFTTrainer, transformers.Trainer)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def trainer_names():
    """Private attributes, methods and arguments of the trainers and of everything they inherit from."""
    names = {name for trainer in TRAINERS for name in dir(trainer)}
    for cls in {cls for trainer in TRAINERS for cls in trainer.__mro__} - {object}:
        source = inspect.getsource(cls)
        names |= set(re.findall(r"self\.(_\w+)", source))
        names |= {node.arg for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.arg)}
    return frozenset(filter(is_private, names))


def dotted(node):
    """``a.b.c`` of nested attributes, or None."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def is_foreign(module):
    return module.split(".")[0] in ("trl", "transformers")


def offences(source):
    """(line, name) of every private or inner name in a source text."""
    tree, found, modules = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_foreign(alias.name):
                    modules[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else None
                parts = alias.name.split(".")
                if (parts[0] == "trl" and len(parts) > 1) or (is_foreign(alias.name) and any(map(is_private, parts))):
                    found.add((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module
            if is_foreign(module):
                modules |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
            for alias in node.names:
                inner = module.startswith("trl.") or (module == "trl" and inspect.ismodule(getattr(trl, alias.name, 0)))
                private = is_foreign(module) and any(map(is_private, [*module.split("."), alias.name]))
                if inner or private:
                    found.add((node.lineno, f"{module}.{alias.name}"))
                names += [alias.name, alias.asname or ""]
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.arg, ast.keyword)):
            names.append(node.arg or "")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            names.append(node.id)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr")
        ):  # getattr
            names += [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        found |= {(node.lineno, name) for name in names if name in trainer_names()}
    for node in ast.walk(tree):  # a.b._c of a module imported from trl or transformers, and any trl.a.b
        path = dotted(node) if isinstance(node, ast.Attribute) else None
        head, *rest = path.split(".") if path else [""]
        if head in modules and (any(map(is_private, rest)) or ((modules[head] or head) == "trl" and len(rest) > 1)):
            found.add((node.lineno, path))
    return sorted(found)


def test_no_private_or_inner_name_outside_the_seam():
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != SEAM
        for line, name in offences(path.read_text(encoding="utf-8"))
    ]
    assert not found, (
        f"{len(found)} uses of private or inner names of TRL or transformers' Trainer. Use a public name, rename your "
        "own, or add the name to trl_seam.py with its reason:\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("self._signature_columns", "_signature_columns"),
        ("self._metrics = {}", "_metrics"),
        ("def _save_checkpoint(self): ...", "_save_checkpoint"),
        ("async def _save(self): ...", "_save"),
        ("class A:\n    _tag_names = []", "_tag_names"),
        ("_tag_names: list = []", "_tag_names"),
        ("def f():\n    _metrics = 1", "_metrics"),
        ("def f():\n    for _metrics in ():\n        pass", "_metrics"),
        ("def f(_internal_call=False): ...", "_internal_call"),
        ("f(_internal_call=True)", "_internal_call"),
        ("lambda _internal_call: 0", "_internal_call"),
        ("from elsewhere import _save", "_save"),
        ("from elsewhere import save as _save", "_save"),
        ("getattr(trainer, '_metrics')", "_metrics"),
        ("setattr(trainer, '_metrics', 0)", "_metrics"),
        ("import trl.trainer.utils", "trl.trainer.utils"),
        ("import trl.models as models", "trl.models"),
        ("from trl.trainer.utils import pad", "trl.trainer.utils.pad"),
        ("from trl import models", "trl.models"),
        ("import trl\ntrl.models.prepare_deepspeed", "trl.models.prepare_deepspeed"),
        ("from transformers.utils import _is_package_available", "transformers.utils._is_package_available"),
        ("import transformers.trainer as t\nt._is_peft_model", "t._is_peft_model"),
        ("from transformers import utils\nutils._LazyModule", "utils._LazyModule"),
        ("import transformers\ntransformers.utils._LazyModule", "transformers.utils._LazyModule"),
    ],
)
def test_the_finder_reports_each_kind(source, name):
    assert name in [found for _, found in offences(source)], offences(source)
    assert offences(source)[0][0] == source[: source.rindex(name.split(".")[-1])].count("\n") + 1


@pytest.mark.parametrize(
    "source",
    [
        "from trl import DPOTrainer, get_peft_config",
        "import trl\ntrl.DPOTrainer",
        "from transformers.utils import logging",
        "import transformers\ntransformers.utils.logging",
        "self._own_name = 1",
        "self.__class__",
        "def __init__(self): ...",
        "for _ in (): pass",
        "# self._metrics\n'_metrics'",
    ],
)
def test_the_finder_leaves_public_and_own_names_alone(source):
    assert offences(source) == []
