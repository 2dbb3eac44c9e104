"""``train``: a file with completions and their rewards or verdicts -> ``run_conditional.py`` on it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from contrastive_align.data.formats import BadRow
from contrastive_align.launch.steps.files import Row, read_rows, to_line, write_rows


CONVERTED = "scored_completions.jsonl"


def train(args: Namespace, rest: list[str]) -> Any:
    """Write the rows as the trainer's columns into ``output_dir``, and train; what the run returns."""
    from contrastive_align.launch.conditional import main

    rows = convert(read_rows(args.input, generations=True), args.score_key, where=args.input)
    path = Path(args.output_dir) / CONVERTED
    write_rows(path, map(to_line, rows))
    return main([*rest, f"--dataset_name={path}", f"--output_dir={args.output_dir}"])


def convert(rows: list[Row], score_key: str | None, *, where: str) -> list[Row]:
    """``prompt``, ``completions``, ``scores``, ``feedbacks`` and ``finished``, the last three where they are there.

    Raises:
        ValueError: neither rewards nor scores nor feedbacks; rewards and scores, and nothing says which.
        BadRow: a row without what others have.

    >>> convert([{"prompt": "Hi", "generations": ["a", "b"], "rewards": [1.0, 0.0]}], None, where="scored.jsonl")
    [{'prompt': 'Hi', 'completions': ['a', 'b'], 'scores': [1.0, 0.0]}]
    """
    there = {name for row in rows for name in ("rewards", "scores", "feedbacks", "finished") if name in row}
    numbers = sorted(there & {"rewards", "scores"}) if score_key is None else [score_key]
    if len(numbers) > 1:
        raise ValueError(
            f"{where} has both 'rewards' and 'scores'. Choose: --score_key=rewards, or --score_key=scores."
        )
    if score_key is not None and score_key not in there:
        raise ValueError(f"{where} has no '{score_key}'. Its rows have {sorted(there)}.")
    if not numbers and "feedbacks" not in there:
        raise ValueError(f"{where} has nothing to learn from. Make it with the step 'score' or 'judge'.")
    wanted = {"generations": "completions", **dict.fromkeys(numbers, "scores")}
    wanted |= {name: name for name in ("feedbacks", "finished") if name in there}
    for number, row in enumerate(rows):
        if missing := [name for name in wanted if name not in row]:
            raise BadRow(f"{where}, row {number}: no '{missing[0]}', which other rows have.")
    return [{"prompt": row["prompt"], **{new: row[old] for old, new in wanted.items()}} for row in rows]
