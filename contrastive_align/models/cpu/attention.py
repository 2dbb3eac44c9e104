"""Attention of documents by torch's flash kernel for a CPU, one call for each document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from contrastive_align.models.kernel import Call, Kernel, masked_blocks


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
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        query, key, value = (_by_heads(t) for t in (query, key, value))
        if _is_one_part(call):  # nothing to put together
            output, log_sums = _flash(query, key, value, **_options(call))
            return output[0].transpose(0, 1), log_sums[0], ()
        _, heads, n, size = query.shape
        output = query.new_empty(1, n, heads, size).transpose(1, 2)
        log_sums = query.new_empty(1, heads, n, dtype=torch.promote_types(query.dtype, torch.float32))
        for q, k, options in _parts(call, query):
            output[:, :, q], sums = _flash(query[:, :, q], key[:, :, k], value[:, :, k], **options)
            if not call.causal and call.window is not None:  # the kernel's log-sum-exp of no keys is 0
                sums = sums.masked_fill((options["attn_mask"] == -torch.inf).all(-1), -torch.inf)
            log_sums[:, :, q] = sums
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
        def of_part(q: slice, k: slice, dropout_p: float, is_causal: bool, **options: Any) -> tuple[Tensor, ...]:
            tensors = of_grad[:, :, q], of_query[:, :, q], of_key[:, :, k], of_value[:, :, k], of_output[:, :, q]
            return _flash_backward(*tensors, log_sums[None, :, q], dropout_p, is_causal, **options)

        of_grad, of_query, of_key, of_value, of_output = (_by_heads(t) for t in (grad, query, key, value, output))
        if _is_one_part(call):
            dq, dk, dv = (t[0].transpose(0, 1) for t in of_part(slice(None), slice(None), **_options(call)))
            return dq, dk, dv
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        wholes = [_by_heads(t) for t in grads]
        for q, k, options in _parts(call, of_query):
            for whole, part, more in zip(wholes, (q, k, k), of_part(q, k, **options), strict=True):
                whole[:, :, part] += more
        return grads


def _parts(call: Call, query: Tensor) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Yield queries, keys and options of the kernel's calls: documents, or blocks of them if there is a window."""
    options = _options(call)
    if call.window is None:
        for a, b, c, d in call.documents.spans:
            if a < b and c < d:
                yield slice(a, b), slice(c, d), dict(options)
        return
    for q, k, hidden in masked_blocks(call, query.device):
        mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        yield q, k, {**options, "attn_mask": mask}


def _is_one_part(call: Call) -> bool:
    """Return whether a single call of the kernel computes all: one document, which is not empty, and no window."""
    return (
        call.window is None and len(call.documents.spans) == 1 and min(call.documents.max_q, call.documents.max_k) > 0
    )


def _options(call: Call) -> dict[str, Any]:
    """Return the kernel's options that all parts share. Under a window, the mask of each part makes it causal."""
    return {"dropout_p": 0.0, "is_causal": call.causal and call.window is None, "scale": call.scale}


def _by_heads(x: Tensor) -> Tensor:
    """(n, H, D) -> (1, H, n, D)."""
    return x.transpose(0, 1)[None]
