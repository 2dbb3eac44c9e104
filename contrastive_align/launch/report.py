"""``contrastive-align report RUN [RUN ...]``: rebuild a run's page, or lay several runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contrastive_align.launch.usage import UsageError, UsageParser
from contrastive_align.report.page import PAGE, RunView, unique_names, write_page


COMPARISON = "comparison.html"


def main(argv: Sequence[str]) -> Path:
    """Write the page of one run into its folder, or of several into ``--output``; print what the doctor says."""
    args = build_parser().parse_args(argv)
    runs = []
    for folder in args.runs:
        if not Path(folder).is_dir():
            raise UsageError(f"no folder '{folder}' (looked in {Path.cwd()}). Give the output_dir of a run.")
        runs.append(RunView.read(folder))
    path = Path(args.output or (COMPARISON if len(runs) > 1 else Path(args.runs[0]) / PAGE))
    if path.suffix != ".html":
        raise UsageError(f"--output is '{path}', expected a name that ends in .html.")
    write_page(runs, path)
    for name, run in zip(unique_names([run.name for run in runs]), runs, strict=True):
        for line in run.diagnosis.lines:
            print(f"{name}: {line}" if len(runs) > 1 else line)
    print(path)
    return path


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = UsageParser(prog="contrastive-align report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The output_dir of a run, or a folder of checkpoints.")
    parser.add_argument(
        "--output",
        help=f"File that the page is written to; by default RUN/{PAGE} for one run and {COMPARISON} for several.",
    )
    return parser
