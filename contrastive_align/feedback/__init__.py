"""The former place of `contrastive_align.conditions`, `.pool` and `.judge`: served for one version, with a warning."""

import importlib.abc
import importlib.machinery
import sys
import warnings
from operator import attrgetter


_MOVED = {  # former module -> where it is now, and the names that differ, former=present
    "atomic": "data.atomic", "tokens": "conditions.tokens", "quantile_conditions": "conditions.conditions",
    "forms": "conditions.conditions Prompt=Text",
    "conditions": "conditions.conditions ladder=texts_or_preset texts=check_texts",
    "judged_conditions":
        "conditions.judged Attributes=AttributeCondition Categories=CategoryCondition Text=TextCondition",
    "offline": "conditions.scored_rows SURELY_SHORT=TEMPLATE_ALLOWANCE",
    "pool": "pool.pool", "pool_prompts": "pool.prompts", "quantiles": "pool.draws",
    "rounds": "pool BATCH=files.BATCH round_path=pool.round_path rounds_in=pool.rounds_in",
    "judge": "judge.judge", "judge_cache": "judge.ledger", "judge_endpoint": "judge.client",
    "judge_answers": "judge.answers Unparsable=Unreadable Categories=CategoryAnswers Feedback=FeedbackAnswers",
}  # fmt: skip


def __getattr__(name: str):
    new = dict(pair.split("=") for pair in _MOVED["judged_conditions"].split()[1:]).get(name, name)
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
    """Make a former module from the names of the one at its new place."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        known = package == __name__ and name in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        place, *renamed = _MOVED[module.__name__.rpartition(".")[2]].split()
        new = importlib.import_module(f"contrastive_align.{place}")
        now = f" ({', '.join(renamed).replace('=', ' is now ')})" if renamed else ""
        _warn(module.__name__, new.__name__ + now)
        names = {old: attrgetter(name)(new) for old, name in (pair.split("=") for pair in renamed)}
        vars(module).update({k: v for k, v in vars(new).items() if k != "__path__"} | vars(module) | names)


sys.meta_path.append(_Finder())
