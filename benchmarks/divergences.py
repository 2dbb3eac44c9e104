"""Divergences beside each other on one target: how near, how far from the base, how diverse.

    python benchmarks/divergences.py                                            # JS, KL, reverse KL, TV; three seeds
    python benchmarks/divergences.py --divergences js alpha:0.5 --seeds 42 --steps 20 --json runs/divergences.json

Each run is ``run_fdpg.py`` without arguments (the bundled model and prompts, "please" in half of the completions) but
for divergence, seed and number of steps, in a process of its own: some two minutes on 2 cores. Its numbers are read
from its summary.json, which is written last, so that a run that is already there is not repeated and one that was
broken off is.

Columns: the feature's moment, KL to the target in both directions, its TV, KL(pi||base), and
distinct-2 (distinct bigrams of tokens over all bigrams); the mean over seeds +- their standard deviation. The rows
``base`` and ``target`` are what the runs measured of these two, ``+QRS`` what quasi-rejection sampling accepts of the
tuned models' samples. All divergences share one learning rate, although their pseudo-rewards differ in scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
DIVERGENCES = ("js", "kl", "reverse_kl", "tv")
SEEDS = (42, 43, 44)
COLUMNS = ("moment", "KL(p||pi)", "KL(pi||p)", "TV", "KL(pi||base)", "distinct-2")


def run(divergence: str, seed: int, steps: int | None, out: Path, more: list[str]) -> dict:
    """The summary of one run, made or found."""
    output_dir = out / "-".join([divergence.replace(":", "_"), f"seed{seed}", *([f"{steps}steps"] if steps else [])])
    summary = output_dir / "summary.json"
    if not summary.is_file():
        flags = [f"--divergence={divergence}", f"--seed={seed}", f"--output_dir={output_dir}", "--disable_tqdm=true"]
        flags += [f"--max_steps={steps}"] if steps else []
        command = [sys.executable, str(ROOT / "run_fdpg.py"), *flags, *more]
        output_dir.mkdir(parents=True, exist_ok=True)
        with open(output_dir / "run.log", "w") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"{' '.join(command)} failed; its output is in {log.name}")
    return json.loads(summary.read_text())


def numbers(column: dict[str, dict]) -> dict[str, float]:
    """What the table shows of one column of a summary's ``distributions``; nothing for what was not measured."""
    (moment,) = (name for name in column if name.startswith("moment/"))
    wanted = zip(COLUMNS, (moment, *COLUMNS[1:]), strict=True)
    return {name: column[key]["value"] for name, key in wanted if key in column}


def rows_of(summaries: dict[tuple[str, int], dict]) -> list[dict]:
    """(divergence, seed) -> summary, to a row each for base, target, every divergence and what QRS makes of it."""
    found: dict[str, list[dict[str, float]]] = {"base": [], "target": []}
    for (divergence, _), summary in summaries.items():
        labels = {"base": "base", "target": "target", "tuned": divergence, "tuned+QRS": f"{divergence} +QRS"}
        for column, label in labels.items():
            if column in summary["distributions"]:
                found.setdefault(label, []).append(numbers(summary["distributions"][column]))
    rows = []
    for label, runs in found.items():
        row = {"row": label, "runs": len(runs)}
        for name in COLUMNS:
            values = [run[name] for run in runs if name in run]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                row[name] = {"mean": statistics.mean(values), "spread": spread, "values": values}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    header = [name.replace("||", ", ") for name in COLUMNS]  # Markdown would take the bars for its own
    lines = [["", "runs", *header], ["---"] * (len(COLUMNS) + 2)]
    for row in rows:
        cells = []
        for name in COLUMNS:
            cell = row.get(name)
            spread = f" +- {cell['spread']:.4f}" if cell and cell["spread"] is not None else ""
            cells.append(f"{cell['mean']:.4f}{spread}" if cell else "")
        lines.append([row["row"], str(row["runs"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed would be taken for --seeds
        epilog="Flags that are not listed go to run_fdpg.py; use another --out for them.",
    )
    parser.add_argument("--divergences", nargs="+", default=list(DIVERGENCES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="optimiser steps (default: those of run_fdpg.py)")
    parser.add_argument("--out", type=Path, default=Path("runs/divergences"), help="a folder for the runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table's numbers there")
    args, more = parser.parse_known_args(argv)
    summaries = {}
    for seed in args.seeds:  # a seed after the other, so that what is broken off still compares all divergences
        for divergence in args.divergences:
            summaries[divergence, seed] = run(divergence, seed, args.steps, args.out, more)
            at = summaries[divergence, seed]["distributions"]["tuned"]
            print(f"{divergence}, seed {seed}: {numbers(at)}", file=sys.stderr, flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(rows_of(summaries), indent=2) + "\n")
    print(table(rows_of(summaries)))


if __name__ == "__main__":
    main()
