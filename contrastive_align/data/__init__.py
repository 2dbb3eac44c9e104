"""From a dataset's rows to groups, to token ids, to batches."""

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
