"""Trainers side by side: seconds, floors and memory of their steps. One :class:`Task` is what one process measures."""

from __future__ import annotations

import ctypes
import os
import resource
import statistics
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

import datasets
import torch
from datasets import Dataset
from floor import Counts, floor_flop
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer
from workloads import REAL, groups_of, load_tokenizer, padded_tokens, unique_tokens

from contrastive_align import ContrastiveConfig, ContrastiveTrainer
from contrastive_align.models.cpu.freed_memory import freed_memory_kept
from contrastive_align.models.head import ScoredTokens


LAYOUTS = ("trl", "padded", "shared")
FULL_LOGITS = "full-logits"  # the padded layout, the logits of all tokens in memory: what is usually done
WARM_UP = 2
SIZES = {
    "56m": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1408,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "tiny": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
}  # fmt: skip
SHRINK = {"tiny": 16}
PRODUCT = {"tiny": 128}


@dataclass
class Task:
    """Rows that share everything but layout and K, to be measured in one process.

    Args:
        workload: see ``workloads.groups_of``.
        precision: ``fp32``, or ``bf16``: autocast over fp32 weights, as ``bf16=True`` means to both trainers.
        reference: ``cached`` log-probs, or ``uncached``: computed in every step.
        tuning: ``full``, or ``lora``: r=16 on every linear layer but the head.
        compile: ``no``, or ``yes``: torch_compile=True, which falls into the steps that are not counted.
        malloc: ``default``, or ``keeping``: what is freed stays with the process, whoever freed it.
        rows: (layout, K).
        groups: groups a step.
        size: one of ``SIZES``.
        vocabulary: 0 for the workload's: 32,000, or the tokenizer's for real text.
        tokenizer: a folder, for real text.
        max_tokens: rows that would compute on more tokens a step (padding counted) are left out.
    """

    workload: str = "synthetic"
    precision: str = "fp32"
    reference: str = "uncached"
    tuning: str = "full"
    compile: str = "no"
    malloc: str = "default"
    rows: list[tuple[str, int]] = field(default_factory=list)
    steps: int = 5
    groups: int = 4
    size: str = "56m"
    device: str = "cpu"
    vocabulary: int = 0
    tokenizer: str | None = None
    max_tokens: int = 10**9


# -------------------------------------------------------------------------------------------------------- trainers


