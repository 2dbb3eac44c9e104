"""The first step whose loss or gradient is not finite: its likely cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_align.models.loading import not_finite


def cause_of(trainer: Any, batch: Mapping[str, Any], bad: Sequence[str], loss: Tensor) -> str:
    """Return what made a step's loss or gradient NaN or infinite: the first that is so of weights, activations, ...

    Weights come first, then what each module computes, then the batch, then the loss and the gradient.

    Args:
        trainer: whose ``compute_loss`` is run again.
        batch: as ``compute_loss`` is given it.
        bad: ``["loss"]``, or the names of the weights whose gradient is not finite, of all processes.
        loss: of the batch.
    """
    models, everywhere = trainer.base_models(), trainer.from_all_processes
    if found := everywhere(not_finite(named for model in models for named in model.named_parameters())):
        return f"The weight '{found[0]}' has NaN or infinite entries. Load the model anew, or start from another one."
    with torch.no_grad(), _bad_outputs(models) as outputs, trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, batch)
    if found := everywhere([f"{name}' computes NaN or infinite values in {dtype}" for name, dtype in outputs]):
        way_out = "Take another model, or look into this one."
        if found[0].endswith(" float16"):
            way_out = "float16 ends at 65504: set bf16 in place of fp16, or dtype to bfloat16 or float32."
        return f"'{found[0]}. {way_out}"
    # A log-weight of -inf is a completion that the target excludes.
    values = ((name, t.clamp(min=0)) for name, t in batch.items() if isinstance(t, Tensor) and t.is_floating_point())
    if found := everywhere(not_finite(values)):
        return f"'{found[0]}' of the batch has NaN or infinite entries. Look at the rows, or at what computes it."
    options = ", ".join(f"{name}={value}" for name, value in trainer.objective().items())
    look = f"Look at {options}" + ("; at bf16, fp16 and dtype." if trainer.computes_in_16_bits else ".")
    if bad == ["loss"]:
        return f"Weights, batch and activations are finite, so it is the loss itself. {look}"
    return f"The loss is {loss.item():.4g}, and the gradient of '{bad[0]}' is not finite. {look}"


@contextmanager
def _bad_outputs(models: Iterable[nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Watch the modules of models, and list name and dtype of the first whose output is not finite."""
    found: list[tuple[str, str]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(first, Tensor) and not_finite([(name, first)]):
                found.append((name, str(first.dtype).removeprefix("torch.")))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for model in models for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
