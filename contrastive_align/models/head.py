"""The head that is added to a model: it scores the completion tokens alone, or hands them to an objective."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from contrastive_align.models.cpu.head import score_tokens
from contrastive_align.models.packed_row import PackedRow
from contrastive_align.trl_seam import maybe_gather_lm_head_ctx


@dataclass
class ScoredTokens(ModelOutput):
    """What a model with :func:`add_head` returns: one value per scored token, in the order of the positions.

    DeepSpeed and FSDP see the tensors of a ModelOutput, and prepare the backward pass through them.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def add_head(model: PreTrainedModel) -> None:
    """Let ``model(..., shift_labels=..., fused_lm_head=True)`` score the positions with a label, and only these.

    Changes ``model.forward``. To be called after TRL's ``add_fused_lm_head``, whose forward takes the calls that this
    one does not: other arguments, router losses, and, without a ``token_objective``, other devices than a CPU.

    The forward also takes ``token_stats=False``, which leaves out all but the log-probs where that saves time, and
    ``token_objective=fn``, with which it returns ``fn(hidden, labels, weight, bias, scale, softcap)`` on any device:
    see :func:`completion_objective`.
    """
    before = model.forward
    scale, softcap = logit_scale(model), logit_softcap(model)

    def forward(self, *args, fused_lm_head=False, shift_labels=None, token_stats=True, token_objective=None, **kwargs):
        served = fused_lm_head and shift_labels is not None and not kwargs.get("output_router_logits")
        if token_objective is not None and not served:
            raise ValueError(
                "token_objective needs fused_lm_head=True, shift_labels, and output_router_logits=False: "
                f"found {fused_lm_head=}, shift_labels {'missing' if shift_labels is None else 'given'}, "
                f"output_router_logits={kwargs.get('output_router_logits', False)}."
            )
        if not served or (shift_labels.device.type != "cpu" and token_objective is None):
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return before(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        shift_labels = shift_labels.to(hidden.device)  # of a model over several devices, the last one
        shift_labels = shift_labels.flatten()
        scored = scored_positions(shift_labels, kwargs.get("shared_prompt"))
        hidden, labels = hidden.flatten(0, -2)[scored], shift_labels[scored]

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            nonlocal labels
            hidden, labels = hidden.to(weight.device), labels.to(weight.device)
            if token_objective is not None:
                return token_objective(hidden, labels, weight, bias, scale, softcap)
            values = score_tokens(hidden, weight, bias, labels, scale=scale, softcap=softcap, token_stats=token_stats)
            return ScoredTokens(*values)

        return call_head(self.get_output_embeddings(), hidden, compute)

    forward.is_head = True
    model.forward = types.MethodType(forward, model)


def scored_positions(shift_labels: Tensor, row: PackedRow | None) -> slice | Tensor:
    """Return the positions of the labels (n,) other than -100. In a packed row, these are its branches.

    In padded rows the host waits for the device, because the number of positions depends on values.
    """
    return slice(row.prompt_tokens, None) if row is not None else (shift_labels != -100).nonzero()[:, 0]


def remove_head(model: PreTrainedModel) -> None:
    """Give a copy of a model its class's own forward: a head that was added calls the model it was added to."""
    if getattr(vars(model).get("forward"), "is_head", False):
        del model.forward


def logit_scale(model: PreTrainedModel) -> float:
    """Return the factor of a model's logits, under whichever name its config has it."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def logit_softcap(model: PreTrainedModel) -> float | None:
    """Return what a model's logits are capped with, softly, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias that an LM head computes with: under PEFT the trained copy while its adapter is on.

    Raises:
        NotImplementedError: the head carries an adapter that is not a weight of its own (LoRA).
    """
    if hasattr(head, "get_base_layer") and hasattr(head, "active_adapters") and not hasattr(head, "original_module"):
        raise NotImplementedError(
            f"The LM head is a {type(head).__module__}.{type(head).__name__}: an adapter on the head is not in its "
            "weight. Train the head in full, modules_to_save=['lm_head'], or leave it out of target_modules."
        )
    # A wrapper that trains single tokens has the weight, but not the bias, which stays the original's.
    return head.weight, head.bias if hasattr(head, "bias") else head.original_module.bias


def call_head(head: Any, hidden: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
    """Return ``compute(hidden, weight, bias)``, called as the head's own forward.

    Where DeepSpeed or FSDP shards the head, the hooks of its modules gather the weights, for the backward pass as well,
    and reduce their gradients over the processes.
    """
    weight, bias = head_parameters(head)
    owner = _owner_of(weight, head)
    if owner is None:
        with whole(weight, bias):
            return compute(hidden, weight, bias)
    before = vars(owner).get("forward")
    owner.forward = lambda hidden: compute(hidden, owner.weight, owner.bias)
    try:
        return head(hidden)
    finally:
        if before is None:
            del owner.forward
        else:
            owner.forward = before


def _owner_of(weight: Tensor, head: nn.Module) -> nn.Module | None:
    """Return the module of a head whose parameter the weight is; None where it is computed of several.

    It is the head itself, or what PEFT's wrapper calls in its place: its trained copy while the adapter is on.
    """
    return next((module for module in head.modules() if module._parameters.get("weight") is weight), None)


@contextlib.contextmanager
def whole(weight: Tensor | None, bias: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Give the weights of a frozen head whole inside the block, wherever an engine keeps their parts."""
    weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (weight, bias))
    with maybe_gather_lm_head_ctx(*(t for t in (weight, bias) if hasattr(t, "ds_id"))):
        yield weight, bias
