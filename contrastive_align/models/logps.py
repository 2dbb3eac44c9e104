"""What a model is given for a batch of groups, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_align.models.head import scored_positions
from contrastive_align.models.shared_prompt import pack


@dataclass
class CompletionLogps:
    """Log-probs of a batch of groups.

    ``tokens`` holds ``entropy``, ``mean_logits`` and ``is_top1`` of all completion tokens, completion after completion.
    """

    logps: Tensor  # (B, K) nats, summed over the completion's tokens, EOS included; 0 where valid is False
    lengths: Tensor  # (B, K) the numbers of summed tokens
    tokens: dict[str, Tensor]
    completion_index: Tensor  # the index, among the N completions, of the one that each of these tokens belongs to
    aux_loss: Tensor | None  # the router loss of a mixture-of-experts model, if it was asked for


def completion_logps(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    layout: str = "padded",
    token_stats: bool = True,
    **forward_kwargs: Any,
) -> CompletionLogps:
    r"""Compute log pi(y|x) of every completion of every group.

    .. math:: \log\pi(y|x) = \sum_t \log\pi(y_t | x, y_{<t})

    Args:
        model: a causal language model that went through :func:`~contrastive_align.models.head.add_head`.
        batch: what :class:`~contrastive_align.data.GroupCollator` returns.
        layout: ``"padded"``, a row for each completion, or ``"shared"``, one packed row in which the completions of a
            group share their prompt (see ``models/shared_prompt.py``; the model's attention must be set to it).
        token_stats: whether to compute ``tokens``, which costs a few passes over the logits.
        forward_kwargs: passed to the model.

    Returns:
        All on the device of the log-probs.

    Raises:
        RuntimeError: a packed row did not reach the shared-prompt attention.
    """
    inputs = _model_inputs(batch, layout)
    outputs = model(**inputs, use_cache=False, fused_lm_head=True, token_stats=token_stats, **forward_kwargs)
    _check_attention(model, inputs)
    lengths = batch["completion_mask"][:, 1:].sum(1)
    # Of completion tokens, completion after completion, under both layouts.
    labels = inputs["shift_labels"].flatten()
    scored = scored_positions(labels, inputs.get("shared_prompt"))
    completions = torch.arange(len(lengths), device=lengths.device)
    completion_index = torch.repeat_interleave(completions, lengths, output_size=len(labels[scored]))
    moved = {"valid": batch["valid"], "lengths": lengths, "scored": scored, "completion_index": completion_index}
    moved = beside(outputs.log_probs, moved)
    values = {name: getattr(outputs, name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")}
    values = {n: v.flatten()[moved["scored"]] if v.dim() == 2 else v for n, v in values.items() if v is not None}
    log_probs = values.pop("log_probs")
    log_probs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    sums = log_probs.new_zeros(len(lengths)).index_add(0, moved["completion_index"], log_probs)
    return CompletionLogps(
        logps=per_completion(sums, moved["valid"]),
        lengths=per_completion(moved["lengths"], moved["valid"]),
        tokens=values,
        completion_index=moved["completion_index"],
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def completion_objective(
    model: nn.Module,
    batch: dict[str, Tensor],
    objective: Callable[..., Any],
    *,
    layout: str = "padded",
    **forward_kwargs: Any,
) -> Any:
    """Call ``objective`` on the completion tokens' hidden states inside the model's forward pass.

    The tokens come completion after completion, in the order of the batch's rows, under both layouts and for any
    prompts: batches with the same completions give the same tokens, even if only the policy's prompts are conditioned.

    Args:
        model, batch, layout, forward_kwargs: as in :func:`completion_logps`, which names the errors, too.
        objective: ``objective(hidden, labels, weight, bias, scale, softcap)``, called once, with the last hidden states
            (n, H) that predict the n completion tokens ``labels`` (n,), and the head: its weight (V, H), its bias (V,)
            or None, the factor of its logits, and their softcap or None. For example
            :func:`~contrastive_align.models.token_loss.token_loss`, or ``lambda hidden, *_: hidden`` for a reference.

    Returns:
        What ``objective`` returns.
    """
    inputs = _model_inputs(batch, layout)
    result = model(**inputs, use_cache=False, fused_lm_head=True, token_objective=objective, **forward_kwargs)
    _check_attention(model, inputs)
    return result


def beside(tensor: Tensor, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch on a tensor's device: of a model over several devices, log-probs come from the last one."""
    return {name: value.to(tensor.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def per_completion(values: Tensor, valid: Tensor) -> Tensor:
    """Arrange one value per completion (N,) as (B, K), with 0 where ``valid`` is False.

    >>> per_completion(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    return values.new_zeros(valid.shape).masked_scatter(valid, values)


def _model_inputs(batch: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """Build a model's inputs, in which only completion tokens have a label, completion after completion."""
    if layout == "shared":
        inputs, shared_prompt = pack(batch)
        shared_prompt.attention_calls = 0
        mask = inputs["input_ids"].new_zeros((1, 1, 1, 1), dtype=torch.bool)  # a placeholder, so that none is built
        return {**inputs, "attention_mask": mask, "shared_prompt": shared_prompt}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"shift_labels": shift_labels}


def _check_attention(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise if a packed row met another attention, which would mix completions without an error."""
    if "shared_prompt" in inputs and not inputs["shared_prompt"].attention_calls:
        raise RuntimeError(
            f"The shared-prompt layout never reached the attention of {type(model).__name__}: it was replaced after "
            "the trainer was made, or is called without the model's keyword arguments. Set layout='padded'."
        )
