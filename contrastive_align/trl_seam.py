"""The private and inner members of TRL, and of transformers' Trainer, that this package needs, each with its reason.

No other file of the package names one (``tests/test_private_names.py`` reads them all). Where TRL calls a private
method that must do something else here, a mixin overrides it and calls a public hook of the trainer; a test proves for
each trainer that TRL still calls every one of them (``tests/test_trl_seam.py``).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers import trainer as trainer_module

# Inner modules of TRL: what they offer has no public import.
from trl.data_utils import extract_prompt
from trl.generation import vllm_generation
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.scripts.utils import DatasetConfig
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
    remove_none_values,
    use_adapter,
)


__all__ = [
    "DatasetConfig", "add_fused_lm_head", "create_model_from_path", "disable_dropout_in_model",
    "disable_gradient_checkpointing", "extract_prompt", "get_config_model_id", "global_then_local_main_first",
    "maybe_gather_lm_head_ctx", "pad", "prepare_deepspeed", "remove_none_values", "unwrap_model_for_generation",
    "vllm_generation",
]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What a model card says of the method: name, tags, and the paper with its arXiv id and BibTeX entry."""

    name: str
    tags: tuple[str, ...]
    paper: str
    arxiv: str
    key: str  # of the BibTeX entry
    authors: str
    year: int
    venue: str

    @property
    def citation(self) -> str:
        """The paper's BibTeX entry."""
        entry = {
            "title": f"{{{{{self.paper}}}}}",
            "author": f"{{{self.authors}}}",
            "year": self.year,
            "booktitle": f"{{{self.venue}}}",
            "eprint": f"{{{self.arxiv}}}",
            "archivePrefix": "{arXiv}",
        }
        lines = "".join(f"    {name:<12} = {value},\n" for name, value in entry.items())
        return f"@inproceedings{{{self.key},\n{lines}}}"


class Members:
    """Members of TRL's trainers under public names. Needed by all trainers."""

    method: Method
    columns: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # TRL's model card and hub tags read three private class attributes.
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            method = cls.method
            cls._name, cls._tag_names = method.name, list(method.tags)
            cls._paper = {"title": method.paper, "id": method.arxiv, "citation": method.citation}

    def record(
        self, metrics: Mapping[str, float], *, training: bool, totals: Mapping[str, float] | None = None
    ) -> None:
        """Add values to the means that TRL's ``log`` makes and clears; of ``totals`` the last value is logged."""
        recorded = self._metrics["train" if training else "eval"]
        for name, value in metrics.items():
            recorded[name].append(value)
        for name, value in (totals or {}).items():
            recorded[name] = [value]

    @property
    def trained_tokens(self) -> int:
        """Tokens trained on so far, which TRL logs as ``num_tokens``."""
        return int(self._total_train_tokens)

    def count_tokens(self, tokens: torch.Tensor) -> None:
        """Count a batch's tokens, without waiting for the device that has them."""
        self._total_train_tokens = self._total_train_tokens + tokens.long()

    def checkpoint_folder(self, trial: Any = None) -> Path:
        """Where Trainer writes the checkpoint of the present step."""
        return Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    @property
    def micro_batch_size(self) -> int:
        """Return the rows of a micro-batch on this process."""
        return self._train_batch_size

    def training_loader(self, dataset: Any, sampler: Callable[[Any], Sampler]) -> DataLoader:
        """Trainer's loader over another dataset and order than the trainer was given."""
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=sampler,
            is_training=True,
        )

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as Trainer hands it to ``compute_loss``."""
        return self._prepare_inputs(batch)

    def prepared_batch(self, inputs: Any) -> dict[str, Any]:
        """Return the batch that the last call of ``compute_loss`` was given."""
        return self.to_device(inputs)

    def on_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to the accelerator."""
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}


def reference_adapter(model: nn.Module) -> contextlib.AbstractContextManager:
    """Make a PEFT model the reference inside the block: its adapter off, or replaced by the frozen copy ``ref``."""
    if not is_peft_model(model):
        return contextlib.nullcontext()
    return use_adapter(model, "ref" if "ref" in model.peft_config else None)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 keeps a part of the weights on each process."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Gather the weights inside the block, where ZeRO-3 has parted them."""
    if not is_partitioned(model):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


