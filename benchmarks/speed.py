"""This package beside TRL's DPOTrainer: seconds, memory and floors of a training step, in one table.

    CONTRASTIVE_ALIGN_DATA=path/to/data CONTRASTIVE_ALIGN_MODELS=path/to/models python benchmarks/speed.py
    python benchmarks/speed.py --workload synthetic --k 2 4 [--precision bf16] [--reference cached] [--tuning lora]
                               [--compile yes] [--malloc keeping]
    python benchmarks/speed.py --gpu

Without a choice of rows: TRL and this package at K = 2, both layouts at K = 4, the shared one at K = 16, on synthetic
and on real lengths: 35 to 60 minutes on 2 cores. With a choice: every combination of what was chosen, and of K = 2 and
4, fp32, an uncached reference, full fine-tuning, nothing compiled and malloc as it is for what was not. --all takes
hours. --memory adds the peaks (a process of its own for every row, about a minute each), --lengths the growth with the
prompt (10 minutes). Rows of more than --max-tokens a step, padding counted, are left out: each token takes about 0.4
MB, and the default 16 GB in all.

``--malloc keeping``: freed memory stays with the process for all rows. By default this package's trainers see to it for
their own steps, and hand it back before TRL's turn, whose largest tensors come on fresh pages every time.

Model: a random Llama of 56M parameters (hidden 512, 8 layers, 8 heads, 4 KV heads, intermediate 1408, vocabulary
32,000, 4,096 positions). Workloads: ``synthetic``, log-normal lengths (prompts median 160, completions median 260);
``qa`` and ``gsm8k``, real groups, under a tokenizer's own vocabulary. --gpu: 1B parameters, prompts of 1,024 tokens,
completions of 512, bf16. The trainers take turns step by step on the same groups, in one process.

Columns: the median of a step's seconds (forward, backward, optimiser) after the first two; unique tokens (each prompt
once) a second; peak memory above the loaded model; the time over that of TRL at K = 2, all else equal; and the share
of the machine's matrix-product rate (the best of 2048 x 2048 x 2048 products in the same precision timed between the
steps, 8192 on a GPU) that the step's floor (``floor.floor_flop``) reaches; on a machine with neighbours also of the
mean rate of the products right before and after each step. A ratio of rows that took turns is the median of the steps'
own ratios, whose groups are the same and whose neighbours nearly so: not quite that of the two medians beside it, and
the last column of the second table not quite the quotient of the two before it. Other rows have their medians divided.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from datasets import disable_progress_bars
from measure import FULL_LOGITS, LAYOUTS, Task, peak_memory, profile, time_rows
from transformers.utils.logging import disable_progress_bar
from workloads import REAL, find_tokenizer

from contrastive_align.models.cpu.freed_memory import keep_freed_memory


CHOICES = {
    "workload": ["synthetic", *REAL],
    "precision": ["fp32", "bf16"],
    "reference": ["uncached", "cached"],
    "tuning": ["full", "lora"],
    "compile": ["no", "yes"],
    "malloc": ["default", "keeping"],
}
DEFAULTS = [  # what answers "how much faster?", with no row for nothing
    Task("synthetic", rows=[("trl", 2), ("shared", 2), ("padded", 4), ("shared", 4)]),
    Task("synthetic", malloc="keeping", rows=[("trl", 2), ("shared", 2), ("shared", 4)]),
    Task("synthetic", reference="cached", rows=[("shared", 4)]),
    Task("synthetic", reference="cached", compile="yes", rows=[("shared", 4)]),
    Task("qa", rows=[("trl", 2), ("shared", 2), ("shared", 4), ("shared", 16)]),
    Task("qa", rows=[("padded", 4), ("shared", 4)]),
    Task("qa", malloc="keeping", rows=[("trl", 2), ("shared", 2)]),
    Task("qa", reference="cached", rows=[("shared", 4)]),
]
GPU_ROWS = [("trl", 2), ("padded", 2), ("shared", 2), ("padded", 4), ("shared", 4), ("padded", 8), ("shared", 8)]
LENGTHS = (64, 128, 256, 512, 1024)
WIDE = 128_000  # the vocabulary beside 32,000
HEADER = (
    "workload", "precision", "reference", "tuning", "compiled", "malloc", "layout", "K", "seconds a step",
    "unique tokens/s", "peak above the model, GB", "time over TRL's at K=2", "share of the matrix-product rate",
    "of the rate around each step",
)  # fmt: skip
GROWTH_HEADER = ("what", "from", "to", "seconds", "seconds", "ratio", "ratio of unique tokens", "one over the other")


# ------------------------------------------------------------------------------------------------- what is measured


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="TRL has rows at K = 2 alone")
    parser.add_argument("--k", nargs="+", type=int, choices=[2, 4, 8, 16])
    parser.add_argument("--all", action="store_true", help="every row there is")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each row, after two more")
    parser.add_argument("--groups", type=int, help="groups a step (default: 4; 2 on a GPU)")
    parser.add_argument("--memory", action="store_true", help="measure peaks too, full logits and vocabularies as well")
    parser.add_argument("--lengths", action="store_true", help="measure growth with the prompt too (K = 4)")
    parser.add_argument("--max-tokens", type=int, default=33_000, help="leave out rows of more tokens a step")
    parser.add_argument("--tokenizer", help="a folder (default: the one in CONTRASTIVE_ALIGN_MODELS)")
    parser.add_argument("--gpu", action="store_true", help="the 1B model on a GPU")
    parser.add_argument("--profile", metavar="ROW", help="instead: the operators of one step, of shared4, trl2, ...")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured there")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # a trial of the benchmark itself
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # one task, in a process of its own
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA GPU, and torch finds none here; without it the 56M model runs on the CPU")
    if args.gpu and args.workload:
        parser.error("--gpu has a workload of its own: leave --workload out")
    if args.profile and not re.fullmatch(rf"({'|'.join(LAYOUTS)})(2|4|8|16)", args.profile):
        parser.error("--profile takes a layout and K, such as shared4 or trl2")
    return args


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The tasks of the first table, a process each: their rows take turns."""
    chosen = {name: getattr(args, name) for name in (*CHOICES, "layouts", "k")}
    common = {
        "steps": args.steps,
        "groups": args.groups or (2 if args.gpu else 4),
        "size": "tiny" if args.tiny else "1b" if args.gpu else "56m",
        "device": "cuda" if args.gpu else "cpu",
        "tokenizer": args.tokenizer or find_tokenizer(),
        "max_tokens": 10**9 if args.gpu else args.max_tokens,
    }
    if args.gpu:
        rows = [row for row in GPU_ROWS if row[0] in (args.layouts or LAYOUTS) and row[1] in (args.k or [2, 4, 8])]
        defaults = {**CHOICES, "precision": ["bf16"]}
        axes = [chosen[name] or values[:1] for name, values in list(defaults.items())[1:]]
        # A process for each layout: three trainers of 1B parameters do not fit beside each other everywhere.
        tasks = [
            Task("fixed:1024:512:512", *axis, rows=[row for row in rows if row[0] == layout])
            for axis in itertools.product(*axes)
            for layout in dict.fromkeys(layout for layout, _ in rows)
        ]
    elif args.all or any(chosen.values()):
        layouts = args.layouts or LAYOUTS
        ks = args.k or ([2, 4, 8, 16] if args.all else [2, 4])
        rows = [(layout, k) for k in ks for layout in layouts if layout != "trl" or k == 2]
        defaults = {name: values if args.all or name == "workload" else values[:1] for name, values in CHOICES.items()}
        axes = [chosen[name] or values for name, values in defaults.items()]
        tasks = [Task(*axis, rows=rows) for axis in itertools.product(*axes)]
    else:
        tasks = DEFAULTS
    return [replace(task, **common) for task in tasks]


