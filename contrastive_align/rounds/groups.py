"""Groups of a round: which samples of the pool say something, which are trained on, and what a round's groups are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from contrastive_align.data.atomic import atomic_write
from contrastive_align.pool import Pool, Sample, Table
from contrastive_align.pool.draws import LEFT_OUT


QUANTILES = (0.1, 0.5, 0.9)  # of a round's rewards


@dataclass(frozen=True)
class GroupSignal:
    """Label the samples of a pool by whether their group can be trained on: two of its scores differ.

    A group is what one round drew for one prompt. Samples without a score are in no group.

    Args:
        needed: whether a round without such a group is refused.
    """

    needed: bool = True

    def label(self, table: Table) -> NDArray[np.int32]:
        """(N,) 0 for samples of groups that can be trained on, -1 for the others."""
        scored = np.flatnonzero(~np.isnan(table.score))
        labels = np.full(len(table), LEFT_OUT, dtype=np.int32)
        if len(scored):
            of = _group_numbers(table)[scored]
            low, high = np.full(of.max() + 1, np.inf), np.full(of.max() + 1, -np.inf)
            np.minimum.at(low, of, table.score[scored])
            np.maximum.at(high, of, table.score[scored])
            labels[scored[(low < high)[of]]] = 0
        return labels

    def check(self, sample: Sample) -> None:
        """Take every sample."""

    def check_signal(self, samples: Sequence[Sample]) -> None:
        """Raise ValueError where no group of the samples can be trained on."""
        by_prompt: dict[int, set[float]] = {}
        for sample in samples:
            by_prompt.setdefault(sample.prompt_index, set()).update([] if sample.score is None else [sample.score])
        if not self.needed or any(len(scores) > 1 for scores in by_prompt.values()):
            return
        scored = sum(sample.score is not None for sample in samples)
        raise ValueError(
            f"There is nothing to learn from: {scored} of {len(samples)} samples are scored, and of none of "
            f"{len(by_prompt)} prompts do two completions differ in score. Sample more completions of a prompt "
            "(num_generations), sample such prompts again (resample), or use a reward that tells completions apart."
        )


def _group_numbers(table: Table) -> NDArray[np.int64]:
    """(N,) the number of each sample's group, in the order of rounds and prompts."""
    keys = np.stack([table.round.astype(np.int64), table.prompt_index])
    return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)


def groups_of(table: Table, first_round: int) -> list[NDArray[np.int64]]:
    """Return the groups of rounds from ``first_round`` on that can be trained on, as rows of the table."""
    rows = np.flatnonzero((table.label >= 0) & (table.round >= first_round))
    of = _group_numbers(table)[rows]
    order = np.argsort(of, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(of[order])) + 1) if len(rows) else []


