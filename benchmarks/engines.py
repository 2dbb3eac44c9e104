"""Every engine against one process: the same losses, weights and evaluation, also after a kill.

    pip install -c constraints.txt -e '.[test,engines]'
    python benchmarks/engines.py [--trainer contrastive ...] [--engine zero3 ...] [--short] [--write docs/engines.md]

A cell is a trainer, full or LoRA, an engine, a layout, and how the reference is had. Two processes (gloo, CPU) make
four steps in it; one process makes the same steps with the same global batch. AdamW has epsilon 1e-3: with a smaller
one, the sign of a rounding error is a step. Then two processes are killed after the checkpoint of step 2, and two new
ones go on from it; and an entry of a weight becomes NaN on one process, after which none may save. In turn the cells
also have gradient checkpointing, accumulation and token-sized batches; the contrastive groups are ragged and fill no
last batch. ``--short``: one cell for each engine, trainer and tuning, and one kill for each engine.

accelerate 1.15 gives FSDP to processes with an accelerator only, and on a CPU it looks for no engine but DeepSpeed:
``engines_on_cpu`` changes that in the processes of this benchmark. DeepSpeed compiles its CPU communication, and Adam
for offload, at their first use: some 80 s each, kept in ``TORCH_EXTENSIONS_DIR``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


DIVERGED = -1  # in the place of the step at which a run is killed
TOLERANCE = 1e-5  # of losses, evaluation and weights, relative above 1
SECONDS = 400  # for a cell; the first of DeepSpeed compiles
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def zero(stage: int, offload: str = "none") -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offload,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": offload,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": str(stage == 3).lower(),
    }


ENGINES = {
    "data parallel": {},
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "ZeRO-3, offload": zero(3, "cpu"),
    "FSDP2": FSDP,
}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2},
    {"max_tokens_per_batch": 200},
]


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    trainer: str  # contrastive, fdpg, conditional, encoder-decoder
    tuning: str  # full, LoRA
    engine: str
    layout: str = "padded"  # padded, shared
    reference: str = "live"  # live, cached
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.trainer, self.tuning, self.layout, self.reference, self.options])

    @property
    def options(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.extra) or "-"


def cells(short: bool = False) -> Iterator[Cell]:
    """Yield the cells, with an extra option in turn."""
    number = itertools.count()
    for trainer, tuning, engine in itertools.product(("contrastive", "fdpg", "conditional"), ("full", "LoRA"), ENGINES):
        references = ("live", "cached") if trainer == "contrastive" else ("live",)
        for layout, reference in list(itertools.product(("shared", "padded"), references))[: 1 if short else None]:
            extra = EXTRAS[next(number) % len(EXTRAS)]
            if trainer != "contrastive" and "max_tokens_per_batch" in extra:  # their batches are what was drawn
                extra = {"ds3_gather_for_generation": False} | ({"kl_coef": 0.0} if trainer == "conditional" else {})
            if trainer == "conditional" and engine.startswith("ZeRO-3"):
                extra = {"condition": "phrases", **extra}
            yield Cell(trainer, tuning, engine, layout, reference, tuple(extra.items()))
    for engine in ("data parallel", "ZeRO-3"):
        yield Cell("encoder-decoder", "full", engine)
    yield Cell("conditional", "full", "ZeRO-3", "shared", extra=(("condition", "quantile_tokens"),))  # refused


# ------------------------------------------------------------------------------------------------------- one process


def engines_on_cpu() -> None:
    """Let accelerate 1.15 give FSDP2 and DeepSpeed to processes without an accelerator."""
    from accelerate import state

    backend_of, start = state.PartialState._prepare_backend, state.AcceleratorState.__init__

    def prepare_backend(self, *args, **kwargs):
        backend, kind = backend_of(self, *args, **kwargs)
        return (backend, kind) if backend else ("gloo", state.DistributedType.MULTI_CPU)

    def init(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.PartialState._prepare_backend, state.AcceleratorState.__init__ = prepare_backend, init


def write_models(folder: Path) -> None:
    """Write a small Llama whose head is not tied, and a small T5, both with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    from contrastive_align import demo

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2, **ids,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id, **ids,
    )  # fmt: skip
    for name, model in (("llama", LlamaForCausalLM(llama)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def build(cell: Cell, models: Path, output: Path, processes: int) -> Any:
    """Return the trainer of a cell; the global batch is the same for any number of processes."""
    from datasets import Dataset, concatenate_datasets
    from peft import LoraConfig

    import contrastive_align as ca
    from contrastive_align import demo
    from contrastive_align.demo.task import all_prompts

    extra = dict(cell.extra)
    condition = extra.pop("condition", "quantile_tokens")
    size = 8 if cell.trainer in ("contrastive", "conditional") else 32
    if "max_tokens_per_batch" in extra:  # a batch of tokens: one of the global batch on each process
        extra["gradient_accumulation_steps"] = 4 // processes
    size //= processes * (1 if "max_tokens_per_batch" in extra else extra.get("gradient_accumulation_steps", 1))
    common = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4 if "max_tokens_per_batch" in extra else size,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_steps": 2,
        "seed": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "layout": cell.layout,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": processes == 1 or not ENGINES[cell.engine],
        **extra,
    }
    lora = (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if cell.tuning == "LoRA" else None
    )
    model = str(models / ("t5" if cell.trainer == "encoder-decoder" else "llama"))
    prompts = Dataset.from_dict({"prompt": all_prompts()[::97][:8]})
    if cell.trainer == "contrastive":
        rows = demo.load_reward_dataset()["train"].select(range(26)).to_list()
        for i, row in enumerate(rows):  # ragged K, and no whole number of batches
            row["completions"], row["scores"] = row["completions"][: 2 + i % 3], row["scores"][: 2 + i % 3]
        args = ca.ContrastiveConfig(
            max_steps=4,
            beta=0.1,
            per_device_eval_batch_size=4,
            precompute_ref_log_probs=cell.reference == "cached",
            **common,
        )
        data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[:7])}
        return ca.ContrastiveTrainer(model, args=args, peft_config=lora, **data)
    if cell.trainer == "conditional":
        args = ca.ConditionalConfig(
            num_generations=5, max_completion_length=6, num_train_epochs=2, prompts_per_round=4, **common
        )
        data = {"train_dataset": prompts, "eval_dataset": prompts.select(range(3))}
        return ca.ConditionalTrainer(
            model, args, reward_funcs=length_reward, condition=condition, peft_config=lora, **data
        )
    args = ca.FDPGConfig(num_generations=8, max_completion_length=6, max_steps=4, fit_samples=256, **common)
    data = {"train_dataset": concatenate_datasets([prompts] * 4), "eval_dataset": prompts.select(range(3))}
    target = ca.Target([ca.Constraint({"contains": "e"}, 0.7)])
    return ca.FDPGTrainer(model, args=args, target=target, peft_config=lora, **data)