@contextlib.contextmanager
def kept_after_forward(units: Sequence[FSDPModule]) -> Iterator[None]:
    """Have FSDP2 keep gathered weights after a forward pass, inside the block.

    ``set_reshard_after_forward`` does it; what was set before is known to inner members alone.
    """
    states = [unit._get_fsdp_state() for unit in units]
    groups = [group for state in states for group in state._fsdp_param_groups]
    was = [(state, state._auto_reshard_after_forward) for state in states]
    meshes = [(group, group.post_forward_mesh_info) for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for state, auto in was:
            state._auto_reshard_after_forward = auto
        for group, mesh in meshes:
            group.post_forward_mesh_info = mesh


class SavesModels:
    """``save_model``: Trainer pushes to the hub within it, unless it is told that the call is internal.

    The weights are checked before and read back after, and pushed only then. Needed by all trainers.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does; a model that diverged is not saved, and what was saved is read back."""
        folder = Path(output_dir or self.args.output_dir)
        self.check_weights()
        with self.writing(folder):
            super().save_model(output_dir, _internal_call=True)
            self.finish_saving(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_weights(self, folder: Path) -> None:
        """Only the files that Trainer writes, without a push."""
        super().save_model(str(folder), _internal_call=True)


class ListensToSignals:
    """``__init__``: under ``enable_jit_checkpoint`` Trainer would put a SIGTERM handler of its own in place.

    It makes every process save by itself, at a step of its own. Needed by all trainers.
    """

    def __init__(self, *rest: Any, args: Any, **kwargs: Any) -> None:
        asked, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(*rest, args=args, **kwargs)
        self.args.enable_jit_checkpoint = asked


class SavesState:
    """``_save_checkpoint``: the only place between two checkpoints, of which the older may go at its end.

    Our state is written first, and ``_save_rng_state`` is Trainer's last before the main process writes what says that
    the checkpoint is whole: an older one goes when the newer one is, on every process. Needed by all trainers.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.checkpoint_folder(trial)
        with self.writing_checkpoint(folder):
            self.save_state(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


class LoadsTiedWeights:
    """``_issue_warnings_after_load``: Trainer takes a weight for missing that is another's under a second name.

    A checkpoint holds tied weights once. Needed by all trainers.
    """

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        weights, missing = dict(self.model.named_parameters(remove_duplicate=False)), set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in weights.items() if name not in missing}
        lost = [name for name in load_result.missing_keys if id(weights.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))


class PreparesDatasets:
    """``_prepare_dataset``: TRL would tokenise pairs or texts. Needed by the contrastive and conditional trainers."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        return self.prepare_rows(dataset, processing_class, args, name=rest[-1])


class ReadsColumns:
    """``_set_signature_columns_if_needed``: which columns Trainer does not drop. Needed by all trainers."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.columns)


class CachesReference:
    """``_precompute_ref_logps``: TRL would add two columns of a pair. Needed by the contrastive trainer."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return self.add_reference_logps(dataset, name, batch_size)

    @property
    def reference_hash(self) -> str | None:
        """TRL's hash of the reference's weights, under ``precompute_ref_log_probs``."""
        return self._precompute_model_hash

    def engine_for_precompute(self) -> nn.Module:
        """Before training DeepSpeed has not placed the model yet: one inference engine places it, for all passes."""
        self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine


class KeepsDigits:
    """``_prepare_inputs``: DeepSpeed would cast every float of a batch to the model's dtype.

    Scores, log-probs and counts need their digits. Needed by the contrastive and the conditional trainer.
    """

    exact: tuple[str, ...]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        for name in self.exact:
            if name in inputs:
                prepared[name] = inputs[name].to(self.accelerator.device)
        return prepared


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, as a function of seed and epoch: a run resumed in a later epoch goes on in its order.

    The epoch is asked for: on several processes accelerate does not tell a sampler whose first batches are skipped.
    """

    def __init__(self, *args: Any, epoch: Callable[[], float | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self.epoch() or 0))
        return super().__iter__()


class DrawsGroups:
    """What TRL's online trainers do with prompts. Needed by the f-DPG trainer.

    ``_prepare_inputs``: TRL would draw, score and shuffle samples across groups.
    ``_get_train_sampler``: TRL's order of the second epoch depends on the first, so that no resumed run continues it.
    """

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return self.draw_groups(generation_batch, training=False)[0]
        steps = self.args.steps_per_generation
        if self._step % steps == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self.draw_groups(generation_batch, training=True)
        return self._buffered_inputs[self._step % steps]

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: self.state.epoch,
        )

    def prepared_batch(self, inputs: Any) -> dict[str, Any]:
        """Return the micro-batch of the last step, which TRL has counted already."""
        return self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]

    @property
    def generation(self) -> int:
        """How often samples have been drawn for training."""
        return self._step // self.args.steps_per_generation

    def drawn_state(self) -> dict[str, Any]:
        """Return the micro-batches that are drawn and not yet trained on, for a checkpoint."""
        return {"step": self._step, "groups": self._buffered_inputs}

    def load_drawn_state(self, state: Mapping[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["groups"]

    def prompt_token_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts as TRL makes them, its chat template options included."""
        prompt_ids, *_ = self._tokenize_prompts(list(prompts))
        return [list(ids) for ids in prompt_ids]

    def generate_by_engine(self, prompt_ids: Sequence[list[int]], per_prompt: int) -> list[list[list[int]]]:
        """Completions from vLLM or from transformers' continuous batching, through TRL."""
        flat = self._generate_single_turn([ids for ids in prompt_ids for _ in range(per_prompt)], None, {})
        return [flat[i : i + per_prompt] for i in range(0, len(flat), per_prompt)]

    def log_completion_rows(
        self, columns: Mapping[str, Sequence], rewards: Mapping[str, Sequence[float]], extra: Mapping[str, Sequence]
    ) -> None:
        """Add rows to the table that ``log_completions`` prints: prompt, completion, advantages, rewards by name.

        ``extra`` are further columns. A column that is new, or missing this time, is filled up with None.
        """
        size, before = len(columns["prompt"]), len(self._logs["prompt"])
        for name in {*extra, *self._logs["extra"]}:
            column = self._logs["extra"][name]
            column.extend([None] * (before - len(column)))
            column.extend(extra.get(name, [None] * size))
        for name, values in columns.items():
            self._logs[name].extend(values)
        for name, values in rewards.items():
            self._logs["rewards"][name].extend(values)


@contextlib.contextmanager
def nothing_loaded_by_trl(args: Any) -> Iterator[None]:
    """While a trainer is built around a loaded model, hide the options by which TRL would load models of its own.

    ``model_init_kwargs``: TRL warns that they are ignored, though the model was loaded with them. ``beta`` of an RLOO
    config: TRL would load a reference from the hub id, whatever was changed since, and takes no model in its place.
    ``temperature``: TRL's head would divide the policy's own logits by it.
    Needed by the f-DPG and the conditional trainer.
    """
    hidden = {"model_init_kwargs": None, "beta": 0.0, "temperature": 1.0}
    options = {name: getattr(args, name) for name in hidden if hasattr(args, name)}
    for name in options:
        setattr(args, name, hidden[name])
    try:
        yield
    finally:
        for name, value in options.items():
            setattr(args, name, value)


@contextlib.contextmanager
def uploading_copies(copy: Callable[[Path, Sequence[str]], Path]) -> Iterator[None]:
    """Have Trainer upload what ``copy`` makes of its folder, given also the patterns that are left out.

    Trainer uploads the folder itself, in the middle of its methods, and takes the API from a function of its module.
    """
    original = trainer_module.hf_api
    trainer_module.hf_api = lambda *args, **kwargs: _Uploads(original(*args, **kwargs), copy)
    try:
        yield
    finally:
        trainer_module.hf_api = original


class _Uploads:
    """The hub's API, of which ``upload_folder`` takes a copy in the folder's place, and removes it afterwards."""

    def __init__(self, api: Any, copy: Callable[[Path, Sequence[str]], Path]) -> None:
        self._api, self._copy = api, copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, folder_path: str, ignore_patterns: Sequence[str] = (), **options: Any) -> Any:
        copy = self._copy(Path(folder_path), ignore_patterns)
        remove = functools.partial(shutil.rmtree, copy, ignore_errors=True)
        try:
            found = self._api.upload_folder(folder_path=str(copy), ignore_patterns=ignore_patterns, **options)
        except BaseException:
            remove()
            raise
        if options.get("run_as_future"):
            found.add_done_callback(lambda _: remove())
        else:
            remove()
        return found


def ignore_bool_buffers(trainer: Trainer) -> None:
    """Exclude boolean buffers from DDP's synchronisation, which cannot send them; TRL's own scripts do the same."""
    trainer.model._ddp_params_and_buffers_to_ignore = [
        name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
    ]