def passes(n: int, first: int, last: int, seed: Sequence[int]) -> list[int]:
    """Return places ``first`` to ``last`` (excluded) of endless passes over n things, each pass in an order of its own.

    >>> sorted(passes(3, 0, 3, [0])), passes(3, 1, 5, [0]) == passes(3, 0, 6, [0])[1:5]
    ([0, 1, 2], True)
    """
    numbers = range(first // n, -(-last // n)) if last > first else ()
    places = [i for p in numbers for i in np.random.default_rng([*seed, p]).permutation(n).tolist()]
    return places[first % n : first % n + last - first]


@dataclass(eq=False)
class GroupRows(TorchDataset):
    """The groups that a round is trained on, in their order; equally many in every round.

    Args:
        pool: where the samples are.
        encode: prompt -> token ids.
        length: groups trained on in a round.
        seed: of the choice and the order.
        scored: tokenised groups of files, or None.
        scored_share: their share of the groups of a round.
    """

    pool: Pool
    encode: Callable[[Any], list[int]]
    length: int
    seed: int
    scored: Dataset | None = None
    scored_share: float = 0.0
    own: list[NDArray[np.int64]] = field(default_factory=list, init=False)
    drawn: list[tuple[bool, int]] = field(default_factory=list, init=False)  # (of the file, number), in their order
    ref_logps: dict[tuple[bool, int], list[float]] = field(default_factory=dict, init=False)
    _through: int = field(default=0, init=False)

    def draw(self, number: int, keep: int) -> None:
        """Choose the groups of a round: each of the pool's once before any comes twice, and those of files in turn.

        Args:
            number: of the round.
            keep: how many rounds before it are trained on again.

        Raises:
            ValueError: none of these rounds has a group that can be trained on, and there are no files.
        """
        self._through, self.ref_logps = number, {}
        self.own = groups_of(self.pool.table(number), number - keep)
        if not self.own and self.scored is None:
            raise ValueError(
                f"There is nothing to learn from in round {number} and the {keep} before it (keep): in none of their "
                "groups do two scores differ. Use a reward that tells completions apart, or resample."
            )
        of_file = 0
        if self.scored is not None:
            of_file = round(self.scored_share * self.length) if self.own else self.length
        own = passes(len(self.own), 0, self.length - of_file, [self.seed, number]) if self.own else []
        taken = [(False, i) for i in own]
        if of_file:
            places = passes(len(self.scored), (number - 1) * of_file, number * of_file, [self.seed])
            taken += [(True, i) for i in places]
        self.drawn = [taken[i] for i in np.random.default_rng([self.seed, number, 1]).permutation(self.length)]

    def distinct(self) -> list[tuple[bool, int]]:
        """Return the groups that are drawn, each once."""
        return sorted(set(self.drawn))

    def group(self, of_file: bool, number: int) -> dict[str, Any]:
        """Return one group as ``prompt_ids``, ``completion_ids`` and ``scores``."""
        if of_file:
            row = self.scored[number]
            return {name: row[name] for name in ("prompt_ids", "completion_ids", "scores")}
        samples = self.pool.read(self.own[number], self._through)
        return {
            "prompt_ids": self.encode(samples[0].prompt),
            "completion_ids": [sample.completion_ids for sample in samples],
            "scores": [sample.score for sample in samples],
        }

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        drawn = self.drawn[place]
        more = {"ref_logps": self.ref_logps[drawn]} if self.ref_logps else {}
        return self.group(*drawn) | more

    # -------------------------------------------------------------------------------- the reference follows the rounds

    @property
    def reference_file(self) -> Path:
        """Where the log-probs under the policy at the beginning of the round are kept."""
        return self.pool.folder / f"reference-{self._through:05d}.json"

    def read_reference(self) -> bool:
        """Take the log-probs of an earlier run of this round, if there are any; whether there were."""
        if not self.reference_file.is_file():
            return False
        found = json.loads(self.reference_file.read_text())
        if found["groups"] != [list(drawn) for drawn in self.distinct()]:
            raise ValueError(
                f"{self.reference_file} has log-probs of other groups than this run draws. Go on with the same "
                "draws_per_round, keep and scored data; or delete the file, and the round's groups are scored again."
            )
        self.ref_logps = dict(zip(self.distinct(), found["logps"], strict=True))
        return True

    def write_reference(self, logps: list[list[float]]) -> None:
        """Keep log-probs of the distinct groups, so that a run that goes on in the round has its reference."""
        with atomic_write(self.reference_file) as file:
            file.write(json.dumps({"groups": self.distinct(), "logps": logps}).encode())


def rewards_of_round(scores: np.ndarray) -> dict[str, float]:
    """Return the mean, the spread and the quantiles of a round's scores.

    >>> rewards_of_round(np.array([1.0, 2.0, 3.0]))["round/reward_q50"]
    2.0
    """
    of = {f"round/reward_q{round(100 * q)}": float(np.quantile(scores, q)) for q in QUANTILES}
    return {"round/mean_reward": float(scores.mean()), "round/reward_std": float(scores.std())} | of


def group_metrics(number: int, table: Table, per_prompt: int) -> dict[str, float]:
    """Numbers of a round's new groups: rewards, the best of each prompt, signal, length and how many were drawn again.

    Args:
        table: the pool after the round.
        per_prompt: samples of a prompt.
    """
    newest = table.round == number
    scores, prompts = table.score[newest], table.prompt_index[newest]
    lengths, scored = table.length[newest], ~np.isnan(table.score[newest])
    places, of = np.unique(prompts, return_inverse=True)
    with_signal = np.zeros(len(places), dtype=bool)
    with_signal[of[table.label[newest] >= 0]] = True
    attempts = np.zeros(len(places), dtype=np.int64)
    np.maximum.at(attempts, of, table.sample_index[newest] // per_prompt)
    metrics = {
        "round/number": number,
        "round/samples": int(newest.sum() + attempts.sum() * per_prompt),
        "round/resampled": int(attempts.sum()),
        "round/unscored": int((~scored).sum()),
        "round/left_out": int((~with_signal).sum()),
        "round/no_signal": float(1 - with_signal.mean()),
        "round/pool": len(table),
        "round/finished": float(table.finished[newest].mean()),
        "round/mean_length": float(lengths.mean()),
    }
    if scored.any():
        best = np.full(len(places), -np.inf)
        np.maximum.at(best, of[scored], scores[scored])
        metrics |= rewards_of_round(scores[scored])
        metrics["round/best_of_k"] = float(best[np.isfinite(best)].mean())
    return metrics
