"""Groups -> batches by tokens: those of similar length share one, as many as a budget of tokens holds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler


# Groups are sorted by their length times 1 +- JITTER: near enough to waste little, loose enough to mix between epochs.
JITTER = 0.1
EPOCHS_TRIED = 4


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of group numbers for one rank: every group once an epoch, over all ranks.

    An epoch is a function of ``(seed, epoch)`` alone, so that ranks agree and a resumed run finds its place. Groups are
    sorted by jittered length and filled into batches in that order, and the batches are shuffled. Then ``ranks *
    accumulation`` batches after each other are an optimiser step; in it the largest come first, so that ranks work on
    similar ones at a time. Which groups a step holds depends on ``ranks * accumulation`` only, not on its two factors.

    Every epoch has the same number of batches (a trainer counts its steps by that), and every rank has as many as any
    other. Both are reached by halving batches; a batch is repeated only where the last step holds too few groups for
    all ranks (:attr:`last_is_repeated`).

    Args:
        lengths: tokens of every group; where ``rows`` is given, of its longest row.
        rows: rows of every group, if rows are padded to the longest of their batch.
        max_tokens, max_groups: what a batch may hold: the sum of ``lengths``, or with ``rows`` their sum x the longest;
            and groups. A group above it is a batch of its own.

    >>> sampler = TokenBatchSampler([50, 9, 20, 10, 52, 21], max_tokens=60, max_groups=4)
    >>> len(sampler), sorted(sorted(sampler.lengths[i] for i in batch) for batch in sampler)
    (3, [[9, 10, 20, 21], [50], [52]])
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
        *,
        max_tokens: int,
        max_groups: int,
        seed: int = 0,
        accumulation: int = 1,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = list(lengths)
        # A batch has sum(wide) x max(tall) tokens.
        self._wide, self._tall = (self.lengths, [1] * len(self.lengths)) if rows is None else (list(rows), self.lengths)
        self.max_tokens, self.max_groups, self.seed = max_tokens, max_groups, seed
        self.accumulation, self.ranks, self.rank = accumulation, ranks, rank
        self.epoch = 0
        self._planned: tuple[int, list[list[int]], int] | None = None
        # Room for jitter in most epochs, and for a sort without any in all of them.
        noises = [self._draw(epoch)[1] for epoch in range(EPOCHS_TRIED)]
        self._batches = max(len(self._fill(noise, jitter)) for noise in noises for jitter in (JITTER, 0.0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._batches / self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._plan()[0][self.rank :: self.ranks]

    @property
    def last_is_repeated(self) -> bool:
        """Whether this epoch's last batch of this rank repeats another rank's."""
        return self.rank >= self.ranks - self._plan()[1]

    @property
    def groups_per_step(self) -> int:
        """Groups of an optimiser step on average, at least 1."""
        return max(1, round(len(self.lengths) / math.ceil(len(self) / self.accumulation)))

    @property
    def above_budget(self) -> list[int]:
        """The groups that alone have more than ``max_tokens``."""
        return [i for i in range(len(self.lengths)) if self.tokens([i]) > self.max_tokens]

    def tokens(self, batch: Sequence[int]) -> int:
        """Count what a batch holds."""
        return sum(self._wide[i] for i in batch) * max(self._tall[i] for i in batch)

    def _plan(self) -> tuple[list[list[int]], int]:
        """Return the epoch's batches of all ranks in turn, and how many of the last are repeated."""
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, *self._make())
        return self._planned[1:]

    def _make(self) -> tuple[list[list[int]], int]:
        (rng, noise), jitter = self._draw(self.epoch), JITTER
        while len(batches := self._fill(noise, jitter)) > self._batches:
            jitter = jitter / 2 if jitter > JITTER / 8 else 0.0
        batches = _halve(batches, self._batches)
        rng.shuffle(batches)
        size = self.ranks * self.accumulation
        steps = [batches[i : i + size] for i in range(0, len(batches), size)]
        steps[-1] = _halve(steps[-1], math.ceil(len(steps[-1]) / self.ranks) * self.ranks)
        batches = [batch for step in steps for batch in sorted(step, key=self.tokens, reverse=True)]
        repeated = -len(batches) % self.ranks
        return batches + batches[-1:] * repeated, repeated

    def _draw(self, epoch: int) -> tuple[random.Random, list[float]]:
        rng = random.Random(f"{self.seed}, epoch {epoch}")
        return rng, [rng.uniform(-1, 1) for _ in self.lengths]

    def _fill(self, noise: list[float], jitter: float) -> list[list[int]]:
        """Fill the groups, from long to short, into one batch after the other.

        Without jitter the noise orders only groups of equal size, so that the number of batches does not depend on it.
        """
        order = sorted(
            range(len(self.lengths)),
            key=lambda i: (self.lengths[i] * (1 + jitter * noise[i]), self._wide[i], noise[i]),
            reverse=True,
        )
        batches: list[list[int]] = []
        wide = tall = 0
        for i in order:
            wide, tall = wide + self._wide[i], max(tall, self._tall[i])
            if not batches or len(batches[-1]) == self.max_groups or wide * tall > self.max_tokens:
                batches.append([])
                wide, tall = self._wide[i], self._tall[i]
            batches[-1].append(i)
        return batches


def _halve(batches: list[list[int]], wanted: int) -> list[list[int]]:
    """``wanted`` batches out of fewer, by halving those of most groups; fewer where all are down to one group."""
    while len(batches) < wanted and max(map(len, batches)) > 1:
        batches = sorted(batches, key=len, reverse=True)
        large, rest = batches[: wanted - len(batches)], batches[wanted - len(batches) :]
        halves = [half for batch in large for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]) if half]
        batches = halves + rest
    return batches


def group_sizes(
    dataset: Dataset, *, padded: bool, pad_to_multiple_of: int | None = None
) -> tuple[list[int], list[int] | None]:
    """Return ``lengths`` and ``rows`` for :class:`TokenBatchSampler`, by what the padded or shared layout computes."""
    lengths: list[int] = []
    rows: list[int] = []
    for batch in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        prompts = pc.list_value_length(batch["prompt_ids"]).to_pylist()
        counts = pc.list_value_length(batch["completion_ids"]).to_pylist()
        completions = iter(pc.list_value_length(pc.list_flatten(batch["completion_ids"])).to_pylist())
        for prompt, k in zip(prompts, counts, strict=True):
            group = [next(completions) for _ in range(k)]
            multiple = pad_to_multiple_of or 1
            lengths.append(math.ceil((prompt + max(group)) / multiple) * multiple if padded else prompt + sum(group))
            rows.append(k)
    return lengths, rows if padded else None
