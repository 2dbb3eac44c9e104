"""Where `contrastive_align.conditions`, `.pool` and `.judge` were. Kept for one version, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings


_MOVED = {  # module of this package -> where its names are now
    "conditions": "conditions.conditions",
    "judged_conditions": "conditions.judged",
    "quantile_conditions": "conditions.quantile_conditions",
    "forms": "conditions.forms",
    "tokens": "conditions.tokens",
    "offline": "conditions.scored_rows",
    "pool": "pool.pool",
    "rounds": "pool.files",
    "quantiles": "pool.quantiles",
    "judge": "judge.judge",
}
_ROOMS = ("conditions", "pool", "judge")


def __getattr__(name: str):
    for room in _ROOMS:
        module = importlib.import_module(f"contrastive_align.{room}")
        if name in module.__all__:
            _warn(f"contrastive_align.feedback.{name}", f"contrastive_align.{room}.{name}")
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} has moved: import {new}. The old name goes with the next version.", FutureWarning, stacklevel=3
    )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`import contrastive_align.feedback.tokens` gives the module at its new place."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package == __name__ and name in _MOVED:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        new = f"contrastive_align.{_MOVED[spec.name.rpartition('.')[2]]}"
        _warn(spec.name, new)
        return importlib.import_module(new)

    def exec_module(self, module):
        return None


sys.meta_path.append(_Finder())
