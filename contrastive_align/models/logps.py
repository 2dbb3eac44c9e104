"""Model + GroupBatch -> log-probs, for training and references (what a sampler draws it scores as it draws)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_align.models.attention import pack


@dataclass
class CompletionLogps:
    """Log-probs of a batch of groups.

    Args:
        logps: (B, K) nats, summed over the completion's tokens, EOS included; 0 where ``valid`` is False.
        lengths: (B, K) how many tokens were summed.
        tokens: name -> one value per completion token, completion after completion (``entropy``, ``mean_logits``,
            ``is_top1``).
        owner: which of the N completions each of these tokens belongs to.
        aux_loss: the router loss of a mixture-of-experts model, if it was asked for.
    """

    logps: Tensor
    lengths: Tensor
    tokens: dict[str, Tensor]
    owner: Tensor
    aux_loss: Tensor | None


def completion_logps(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    layout: str = "padded",
    token_stats: bool = True,
    **forward_kwargs: Any,
) -> CompletionLogps:
    r"""log pi(y|x) of every completion of every group.

    .. math:: \log\pi(y|x) = \sum_t \log\pi(y_t | x, y_{<t})

    Args:
        model: a causal language model that went through ``models/head.py``'s ``add_head``, so that it returns the
            log-probs of the labels without holding the logits of tokens x vocabulary.
        batch: what :class:`~contrastive_align.data.GroupCollator` returns.
        layout: ``"padded"``, a row for each completion, or ``"shared"``, one packed row in which the completions of a
            group share their prompt (see ``models/attention.py``; the model's attention must be set to it).
        token_stats: whether ``tokens`` is wanted, which costs a few passes over the logits.
        forward_kwargs: passed to the model.
    """
    lengths = batch["completion_mask"][:, 1:].sum(1)
    inputs = _inputs(batch, layout)
    outputs = model(**inputs, use_cache=False, fused_lm_head=True, token_stats=token_stats, **forward_kwargs)
    _check_attention(model, inputs)
    scored = inputs["shift_labels"] != -100  # completion tokens, completion after completion, under both layouts
    values = {name: getattr(outputs, name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")}
    values = {name: v[scored] if v.dim() == 2 else v for name, v in values.items() if v is not None}
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    log_probs = values.pop("log_probs")
    log_probs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    sums = log_probs.new_zeros(len(lengths)).index_add(0, owner, log_probs)
    return CompletionLogps(
        logps=per_completion(sums, batch["valid"]),
        lengths=per_completion(lengths, batch["valid"]),
        tokens=values,
        owner=owner,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def completion_objective(
    model: nn.Module,
    batch: dict[str, Tensor],
    objective: Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Any],
    *,
    layout: str = "padded",
    **forward_kwargs: Any,
) -> Any:
    """What ``objective`` makes of the completion tokens, inside the model's forward pass.

    ``objective(hidden, labels, weight, bias, scale, softcap)`` gets the last hidden states (n, H) that predict the n
    completion tokens ``labels`` (n,), and the head: its weight (V, H) and bias (V,) or None, what the logits are
    multiplied by, and their softcap or None. :func:`~contrastive_align.models.token_loss.token_loss` is made for it;
    ``lambda hidden, *_: hidden`` gives a reference's hidden states to it.

    The tokens come completion after completion, in the order of the batch's rows, under both layouts, and whatever the
    prompts are. So those of two batches with the same completions are the same tokens in the same order, though the
    policy sees a conditioned prompt and the reference the bare one.

    Args:
        model: a causal language model that went through ``models/head.py``'s ``add_head``.
        batch: what :class:`~contrastive_align.data.GroupCollator` returns.
        objective: called once.
        layout: as in :func:`completion_logps`.
        forward_kwargs: passed to the model.
    """
    inputs = _inputs(batch, layout)
    found = model(**inputs, use_cache=False, fused_lm_head=True, token_objective=objective, **forward_kwargs)
    _check_attention(model, inputs)
    return found


def _check_attention(model: nn.Module, inputs: dict[str, Any]) -> None:
    """That a packed row met the attention it needs: any other would mix completions without an error.

    And that one attention at most, the last, met no more of the prompts than their keys: another one would need more.
    """
    if "shared_prompt" not in inputs:
        return
    if inputs["shared_prompt"].stops > 1:
        raise RuntimeError(
            f"The last layer of {type(model).__name__} attends {inputs['shared_prompt'].stops} times in a forward "
            "pass, and needs the whole prompts for that. Set layout='padded'."
        )
    if not inputs["shared_prompt"].layers_seen:
        raise RuntimeError(
            f"The shared-prompt layout never reached the attention of {type(model).__name__}: it was replaced after "
            "the trainer was made, or is called without the model's keyword arguments. Set layout='padded'."
        )


def _inputs(batch: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """What a model is given for a batch: only completion tokens have a label, completion after completion."""
    if layout == "shared":
        inputs, shared_prompt = pack(batch)
        mask = inputs["input_ids"].new_zeros((1, 1, 1, 1), dtype=torch.bool)  # made, so that none is built
        return {**inputs, "attention_mask": mask, "shared_prompt": shared_prompt}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"shift_labels": shift_labels}


def per_completion(values: Tensor, valid: Tensor) -> Tensor:
    """One value per completion (N,) -> (B, K), 0 where ``valid`` is False.

    >>> per_completion(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    return values.new_zeros(valid.shape).masked_scatter(valid, values)
