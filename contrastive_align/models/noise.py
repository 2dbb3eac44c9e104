"""How far rounding alone moves a model's log-probs: the same completions, computed in other batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


ROUNDING = 1e-4  # nats per token; log-probs are float32 at least, and deep float32 models move by 1e-6 to 1e-5
MOST_ROWS = 16  # that are computed one by one
# Columns of padding. Padded rows take another attention kernel than whole ones, or sum in another order where their
# length passes a multiple of what a kernel adds at once: 16 numbers of a CPU's registers, 64 keys of a tile.
WIDER = 72
Batch = dict[str, Tensor]


def gap_per_token(found: Tensor, expected: Tensor, lengths: Tensor) -> Tensor:
    r"""Return the root mean square of the difference of a token's log-prob, from sums over tokens.

    .. math:: \sqrt{\frac1N \sum_i \frac{(a_i - b_i)^2}{T_i}}

    The errors of tokens are independent, so those of a sum of T tokens grow as the square root of T.

    Args:
        found, expected: (N,) nats, each summed over the tokens of one completion.
        lengths: (N,) the numbers of tokens T.

    >>> gap_per_token(torch.tensor([0.2, 0.4]), torch.zeros(2), torch.tensor([4, 16]))
    tensor(0.1000)
    """
    return ((found - expected).square() / lengths.clamp(min=1)).mean().sqrt()


def measure_noise(
    logps: Tensor, lengths: Tensor, score: Callable[[Batch], tuple[Tensor, Tensor]], ways: Iterable[list[Batch]]
) -> float:
    """Return how far a model's log-probs are from themselves where they are computed in other ways, in nats per token.

    A way that overflows, as eager attention may in float16, says nothing.

    Args:
        logps, lengths: log-probs (N,) in nats, and the numbers of their tokens (N,).
        score: a batch -> both of its rows.
        ways: each a list of batches that begin with the same completions (:func:`other_batches`).
    """
    gaps = [0.0]
    for batches in ways:
        found = torch.cat([score(batch)[0] for batch in batches])
        n = min(len(found), len(logps))
        gaps.append(gap_per_token(found[:n], logps[:n], lengths[:n]).item())
    return max(filter(math.isfinite, gaps))


def other_batches(batch: Batch, rows: int = MOST_ROWS, room: int = WIDER) -> list[list[Batch]]:
    """Return the completions of a padded batch in other batches: one by one, and twice with more padding.

    Args:
        batch: what :class:`~contrastive_align.data.GroupCollator` returns.
        rows: the most that are taken one by one.
        room: the most columns that may be added.
    """
    names = ("input_ids", "attention_mask", "completion_mask")
    sizes = batch["attention_mask"][:rows].sum(1).tolist()
    alone = torch.ones_like(batch["valid"][:1, :1])
    singles = [{**{name: batch[name][i : i + 1, :n] for name in names}, "valid": alone} for i, n in enumerate(sizes)]
    wider = max(0, min(WIDER, room))
    twice = {name: F.pad(batch[name].repeat(2, 1), (0, wider)) for name in names}
    return [singles, [{**twice, "valid": batch["valid"].repeat(2, 1)}]]


def places(batches: Iterable[Batch], width: int) -> Iterator[Tensor]:
    """Yield the indices (n,) of each batch's tokens in a flattened batch of ``width``, whose first rows these are."""
    row = 0
    for batch in batches:
        rows, columns = batch["input_ids"].shape
        yield ((row + torch.arange(rows))[:, None] * width + torch.arange(columns)).flatten()
        row += rows
