"""What a run leaves to be seen: every logged metric, samples of held-out prompts, and ``report.html``."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.formats import Text
from contrastive_align.models.loading import eos_token_ids
from contrastive_align.report import Change
from contrastive_align.report.history import LOG_FILE, History, read_entries
from contrastive_align.report.page import PAGE, SAMPLES_FILE, RunView, write_page
from contrastive_align.report.summary import UNFINISHED_FILE
from contrastive_align.sampling.decode import draw, score, seed_of


logger = logging.get_logger(__name__)

SHOWN = 10  # prompts of the page
PER_PROMPT = 2  # samples of a prompt; the page shows the first
TIMES = 6  # at most so many times samples are drawn during training
GRAM = 3  # tokens of a repetition
LONGEST = 128  # tokens of a sample where the method has no max_completion_length
BEFORE, AFTER = "before", "after"

# (rows, texts of PER_PROMPT samples each) -> a reward for each text
Rewards = Callable[[list[dict[str, Any]], list[list[str]]], list[list[float]]]


@dataclass
class HeldOut:
    """Prompts that are sampled before, during and after training.

    Attributes:
        texts: as the page shows them.
        ids: their tokens.
        rows: the rows they are from, for rewards.
        where: one phrase on what they are a sample of.
    """

    texts: list[str]
    ids: list[list[int]]
    rows: list[dict[str, Any]]
    where: str

    def select(self, keep: Sequence[int]) -> HeldOut:
        """Return these prompts alone."""
        lists = (self.texts, self.ids, self.rows)
        texts, ids, rows = ([values[i] for i in keep] for values in lists)
        return HeldOut(texts, ids, rows, self.where)


def choose_rows(dataset: Any, most: int, seed: int) -> list[dict[str, Any]]:
    """Return a seeded random choice of a dataset's rows; of a stream its first."""
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, most))
    chosen = random.Random(seed_of(seed, "report")).sample(range(len(dataset)), min(most, len(dataset)))
    return [dict(dataset[i]) for i in chosen]


