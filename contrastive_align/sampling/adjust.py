"""Changes of the distribution that tokens are drawn from, and the log-probs of what was drawn under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_align.models.token_loss import ChunkedHead


LOGITS_AT_ONCE = 2**24  # in memory when drawn tokens are scored again


@dataclass(frozen=True)
class Adjustment:
    r"""Temperature, top-k and top-p, applied to the next token's distribution :math:`\pi` in this order.

    Args:
        temperature: T > 0; each token from :math:`\pi(v)^{1/T}`, normalised.
        top_k: only the k likeliest tokens are left; 0 leaves all.
        top_p: in (0, 1]; only the smallest set of tokens, the likeliest first, whose probability reaches it is left
            (Holtzman et al., arXiv 1904.09751). Of tokens with equal probability, those with the lower ids come first,
            here and in ``top_k``.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}, expected a finite number above 0. For greedy completions use "
                "model.generate(do_sample=False)."
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k={self.top_k}, expected a whole number of at least 0 (0 keeps every token).")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}, expected a number above 0 and at most 1 (1 keeps every token).")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def changes(self) -> bool:
        """Whether anything but the model's own distribution is drawn from."""
        return self.temperature != 1 or self.truncates

    def __str__(self) -> str:
        parts = {"temperature": (self.temperature, 1), "top_k": (self.top_k, 0), "top_p": (self.top_p, 1)}
        return ", ".join(f"{name}={value:g}" for name, (value, plain) in parts.items() if value != plain)

    def apply(self, logits: Tensor, suppressed: Tensor | None = None) -> Tensor:
        """Return the (n, V) logits of the distribution to draw from, -inf for what it leaves out.

        Args:
            suppressed: ids of tokens that are removed first, so that ``top_p`` is a share of the rest.

        >>> Adjustment(top_p=0.6).apply(torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log(), torch.tensor([0])).exp()
        tensor([[0.0000, 0.0000, 0.3000, 0.2000]])
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if suppressed is not None and len(suppressed):
            logits = logits.index_fill(-1, suppressed, -torch.inf)
        if self.temperature != 1:
            logits = (logits - logits.max(-1, keepdim=True).values) / self.temperature  # keeps a small T finite
        if self.truncates:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            dropped = torch.zeros_like(ordered, dtype=torch.bool)
            if self.top_k:
                dropped[:, self.top_k :] = True
            if self.top_p < 1:
                reached = ordered.masked_fill(dropped, -torch.inf).softmax(-1).cumsum(-1)
                dropped |= F.pad(reached[:, :-1], (1, 0)) >= self.top_p  # the tokens before it already reach top_p
            logits = logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)
        return logits


@dataclass(frozen=True)
class Support:
    """The tokens from which each token of a completion, or of several one after the other, was chosen."""

    sizes: Tensor  # (T,) int64, how many there were at each of T tokens
    ids: Tensor  # (sizes.sum(),) int32, those of the first token, then those of the second

    @staticmethod
    def join(parts: Sequence[Support]) -> Support:
        """Concatenate the supports of completions, in order."""
        return Support(torch.cat([part.sizes for part in parts]), torch.cat([part.ids for part in parts]))


@torch.no_grad()
def adjusted_logps(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    temperature: float,
    support: Support | None,
) -> Tensor:
    r"""Score drawn tokens under the model and under what they were drawn from, (n, 2) float64 nats.

    .. math:: \log q(y) = z_y / T - \log \sum_{v \in S} \exp(z_v / T)

    with the logits z of this forward pass and the support S that the sampler used. Both columns are of the same logits:
    whatever else of the sampler's forward pass differs has no part in :math:`\pi / q`. An objective for
    :func:`~contrastive_align.models.logps.completion_objective`.

    Args:
        hidden, labels, weight, bias, scale, softcap: of n tokens, as the objective is given them.
        temperature: T.
        support: of the n tokens, in their order; None for all of the vocabulary.

    Returns:
        log pi(y) and log q(y); -inf for a token outside its support.
    """
    head = ChunkedHead(weight, bias, scale, softcap)
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    sizes = [None] if support is None else support.sizes.to(labels.device).split(rows)
    ids = [None] if support is None else support.ids.long().split([int(part.sum()) for part in sizes])
    found = []
    for i, start in enumerate(range(0, len(labels), rows)):
        part = slice(start, start + rows)
        with torch.autocast(hidden.device.type, enabled=False):
            z = head.logits(head.products(hidden[part].to(head.dtype)))
        top = z.max(-1).values
        chosen = z.gather(-1, labels[part].unsqueeze(-1)).squeeze(-1) - top
        own = chosen.double() - (z - top.unsqueeze(-1)).exp().sum(-1).double().log()
        if support is None:
            total = ((z - top.unsqueeze(-1)) / temperature).exp().sum(-1).double()
            changed = chosen.double() / temperature - total.log()
        else:
            row = torch.repeat_interleave(torch.arange(len(z), device=z.device), sizes[i])
            members = ids[i].to(z.device)
            terms = ((z[row, members] - top[row]) / temperature).exp().double()
            total = terms.new_zeros(len(z)).index_add(0, row, terms)
            inside = torch.zeros_like(total).index_add(0, row, (members == labels[part][row]).double())
            changed = torch.where(inside > 0, chosen.double() / temperature - total.log(), -torch.inf)
        found.append(torch.stack([own, changed], -1))
    return torch.cat(found) if found else hidden.new_zeros(0, 2, dtype=torch.float64)
