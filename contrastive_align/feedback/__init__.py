"""Serve the names of the former `contrastive_align.feedback` for one version, each use with a FutureWarning.

The names are now in `contrastive_align.conditions`, `contrastive_align.pool` and `contrastive_align.judge`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings


_CONDITIONS, _JUDGED = "conditions.conditions", "conditions.judged"
_MOVED = {  # former module -> the modules that have its names now
    "atomic": ["data.atomic"],
    "conditions": [_CONDITIONS],
    "forms": [_CONDITIONS],
    "quantile_conditions": [_CONDITIONS],
    "judged_conditions": [_JUDGED],
    "tokens": ["conditions.tokens"],
    "offline": ["conditions.scored_rows"],
    "pool": ["pool.pool"],
    "rounds": ["pool.files", "pool.pool"],
    "quantiles": ["pool.draws"],
    "pool_prompts": ["pool.prompts"],
    "judge": ["judge.judge"],
    "judge_answers": ["judge.answers"],
    "judge_cache": ["judge.ledger"],
    "judge_endpoint": ["judge.client"],
}
_RENAMED = {  # name in a former module, or in the package itself, whose key is "" -> where it is now
    **{(module, "Categories"): (_JUDGED, "CategoryCondition") for module in ("", "judged_conditions")},
    **{(module, "Text"): (_JUDGED, "TextCondition") for module in ("", "judged_conditions")},
    **{(module, "Attributes"): (_JUDGED, "AttributeCondition") for module in ("", "judged_conditions")},
    ("judge_answers", "Categories"): ("judge.answers", "CategoryAnswers"),
    ("judge_answers", "Feedback"): ("judge.answers", "FeedbackAnswers"),
    ("forms", "Prompt"): ("data.formats", "Text"),
    ("conditions", "ladder"): (_CONDITIONS, "texts_or_preset"),
    ("conditions", "texts"): (_CONDITIONS, "check_texts"),
    ("offline", "SURELY_SHORT"): ("conditions.scored_rows", "TEMPLATE_ALLOWANCE"),
}
_EXPORTED = (
    "CONDITIONS", "LEFT_OUT", "NEW", "Attributes", "Categories", "Condition", "Phrases", "Pool", "QuantileTokens",
    "Sample", "Table", "Text", "balanced_order", "keep", "quantiles", "resolve_condition",
)  # fmt: skip


class _Moved(types.ModuleType):
    """A former module. It warns when it is first imported, and at each use of a name after that."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"Moved: see `{__name__}`.")
        self._just_warned = False

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        module = self.__name__.rpartition(".")[2]
        places = [_RENAMED[module, name]] if (module, name) in _RENAMED else [(m, name) for m in _MOVED[module]]
        for room, new in places:
            target = importlib.import_module(f"contrastive_align.{room}")
            if hasattr(target, new):
                if not self._just_warned:
                    _warn(f"{self.__name__}.{name}", f"contrastive_align.{room}.{new}")
                self._just_warned = False
                return getattr(target, new)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """Package in which the name `quantiles` stays the function, also when the module `quantiles` is imported."""

    def __getattr__(self, name: str):
        if name not in _EXPORTED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        new = _RENAMED.get(("", name), ("", name))[1]
        for room in ("conditions", "pool"):
            module = importlib.import_module(f"contrastive_align.{room}")
            if new in module.__all__:
                # `from package import name` looks a name up twice: only the second time is the user's.
                if sys._getframe(1).f_code.co_name != "_handle_fromlist":
                    _warn(f"{self.__name__}.{name}", f"contrastive_align.{room}.{new}")
                return getattr(module, new)

    def __setattr__(self, name: str, value) -> None:
        if name not in _EXPORTED:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_EXPORTED})


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} has moved. Use {new} instead; the old name is removed in the next version.",
        FutureWarning,
        stacklevel=3,
    )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        known = package == __name__ and name in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec):
        return _Moved(spec.name)

    def exec_module(self, module):
        new = " and ".join(f"contrastive_align.{room}" for room in _MOVED[module.__name__.rpartition(".")[2]])
        _warn(module.__name__, new)
        module._just_warned = True


sys.meta_path.append(_Finder())
sys.modules[__name__].__class__ = _Package
