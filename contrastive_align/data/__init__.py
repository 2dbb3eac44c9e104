"""From a dataset's rows to groups, to token ids, to batches."""

from contrastive_align.data.collate import GroupCollator
from contrastive_align.data.formats import BadRow, Group, detect_spelling, distinct_prompts, read_group
from contrastive_align.data.tokenise import DataReport, prepare_groups, tokenise_group


__all__ = [
    "BadRow",
    "DataReport",
    "Group",
    "GroupCollator",
    "detect_spelling",
    "distinct_prompts",
    "prepare_groups",
    "read_group",
    "tokenise_group",
]
