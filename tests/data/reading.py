"""A row by itself, read as the rows of a dataset are."""

from contrastive_align.data import Group, Options, recognise
from contrastive_align.data.formats import checked_group


def read(row: dict, number: int = 17, source: str = "train", **options) -> Group:
    reading, where = recognise([row], list(row), Options(**options)), f"{source}, row {number}"
    [parts] = reading(row, where)
    return checked_group(parts, where, prompt_repeats=reading.prompt_repeats)[0]