def perform(task: Task, what: str, apart: bool = True) -> dict:
    """Measure ``time`` or ``memory`` of a task, ``apart``: in a process of its own, so that none disturbs the next."""
    if not apart:
        if task.malloc == "keeping":
            keep_freed_memory()
        return {"time": time_rows, "memory": peak_memory, "profile": profile}[what](task)
    print(f"{what}: {', '.join(filter(None, _choices(_settings(task))))}: {task.rows}", file=sys.stderr)
    command = [sys.executable, __file__, "--child", what, json.dumps(asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"problem": f"ended with {done.returncode}"}  # its own words stand on stderr
    return json.loads(done.stdout.splitlines()[-1])


def measured(tasks: list[Task], memory: bool, apart: bool = True) -> list[dict]:
    """One dict a row: its settings and what was measured."""
    rows = []
    for run, task in enumerate(tasks):
        found = perform(task, "time", apart)
        nothing = {"problem": found.get("problem"), "peak": None}
        for row in found.get("rows") or [{"layout": layout, "k": k, **nothing} for layout, k in task.rows]:
            rows.append(
                {**_settings(task), "run": run, "rate": found.get("rate"), "threads": found.get("threads"), **row}
            )
        if memory and task.device == "cpu":
            rows += _peaks(task, rows[-len(task.rows) :], apart)
    for row in rows:
        trl = [r for r in rows if r["layout"] == "trl" and "median" in r and _alike(r, row)]
        row["over_trl"] = statistics.median(_ratios(row, trl[0])) if trl and "median" in row else None
    return rows


def _ratios(row: dict, base: dict, name: str = "seconds") -> list[float]:
    """Each step's own ratio where the rows took turns, in one process on the same groups; else that of the medians."""
    if _alike(row, base) and row["run"] == base["run"]:
        return [a / b for a, b in zip(row[name], base[name], strict=True)]
    return [statistics.median(row[name]) / statistics.median(base[name])]


def _settings(task: Task) -> dict:
    return {name: getattr(task, name) for name in (*CHOICES, "groups", "size", "device", "vocabulary")}


def _alike(a: dict, b: dict) -> bool:
    return all(a[name] == b[name] for name in CHOICES)


def _peaks(task: Task, rows: list[dict], apart: bool) -> list[dict]:
    """Fill in the rows' peaks. Where the shared layout has K = 4, add rows of memory alone to set beside it."""
    more = []
    if any((row["layout"], row["k"], row["problem"]) == ("shared", 4, None) for row in rows):
        more.append({**_settings(task), "layout": FULL_LOGITS, "k": 4, "problem": None})
        if task.workload not in REAL:
            more.append({**_settings(task), "layout": "shared", "k": 4, "problem": None, "vocabulary": WIDE})
    for row in [*rows, *more]:
        if row["problem"] is None:
            alone = replace(task, rows=[(row["layout"], row["k"])], vocabulary=row["vocabulary"])
            row |= perform(alone, "memory", apart)
    return more


# --------------------------------------------------------------------------------------------------- what is printed


def table(rows: list[dict]) -> str:
    """The first table."""
    lines = []
    for row in rows:
        peak = f"{row['peak'] / 1e9:.2f}" if row.get("peak") is not None else ""
        cells = [row["problem"] or "", "", peak, "", "", ""]
        if "median" in row:
            over = f"{row['over_trl']:.2f}" if row["over_trl"] else ""
            cells = [
                f"{row['median']:.3g}",
                f"{row['tokens_per_second']:.0f}",
                peak,
                over,
                f"{row['share']:.2f}",
                f"{row['share_now']:.2f}",
            ]
        layout = row["layout"] + (f", vocabulary {row['vocabulary']:,}" if row["vocabulary"] else "")
        lines.append([*(row[name] for name in CHOICES), layout, row["k"], *cells])
    return markdown(HEADER, lines)


def growth(rows: list[dict]) -> str:
    """The second table: from 4 completions (or the fewest) to more; where lengths were measured, prompts too."""
    rows = [row for row in rows if "median" in row and row["layout"] != "trl"]
    pairs = []
    for row in rows:
        alike = [r for r in rows if _alike(r, row) and r["layout"] == row["layout"]]
        base = next((r for r in alike if r["k"] == 4), min(alike, key=lambda r: r["k"]))
        pairs += [(base, row)] if row["k"] > base["k"] else []
    fixed = [row for row in rows if row["workload"].startswith("fixed:") and row["k"] == 4]
    for row in fixed:
        first = next(r for r in fixed if _labels(r)[1:] == _labels(row)[1:])
        pairs += [(first, row)] if first is not row else []
    pairs += [(a, b) for a, b in itertools.product(fixed, fixed) if _alike(a, b) and a["layout"] < b["layout"]]
    lines = []
    for pair in pairs:
        labels = list(zip(*map(_labels, pair), strict=True))
        same = ", ".join(a for a, b in labels if a == b != "")
        differ = next((a, b) for a, b in labels if a != b)
        base, row = pair
        times, tokens = _ratios(row, base), _ratios(row, base, "tokens")
        over = [time / token for time, token in zip(times, tokens, strict=True)]
        ratios = [f"{statistics.median(x):.2f}" for x in (times, tokens, over)]
        lines.append([same, *differ, *(f"{row['median']:.3g}" for row in pair), *ratios])
    return markdown(GROWTH_HEADER, lines)


def _labels(row: dict) -> list[str]:
    workload, *fixed = row["workload"].split(":")
    workload = f"prompts of {fixed[0]}" if fixed else workload
    return [workload, *_choices(row)[1:], row["layout"], f"K = {row['k']}"]


def _choices(row: dict) -> list[str]:
    """What was chosen for a row, to be read without a header."""
    words = {"yes": "compiled", "no": "", "default": "", "keeping": "malloc keeping"}
    return [words.get(row[name], row[name]) for name in CHOICES]


def memory_notes(rows: list[dict]) -> list[str]:
    """What the peaks of K = 4 say: beside full logits, and beside a vocabulary of 32,000."""
    notes = []
    rows = [row for row in rows if row["k"] == 4 and row.get("counts")]
    for row in [row for row in rows if row["layout"] == "shared"]:
        alike = [r for r in rows if _alike(r, row) and r is not row]
        what = ", ".join(filter(None, [*_choices(row), "K = 4, shared"]))
        if row["vocabulary"] != WIDE:
            ratios = [row["peak"] / r["peak"] for r in alike if r["layout"] == FULL_LOGITS]
            notes += [f"{what}: {ratio:.2f} of the peak of padded rows with full logits." for ratio in ratios]
            continue
        for small in [r for r in alike if r["layout"] == "shared"]:
            grown = (row["peak"] - small["peak"]) / 1e6
            head, embedding = ((row["counts"][n] - small["counts"][n]) / 1e6 for n in ("head", "embedding"))
            kept = 12 if row["tuning"] == "full" else 0  # bytes a parameter: a gradient and two moments, fp32
            notes.append(
                f"{what}: a vocabulary of {WIDE:,} raises the peak above the model by {grown:.0f} MB. Gradients and "
                f"AdamW's moments: {kept * head:.0f} MB more for the head, {kept * embedding:.0f} for the untied "
                f"embedding; weights, in the loaded model: {4 * head:.0f} and {4 * embedding:.0f}."
            )
    return notes


def markdown(header: tuple, lines: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *lines])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        what, task = args.child
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        disable_progress_bar()
        disable_progress_bars()
        print(json.dumps(perform(Task(**json.loads(task)), what, apart=False)))
        return
    tasks = tasks_of(args)
    if any(task.workload in REAL for task in tasks):
        if "CONTRASTIVE_ALIGN_DATA" not in os.environ:
            sys.exit("Set CONTRASTIVE_ALIGN_DATA to the folder with the .jsonl files, or give --workload synthetic.")
        if tasks[0].tokenizer is None:
            sys.exit("Give --tokenizer, or set CONTRASTIVE_ALIGN_MODELS to a folder that holds a tokenizer.")
    if args.profile:
        layout, k = re.fullmatch(r"([a-z]+)(\d+)", args.profile).groups()
        print(perform(replace(tasks[0], rows=[(layout, int(k))]), "profile"))
        return
    rows = measured(tasks, args.memory)
    print(table(rows), end="\n\n")
    fixed = []
    if args.lengths or args.all:
        settings = replace(tasks[0], rows=[("padded", 4), ("shared", 4)])
        fixed = measured([replace(settings, workload=f"fixed:{n}:64:256") for n in LENGTHS], memory=False)
    print(growth(rows + fixed), end="\n\n")
    print("\n".join(memory_notes(rows)))
    for precision in dict.fromkeys(task.precision for task in tasks):
        rates = [row["rate"] / 1e9 for row in rows if row["precision"] == precision and row.get("rate")]
        span = f"{min(rates):.0f} to {max(rates):.0f}" if rates else "?"
        print(f"Matrix products in {precision}: {span} GFLOP/s. {tasks[0].groups} groups a step.")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows + fixed}, indent=1))


if __name__ == "__main__":
    main()
