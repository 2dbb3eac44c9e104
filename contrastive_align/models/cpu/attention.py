"""Attention of documents by torch's flash kernel for a CPU, one call for each document."""

from __future__ import annotations

import torch
from packaging.version import Version
from torch import Tensor

from contrastive_align.models.kernel import Call, Kernel


# The kernel behind F.scaled_dot_product_attention, which does not return the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
TAKES_GROUPED_QUERIES = Version(torch.__version__) >= Version("2.9")  # fewer heads of keys than of queries


class CpuKernel(Kernel):
    """Flash attention on a CPU, which takes one document and no softcap."""

    def serves(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
        return (
            query.device.type == "cpu"
            and query.size(-1) == value.size(-1)
            and (TAKES_GROUPED_QUERIES or query.size(1) == key.size(1))
            and call.softcap is None
            and call.window is None
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        query, key, value = (_by_heads(t) for t in (query, key, value))
        _, heads, n, size = query.shape
        output = query.new_empty(1, n, heads, size).transpose(1, 2)
        log_sums = query.new_empty(1, heads, n, dtype=torch.promote_types(query.dtype, torch.float32))
        for a, b, c, d in call.documents.spans:
            if a < b and c < d:
                tensors = query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]
                output[:, :, a:b], log_sums[:, :, a:b] = _flash(*tensors, 0.0, call.causal, scale=call.scale)
        return output[0].transpose(0, 1), log_sums[0], ()

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
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        dq, dk, dv = (_by_heads(t) for t in grads)
        grad, query, key, value, output = (_by_heads(t) for t in (grad, query, key, value, output))
        for a, b, c, d in call.documents.spans:
            if a < b and c < d:
                own = output[:, :, a:b], log_sums[None, :, a:b]
                tensors = grad[:, :, a:b], query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], *own
                found = _flash_backward(*tensors, 0.0, call.causal, scale=call.scale)
            else:
                found = 0.0, 0.0, 0.0
            dq[:, :, a:b], dk[:, :, c:d], dv[:, :, c:d] = found
        return grads


def _by_heads(x: Tensor) -> Tensor:
    """(n, H, D) -> (1, H, n, D)."""
    return x.transpose(0, 1)[None]
