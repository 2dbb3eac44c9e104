"""Conditional training beside itself: kinds of condition and of feedback, and the two directions of the KL.

    python benchmarks/conditional.py                                             # seed 42, four runs
    python benchmarks/conditional.py --seeds 42 43 44 --json runs/conditional_benchmark.json
    python benchmarks/conditional.py --runs tokens forward --num_train_epochs=2  # other flags go to run_conditional.py

Each run is ``run_conditional.py`` with the bundled model, prompts and reward but for the flags of its row, in a process
of its own: one to two minutes on 2 cores. Its numbers are read from its summary.json, which is written last, so that a
run that is already there is not repeated and one that was broken off is.

Rewards are means over the held-out prompts: of the start, given nothing, and of the trained model given its best
condition, its worst and nothing. ``gain / se``: of the best above the start, paired over prompts. ``ordered``: of how
many runs the reward falls strictly with each condition from best to worst. In the second table, KL per token to the
start at the end of training, and what the last round sampled: its perplexity under the start, and distinct-2. With
several seeds, means +- standard deviations over them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
RUNS = {
    "tokens": [],
    "phrases": ["--condition=phrases"],
    "scored data": ["--score_column=scores"],
    "forward": ["--kl_direction=forward"],
}
TABLES = {
    "Kinds of condition and feedback": (
        {"tokens": "quantile tokens", "phrases": "phrases", "scored data": "tokens, scored data"},
        ("start", "best", "worst", "nothing", "gain / se", "ordered"),
    ),
    "Directions of the KL": (
        {"tokens": "KL(policy, start), reverse", "forward": "KL(start, policy), forward"},
        ("best", "worst", "gain / se", "ordered", "KL", "perplexity", "distinct-2"),
    ),
}


def run(name: str, seed: int, out: Path, more: list[str]) -> dict:
    """The summary of one run, made or found."""
    output_dir = out / f"{name.replace(' ', '_')}-seed{seed}"
    summary = output_dir / "summary.json"
    if not summary.is_file():
        # What an interrupted run has sampled is what this one would sample: it is kept.
        flags = [f"--seed={seed}", f"--output_dir={output_dir}", "--resume_from_checkpoint=true", "--disable_tqdm=true"]
        command = [sys.executable, str(ROOT / "run_conditional.py"), *flags, *RUNS[name], *more]
        output_dir.mkdir(parents=True, exist_ok=True)
        with open(output_dir / "run.log", "w") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"{' '.join(command)} failed; its output is in {log.name}")
    return json.loads(summary.read_text())


def numbers(summary: dict) -> dict[str, float]:
    """What the tables show of one summary."""
    given = {k.removeprefix("reward_given/"): v for k, v in summary["metrics"].items() if k.startswith("reward_given/")}
    nothing = given.pop("nothing")
    means = [change["after"] for change in given.values()]  # best first
    change, training = summary["metrics"]["mean_reward"], summary["training"]
    found = {
        "start": nothing["before"],
        "best": means[0],
        "worst": means[-1],
        "nothing": nothing["after"],
        "gain / se": (change["after"] - change["before"]) / change["se"],
        "ordered": float(all(a > b for a, b in itertools.pairwise(means))),
        "seconds": training["seconds"] + training["seconds_measuring"],
    }
    if "kl" in training:
        found["KL"] = training["kl"]
    last = training["rounds"][-1]
    return found | {"perplexity": last["round/reference_perplexity"], "distinct-2": last["round/distinct_2"]}


def rows_of(summaries: dict[tuple[str, int], dict]) -> dict[str, dict]:
    """(name, seed) -> summary, to name -> column -> mean and, of several seeds, spread."""
    rows = {}
    for name in dict.fromkeys(name for name, _ in summaries):
        found = [numbers(summary) for (of, _), summary in summaries.items() if of == name]
        rows[name] = {"runs": len(found)}
        for column in found[0]:
            values = [numbers[column] for numbers in found]
            spread = statistics.stdev(values) if len(values) > 1 else None
            rows[name][column] = {"mean": statistics.fmean(values), "spread": spread}
    return rows


def tables(rows: dict[str, dict]) -> str:
    parts = []
    for title, (names, columns) in TABLES.items():
        lines = [[title, "runs", *columns], ["---"] * (len(columns) + 2)]
        for name, label in names.items():
            if name in rows:
                lines.append([label, str(rows[name]["runs"]), *(_cell(rows[name], c) for c in columns)])
        if len(lines) > 2:
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _cell(row: dict, column: str) -> str:
    cell = row.get(column)
    if cell is None:
        return ""
    if column == "ordered":
        return f"{round(cell['mean'] * row['runs'])} of {row['runs']}"
    digits = 1 if column == "gain / se" else 3
    spread = f" +- {cell['spread']:.{digits}f}" if cell["spread"] is not None else ""
    return f"{cell['mean']:.{digits}f}{spread}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags that are not listed go to run_conditional.py; use another --out for them.",
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--out", type=Path, default=Path("runs/conditional_benchmark"), help="a folder for the runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the tables' numbers there")
    args, more = parser.parse_known_args(argv)
    summaries = {}
    for seed, name in itertools.product(args.seeds, args.runs):
        summaries[name, seed] = run(name, seed, args.out, more)
        print(f"{name}, seed {seed}: {numbers(summaries[name, seed])}", file=sys.stderr, flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows_of(summaries), indent=2) + "\n")
    print(tables(rows_of(summaries)))


if __name__ == "__main__":
    main()
