"""Attention of documents by torch's two kernels for CUDA that take cumulative lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_align.models.kernel import Call, Kernel
from contrastive_align.models.packed_row import Documents


AMPERE = (8, 0)
CAUSAL = 1  # the memory-efficient kernel's number for a causal mask
ALIGNMENT = 32  # queries by which that kernel pads the log-sum-exps of a document
_flash, _flash_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
_efficient, _efficient_backward = (
    torch.ops.aten._efficient_attention_forward,
    torch.ops.aten._efficient_attention_backward,
)


def _is_nvidia(device: torch.device, since: tuple[int, int] = (0, 0)) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return since <= torch.cuda.get_device_capability(device)


class FlashKernel(Kernel):
    """Flash attention: 16 bits, from Ampere on. Where transformers or torch activate FA3, the same calls reach it."""

    def serves(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
        size = query.size(-1)
        return (
            query.dtype in (torch.float16, torch.bfloat16)
            and _is_nvidia(query.device, AMPERE)
            and size == value.size(-1) <= 256
            and size % 8 == 0
            and call.softcap is None
            and (call.window is None or call.causal)
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        lengths, options = call.documents[:4], self._options(call)
        output, log_sums, *state, _ = _flash(query, key, value, *lengths, 0.0, call.causal, False, **options)
        return output, log_sums, tuple(state)

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
        tensors, lengths = (grad, query, key, value, output, log_sums.contiguous()), call.documents[:4]
        return _flash_backward(*tensors, *lengths, 0.0, call.causal, *state, **self._options(call))

    def _options(self, call: Call) -> dict[str, float]:
        if call.window is None:
            return {"scale": call.scale}
        return {"scale": call.scale, "window_size_left": call.window - 1, "window_size_right": 0}


class MemoryEfficientKernel(Kernel):
    """Memory-efficient attention: float32, and cards before Ampere.

    It takes as many heads of keys as of queries, so the keys are repeated for its calls, and not kept.
    """

    def serves(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
        return (
            query.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and _is_nvidia(query.device, AMPERE if query.dtype == torch.bfloat16 else (5, 0))
            and query.size(-1) % 8 == value.size(-1) % 8 == 0
            and call.softcap is None
            and call.window is None
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        tensors = (t[None] for t in (query, _repeat(key, query), _repeat(value, query)))
        mask = CAUSAL if call.causal else 0
        output, log_sums, *state, _, _ = _efficient(
            *tensors, None, *call.documents[:4], 0.0, mask, True, scale=call.scale
        )
        return output[0], log_sums.transpose(0, 1).flatten(1)[:, _places(call.documents)], tuple(state)

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
        tensors = (t[None] for t in (grad, query, _repeat(key, query), _repeat(value, query)))
        documents, mask = call.documents, CAUSAL if call.causal else 0
        shape = query.size(1), len(documents.spans), _padded_length(documents)
        padded = log_sums.new_full(shape, torch.inf)
        padded.flatten(1)[:, _places(documents)] = log_sums
        dq, dk, dv, _ = _efficient_backward(
            *tensors, None, output[None], *documents[:4], padded.transpose(0, 1).contiguous(), 0.0, *state, mask,
            False, scale=call.scale,
        )  # fmt: skip
        return dq[0], *(d[0].unflatten(1, (key.size(1), -1)).sum(2) for d in (dk, dv))


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    """Return keys with as many heads as queries."""
    return x if x.size(1) == query.size(1) else x.repeat_interleave(query.size(1) // x.size(1), 1)


def _padded_length(documents: Documents) -> int:
    return -(-documents.max_q // ALIGNMENT) * ALIGNMENT


def _places(documents: Documents) -> Tensor:
    """Return the index of each query's log-sum-exp among those of all documents, each padded."""
    token = torch.arange(documents.spans[-1][1], device=documents.cu_q.device, dtype=torch.int32)
    document = torch.searchsorted(documents.cu_q, token, right=True) - 1
    return document * _padded_length(documents) + token - documents.cu_q[document]
