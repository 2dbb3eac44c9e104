"""Model + GroupBatch -> log-probs. No other place of the package turns a model's output into log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class CompletionLogps:
    """Log-probs of a batch of groups.

    Args:
        logps: (B, K) nats, summed over the completion's tokens, EOS included; 0 where ``valid`` is False.
        lengths: (B, K) how many tokens were summed.
        outputs: the model's own output, per token, for those who want more (entropy, router losses).
        token_mask: (N, L - 1) which of the per-token outputs belong to a completion.
    """

    logps: Tensor
    lengths: Tensor
    outputs: Any
    token_mask: Tensor


def completion_logps(model: nn.Module, batch: dict[str, Tensor], **forward_kwargs: Any) -> CompletionLogps:
    r"""log pi(y|x) of every completion of every group.

    .. math:: \log\pi(y|x) = \sum_t \log\pi(y_t | x, y_{<t})

    Args:
        model: a causal language model with TRL's fused LM head (``DPOTrainer`` adds it), which returns the log-probs of
            the labels without holding the logits of tokens x vocabulary.
        batch: what :class:`~contrastive_align.data.GroupCollator` returns.
        forward_kwargs: passed to the model.
    """
    token_mask = batch["completion_mask"][:, 1:].bool()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
        **forward_kwargs,
    )
    per_token = outputs.log_probs
    sums = (per_token if per_token.dtype == torch.float64 else per_token.float()).sum(1)
    return CompletionLogps(
        logps=per_completion(sums, batch["valid"]),
        lengths=per_completion(token_mask.sum(1), batch["valid"]),
        outputs=outputs,
        token_mask=token_mask,
    )


def per_completion(values: Tensor, valid: Tensor) -> Tensor:
    """One value per completion (N,) -> (B, K), 0 where ``valid`` is False.

    >>> per_completion(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    return values.new_zeros(valid.shape).masked_scatter(valid, values)