@contextmanager
def trainers_of(task: Task) -> Iterator[tuple[dict, list[list[dict]], Counts]]:
    """Layout -> trainer, ready for ``step``, on one saved random model; the groups of every step; what to count."""
    tokenizer = load_tokenizer(task.workload, task.tokenizer)
    default = {"tiny": 512}.get(task.size, 32000)
    vocabulary = task.vocabulary or (len(tokenizer) if task.workload in REAL else default)
    n = task.groups * (task.steps + WARM_UP)
    groups = groups_of(task.workload, n, tokenizer, min(vocabulary, default), SHRINK.get(task.size, 1))
    config = LlamaConfig(
        **SIZES[task.size], vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False
    )
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE, before = Path(folder), datasets.config.HF_DATASETS_CACHE
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
        layouts = dict.fromkeys(layout for layout, _ in task.rows)
        trainers = {layout: _build(layout, folder, tokenizer, task) for layout in layouts}
        steps = [groups[i : i + task.groups] for i in range(0, n, task.groups)]
        try:
            yield trainers, steps, Counts.of(next(iter(trainers.values())).model, config)
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def _build(layout: str, folder: str, tokenizer, task: Task) -> DPOTrainer:
    options = {
        "output_dir": f"{folder}/{layout}",
        "use_cpu": task.device == "cpu",
        "bf16": task.precision == "bf16",
        "precompute_ref_log_probs": task.reference == "cached",
        "torch_compile": task.compile == "yes",
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_length": None,
        "per_device_train_batch_size": task.groups,
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if task.tuning == "lora" else None
    shared = {"model": f"{folder}/model", "processing_class": tokenizer, "peft_config": lora}
    # The trainers' own data are one tiny row: ``step`` is given its batches.
    if layout == "trl":
        data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(args=DPOConfig(loss_type=["nca_pair"], **options), train_dataset=data, **shared)
    else:
        data = Dataset.from_list([{"prompt_ids": [3, 4], "completion_ids": [[5], [6]], "scores": [1.0, 0.0]}])
        args = ContrastiveConfig(loss_type="nca", layout="shared" if layout == "shared" else "padded", **options)
        trainer = ContrastiveTrainer(args=args, train_dataset=data, **shared)
    if layout == FULL_LOGITS:
        for model in filter(None, (trainer.model, trainer.ref_model)):
            _with_full_logits(model.get_base_model() if lora else model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(
        trainer.model, trainer.optimizer
    )  # autocast, TRL's compilation
    return trainer


def _with_full_logits(model: PreTrainedModel) -> None:
    """In place of the fused head: the model's own forward, and the log-softmax of all its logits."""

    def forward(self, *args, fused_lm_head=False, shift_labels=None, **kwargs):
        output = type(self).forward(self, *args, **kwargs)
        if not fused_lm_head:
            return output
        logits = output.logits
        log_probs = logits.float().log_softmax(-1).gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(log_probs)  # entropy and the like would only cost more
        return ScoredTokens(log_probs, nothing, nothing, nothing.bool())

    model.forward = types.MethodType(forward, model)


def batch_of(trainer: DPOTrainer, layout: str, groups: list[dict], k: int, task: Task) -> dict:
    """The batch that the trainer's own collator makes, with the reference's log-probs where they are cached."""
    if layout == "trl":
        pairs = [(g["prompt_ids"], *g["completion_ids"][:2]) for g in groups]
        rows = [{"prompt_ids": p, "chosen_ids": chosen, "rejected_ids": rejected} for p, chosen, rejected in pairs]
    else:
        rows = [{**g, "completion_ids": g["completion_ids"][:k], "scores": g["scores"][:k]} for g in groups]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    if task.reference == "cached":
        found = trainer.compute_ref_log_probs(trainer.model, batch)  # no step was made: the policy is the reference
        if layout == "trl":
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = found
        else:
            batch["ref_logps"] = found
    return batch


def step(trainer: DPOTrainer, batch: dict) -> float:
    """Seconds of one step: forward, backward, optimiser, gradients dropped (no clipping, no schedule)."""
    _synchronise()
    started = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.model.zero_grad()
    _synchronise()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------- measuring


class Machine:
    """The rate of the machine's matrix products, to be asked between the steps: the best seen, and the present one."""

    def __init__(self, task: Task) -> None:
        self.n = PRODUCT.get(task.size, 8192 if task.device == "cuda" else 2048)
        dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
        self.a, self.b = (torch.randn(self.n, self.n, device=task.device).to(dtype) for _ in range(2))
        self.rate = 0.0

    def measure(self) -> float:
        """The mean rate of a few products now."""
        seconds = []
        for _ in range(6):
            _synchronise()
            started = time.perf_counter()
            torch.mm(self.a, self.b)
            _synchronise()
            seconds.append(time.perf_counter() - started)
        self.rate = max(self.rate, 2 * self.n**3 / min(seconds))
        return 2 * self.n**3 / statistics.mean(seconds)


def time_rows(task: Task) -> dict:
    """The rows take turns step by step on the same groups; the first two steps of each are not counted.

    Returns the rate of the matrix products and, for each row, medians and the seconds of every counted step; on a GPU
    also the peak of memory (see ``peak_memory``), or why there is none.
    """
    with trainers_of(task) as (trainers, steps, counts):
        rows, batches = [], {}
        for layout, k in task.rows:
            problem = _too_many(task, layout, k, steps)
            row = {"layout": layout, "k": k, "seconds": [], "rates": [], "problem": problem, "peak": None}
            rows.append(row)
            if problem is None:
                batches[layout, k] = [batch_of(trainers[layout], layout, g, k, task) for g in steps]
        machine = Machine(task)
        now = machine.measure()
        for i in range(len(steps)):
            for row in rows:
                if row["problem"] is None:
                    _turn(row, trainers[row["layout"]], batches[row["layout"], row["k"]][i], task.device)
                    before, now = now, machine.measure()
                    row["rates"].append((before + now) / 2)
        for row in rows:
            if row["problem"] is not None:
                continue
            row["seconds"], row["rates"] = row["seconds"][WARM_UP:], row["rates"][WARM_UP:]
            row["tokens"] = [unique_tokens(g, row["k"]) for g in steps[WARM_UP:]]
            floors = [floor_flop(g, row["k"], counts, task.tuning, task.reference) for g in steps[WARM_UP:]]
            row["median"] = statistics.median(row["seconds"])
            row["tokens_per_second"] = sum(row["tokens"]) / sum(row["seconds"])
            reached = [f / s for f, s in zip(floors, row["seconds"], strict=True)]
            row["share"] = statistics.median(reached) / machine.rate
            row["share_now"] = statistics.median(r / now for r, now in zip(reached, row["rates"], strict=True))
        return {"rate": machine.rate, "threads": torch.get_num_threads(), "rows": rows}


def _too_many(task: Task, layout: str, k: int, steps: list[list[dict]]) -> str | None:
    most = max(unique_tokens(g, k) if layout == "shared" else padded_tokens(g, k) for g in steps)
    return f"left out: {most} tokens a step" if most > task.max_tokens else None


def _turn(row: dict, trainer: DPOTrainer, batch: dict, device: str) -> None:
    if row["layout"] == "trl":
        with freed_memory_kept(device):
            pass  # what our steps keep is handed back: TRL finds malloc as it would without them
    if device != "cuda":
        row["seconds"].append(step(trainer, batch))
        return
    # What the optimiser keeps stands there before a step, and is above the loaded model all the same.
    kept = [v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.is_cuda]
    before = torch.cuda.memory_allocated() - sum(v.numel() * v.element_size() for v in kept)
    torch.cuda.reset_peak_memory_stats()
    try:
        row["seconds"].append(step(trainer, batch))
    except torch.cuda.OutOfMemoryError:
        row["problem"] = "out of memory"
    if row["problem"] is not None:  # out of the except clause, so that the step's tensors are gone with the error
        trainer.model.zero_grad()
        torch.cuda.empty_cache()
        return
    row["peak"] = max(row["peak"] or 0, torch.cuda.max_memory_allocated() - before)


def peak_memory(task: Task) -> dict:
    """Bytes above the loaded model at the peak of two steps of one row; to be called in a process of its own.

    The process's resident memory is read with policy and reference loaded, every weight read once, one tiny forward
    done and freed memory handed back. The peak (VmHWM, set back there; else ``ru_maxrss``) after two steps on the
    largest of the batches, less that, is activations, gradients and the optimiser's state. The second step is needed:
    the optimiser's state is made at the end of the first.
    """
    ((layout, k),) = task.rows
    with trainers_of(task) as (trainers, steps, counts):
        if problem := _too_many(task, layout, k, steps):
            return {"problem": problem}
        trainer = trainers[layout]
        largest = max(steps, key=lambda groups: padded_tokens(groups, k))
        loaded = [trainer.model, *filter(None, [trainer.ref_model])]
        with torch.no_grad():
            sum(p.sum().item() for model in loaded for p in model.parameters())
            trainer.model(torch.tensor([[3, 4]]))
        batch = batch_of(trainer, layout, largest, k, task)
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        for _ in range(2):
            step(trainer, batch)
        return {"peak": _resident("VmHWM") - before, "loaded": before, "counts": asdict(counts)}


def _resident(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(task: Task) -> str:
    """The 15 operators that take most of one step's time."""
    ((layout, k),) = task.rows
    with trainers_of(task) as (trainers, steps, _):
        batches = [batch_of(trainers[layout], layout, groups, k, task) for groups in steps[:3]]
        for batch in batches[:2]:
            step(trainers[layout], batch)
        with torch.profiler.profile() as profiler:
            step(trainers[layout], batches[2])
        by = "self_device_time_total" if task.device == "cuda" else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=by, row_limit=15)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
