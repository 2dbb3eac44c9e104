"""From a dataset's rows to groups, to token ids, to batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from contrastive_align.data.collate import GroupCollator
    from contrastive_align.data.columns import Options
    from contrastive_align.data.formats import Group, distinct_prompts, random_prompts
    from contrastive_align.data.prepare import DataReport, prepare_groups
    from contrastive_align.data.reading import read_shape
    from contrastive_align.data.rows import BadRow
    from contrastive_align.data.shapes import SHAPES, Reading, recognise
    from contrastive_align.data.tokenise import tokenise_group

__all__ = [
    "SHAPES",
    "BadRow",
    "DataReport",
    "Group",
    "GroupCollator",
    "Options",
    "Reading",
    "distinct_prompts",
    "prepare_groups",
    "random_prompts",
    "read_shape",
    "recognise",
    "tokenise_group",
]
_MODULES = {
    "collate": ("GroupCollator",),
    "columns": ("Options",),
    "formats": ("Group", "distinct_prompts", "random_prompts"),
    "prepare": ("DataReport", "prepare_groups"),
    "reading": ("read_shape",),
    "rows": ("BadRow",),
    "shapes": ("SHAPES", "Reading", "recognise"),
    "tokenise": ("tokenise_group",),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that ``contrastive-align report`` need not wait for torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
