"""Where DeepSpeed or FSDP keeps the weights: the reference's copy, and models to draw from and to score with."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, is_peft_model, parse_flag_from_env
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from contrastive_align.models.head import remove_head
from contrastive_align.trl_seam import (
    add_fused_lm_head,
    disable_dropout_in_model,
    is_partitioned,
    kept_after_forward,
    prepare_deepspeed,
    reference_adapter,
    unwrap_model_for_generation,
    whole_parameters,
)


class HoldsWeights:
    """What the trainers ask of the engine that holds the weights; between them and the TRL class.

    Attributes:
        reference: the frozen model that the policy is compared with, where it is not the policy without its adapter.
    """

    reference: nn.Module | None
    load_again: Callable[[], PreTrainedModel] | None = None  # the start, where it was loaded here

    @property
    def uses_engine(self) -> bool:
        """Whether DeepSpeed or FSDP holds the weights."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def uses_zero3(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return plugin is not None and plugin.zero_stage == 3

    @property
    def is_sharded(self) -> bool:
        """Whether a weight may not be here as a whole (FSDP, ZeRO-3)."""
        return self.is_fsdp_enabled or self.uses_zero3

    def check_engine(self) -> None:
        """Raise ValueError where an engine was asked for and accelerate gave none."""
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP") or self.args.fsdp
        if asked and not self.is_fsdp_enabled:
            raise ValueError(
                "FSDP is asked for, and accelerate gives it to GPUs and other accelerators only: here, on "
                f"{self.accelerator.device.type}, every process would hold the whole model instead. Run it where "
                "there are GPUs, or take another accelerate config (multi_gpu, zero2, zero3)."
            )

    def describe_engine(self) -> dict[str, Any]:
        """Return what computes: ``line``, and engine, processes, machines, device, precision and layout by name."""
        state = self.accelerator.state
        found: dict[str, Any] = {"engine": self.engine, "processes": state.num_processes}
        found["machines"] = state.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        found |= {"device": self.accelerator.device.type, "layout": self.layout}
        found["precision"] = "as the weights" if state.mixed_precision == "no" else state.mixed_precision
        processes = "one process" if found["processes"] == 1 else f"{found['processes']} processes"
        machines = f" on {found['machines']} machines" if found["machines"] > 1 else ""
        line = f"{self.engine}, {processes}{machines}, {found['device']}, precision {found['precision']}"
        line = f"{line}, {self.layout} layout"
        return {"line": line, **found}

    @property
    def engine(self) -> str:
        """The name of what holds the weights."""
        if self.is_deepspeed_enabled:
            return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return f"FSDP{self.accelerator.state.fsdp_plugin.fsdp_version}"
        return "no engine" if self.accelerator.num_processes == 1 else "data parallel"

    def base_models(self) -> list[PreTrainedModel]:
        """Return the policy without PEFT's wrapper, and the reference where it is a model of its own."""
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        return models if self.reference is None else [*models, self.accelerator.unwrap_model(self.reference)]

    def frozen_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the reference of full fine-tuning, a frozen copy, to be made before TRL wraps the policy.

        A model that ZeRO-3 parted while it was loaded is loaded once more, parted as well; one that was given so is
        gathered on every process.
        """
        if not is_partitioned(model):
            reference = copy.deepcopy(model)
        elif self.load_again is not None:
            reference = self.load_again()
        else:
            with whole_parameters(model):
                reference = copy.deepcopy(model)
        remove_head(reference)  # of another trainer, which would call that trainer's model
        disable_dropout_in_model(reference)
        return reference.eval().requires_grad_(False)

    def place_reference(self) -> None:
        """Put a frozen copy beside the policy, sharded where the policy is."""
        if self.reference is None:
            return
        if not self.reference.config.is_encoder_decoder:
            add_fused_lm_head(self.reference)
        if self.is_deepspeed_enabled:
            self.reference = prepare_deepspeed(self.reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.reference = fsdp2_prepare_model(self.accelerator, self.reference).eval()
        else:
            self.reference.to(self.accelerator.device)

    @contextlib.contextmanager
    def scoring_by(self, *, reference: bool = False) -> Iterator[PreTrainedModel]:
        """Give the policy, or the reference, to score with: all processes call it equally often.

        In evaluation mode, without gradients, in the run's precision and out of its wrappers. The reference is the
        frozen model, or the policy with its adapter off or replaced by the copy of the adapter that it came with.
        """
        with self._at_hand(reference, unwrapped=self._unwrapped) as model:
            yield model

    @contextlib.contextmanager
    def sampling_from(self, *, reference: bool = False, at_once: bool = True) -> Iterator[PreTrainedModel]:
        """Give the policy, or the reference, to draw or score with: each process calls it as often as it needs.

        As :meth:`scoring_by`. The weights are gathered once, for all calls; without ``at_once``, or with
        ``ds3_gather_for_generation=False``, layer by layer in every call, which all processes then make together.
        """
        at_once = at_once and getattr(self.args, "ds3_gather_for_generation", True)
        with self._at_hand(reference, unwrapped=functools.partial(self._gathered, at_once=at_once)) as model:
            yield model

    @contextlib.contextmanager
    def _at_hand(self, reference: bool, unwrapped: Callable[[nn.Module], Any]) -> Iterator[PreTrainedModel]:
        own = reference and self.reference is not None
        with torch.no_grad(), self.accelerator.autocast(), contextlib.ExitStack() as stack:
            model = stack.enter_context(unwrapped(self.reference if own else self.model_wrapped))
            if reference and not own:
                stack.enter_context(reference_adapter(model))
            was_training = model.training
            stack.callback(lambda: model.train(was_training))
            yield model.eval()

    @contextlib.contextmanager
    def _unwrapped(self, wrapped: nn.Module) -> Iterator[PreTrainedModel]:
        model = self.accelerator.unwrap_model(wrapped)
        with whole_parameters(model) if wrapped is model else contextlib.nullcontext():  # no engine gathers them yet
            yield model

    @contextlib.contextmanager
    def _gathered(self, wrapped: nn.Module, *, at_once: bool) -> Iterator[PreTrainedModel]:
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(
                unwrap_model_for_generation(
                    wrapped,
                    self.accelerator,
                    gather_deepspeed3_params=at_once,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                )
            )
            if self.is_sharded and not at_once:
                stack.enter_context(calling_together(model, self.accelerator))
            elif self.is_fsdp_enabled:
                stack.enter_context(unsharded(model))
            yield model


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model under FSDP2, and keep them through every call inside the block."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with kept_after_forward(units):
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()


@contextlib.contextmanager
def calling_together(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let each process call the model as often as it needs, where every call gathers weights from all processes.

    Before each call all tell whether they have calls to make; one that has none makes one of its own, of a single
    token, until no other has any.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=accelerator.device)

    def some_call(this_one: bool) -> bool:
        calls = torch.tensor(float(this_one), device=accelerator.device)
        distributed.all_reduce(calls, distributed.ReduceOp.MAX)
        return bool(calls)

    before = model.register_forward_pre_hook(lambda *_: some_call(True) and None, prepend=True)
    try:
        yield
        before.remove()
        while some_call(False):
            model(input_ids=token, use_cache=False)
    finally:
        before.remove()
