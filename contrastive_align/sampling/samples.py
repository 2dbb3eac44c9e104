"""Completions with their log-probs, and the interface of a proposal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """n completions of some prompts, in the order in which they were drawn.

    Raises:
        ValueError: parts of different lengths, or a log-prob that is NaN or that no sample can have.
    """

    prompt_index: Tensor  # (n,) int64, the place of each sample's prompt in the list of prompts
    completion_ids: Sequence[Sequence[int]]  # n lists of token ids
    completions: Sequence[Any]  # n texts, or lists of messages
    logps: Tensor  # (n,) float64 nats, log q(x|c) under the proposal, summed over the completion's tokens
    base_logps: Tensor  # (n,) float64 nats, log a(x|c) under the base, -inf where its probability is 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_index", torch.as_tensor(self.prompt_index, dtype=torch.int64).cpu())
        for name in ("logps", "base_logps"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64).detach().cpu())
        sizes = {name: len(part) for name, part in vars(self).items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"The parts of Samples have the lengths {sizes}, expected one entry each for every sample."
            )
        bad = ~torch.isfinite(self.logps) | ~(self.base_logps < torch.inf)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"Sample {i} has logps {self.logps[i].item()} and base_logps {self.base_logps[i].item()}, expected a "
                "finite log-prob under the proposal that drew it, and a number or -inf under the base."
            )

    def __len__(self) -> int:
        return len(self.logps)

    def select(self, rows: Tensor) -> Samples:
        """Return the samples of some rows: a bool mask (n,), or row numbers in the wanted order."""
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        parts = vars(self).values()
        return Samples(*(p[rows] if isinstance(p, Tensor) else [p[i] for i in rows.tolist()] for p in parts))

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """Concatenate samples, in order."""
        return Samples(
            torch.cat([part.prompt_index for part in parts]) if parts else [],
            [ids for part in parts for ids in part.completion_ids],
            [completion for part in parts for completion in part.completions],
            torch.cat([part.logps for part in parts]) if parts else [],
            torch.cat([part.base_logps for part in parts]) if parts else [],
        )


class Proposal(Protocol):
    """The interface that quasi-rejection sampling draws from: a tuned policy, the base, or a prompted base."""

    def sample(self, prompts: Sequence[Any], n: int) -> Samples:
        """Draw n independent samples for each prompt, ``prompt_index`` counting from 0 in this call's list.

        ``logps`` must be those of the distribution that the samples came from, EOS included: after temperature, top-k
        and top-p, where these change it.
        """
        ...