def diverge(trainer: Any, rank: int) -> None:
    """Make one entry of a trained weight NaN, on the last process only."""
    import torch

    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    part = getattr(weight, "ds_tensor", weight)
    part = getattr(part, "_local_tensor", part)
    if rank == 1:
        with torch.no_grad():
            part.view(-1)[0] = torch.nan


def length_reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def work(cell: Cell, models: Path, output: Path, *, kill_at: int | None, resume: bool) -> None:
    """Train, evaluate and save a cell on this process, and write ``result.json`` beside the weights."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > 1 and ENGINES[cell.engine]:
        engines_on_cpu()
    result: dict[str, Any] = {}
    try:
        trainer = build(cell, models, output, processes)
        trainer.add_callback(Kill())
        trainer.train(resume_from_checkpoint=resume)
        if kill_at == DIVERGED:
            diverge(trainer, rank)
            trainer.save_model(str(output / "final"))
        result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = trainer.evaluate()
        spent = ("runtime", "per_second")
        result["evaluation"] = {k: v for k, v in found.items() if isinstance(v, float) and not k.endswith(spent)}
        result["layout"] = trainer.layout
        trainer.save_model(str(output / "final"))
    except BaseException as error:  # also SystemExit: the parent tells what it was
        result["error"] = f"{type(error).__name__}: {error}"
        if not isinstance(error, (ValueError, NotImplementedError)):
            import traceback

            traceback.print_exc()
    (output / f"result-{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit("error" in result)


# ------------------------------------------------------------------------------------------------------ the parent


@dataclass
class Ended:
    """What the processes of a run left."""

    statuses: list[int]
    result: dict[str, Any] = field(default_factory=dict)


def run(
    cell: Cell,
    models: Path,
    output: Path,
    processes: int,
    *,
    kill_at: int | None = None,
    resume: bool = False,
    work: Callable[..., None] = work,
) -> Ended:
    """Fork the processes of a run, which have the libraries imported already, and wait for them."""
    output.mkdir(parents=True, exist_ok=True)
    for file in output.glob("result-*.json"):
        file.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            log = os.open(output / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ENGINES[cell.engine]}
                os.environ.update({name: str(value) for name, value in place.items()})
            work(cell, models, output, kill_at=kill_at, resume=resume)
        pids.append(pid)
    file = output / "result-0.json"
    statuses = wait(pids)
    return Ended(statuses, json.loads(file.read_text()) if file.exists() else {})


def wait(pids: list[int]) -> list[int]:
    """Wait for processes; the others of one that ended wrong are killed after a while, and all after ``SECONDS``."""
    ended: dict[int, int] = {}
    began, failed = time.time(), None
    while len(ended) < len(pids):
        for pid in pids:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(found[1])
                failed = failed or (time.time() if ended[pid] else None)
        if time.time() - began > SECONDS or (failed and time.time() - failed > 20):
            for pid in set(pids) - set(ended):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [ended[pid] for pid in pids]


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of losses and evaluation, relative where a value is above 1."""
    pairs = [*zip(one["losses"], other["losses"], strict=True)]
    pairs += [(value, other["evaluation"][name]) for name, value in one["evaluation"].items()]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def gap_of_weights(one: Path, other: Path) -> float:
    """Return the largest difference of the weights that two runs saved, read as transformers and peft read them."""
    a, b = (load_saved(folder / "final") for folder in (one, other))
    if a.keys() != b.keys():
        return float("inf")
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def load_saved(folder: Path) -> dict[str, Any]:
    """Return a saved model's weights by name, loaded by plain transformers or peft."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if (folder / "adapter_config.json").is_file():
        return AutoPeftModelForCausalLM.from_pretrained(folder).state_dict()
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).state_dict()


def trial(cell: Cell, models: Path, folder: Path, *, kill: bool) -> dict[str, str]:
    """Run a cell; return what the table says of it, with ``wrong`` where something is not as it must be."""
    alone, pair, killed = folder / str(cell).replace(", ", "-"), folder / "pair", folder / "killed"
    for old in (pair, killed, folder / "diverged"):
        shutil.rmtree(old, ignore_errors=True)
    if not (alone / "final").is_dir():
        baseline = run(cell, models, alone, 1)
        if baseline.result.get("losses") is None:
            return {"wrong": f"one process: {baseline.result} {tail(alone)}"}
    one = json.loads((alone / "result-0.json").read_text())
    two = run(cell, models, pair, 2)
    if "error" in two.result:
        refused = two.result["error"].startswith(("ValueError", "NotImplementedError"))
        return {"refused" if refused else "wrong": two.result["error"] + ("" if refused else tail(pair))}
    if two.statuses != [0, 0]:
        return {"wrong": f"exit {two.statuses}: {tail(pair)}"}
    found = {"losses, evaluation": f"{gap(one, two.result):.0e}", "weights": f"{gap_of_weights(alone, pair):.0e}"}
    found["layout"] = two.result["layout"]
    if kill:
        ended = run(cell, models, killed, 2, kill_at=3)
        if ended.statuses != [-signal.SIGKILL] * 2:
            return found | {"wrong": f"not killed, exit {ended.statuses}: {tail(killed)}"}
        again = run(cell, models, killed, 2, resume=True)
        if again.statuses != [0, 0]:
            return found | {"wrong": f"resumed, exit {again.statuses}: {again.result} {tail(killed)}"}
        found["after a kill"] = f"{gap_of_weights(pair, killed):.0e}"
        if ENGINES[cell.engine] and (problem := saved_what_diverged(cell, models, folder / "diverged")):
            return found | {"wrong": problem}
    if any(not float(value) <= TOLERANCE for title, value in found.items() if title != "layout"):
        found["wrong"] = f"more than {TOLERANCE}"
    if found["layout"] != cell.layout:
        found["wrong"] = f"layout {found['layout']}"
    return found


def saved_what_diverged(cell: Cell, models: Path, folder: Path) -> str:
    """Return what is wrong where a weight of the last process is NaN, or "". Data parallel processes may save alone."""
    ended = run(cell, models, folder, 2, kill_at=DIVERGED)
    saved = [file.name for file in (folder / "final").glob("*.safetensors")]
    refused = ended.statuses == [1, 1] and "diverged" in ended.result.get("error", "")
    return "" if refused and not saved else f"diverged, exit {ended.statuses}, saved {saved}: {ended.result}"


def tail(folder: Path) -> str:
    return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in folder.glob("rank*.log"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", nargs="+", choices=["contrastive", "fdpg", "conditional", "encoder-decoder"])
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES))
    parser.add_argument("--tuning", nargs="+", choices=["full", "LoRA"])
    parser.add_argument("--short", action="store_true", help="a cell for each engine, trainer and tuning")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page")
    args = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", ACCELERATE_MIXED_PRECISION="no", HF_HUB_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    chosen = [
        cell
        for cell in cells(args.short)
        for given, value in [(args.trainer, cell.trainer), (args.engine, cell.engine), (args.tuning, cell.tuning)]
        if not given or value in given
    ]
    chosen = [cell for cell, times in ((c, chosen.count(c)) for c in dict.fromkeys(chosen)) if times == 3]
    began, rows, killed = time.time(), [], set()
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        write_models(folder)
        for cell in chosen:
            kill = not args.short or cell.engine not in killed
            killed.add(cell.engine)
            found = trial(cell, folder, folder / "runs", kill=kill)
            rows.append((cell, found))
            said = ", ".join(f"{title} {value}" for title, value in found.items())
            print(f"{cell.engine:<16} {cell}: {said}", flush=True)
    wrong = sum("wrong" in found for _, found in rows)
    refused = sum("refused" in found for _, found in rows)
    minutes = (time.time() - began) / 60
    print(f"{len(rows)} cells, {wrong} wrong, {refused} refused, {minutes:.0f} minutes")
    if args.write:
        write_page(args.write, rows)
    return 1 if wrong else 0


def write_page(page: Path, rows: list[tuple[Cell, dict[str, str]]]) -> None:
    """Put the table between the two marks of a page."""
    titles = ["losses, evaluation", "weights", "after a kill"]
    lines = ["| trainer | engine | options | " + " | ".join(titles) + " |", "|---" * (3 + len(titles)) + "|"]
    for cell, found in rows:
        options = ", ".join([cell.tuning, cell.layout, cell.reference, *([cell.options] if cell.extra else [])])
        values = (
            [found.get("refused") or found.get("wrong", "").split("\n")[0]]
            if len(found) == 1
            else [found.get(title, "") for title in titles]
        )
        lines.append(f"| {cell.trainer} | {cell.engine} | {options} | " + " | ".join(values) + " |")
    begin, end = "<!-- table -->", "<!-- end of table -->"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
