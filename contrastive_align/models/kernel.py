"""What a kernel is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from contrastive_align.data.packed_row import Documents


class Call(NamedTuple):
    """Attention of documents that lie in a row, as one call of a kernel computes it.

    A causal document has its queries at its keys. A window counts the keys that a query sees, its own included.
    """

    documents: Documents
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None


class Kernel(ABC):
    """A way to compute a call. Tensors are (tokens, heads, size); keys may have fewer heads than queries."""

    @abstractmethod
    def serves(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
        """Return whether the kernel computes this call, here."""

    @abstractmethod
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Attend.

        Returns:
            The output (n, H, D), the natural log-sum-exp of the scores (H, n), at least in float32, and what the
            backward pass needs besides. Of a query without keys, output and log-sum-exp are undefined.
        """

    @abstractmethod
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
        """Return the gradients of queries, keys and values.

        Output and log-sum-exp may be those over a larger set of keys, of which the call's are a part.
        """
