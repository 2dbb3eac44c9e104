"""Made-up rows of published shapes, and what they are read as (``published.jsonl``, a shape a line).

``rows`` is one row, or those of one prompt; ``group`` its prompt, completions and scores. Where there is ``refused``,
the refusal has these words, and ``options`` that it leads to; without a group no options make one of the rows.
"""

import json
from pathlib import Path

from datasets import Dataset

from contrastive_align.data.rows import RAW, ROW, UNREADABLE


LINES = [json.loads(line) for line in Path(__file__).with_name("published.jsonl").read_text("utf-8").splitlines()]
SHAPES = {line["name"]: line for line in LINES}
READ = [name for name, line in SHAPES.items() if "group" in line]
REFUSED = [name for name, line in SHAPES.items() if "refused" in line]
ONE_ROW = [name for name in READ if len(SHAPES[name]["rows"]) == 1]
P, A, B, C = "Name a fruit.", "A lime.", "Pear?", "No."
SYSTEM = "Be brief."
LONG = [
    {"prompt": P, "completion": A, "label": True},
    {"prompt": "What?", "completion": "This.", "label": True},
    {"prompt": P, "completion": B, "label": False},
    {"prompt": P, "completion": C, "label": False},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(*texts):
    return [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]


def from_json(rows):
    """Rows as a file of JSON lines gives them: Arrow fills no keys in."""
    told = [{ROW: n, RAW: json.dumps(row), UNREADABLE: None} for n, row in enumerate(rows)]
    return Dataset.from_list(told)
