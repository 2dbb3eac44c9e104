"""Attention of documents in plain torch: for every device, dtype, head size, window and softcap.

The queries of a document go in blocks, and the backward pass computes the scores again: so memory grows with the
keys of one document, not with their square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_align.models.kernel import Call, Kernel, masked_blocks


class ReferenceKernel(Kernel):
    """Plain torch, which serves every call."""

    def serves(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
        return True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        n, heads, _ = query.shape
        output = query.new_zeros(n, heads, value.size(-1))
        log_sums = query.new_full((heads, n), -torch.inf, dtype=_precise(query))
        for q, k, hidden in masked_blocks(call, query.device):
            scores = _scores(_by_heads(query[q], key), key[k], call)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            sums = scores.logsumexp(-1, keepdim=True)
            mean = _weights_(scores, sums).flatten(1, 2) @ _keys(value[k], scores.dtype)
            output[q] = _by_tokens(mean.view(*scores.shape[:3], -1)).to(output.dtype)
            log_sums[:, q] = sums.flatten(0, 1)[..., 0]
        return output, log_sums, ()

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sums: Tensor,
        state: tuple[Tensor, ...],
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(t, dtype=_precise(query)) for t in (query, key, value))
        for q, k, hidden in masked_blocks(call, query.device):
            of_query, of_grad, of_output = (_by_heads(t[q], key) for t in (query, grad, output))
            scores = _scores(of_query, key[k], call)
            slope = call.scale if call.softcap is None else call.scale * (1 - (scores / call.softcap).square())
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            weights = _weights_(scores, log_sums[:, q].reshape(*scores.shape[:3], 1))
            mean = (of_grad * of_output).sum(-1, keepdim=True)
            of_scores = (of_grad.flatten(1, 2) @ _keys(value[k], scores.dtype).mT).view_as(scores).sub_(mean)
            of_scores = of_scores.mul_(weights).mul_(slope).flatten(1, 2)
            dq[q] = _by_tokens((of_scores @ _keys(key[k], scores.dtype)).view_as(of_query))
            dk[k] += (of_scores.mT @ of_query.flatten(1, 2)).transpose(0, 1)
            dv[k] += (weights.flatten(1, 2).mT @ of_grad.flatten(1, 2)).transpose(0, 1)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _precise(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _by_heads(x: Tensor, key: Tensor) -> Tensor:
    """(n, H, D) -> (heads of keys, heads of queries of each, n, D), at least in float32."""
    return x.view(len(x), key.size(1), -1, x.size(-1)).permute(1, 2, 0, 3).to(_precise(x)).contiguous()


def _by_tokens(x: Tensor) -> Tensor:
    return x.flatten(0, 1).transpose(0, 1)


def _keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(0, 1).to(dtype)


def _scores(query: Tensor, key: Tensor, call: Call) -> Tensor:
    scores = (query.flatten(1, 2) @ _keys(key, query.dtype).mT).mul_(call.scale)
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    return scores.view(*query.shape[:3], -1)


def _weights_(scores: Tensor, sums: Tensor) -> Tensor:
    """Replace scores by their weights, which are all 0 where no key is seen."""
    return scores.sub_(sums.clamp(min=torch.finfo(sums.dtype).min)).exp_()
