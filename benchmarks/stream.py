"""Stream more groups than one wants in memory: each once an epoch, through kills and on other numbers of processes.

    python benchmarks/stream.py [--groups 1000000] [--shards 64] [--epochs 1] [--folder DIR]

Synthetic groups of two short completions in JSON-lines shards, and a Llama of one layer. Two jobs of
``contrastive-align reference`` write the reference's log-probs together. Then a run of two processes with two
dataloader workers each is killed (SIGKILL) in mid-epoch, resumed on one process, killed again, and resumed on two.
Every process logs the ids of the groups in its training loss. Checked are

- each group is in the loss exactly once an epoch, steps that were made again after a kill counted once;
- a step that was made twice, on other numbers of processes, has the same groups;
- the memory of each process and of its workers, early in a run and at its end;
- cached log-probs against live ones, on a sample.

    python benchmarks/stream.py --constants [--folder DIR]

measures the constants that docs/scale.md uses, on groups of a usual size: four completions of about 200 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np


WORDS = "red green blue warm cold near far high low old new big small fast slow round".split()
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "optim": "sgd", "max_length": 64}
PER_STEP = 512
SAMPLE = 2000


# --------------------------------------------------------------------------------------------------------------- data


def row_of(i: int) -> dict[str, Any]:
    """A group whose best score is its id."""
    words = [WORDS[(i >> shift) % len(WORDS)] for shift in (0, 4, 8, 12)]
    completions = [f" {words[0]} and {words[1]}.", f" {words[2]}, {words[3]} or {i % 97}."]
    return {"prompt": f"Thing {i} is", "completions": completions, "scores": [i, i - 1]}


def write_shards(folder: Path, groups: int, shards: int) -> int:
    """Write the groups, in shards of different sizes; return their bytes."""
    folder.mkdir(parents=True)
    cuts = np.sort(np.random.RandomState(0).choice(np.arange(1, groups), shards - 1, replace=False))
    for shard, (begin, end) in enumerate(zip([0, *cuts], [*cuts, groups], strict=True)):
        with (folder / f"shard-{shard:03}.jsonl").open("w") as file:
            file.writelines(json.dumps(row_of(i)) + "\n" for i in range(begin, end))
    return sum(path.stat().st_size for path in folder.iterdir())


def write_model(folder: Path) -> None:
    """Write a random Llama of one layer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from contrastive_align import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- training


def build(place: Path, *, output: str = "run", **options: Any) -> Any:
    """Build the trainer, whose ``note`` is called with the ids in each loss."""
    from contrastive_align import ContrastiveConfig, ContrastiveTrainer
    from contrastive_align.data.files import read_folder

    class Noting(ContrastiveTrainer):
        note = staticmethod(lambda step, ids: None)

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
            if model.training:
                ids = inputs["scores"].max(1).values[inputs["group_weights"] > 0]
                self.note(self.state.global_step, ids.long().tolist())
            return super().compute_loss(model, inputs, *rest, **kwargs)

    told = {"output_dir": str(place / output), "precompute_ref_log_probs": True, "learning_rate": 1e-3, **QUIET}
    told |= {"loss_type": "dpo", "save_total_limit": 2, "logging_steps": 50, "max_grad_norm": 0.0, **options}
    data = read_folder(place / "data", streaming=True)["train"]
    return Noting(str(place / "model"), args=ContrastiveConfig(**told), train_dataset=data)


def train(place: Path, name: str, *, kill_at: int | None = None, resume: bool = False, **options: Any) -> None:
    """Train in this process, log ids and memory to files, and be killed after a step."""
    import psutil
    from transformers import TrainerCallback

    started, process, rank = time.perf_counter(), psutil.Process(), int(os.environ.get("RANK", "0"))
    trainer = build(place, **options)
    log = (place / f"{name}-{rank}.log").open("w")
    told: dict[str, Any] = {"memory": [], "built": time.perf_counter() - started}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told["resumed_at"], self.began = state.global_step, time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.setdefault("first_step", time.perf_counter() - self.began)
            if state.global_step % 20 == 0 or state.global_step in (kill_at, state.max_steps):
                sizes = [p.memory_info().rss / 2**20 for p in (process, *process.children())]
                told["memory"].append([state.global_step, sizes[0], sum(sizes[1:])])
                told["seconds"], told["steps"] = time.perf_counter() - self.began, state.global_step
                (place / f"{name}-{rank}.json").write_text(json.dumps(told))
            if kill_at is not None and state.global_step >= kill_at and rank == 0:
                log.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    def note(step: int, ids: list[int]) -> None:
        log.write(f"{step} {' '.join(map(str, ids))}\n")
        log.flush()

    trainer.note = note
    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=resume or None)
    log.close()


