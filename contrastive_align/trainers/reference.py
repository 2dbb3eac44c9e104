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
from torch import nn
from transformers.utils import logging

from contrastive_align.data.atomic import atomic_write
from contrastive_align.models.noise import gap_per_token


logger = logging.get_logger(__name__)

REFERENCE_FILE = "reference.json"
NOISE = 3  # times what rounding moves this model's log-probs by


class ReferenceMismatch(RuntimeError):
    """Policy and reference are not what they should be."""


def check_reference_at_start(gap: float, noise: float, *, start: str, way_out: str) -> None:
    """Raise :class:`ReferenceMismatch` where policy and reference differ by more than rounding at the start.

    Args:
        gap: of policy and reference, in nats per token (:func:`~contrastive_align.models.noise.gap_per_token`).
        noise: what rounding moves.
    """
    if not gap <= NOISE * noise:
        raise ReferenceMismatch(
            f"Before the first step policy and reference differ by {gap:.3g} nats per token, where rounding makes "
            f"{noise:.2g}: the reference is not the start of this run ({start}). Usual causes: the weights were "
            f"changed after loading ({way_out}), or a LoRA initialisation that is not zero (PiSSA, OLoRA, LoftQ)."
        )


def check_reference_of_checkpoint(
    checkpoint: Path,
    score: Callable[[dict[str, Any]], list[float] | None],
    measure: Callable[[float, dict[str, Any]], float],
    *,
    start: str,
) -> None:
    """Raise :class:`ReferenceMismatch` where this run's reference is not that of the checkpoint.

    Args:
        score: a group -> its log-probs under this run's reference, None where that is not at hand.
        measure: a gap in nats per token, and the group -> what rounding moves.
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
    lengths = torch.tensor([len(ids) for ids in saved["group"]["completion_ids"]])
    then, now = (torch.tensor(logps, dtype=torch.float64) for logps in (saved["logps"], now))
    gap = gap_per_token(now, then, lengths).item()
    noise = measure(gap, saved["group"])
    if not gap <= NOISE * noise:
        raise ReferenceMismatch(
            f"The reference of {checkpoint} ({saved['reference']}) and the one of this run ({start}) differ by "
            f"{gap:.3g} nats per token on the same group, where rounding makes {noise:.2g}. Resume with the same model "
            "(sync_ref_model runs cannot be resumed: TRL does not save their moving reference)."
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
