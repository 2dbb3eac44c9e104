"""The reference is an identity: computing its log-probs, caching them, and proving that it is still the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list, is_peft_model, tqdm
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from contrastive_align.models import completion_logps
from contrastive_align.models.cpu.freed_memory import freed_memory_kept
from contrastive_align.models.logps import CompletionLogps
from contrastive_align.trl_seam import disable_gradient_checkpointing, prepare_deepspeed, use_adapter


logger = logging.get_logger(__name__)

REFERENCE_FILE = "reference.json"
# Policy and reference start as the same weights, so their log-probs may differ by rounding alone: nats per token.
START_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
START_TOLERANCE_16_BIT = 2e-2


class ReferenceMismatch(RuntimeError):
    """Policy and reference are not what they should be."""


class ReferenceMixin:
    """What a trainer derived from TRL's needs for a reference whose log-probs come as (B, K)."""

    start_description: str
    layout: str
    _reference_checked = False
    _reference_given = False
    _resumed_from: str | None = None

    @property
    def _reference(self) -> nn.Module:
        return self.ref_model if self.ref_model is not None else self.model

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Reference log-probs (B, K) of a batch; with PEFT, of the model with its adapter off (or its frozen copy)."""
        was_training = model.training
        if not self.args.disable_dropout:  # the reference is one function, also where it is the policy without adapter
            model.eval()
        try:
            with (
                torch.no_grad(),
                self._without_checkpointing(),
                self._without_new_adapter(),
                self.accelerator.autocast(),
            ):
                return completion_logps(model, inputs, layout=self.layout, token_stats=False).logps
        finally:
            model.train(was_training)

    def _without_checkpointing(self) -> contextlib.AbstractContextManager:
        args = self.args
        if not args.gradient_checkpointing:  # TRL's way of asking the model is deprecated in transformers
            return contextlib.nullcontext()
        return disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs)

    @contextlib.contextmanager
    def _without_new_adapter(self) -> Iterator[None]:
        model = self.accelerator.unwrap_model(self.model) if self.ref_model is None else None
        if model is None or not is_peft_model(model):
            yield
        else:
            with use_adapter(model, "ref" if "ref" in model.peft_config else None):
                yield

    # -------------------------------------------------------------------------------------------------- cached on disk

    def _precompute_ref_logps(self, dataset: Dataset | IterableDataset, name: str, batch_size: int) -> Dataset:
        """Add the column ``ref_logps``, cached on disk under a key of everything it depends on."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "precompute_ref_log_probs=True needs a dataset with a length, found a stream. Load it whole, or set "
                "precompute_ref_log_probs=False."
            )
        self._set_layout()
        file = self._cache_file(dataset)
        # The main process decides and tells, so that all take the same way whatever their disks hold.
        rows = [None]
        if self.accelerator.is_main_process and file is not None and file.is_file():
            rows = [Dataset.from_parquet(str(file))["ref_logps"][:]]
        rows = broadcast_object_list(rows, from_process=0)[0]
        if rows is None:
            rows = self._ref_logps_of(dataset, name, batch_size)
            if self.accelerator.is_main_process and file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                aside = file.with_suffix(f".{os.getpid()}.incomplete")
                Dataset.from_dict({"ref_logps": rows}).to_parquet(aside)
                aside.replace(file)
        return concatenate_datasets([dataset, Dataset.from_dict({"ref_logps": rows})], axis=1)

    def _cache_file(self, dataset: Dataset) -> Path | None:
        """Where the log-probs of these token ids under this reference are kept; None where weights are sharded."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return None  # parameters are empty until gathered, so that any two models would have one key
        model = self._reference
        config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        adapters = {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()}
        parts = {
            "package": version("contrastive_align"),
            "weights": self._precompute_model_hash,
            "config": config,
            "adapters": adapters,
            "attention": model.config._attn_implementation,
            "precision": (self.args.bf16, self.args.fp16, str(model.dtype)),
            "start": self.start_description,
            "tokens": _hash_of_tokens(dataset),
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return Path(datasets.config.HF_DATASETS_CACHE) / "contrastive_align" / f"ref_logps_{key}.parquet"

    def _ref_logps_of(self, dataset: Dataset, name: str, batch_size: int) -> list[list[float]]:
        model = self._reference
        if self.ref_model is None and self.is_deepspeed_enabled:
            # Before training DeepSpeed has not placed the model yet; one inference engine does, for all passes.
            self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator))
        rows: list[list[float]] = []
        # In the mode the policy will be in: 4-bit layers on CPU take another kernel in evaluation mode.
        was_training = model.training
        model.train(self.args.disable_dropout)
        with freed_memory_kept(self.args.device.type):
            for batch in tqdm(loader, desc=f"Reference log-probs of the {name} dataset"):
                logps = self.compute_ref_log_probs(model, batch)
                rows += self.accelerator.gather_for_metrics(
                    [row[ok].tolist() for row, ok in zip(logps, batch["valid"], strict=True)], use_gather_object=True
                )
        model.train(was_training)
        return rows

    # ------------------------------------------------------------------------------------------ proven to be the same

    def _check_reference(self, log_ratios: Tensor, policy: CompletionLogps) -> None:
        """At step 0 policy and reference agree; on resuming, the reference is that of the checkpoint."""
        self._reference_checked = True
        if self._resumed_from is not None:
            return self._check_reference_of_checkpoint(Path(self._resumed_from))
        if self.state.global_step > 0 or self._reference_given or not self.args.disable_dropout:
            return None
        worst = (log_ratios.abs() / policy.lengths.clamp(min=1)).max().item()
        tolerance = self._start_tolerance()
        if not worst <= tolerance:
            raise ReferenceMismatch(
                f"Before the first step policy and reference differ by {worst:.3g} nats per token (expected at most "
                f"{tolerance:g}): the reference is not the start of this run ({self.start_description}). Usual causes: "
                "the weights were changed after loading (pass the changed model's own copy as ref_model), or a LoRA "
                "initialisation that is not zero (PiSSA, OLoRA, LoftQ)."
            )
        return None

    def _start_tolerance(self) -> float:
        sixteen_bit = self.args.bf16 or self.args.fp16 or getattr(self.model, "is_quantized", False)
        return START_TOLERANCE_16_BIT if sixteen_bit else START_TOLERANCE.get(self.model.dtype, START_TOLERANCE_16_BIT)

    def _reference_note(self) -> dict[str, Any]:
        """The reference's log-probs of one group, with its token ids: what a resumed run must find again."""
        if not hasattr(self, "_probe"):
            self._probe = next(iter(self.train_dataset))
        row = {name: self._probe[name] for name in ("prompt_ids", "completion_ids", "scores")}
        return {"reference": self.start_description, "group": row, "logps": self._score_by_reference(self._probe)}

    def _score_by_reference(self, row: dict[str, Any]) -> list[float] | None:
        """Reference log-probs of one group; None where the reference is not in memory and they were not kept."""
        if self.ref_model is None and not is_peft_model(self.accelerator.unwrap_model(self.model)):
            return row.get("ref_logps")
        row = {name: value for name, value in row.items() if name != "ref_logps"}
        batch = self._prepare_inputs(self.data_collator([row]))
        return self.compute_ref_log_probs(self._reference, batch)[batch["valid"]].tolist()

    def _check_reference_of_checkpoint(self, checkpoint: Path) -> None:
        file = checkpoint / REFERENCE_FILE
        if not file.is_file():
            logger.warning(f"{checkpoint} has no {REFERENCE_FILE}: that its reference is this one cannot be checked.")
            return
        saved = json.loads(file.read_text())
        row = saved["group"]
        first = next(iter(self.train_dataset))
        if "ref_logps" in first and first["completion_ids"] == row["completion_ids"]:
            row = first
        now = self._score_by_reference(row)
        if now is None or saved["logps"] is None:
            logger.warning(f"The reference is cached for other data than {checkpoint}'s: it cannot be checked.")
            return
        lengths = map(len, row["completion_ids"])
        gap = max(abs(a - b) / n for a, b, n in zip(saved["logps"], now, lengths, strict=True))
        if not gap <= self._start_tolerance():
            raise ReferenceMismatch(
                f"The reference of {checkpoint} ({saved['reference']}) and the one of this run "
                f"({self.start_description}) differ by {gap:.3g} nats per token on the same group. Resume with the "
                "same model (sync_ref_model runs cannot be resumed: TRL does not save their moving reference)."
            )


def _hash_of_tokens(dataset: Dataset) -> str:
    """A hash of what the log-probs depend on: the token ids, not the object or file they came in."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        for column in ("prompt_ids", "completion_ids"):
            digest.update(json.dumps(batch[column].to_pylist()).encode())
    return digest.hexdigest()
