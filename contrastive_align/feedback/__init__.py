"""The former place of `contrastive_align.conditions`, `.pool` and `.judge`: served for one version, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings


_MOVED = {  # former module -> where it is now
    "conditions": "conditions.conditions",
    "quantile_conditions": "conditions.conditions",
    "judged_conditions": "conditions.judged",
    "tokens": "conditions.tokens",
    "offline": "conditions.scored_rows",
    "pool": "pool.pool",
    "rounds": "pool.files",
    "quantiles": "pool.draws",
    "judge": "judge.judge",
}
_RENAMED = {"Attributes": "AttributeCondition", "Categories": "CategoryCondition", "Text": "TextCondition"}


def __getattr__(name: str):
    new = _RENAMED.get(name, name)
    for room in ("conditions", "pool"):
        module = importlib.import_module(f"contrastive_align.{room}")
        if new in module.__all__:
            _warn(f"{__name__}.{name}", f"contrastive_align.{room}.{new}")
            return globals().setdefault(name, getattr(module, new))  # `from ... import` looks twice
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _warn(old: str, new: str) -> None:
    message = f"{old} has moved. Use {new} instead; the old name is removed in the next version."
    warnings.warn(message, FutureWarning, stacklevel=3)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Give the module at its new place for the import of a former one."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        known = package == __name__ and name in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        new = f"contrastive_align.{_MOVED[module.__name__.rpartition('.')[2]]}"
        _warn(module.__name__, new)
        sys.modules[module.__name__] = importlib.import_module(new)  # what the import then returns


sys.meta_path.append(_Finder())
