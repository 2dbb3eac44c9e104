"""Kernels that compute the attention of documents lying in a row, all behind one interface."""

from __future__ import annotations

from torch import Tensor

from contrastive_align.models.cpu.attention import CpuKernel
from contrastive_align.models.kernel import Call, Kernel
from contrastive_align.models.kernels.cuda import FlashKernel, MemoryEfficientKernel
from contrastive_align.models.kernels.reference import ReferenceKernel


__all__ = ["KERNELS", "Call", "Kernel", "find_kernel"]

KERNELS: tuple[Kernel, ...] = (CpuKernel(), FlashKernel(), MemoryEfficientKernel(), ReferenceKernel())


def find_kernel(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Kernel:
    """Return the first of ``KERNELS`` that serves this call."""
    return next(kernel for kernel in KERNELS if kernel.serves(query, key, value, call))
