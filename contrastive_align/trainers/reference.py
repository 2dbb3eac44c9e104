"""The reference is an identity: proving that it is the start of the run, and keeping its log-probs on disk.

The log-probs of a data set that is loaded whole are a file of the cache. Those of shards are written before training, a
shard at a time, and read by any run of the same reference: ``FOLDER/<identity>/<shard>.parquet`` holds a row for each
row of the shard. The identity is a hash of the reference's weights, its config and its precision; neither the loss, its
options nor an adapter that is trained are part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from contrastive_align.data.atomic import atomic_write, leftovers
from contrastive_align.data.folder_lock import FolderInUse, folder_held
from contrastive_align.data.reference_shards import COMMAND, LogpsWriter, read_note
from contrastive_align.data.shards import ShardedGroups
from contrastive_align.models.noise import gap_per_token
from contrastive_align.trl_seam import whole_parameters


logger = logging.get_logger(__name__)

REFERENCE_FILE = "reference.json"
NOISE = 3  # times what rounding moves this model's log-probs by

FOLDER = ".reference"  # beside the shards; readers of folders pass over names with a dot
ROWS_AT_ONCE = 32  # batches whose groups are sorted by length
CHECKED = 16  # shards whose first row is compared before training
# What two configs of the same weights may differ in.
NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
DIFFERENCES = {
    "precision": "computed in another precision (give both the same dtype, bf16 and quantisation)",
    "config": "of a model with another config",
    "weights": "of other weights",
}


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


# ------------------------------------------------------------------------------------------------ log-probs of shards


def identity_of(trainer: Any) -> dict[str, Any]:
    """Return what the reference's log-probs depend on beside the tokens. All processes call it together."""
    given = trainer.reference_is_given
    model = trainer.accelerator.unwrap_model(trainer.reference) if given else trainer.model
    with whole_parameters(model):
        weights = broadcast_object_list([_hash_of_reference(model)])[0]
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_IDENTITY}
    plain = json.loads(json.dumps(config, sort_keys=True, default=str))
    return {"weights": weights, "config": plain, "precision": [trainer.accelerator.mixed_precision, str(model.dtype)]}


def _hash_of_reference(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_reference_weights(model)):
        tensor = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()  # of FSDP
        if not tensor.is_meta:  # of a process that is sent the weights later
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _reference_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a reference: those of a PEFT model without the adapter, or with its frozen copy ``ref``."""
    if not is_peft_model(model):
        yield from model.state_dict().items()
        return
    peft: Any = model
    assert isinstance(peft, PeftModel)
    adapters, prefix = list(peft.peft_config), peft.base_model.prefix
    for name, tensor in peft.get_base_model().state_dict().items():
        parts = name.split(".")
        of_adapter = any(
            part.startswith((prefix, "modules_to_save", "trainable_tokens", "token_adapter")) for part in parts
        )
        if not of_adapter or ("ref" in adapters and "ref" in parts):
            yield ".".join(part for part in parts if part not in ("base_layer", "original_module")), tensor


def base_of(folder: str | None, files: Sequence[Path]) -> Path:
    """Return the folder of the log-probs of all references: the one that is named, or one beside the shards."""
    return Path(folder) if folder else Path(os.path.commonpath([path.parent for path in files])) / FOLDER


def folder_of(folder: str | None, files: Sequence[Path], identity: dict[str, Any]) -> Path:
    """Return the folder of one reference's log-probs of these shards."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return base_of(folder, files) / key


def name_of(files: Sequence[Path], file: int) -> str:
    """Return the name of a shard's file of log-probs: its own, below the folder that all shards share."""
    top = Path(os.path.commonpath([path.parent for path in files]))
    return f"{files[file].relative_to(top).as_posix().replace('/', '__')}.parquet"


def attach_logps(dataset: ShardedGroups, trainer: Any, name: str) -> ShardedGroups:
    """Have the groups of shards carry their cached reference log-probs.

    Raises:
        ValueError: log-probs of some shard are missing, or were computed for another reference or other rows.
    """
    identity = identity_of(trainer)
    folder = folder_of(trainer.args.ref_log_probs_folder, dataset.files, identity)
    found = [folder / name_of(dataset.files, file) for file in range(len(dataset.files))]
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise ValueError(
            f"precompute_ref_log_probs=True, and the reference log-probs of {len(missing)} of the {len(found)} shards "
            f"of the {name} dataset are missing, the first: {missing[0]}.{_other_reference(folder, identity)} Write "
            f"them with: {COMMAND} --model_name_or_path=... --dataset_name=... (all options of the model as here)."
        )
    stale = [path for file, path in enumerate(found) if not _fits(path, dataset.files[file], dataset.lengths[file])]
    if stale:
        raise ValueError(
            f"The reference log-probs in {stale[0]} are stale: the shard has changed since they were written "
            f"({len(stale)} of {len(found)} shards). Run {COMMAND} again, which writes them anew."
        )
    dataset.references = found
    for file in random.Random(0).sample(range(len(found)), min(CHECKED, len(found))):
        next(dataset.rows_of(file), None)  # raises where they are of other tokens
    dataset.first = next(iter(dataset))
    return dataset


