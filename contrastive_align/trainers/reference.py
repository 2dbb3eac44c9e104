"""The reference is an identity: proving that it is the start of the run, and keeping its log-probs on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor, nn
from transformers.utils import logging

from contrastive_align.data.atomic import atomic_write


logger = logging.get_logger(__name__)

REFERENCE_FILE = "reference.json"
# Policy and reference start as the same weights, so their log-probs may differ by rounding alone: nats per token.
START_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
START_TOLERANCE_16_BIT = 2e-2


class ReferenceMismatch(RuntimeError):
    """Policy and reference are not what they should be."""


def rounding_tolerance(model: nn.Module, *, sixteen_bit: bool) -> float:
    """Nats per token by which rounding may tell two equal models apart."""
    if sixteen_bit or getattr(model, "is_quantized", False):
        return START_TOLERANCE_16_BIT
    return START_TOLERANCE.get(model.dtype, START_TOLERANCE_16_BIT)


def check_reference_at_start(
    policy: Tensor, reference: Tensor, lengths: Tensor, *, start: str, way_out: str, tolerance: float
) -> None:
    """Raise :class:`ReferenceMismatch` where policy and reference differ by more than rounding at the start."""
    worst = ((policy - reference).abs() / lengths.clamp(min=1)).max().item()
    if not worst <= tolerance:
        raise ReferenceMismatch(
            f"Before the first step policy and reference differ by {worst:.3g} nats per token (expected at most "
            f"{tolerance:g}): the reference is not the start of this run ({start}). Usual causes: the weights were "
            f"changed after loading ({way_out}), or a LoRA initialisation that is not zero (PiSSA, OLoRA, LoftQ)."
        )


def check_reference_of_checkpoint(
    checkpoint: Path, score: Callable[[dict[str, Any]], list[float] | None], *, start: str, tolerance: float
) -> None:
    """Raise :class:`ReferenceMismatch` where this run's reference is not that of the checkpoint.

    Args:
        score: a group -> its log-probs under this run's reference, None where that is not at hand.
    """
    file = checkpoint / REFERENCE_FILE
    if not file.is_file():
        logger.warning(f"{checkpoint} has no {REFERENCE_FILE}: that its reference is this one cannot be checked.")
        return
    saved = json.loads(file.read_text())
    now = score(saved["group"])
    if now is None or saved["logps"] is None:
        logger.warning(f"The reference is cached for other data than {checkpoint}'s: it cannot be checked.")
        return
    lengths = map(len, saved["group"]["completion_ids"])
    gap = max(abs(a - b) / max(n, 1) for a, b, n in zip(saved["logps"], now, lengths, strict=True))
    if not gap <= tolerance:
        raise ReferenceMismatch(
            f"The reference of {checkpoint} ({saved['reference']}) and the one of this run ({start}) differ by "
            f"{gap:.3g} nats per token on the same group. Resume with the same model (sync_ref_model runs cannot be "
            "resumed: TRL does not save their moving reference)."
        )


def cached_reference_logps(
    dataset: Dataset | IterableDataset, file: Path | None, compute: Callable[[], list[list[float]]]
) -> Dataset:
    """Add the column ``ref_logps``, read from a cache file or computed and kept there.

    The main process decides and tells, so that all processes take the same way whatever their disks hold.

    Raises:
        ValueError: a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "precompute_ref_log_probs=True needs a dataset with a length, found a stream that is not one of files. "
            "Load it whole, set precompute_ref_log_probs=False, or stream a folder of files, whose log-probs "
            "`contrastive-align reference` writes before training."
        )
    is_main = PartialState().is_main_process
    rows: list[Any] = [None]
    if is_main and file is not None and file.is_file():
        rows = [Dataset.from_parquet(str(file))["ref_logps"][:]]
    found = broadcast_object_list(rows, from_process=0)[0]
    if found is None:
        found = compute()
        if is_main and file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as out:
                Dataset.from_dict({"ref_logps": found}).to_parquet(out)
    return concatenate_datasets([dataset, Dataset.from_dict({"ref_logps": found})], axis=1)


def reference_cache_file(
    dataset: Dataset, model: nn.Module, *, weights: str | None, precision: str, start: str
) -> Path:
    """Where the log-probs of these token ids under this reference are kept: a name made of all that they depend on."""
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    parts = {
        "package": version("contrastive_align"),
        "weights": weights,
        "config": config,
        "adapters": adapters,
        "attention": model.config._attn_implementation,
        "precision": (precision, str(model.dtype)),
        "start": start,
        "tokens": hash_of_tokens(dataset),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "contrastive_align" / f"ref_logps_{key}.parquet"


def hash_of_tokens(dataset: Dataset) -> str:
    """Return a hash of the token ids, whatever object or file they came in."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        for column in ("prompt_ids", "completion_ids"):
            digest.update(json.dumps(batch[column].to_pylist()).encode())
    return digest.hexdigest()