def start(place: Path, name: str, processes: int, *, rows_per_step: int = PER_STEP, **options: Any) -> int:
    """Run :func:`train` in new processes; return the exit status."""
    size = rows_per_step // 2
    options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows_per_step // size // processes}
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    told = json.dumps({"place": str(place), "name": name, **options})
    done = subprocess.run(
        [sys.executable, *launch, __file__, "--train", told],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(place / f"{name}.err").open("w"),
    )
    return done.returncode


# ----------------------------------------------------------------------------------------------------------- checking


def steps_of(place: Path, name: str) -> dict[int, list[int]]:
    """Step -> the ids in its loss, over all processes of a run."""
    steps: dict[int, list[int]] = {}
    for path in sorted(place.glob(f"{name}-*.log")):
        lines = path.read_text().split("\n")[:-1]  # a killed process may have written half a line
        for step, *ids in (map(int, line.split()) for line in lines):
            steps.setdefault(step, []).extend(ids)
    return steps


def check_ids(runs: list[dict[int, list[int]]], groups: int, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
    """Join the steps of runs that were resumed one after the other; compare those that were made twice."""
    joined: dict[int, list[int]] = {}
    again = differ = 0
    for run in runs:
        whole = sorted(run)[:-1] if run is not runs[-1] else sorted(run)  # the last one of a killed run may lack a part
        for step in whole:
            if step in joined:
                again += 1
                differ += sorted(joined[step]) != sorted(run[step])
            joined[step] = run[step]
    missing = twice = 0
    for epoch in range(epochs):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        counts = Counter(id for step in steps for id in joined.get(step, ()))
        missing += groups - len(counts)
        twice += sum(count > 1 for count in counts.values())
    return {"missing": missing, "twice": twice, "steps again": again, "of them other": differ}


def live_gap(place: Path, sample: int) -> tuple[float, float]:
    """Return the largest difference of cached and live log-probs of a sample: in nats, and relative to the log-prob."""
    trainer = build(place, output="live", precompute_ref_log_probs=True, per_device_train_batch_size=16)
    groups, gap, relative = trainer.train_dataset, 0.0, 0.0
    positions = np.random.RandomState(1).permutation(len(groups))[:sample].tolist()
    for batch in (positions[at : at + 16] for at in range(0, len(positions), 16)):
        [read] = groups.__getitems__(sorted(batch))
        inputs = trainer.to_device(trainer.data_collator([group for row in read.rows for group in row.groups]))
        live = trainer.compute_ref_log_probs(trainer.reference_or_policy, inputs)
        found = (live - inputs["ref_logps"])[inputs["valid"]].abs()
        gap = max(gap, found.max().item())
        relative = max(relative, (found / live[inputs["valid"]].abs()).max().item())
    return gap, relative


def growth(place: Path, name: str) -> list[tuple[float, float]]:
    """Per process of a run: its memory with its workers, in MiB, at a fifth of the run and at its end."""
    found = []
    for path in sorted(place.glob(f"{name}-*.json")):
        memory = json.loads(path.read_text())["memory"]
        memory = [(own, workers) for _, own, workers in memory if workers]  # which end with the epoch
        found.append((sum(memory[len(memory) // 5]), sum(memory[-1])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--constants", action="store_true", help="what a group of a usual size costs one reader")
    parser.add_argument("--folder", help="where the shards are written for the time being")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        told = json.loads(args.train)
        return train(Path(told.pop("place")), told.pop("name"), **told)
    with TemporaryDirectory(dir=args.folder) as place:
        if args.constants:
            return constants(Path(place))
        measure(Path(place), args.groups, args.shards, args.epochs)


def measure(place: Path, groups: int, shards: int, epochs: int) -> None:
    import datasets

    from contrastive_align.data.shards import lengths_of

    os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = str(place / "cache")
    size = write_shards(place / "data", groups, shards)
    write_model(place / "model")
    say("shards", f"{groups} groups in {shards} shards, {size / 1e6:.0f} MB")
    began = time.perf_counter()
    lengths_of(sorted((place / "data").glob("*.jsonl")))
    seconds = time.perf_counter() - began
    say("counting the rows, once", f"{size / seconds / 1e6:.0f} MB/s, {groups / seconds:.0f} rows/s")

    command = [sys.executable, "-m", "contrastive_align", "reference", f"--model_name_or_path={place / 'model'}"]
    command += [f"--dataset_name={place / 'data'}", "--per_device_train_batch_size=256"]
    command += [f"--{name}={str(value).lower()}" for name, value in QUIET.items() if name not in ("optim",)]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate()[0].strip().split("\n")[-1] for job in jobs]
    seconds = time.perf_counter() - began
    say("two reference jobs", f"{groups / seconds:.0f} groups/s together; " + " | ".join(said))
    stored = sum(path.stat().st_size for path in (place / "data" / ".reference").rglob("*.parquet"))
    say("stored log-probs", f"{stored / groups:.1f} bytes a group; rows {size / groups:.0f} bytes a group")
    gap, relative = live_gap(place, SAMPLE)
    say("cached against live", f"at most {gap:.2g} nats, {relative:.2g} of the log-prob, in {SAMPLE} groups")

    per_epoch = -(-groups // PER_STEP)
    save = max(1, per_epoch // 10)
    told = {"num_train_epochs": epochs, "dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": save}
    kills = [int(epochs * per_epoch * part) for part in (0.27, 0.65)]
    plan = [("first", 2, kills[0], False), ("second", 1, kills[1], True), ("third", 2, None, True)]
    for name, processes, kill_at, resume in plan:
        status = start(place, name, processes, kill_at=kill_at, resume=resume, **told)
        if (status == 0) != (kill_at is None):
            sys.exit((place / f"{name}.err").read_text()[-3000:])
        found = json.loads((place / f"{name}-0.json").read_text())
        rate = (found["steps"] - found["resumed_at"]) * PER_STEP / found["seconds"]
        end = "to the end" if kill_at is None else f"killed at step {kill_at}"
        memory = ", ".join(f"{early:.0f} -> {late:.0f}" for early, late in growth(place, name))
        say(
            f"{name}: {processes} process{'es' * (processes > 1)}, from step {found['resumed_at']}, {end}",
            f"{rate:.0f} groups/s; first step after {found['first_step']:.1f} s; memory (MiB) {memory}",
        )
    runs = [steps_of(place, name) for name, *_ in plan]
    checked = check_ids(runs, groups, epochs, per_epoch)
    say(f"ids of {epochs} epoch{'s' * (epochs > 1)}", ", ".join(f"{count} {what}" for what, count in checked.items()))


def constants(place: Path, groups: int = 2000, completions: int = 4, words: int = 150) -> None:
    """Measure one reader on groups of a usual size, in seconds of a core."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from contrastive_align.data.files import count_rows, unread_rows
    from contrastive_align.data.reference_shards import LogpsWriter, read_logps
    from contrastive_align.data.shards import ShardOrder

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = str(place / "cache")
    random = np.random.RandomState(0)

    def text(length: int) -> str:
        return " ".join(np.array(WORDS)[random.randint(len(WORDS), size=length)])

    rows = [
        {
            "prompt": text(words),
            "completions": [f" {text(words)} {i}" for i in range(completions)],
            "scores": random.rand(completions).tolist(),
        }
        for _ in range(groups)
    ]
    (place / "data").mkdir()
    lines, table = place / "data" / "a.jsonl", place / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table, compression="zstd", row_group_size=1000)
    size = lines.stat().st_size
    say("a group", f"{size / groups:.0f} bytes in JSON lines, {table.stat().st_size / groups:.0f} in Parquet (zstd)")
    write_model(place / "model")
    stream = build(place, precompute_ref_log_probs=False, max_length=4096).train_dataset

    def pass_over(path: Path) -> int:
        return sum(1 for _ in unread_rows(path))

    def seconds(work: Any, times: int = 3) -> float:
        found = []
        for _ in range(times):
            began = time.process_time()  # of all threads: a machine may be busy with something else
            work()
            found.append(time.process_time() - began)
        return min(found)

    for path in (lines, table):
        took, over = seconds(partial(count_rows, path)), seconds(partial(pass_over, path))
        say(f"{path.suffix}: count the rows", f"{path.stat().st_size / took / 1e6:.0f} MB/s")
        say(
            f"{path.suffix}: pass over rows", f"{path.stat().st_size / over / 1e6:.0f} MB/s, {groups / over:.0f} rows/s"
        )
    tokens = sum(len(g["prompt_ids"]) + sum(map(len, g["completion_ids"])) for g in stream)
    took = seconds(lambda: [rows for rows in stream.rows_of(0, 64)])
    say("the door: parse, check, tokenise", f"{groups / took:.0f} groups/s, {tokens / took:.0f} tokens/s of one core")
    say("tokens of a group", f"{tokens / groups:.0f}, the prompt once")
    order = ShardOrder([100_000] * 10_000)
    took = seconds(lambda: order.window_at(int(random.randint(9)), int(random.randint(order.rows))))
    say("find a place among 10^9 rows in 10^4 shards", f"{took * 1000:.0f} ms")
    file = place / "logps.parquet"
    read = [row.groups for rows in stream.rows_of(0, 256) for row in rows]

    def write() -> None:
        with file.open("wb") as out:
            writer = LogpsWriter(out, {})
            for at in range(0, groups, 512):
                logps = [[(g, random.normal(-200, 50, completions)) for g in row] for row in read[at : at + 512]]
                writer.write(logps)
            writer.close()

    took, again = seconds(write), seconds(lambda: sum(1 for _ in read_logps(file)))
    say("log-probs of a group", f"{file.stat().st_size / groups:.1f} bytes")
    say("write, and read log-probs", f"{groups / took:.0f} and {groups / again:.0f} groups/s")


def say(what: str, found: str) -> None:
    print(f"| {what} | {found} |", flush=True)


if __name__ == "__main__":
    main()