def _fits(path: Path, shard: Path, rows: int, *, to_the_byte: bool = False) -> bool:
    """Whether a file of log-probs is of a shard as it is now."""
    try:
        found, note = read_note(path)
    except (OSError, ValueError, pa.ArrowException):
        return False
    stamp = shard.stat()
    if found != rows or note.get("size") != stamp.st_size:
        return False
    return not to_the_byte or note.get("time") == stamp.st_mtime_ns or note.get("digest") == _digest(shard)


def _other_reference(folder: Path, identity: dict[str, Any]) -> str:
    """Say of log-probs that are there what tells their reference from this one."""
    for other in sorted(folder.parent.glob("*/*.parquet")):
        if other.parent != folder:
            try:
                then = read_note(other)[1].get("identity", {})
            except (OSError, ValueError, pa.ArrowException):
                continue
            differs = next((what for part, what in DIFFERENCES.items() if then.get(part) != identity[part]), "others")
            return f" Those in {other.parent} are {differs}."
    return ""


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class ReferenceJob:
    """Writes the log-probs of shards that have none, while other jobs may write those of others.

    Each process of a job works by itself: a shard belongs to the process that holds it, its file is written aside and
    renamed, and one that is killed leaves nothing behind that another does not take over.

    Args:
        trainer: has the reference, and knows the layout.
        folder: see :func:`folder_of`.
    """

    def __init__(self, trainer: Any, folder: Path, identity: dict[str, Any]) -> None:
        self.trainer, self.folder, self.identity = trainer, folder, identity

    def run(self, dataset: ShardedGroups, batch_size: int) -> dict[str, int]:
        """Write what is missing or stale; return how many shards were written, were there, and are others' work."""
        counts = {"written": 0, "there": 0, "elsewhere": 0, "groups": 0}
        self.folder.mkdir(parents=True, exist_ok=True)
        order = list(range(len(dataset.files)))
        random.shuffle(order)  # jobs that start together begin with different shards
        for file in self.trainer.progress(order, "Reference log-probs of shards"):
            target = self.folder / name_of(dataset.files, file)
            if _fits(target, dataset.files[file], dataset.lengths[file], to_the_byte=True):
                counts["there"] += 1
                continue
            try:
                with folder_held(self.folder / f".{target.name}"):
                    if _fits(target, dataset.files[file], dataset.lengths[file], to_the_byte=True):
                        counts["there"] += 1
                        continue
                    for left in leftovers(self.folder, target.name):
                        left.unlink()  # of a job that was killed
                    counts["groups"] += self._write(dataset, file, target, batch_size)
                    counts["written"] += 1
            except FolderInUse:
                counts["elsewhere"] += 1
        return counts

    def _write(self, dataset: ShardedGroups, file: int, target: Path, batch_size: int) -> int:
        shard, groups = dataset.files[file], 0
        stamp = shard.stat()
        note = {"size": stamp.st_size, "time": stamp.st_mtime_ns, "digest": _digest(shard), "identity": self.identity}
        with atomic_write(target) as out:
            writer = LogpsWriter(out, note)
            for rows in dataset.rows_of(file, batch_size * ROWS_AT_ONCE):
                for row in rows:
                    dataset.count(row)
                flat = [group for row in rows for group in row.groups]
                logps = iter(self._logps(flat, batch_size))
                writer.write([[(group, next(logps)) for group in row.groups] for row in rows])
                groups += len(flat)
            writer.close()
        return groups

    def _logps(self, groups: list[dict[str, Any]], batch_size: int) -> list[list[float]]:
        """Return the log-probs of groups, computed in batches of similar length."""
        trainer, found = self.trainer, dict[int, list[float]]()
        order = sorted(range(len(groups)), key=lambda i: _longest(groups[i]))
        for batch in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
            inputs = trainer.to_device(trainer.data_collator([groups[i] for i in batch]))
            logps = trainer.compute_ref_log_probs(trainer.reference_or_policy, inputs)
            for i, row, valid in zip(batch, logps, inputs["valid"], strict=True):
                found[i] = row[valid].tolist()
        return [found[i] for i in range(len(groups))]


def _longest(group: dict[str, Any]) -> int:
    return len(group["prompt_ids"]) + max(map(len, group["completion_ids"]))
