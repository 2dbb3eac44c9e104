"""A trainer's model as a sampler and a reference need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel, Trainer

from contrastive_align.trl_seam import unwrap_model_for_generation, use_adapter


@contextmanager
def evaluation_mode(trainer: Trainer, *, without_adapter: bool = False) -> Iterator[PreTrainedModel]:
    """The policy without gradients and dropout, in the run's precision and out of its wrappers.

    Args:
        without_adapter: the adapter off; or the frozen copy of the one that the model came with.
    """
    with torch.no_grad(), trainer.accelerator.autocast(), ExitStack() as stack:
        model = stack.enter_context(
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=getattr(trainer.args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            )
        )
        if without_adapter:
            stack.enter_context(use_adapter(model, "ref" if "ref" in model.peft_config else None))
        was_training = model.training
        stack.callback(lambda: model.train(was_training))
        yield model.eval()