def shown_text(prompt: Text) -> str:
    """Return a prompt as the page shows it: text, or each message under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


@dataclass
class Stage:
    """Samples at one time: (C, K) numbers and the texts of the first sample of each prompt."""

    name: str
    step: int
    texts: list[list[str]]
    length: np.ndarray
    eos_rate: np.ndarray
    repetition: np.ndarray
    kl: np.ndarray | None
    reward: np.ndarray | None
    gap: float | None = None  # the largest difference of policy and reference, in nats per token

    def means(self) -> dict[str, float]:
        """Return ``samples/<name>`` and its standard error over prompts, for the curves."""
        found = {}
        for name, values in self.numbers().items():
            per_prompt = values.mean(1)
            found[f"samples/{name}"] = float(per_prompt.mean())
            if len(per_prompt) > 1:
                found[f"samples/{name}/se"] = float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))
        return found

    def numbers(self) -> dict[str, np.ndarray]:
        """Return what was measured of every sample, by name."""
        measured = {name: getattr(self, name) for name in ("length", "eos_rate", "repetition", "kl", "reward")}
        return {name: values for name, values in measured.items() if values is not None and np.isfinite(values).all()}

    def as_dict(self) -> dict[str, Any]:
        """Return what ``samples.json`` keeps of it: the first sample of the prompts that are shown."""
        rewards = [None] * len(self.texts) if self.reward is None else [_finite(x) for x in self.reward[:, 0].tolist()]
        return {
            "name": self.name,
            "step": self.step,
            "texts": [group[0] for group in self.texts[:SHOWN]],
            "rewards": rewards[:SHOWN],
            "lengths": [int(n) for n in self.length[:SHOWN, 0]],
            "ended": [bool(x) for x in self.eos_rate[:SHOWN, 0]],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def repeated_share(ids: Sequence[int], n: int = GRAM) -> float:
    """Return the share of n-grams that came before in the same text; 0 for a text without any.

    >>> repeated_share([1, 2, 3, 1, 2, 3]), repeated_share([1, 2, 3, 4])
    (0.25, 0.0)
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Recorder(TrainerCallback):
    """Follow a run: write ``log.jsonl``, sample held-out prompts, write ``report.html`` at each evaluation and the end.

    All processes sample alike, since weights may have to be gathered; one writes.
    """

    def __init__(
        self,
        trainer: Any,
        held_out: HeldOut,
        *,
        rewards: Rewards | None,
        reward_name: str,
        suppress: Sequence[int] = (),
    ) -> None:
        self.trainer, self.rewards, self.reward_name, self.suppress = trainer, rewards, reward_name, list(suppress)
        self.folder = Path(trainer.args.output_dir)
        self.writes = trainer.args.should_save
        self.history, self.stages = History(), []
        self.first: Stage | None = None
        self.summary: dict[str, Any] = {}
        self.moved: dict[str, Any] = {}
        self.best_ids: Callable[[HeldOut], list[list[int]]] | None = None
        self.once_prepared: Callable[[], None] | None = None  # called when an engine has taken the weights
        self.seconds = 0.0  # spent on pages
        self._training = self._began = False
        self._next = 0.0
        self.held_out, self.max_new = self._fitting(held_out)

    def _fitting(self, held_out: HeldOut) -> tuple[HeldOut, int]:
        """Leave out prompts that leave no room for a sample."""
        args = self.trainer.args
        wanted = getattr(args, "max_completion_length", None) or LONGEST
        limits = self.trainer.context_limits().values()
        room = [min(limits, default=10**9) - len(ids) - 1 for ids in held_out.ids]
        keep = [i for i, free in enumerate(room) if free >= min(wanted, 16) and held_out.ids[i]]
        return held_out.select(keep), min([wanted, *(room[i] for i in keep)])

    # ---------------------------------------------------------------------------------------------------- sampling

    @property
    def _has_reference(self) -> bool:
        return self.trainer.reference is not None or bool(is_peft_model(self.trainer.model))

    def sample(self, name: str) -> None:
        """Draw samples of the held-out prompts and keep them as a stage; without prompts do nothing.

        A trainer that samples nothing itself may hold a model that does not fit on one device: sharded weights are then
        gathered layer by layer.
        """
        held_out, trainer = self.held_out, self.trainer
        if not held_out.texts:
            return
        ids, conditioned = held_out.ids, False
        if name != BEFORE and self.best_ids is not None:
            ids, conditioned = self.best_ids(held_out), True
        tokenizer, seed = trainer.processing_class, trainer.args.seed
        gathered = {"at_once": getattr(trainer, "online", True)}
        seeds = [seed_of(seed, "report", i) for i in range(len(ids))]
        with trainer.sampling_from(**gathered) as model:
            eos = eos_token_ids(model, tokenizer)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos or [0])[0]
            options = {"eos_token_ids": eos, "pad_token_id": pad, "suppress_ids": self.suppress}
            drawn = draw(model, ids, per_prompt=PER_PROMPT, max_new_tokens=self.max_new, seeds=seeds, **options)
        groups = drawn.completion_ids
        shape = (len(groups), PER_PROMPT)
        length = np.array([[len(c) for c in group] for group in groups], dtype=float)
        kl = None
        if self._has_reference and not conditioned:
            flat = [c for group in groups for c in group]
            repeated = [prompt for prompt in ids for _ in range(PER_PROMPT)]
            own = drawn.logps
            if self.suppress:  # drawn without some tokens
                with trainer.sampling_from(**gathered) as model:
                    own = score(model, repeated, flat, pad_token_id=pad).view(shape)
            with trainer.sampling_from(reference=True, **gathered) as model:
                kl = own.numpy() - score(model, repeated, flat, pad_token_id=pad).numpy().reshape(shape)
        texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]
        stage = Stage(
            name=name,
            step=trainer.state.global_step,
            texts=texts,
            length=length,
            eos_rate=1.0 - drawn.truncated.numpy(),
            repetition=np.array([[repeated_share(c) for c in group] for group in groups]),
            kl=kl,
            reward=None if self.rewards is None else np.array(self.rewards(held_out.rows, texts), dtype=float),
            gap=None if kl is None else float((np.abs(kl) / np.maximum(length, 1)).max()),
        )
        if name == BEFORE:
            self.first = stage
        self.stages.append(stage.as_dict())
        self._keep({**stage.means(), "step": stage.step})
        if name == AFTER and self.first is not None:
            first, last = self.first.numbers(), stage.numbers()
            self.changes = {
                key: asdict(Change.paired(first[key].mean(1).tolist(), last[key].mean(1).tolist()))
                for key in first
                if key in last
            }

    def forget_start(self) -> None:
        """Drop the prompts and their samples, so that the log and the page have none."""
        self.held_out, self.first, self.stages = HeldOut([], [], [], ""), None, []
        self.history = History()

    changes: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    # ------------------------------------------------------------------------------------------------- the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep of an earlier log what a resumed run goes on from."""
        if self.once_prepared is not None and not state.global_step:
            self.once_prepared()
        self._training, self._began, self._next = True, True, state.max_steps / TIMES
        file, samples = self.folder / LOG_FILE, self.folder / SAMPLES_FILE
        own = [{**self.first.means(), "step": 0}] if self.first is not None else []
        kept: list[dict[str, Any]] = []
        if state.global_step:
            earlier = read_entries(file) if file.is_file() else state.log_history
            kept = [entry for entry in earlier if 0 < entry.get("step", 0) <= state.global_step]
            if samples.is_file() and self.held_out.texts:
                found = json.loads(samples.read_text(encoding="utf-8")).get("stages", [])
                size, first = min(SHOWN, len(self.held_out.texts)), 1 if self.stages else 0
                kept_stages = [s for s in found if first <= s["step"] <= state.global_step and len(s["texts"]) == size]
                named = [f"step {s['step']}" if s["name"] == AFTER else s["name"] for s in kept_stages]
                self.stages += [{**s, "name": name} for s, name in zip(kept_stages, named, strict=True)]
        self.history = History([*own, *kept])
        if self.writes:
            with atomic_write(file) as out:
                out.writelines(_line(entry) for entry in [*own, *kept])
            (self.folder / PAGE).unlink(missing_ok=True)
            samples.unlink(missing_ok=True)
            self._keep_unfinished({"unfinished": f"{state.global_step} of {state.max_steps}"})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the entry."""
        self._keep(state.log_history[-1])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample, and refresh the page."""
        if self._training:
            self._during(state)
            self.write_page(unfinished=f"{state.global_step} of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample halfway where nothing is evaluated during training."""
        if args.eval_strategy == "no" and state.global_step == state.max_steps // 2:
            self._next = 0.0
            self._during(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop following."""
        self._training = False

    def _during(self, state: Any) -> None:
        if self._next <= state.global_step < state.max_steps:
            self._next = state.global_step + state.max_steps / TIMES
            self.sample(f"step {state.global_step}")

    def _keep(self, entry: dict[str, Any]) -> None:
        entry = {key: value.item() if hasattr(value, "item") else value for key, value in entry.items()}
        self.history.add(entry)
        if self.writes and self._began:  # the file of a run before is not this one's
            with (self.folder / LOG_FILE).open("ab") as file:
                file.write(_line(entry))

    # --------------------------------------------------------------------------------------------------- the page

    def write_page(self, *, unfinished: str = "", stopped: str = "") -> None:
        """Write ``samples.json`` and ``report.html`` from what is known, and until the end ``unfinished.json``.

        Args:
            unfinished: the step of a run that is not at its end, such as "4 of 40".
            stopped: the error that ended it there.
        """
        if not self.writes:
            return
        started = time.perf_counter()
        samples = {"about": self._about(), "prompts": self.held_out.texts[:SHOWN], "reward_name": self.reward_name}
        samples |= {"stages": self.stages, "moved": self.moved}
        with atomic_write(self.folder / SAMPLES_FILE) as file:
            file.write(json.dumps(samples, ensure_ascii=False).encode())
        more = {name: said for name, said in (("unfinished", unfinished), ("stopped", stopped)) if said}
        summary = self._keep_unfinished(more) if more else self.summary
        write_page([RunView(self.folder.resolve().name, summary, self.history, samples)], self.folder / PAGE)
        self.seconds += time.perf_counter() - started

    def _keep_unfinished(self, more: dict[str, str]) -> dict[str, Any]:
        """Write what is known of a run that is not at its end, so that its page can be rebuilt; return it."""
        summary = {**self.summary, **more}
        with atomic_write(self.folder / UNFINISHED_FILE) as file:
            file.write(json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
        return summary

    def _about(self) -> str:
        shown, all_of = min(SHOWN, len(self.held_out.texts)), len(self.held_out.texts)
        asked = " The trained model is asked under its best condition, the start under none." if self.best_ids else ""
        return f"{shown} of {all_of} {self.held_out.where}, drawn at random; every stage has the same seeds.{asked}"


def _line(entry: dict[str, Any]) -> bytes:
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(values, ensure_ascii=False, default=str).encode() + b"\n"


class MovedGroups:
    """Keep the groups whose best completion moved farthest from the others, and those where it moved least.

    It is called with the batches of an evaluation (``ContrastiveTrainer.on_evaluated``); of several processes, each
    keeps those that it evaluates.
    """

    def __init__(self, most: int = 3) -> None:
        self.most = most
        self.found: list[tuple[float, int, dict[str, Any]]] = []  # margin, number, group
        self._number = 0

    def __call__(self, batch: dict[str, Tensor], log_ratios: Tensor, weights: Tensor) -> None:
        valid, first = batch["valid"], 0
        for i, own in enumerate(valid):
            k, start = int(own.sum()), first
            first += k
            scores, ratios = batch["scores"][i][own].tolist(), log_ratios[i][own].float().tolist()
            if weights[i] <= 0 or k < 2 or min(scores) == max(scores):
                continue
            best = scores.index(max(scores))
            margin = ratios[best] - (sum(ratios) - ratios[best]) / (k - 1)
            self._number += 1
            if len(self.found) < 2 * self.most or not self.found[self.most - 1][0] < margin < self.found[-self.most][0]:
                rows = range(start, start + k)
                group = {
                    "prompt": _tokens(batch, start, completion=False),
                    "completions": [(s, r, _tokens(batch, n)) for s, r, n in zip(scores, ratios, rows, strict=True)],
                }
                self.found = sorted([*self.found, (margin, self._number, group)], key=lambda entry: entry[:2])
                if len(self.found) > 2 * self.most:
                    del self.found[self.most]  # neither among the least nor among the most

    def described(self, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
        """Return the groups as the page shows them, the completions best first."""
        if not self.found:
            return {}

        def text(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        def describe(margin: float, number: int, group: dict[str, Any]) -> dict[str, Any]:
            ordered = sorted(group["completions"], key=lambda c: -c[0])
            completions = [{"score": s, "moved": r, "text": text(ids)} for s, r, ids in ordered]
            return {"prompt": text(group["prompt"]), "margin": margin, "completions": completions}

        least, most = self.found[: self.most], self.found[self.most :][::-1]
        named = {"Most improved": most, "Least improved, or worse": least}
        return {name: [describe(*entry) for entry in groups] for name, groups in named.items() if groups}


def _tokens(batch: dict[str, Tensor], row: int, *, completion: bool = True) -> list[int]:
    mask = batch["completion_mask"][row].bool()
    mask = mask if completion else batch["attention_mask"][row].bool() & ~mask
    return batch["input_ids"][row][mask].tolist()
