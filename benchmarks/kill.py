"""Kill runs with SIGKILL and start them again: the same weights, bit for bit, as without.

    python benchmarks/kill.py [--kills 50] [--seed 0] [--command reward ...]
    python benchmarks/kill.py --cut [--command reward ...]

Small runs of the four training commands, and of ``reward --online``, with a checkpoint every other step and
``--save_total_limit=1``. One of each is undisturbed. Others are killed: as they write a file of the first checkpoint,
remove an older checkpoint, write the trained model, or write a round of samples (each at least five times in 50), and
at a moment drawn from the whole run. Then the same command line runs with ``--resume_from_checkpoint=true``, and a
third of these runs are killed again. The last one must end well, with the undisturbed run's weights and samples.

A moment is a file event (open to write, rename, remove): its number in the events of the undisturbed run.

With ``--cut``, each file of the newest of two checkpoints is cut to nothing, to a half, and by its last byte, as a full
disk or a copy that broke off does: the run goes on to the same weights, or refuses in a sentence.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


SAVING = ["--save_strategy=steps", "--save_total_limit=1", "--logging_steps=1", "--learning_rate=1e-3"]
QUIET = ["--use_cpu=true", "--bf16=false", "--gradient_checkpointing=false", "--report_to=none", "--disable_tqdm=true"]
CONTRASTIVE = ["--per_device_train_batch_size=4", "--max_steps=5", "--save_steps=2", "--eval_strategy=no"]
FDPG = [
    "--features=[{contains: please, moment: 0.3}]", "--per_device_train_batch_size=16", "--num_generations=4",
    "--fit_samples=256", "--eval_samples=0", "--max_completion_length=6", "--max_steps=5", "--save_steps=2",
]  # fmt: skip
CONDITIONAL = [
    "--reward=contrastive_align.demo:reward", "--num_generations=5", "--max_completion_length=8", "--eval_prompts=0",
    "--num_train_epochs=2", "--prompts_per_round=6", "--per_device_train_batch_size=10", "--save_steps=2",
]  # fmt: skip
ONLINE = [
    "--online", "--reward=contrastive_align.demo:reward", "--num_generations=4", "--max_completion_length=8",
    "--eval_prompts=0", "--num_rounds=2", "--prompts_per_round=6", "--per_device_train_batch_size=2", "--save_steps=2",
]  # fmt: skip
COMMANDS = {
    "reward": ["--dataset_name={data}/groups.jsonl", *CONTRASTIVE],
    "preference": ["--dataset_name={data}/pairs.jsonl", *CONTRASTIVE],
    "fdpg": ["--dataset_name={data}/prompts.jsonl", *FDPG],
    "conditional": ["--dataset_name={data}/prompts.jsonl", *CONDITIONAL],
    "online": ["--dataset_name={data}/prompts.jsonl", *ONLINE],  # of the command reward
}
TRIES = 5  # of a kill at any moment
KINDS = ("first checkpoint", "rotation", "final save", "round")


def typed(command: str) -> str:
    """Return the command of the command line: own samples are a way of ``reward``."""
    return "reward" if command == "online" else command


def write_data(folder: Path) -> None:
    """Twenty-four groups of the bundled data, as groups, pairs and prompts."""
    from contrastive_align.demo import load_reward_dataset

    rows = load_reward_dataset()["train"].select(range(24)).to_list()
    pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][-1]} for r in rows]
    prompts = [{"prompt": row["prompt"]} for row in rows]
    for name, found in {"groups": rows, "pairs": pairs, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def events_of(folder: Path, tell) -> None:
    """Call ``tell(kind, path)`` before each file event in a folder, in this process from now on."""

    def hook(event: str, args: tuple) -> None:
        if (event == "open" and set(str(args[1])) & set("wax+")) or event in ("os.rename", "os.remove", "os.rmdir"):
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
            if path.startswith(str(folder)):
                tell(event, path[len(str(folder)) :].lstrip("/"))
            elif event in ("os.remove", "os.rmdir") and not path.startswith("/"):
                tell(event, "")  # of shutil.rmtree, which names no folder

    sys.addaudithook(hook)


@dataclass
class Ended:
    status: int
    said: str
    seconds: float


def run(command: str, data: Path, folder: Path, *more: str, at: int | None = None, after: float | None = None) -> Ended:
    """Run a command in a fork, killed at a file event or after so many seconds; log and events lie with the data."""
    log, events = data / f"{folder.name}.log", data / f"{folder.name}.events"
    gc.collect()
    began = time.perf_counter()
    if not (pid := os.fork()):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os._exit(_child(command, data, folder, more, at, events))
    if after is not None:
        time.sleep(max(0.0, after - (time.perf_counter() - began)))
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(status, log.read_text(errors="replace"), time.perf_counter() - began)


def _child(command: str, data: Path, folder: Path, more: tuple[str, ...], at: int | None, events: Path) -> int:
    from contrastive_align.launch import cli

    count, trace = 0, events.open("w", buffering=1)

    def tell(event: str, path: str) -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        trace.write(f"{event}\t{path}\n")

    events_of(folder, tell)
    flags = [flag.replace("{data}", str(data)) for flag in COMMANDS[command]]
    try:
        cli.main([typed(command), *flags, *SAVING, *QUIET, f"--output_dir={folder}", *more])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def moments_of(events: Path) -> dict[str, list[int]]:
    """Kind of moment -> numbers of the events of an undisturbed run that are of this kind."""
    lines = [line.split("\t") for line in events.read_text().splitlines()]
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    last_checkpoint = max(i for i, (_, path) in enumerate(lines) if path.startswith("checkpoint-"))
    for i, (event, path) in enumerate(lines):
        if path.startswith("checkpoint-2/"):
            found["first checkpoint"].append(i)
        if event in ("os.remove", "os.rmdir") and not path:
            found["rotation"].append(i)
        if i > last_checkpoint and path and path != "_run.lock":
            found["final save"].append(i)
        if path.startswith(("pool/round", "pool/reference")):
            found["round"].append(i)
    return found


def plan(kills: int, moments: dict[str, dict[str, list[int]]], rng: random.Random) -> Iterator[tuple[str, str, int]]:
    """Command, kind and event of each kill; -1 for a moment of the whole run."""
    commands = list(moments)
    share = max(1, round(kills / 10))
    planned: list[tuple[str, str, int]] = []
    for kind in KINDS:
        able = [command for command in commands if moments[command][kind]]
        for i in range(share if able else 0):
            command = able[(i + KINDS.index(kind)) % len(able)]
            planned.append((command, kind, rng.choice(moments[command][kind])))
    planned += [(commands[i % len(commands)], "any moment", -1) for i in range(kills - len(planned))]
    yield from planned[:kills]


def same(a: Path, b: Path) -> str:
    """What differs between two finished runs, or ""."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from contrastive_align.pool import Pool

    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    if set(one) != set(two):
        return "weights of other names"
    if moved := [name for name in one if not torch.equal(one[name], two[name])]:
        gap = max((one[name] - two[name]).abs().max().item() for name in moved)
        return f"{len(moved)} of {len(one)} weights differ, by {gap:.1e} at most"
    if (a / "pool").is_dir():
        pools = [Pool(f / "pool", label=lambda table: np.zeros(len(table), dtype=np.int32)) for f in (a, b)]
        if len({len(pool) for pool in pools}) > 1 or pools[0].read(range(len(pools[0]))) != pools[1].read(
            range(len(pools[1]))
        ):
            return "other samples"
    return ""


