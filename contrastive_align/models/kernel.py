"""What a kernel is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_align.models.packed_row import Documents


BLOCK_QUERIES = 256


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


def masked_blocks(call: Call, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield slices of queries, slices of the keys that some of these see, and (queries, keys) which do not see which.

    Query i of a causal document is at its key i. Any other query is ``documents.behind`` tokens behind the end of the
    keys.
    """
    documents, causal, window = call.documents, call.causal, call.window
    for start, stop, first, last in documents.spans:
        for begin in range(start, stop if last > first else start, BLOCK_QUERIES):
            end = min(begin + BLOCK_QUERIES, stop)
            shift = first - start
            seen = end + shift if causal else last
            oldest = first if window is None else max(first, (begin + shift if causal else last) - window + 1)
            hidden = None
            if causal or window is not None:
                keys = torch.arange(oldest, seen, device=device)
                if causal:
                    queries = torch.arange(begin + shift, end + shift, device=device)[:, None]
                    hidden = keys > queries
                else:
                    queries = last + documents.behind[begin:end, None]
                    hidden = torch.zeros((), dtype=torch.bool, device=device)
                if window is not None:
                    hidden = hidden | (keys <= queries - window)
            if seen > oldest:
                yield slice(begin, end), slice(oldest, seen), hidden