def trial(command: str, kind: str, event: int, data: Path, whole: Ended, folder: Path, rng: random.Random) -> str:
    """Kill a run, start it again, and return what is wrong with its end, or ""."""
    seconds = whole.seconds
    for _ in range(TRIES):
        how = {"at": event} if event >= 0 else {"after": rng.uniform(0.1, 0.9) * seconds}
        first = run(command, data, folder, **how)
        if first.status != 0:
            break
        seconds = first.seconds  # the machine is faster now than when the undisturbed run was timed
        shutil.rmtree(folder)
    else:
        return f"it came to its end before the kill, {TRIES} times"
    if first.status != -signal.SIGKILL:
        return f"exit {first.status} before it was killed: {first.said[-600:]}"
    if rng.random() < 1 / 3:
        run(command, data, folder, "--resume_from_checkpoint=true", after=rng.uniform(0.3, 1.0) * whole.seconds)
    last = run(command, data, folder, "--resume_from_checkpoint=true")
    if last.status != 0 or "Traceback" in last.said:
        return f"exit {last.status}: {last.said[-600:]}"
    return same(data / f"{command}-whole", folder)


def cut_each(command: str, data: Path) -> int:
    """Cut each file of the newest checkpoint; return the number of ends that are wrong."""
    whole, wrong = data / f"{command}-whole", 0
    run(command, data, whole, "--save_total_limit=2")
    newest = max(whole.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    for file in sorted(newest.iterdir()):
        ends = []
        for size in (0, file.stat().st_size // 2, file.stat().st_size - 1):
            folder = data / f"{command}-cut"
            shutil.copytree(whole, folder)
            with (folder / newest.name / file.name).open("r+b") as cut:
                cut.truncate(size)
            for name in ("model.safetensors", "adapter_model.safetensors", "summary.json"):
                (folder / name).unlink(missing_ok=True)  # of the end
            ended = run(command, data, folder, "--save_total_limit=2", "--resume_from_checkpoint=true")
            if "Traceback" in ended.said or ended.status not in (0, 2):
                ends.append(f"exit {ended.status}: {ended.said[-300:]}")
            elif ended.status == 2:
                ends.append("refused: " + ended.said[ended.said.rindex("error:") :].split("\n")[0])
            else:
                problem, skipped = same(whole, folder), f"{newest.name} was not written to its end" in ended.said
                ends.append(problem or ("from the older one" if skipped else "not needed"))
            wrong += ends[-1] not in ("from the older one", "not needed") and ended.status != 2
            shutil.rmtree(folder)
        print(f"{command:<12} {file.name:<26} {'; '.join(sorted(set(ends)))}", flush=True)
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--cut", action="store_true", help="cut files of a checkpoint, and kill nothing")
    parser.add_argument("--one_each", action="store_true", help="one kill of each kind that is a file event")
    args = parser.parse_args(argv)
    args.kills = len(KINDS) if args.one_each else args.kills
    from contrastive_align.launch import common, conditional, contrastive, fdpg  # noqa: F401 - before the forks: once

    rng = random.Random(args.seed)
    failures = 0
    with TemporaryDirectory() as name:
        data = Path(name)
        write_data(data)
        if args.cut:
            wrong = sum(cut_each(command, data) for command in args.command)
            print(f"{wrong} that ended wrong")
            return 1 if wrong else 0
        whole, moments = {}, {}
        for command in args.command:
            whole[command] = run(command, data, data / f"{command}-whole")
            assert whole[command].status == 0, whole[command].said[-2000:]
            moments[command] = moments_of(data / f"{command}-whole.events")
            found = ", ".join(f"{kind} {len(places)}" for kind, places in moments[command].items())
            print(f"{command}: undisturbed {whole[command].seconds:.1f} s; file events: {found}", flush=True)
        for number, (command, kind, event) in enumerate(plan(args.kills, moments, rng), 1):
            folder = data / f"run{number}"
            problem = trial(command, kind, event, data, whole[command], folder, rng)
            failures += bool(problem)
            where = f"event {event}" if event >= 0 else ""
            print(f"{number:3d} {command:<12} {kind:<17} {where:<10} {problem or 'the same weights'}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.kills} kills, {failures} that did not end as the undisturbed run")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
