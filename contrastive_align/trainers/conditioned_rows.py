"""What conditional training reads: draws of the pool, each with its condition in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils import logging

from contrastive_align.data import GroupCollator
from contrastive_align.data.formats import Text
from contrastive_align.pool.pool import Pool
from contrastive_align.trainers.conditioned_prompts import ConditionedPrompts


logger = logging.get_logger(__name__)

BARE = "bare_"


class ConditionedRows(Dataset):
    """The draws of one round, in their order. The length is the same for every round.

    Args:
        pool: where the samples are.
        conditioned: prompts under the text that a label becomes.
        encode: prompt -> token ids.
        length: draws in a round.
        max_length: completions are cut so that the conditioned prompt and they have at most so many tokens.
    """

    def __init__(
        self,
        pool: Pool,
        conditioned: ConditionedPrompts,
        encode: Callable[[Text], list[int]],
        length: int,
        max_length: int | None,
    ) -> None:
        self.pool, self.conditioned, self.encode = pool, conditioned, encode
        self.length, self.max_length = length, max_length
        self._draws: Sequence[int] = ()
        self._labels: Sequence[int] = ()
        self._through = 0

    def set_draws(self, draws: Sequence[int], labels: Sequence[int], through: int) -> None:
        """Places in the pool's table after round ``through``, and their labels."""
        if len(draws) != self.length:
            raise ValueError(f"{len(draws)} draws for a round of {self.length}.")
        self._draws, self._labels, self._through = draws, labels, through

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        samples = self.pool.read([self._draws[i] for i in places], self._through)
        return [self.row(sample, int(self._labels[i])) for sample, i in zip(samples, places, strict=True)]

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def row(self, sample: Any, label: int) -> dict[str, Any]:
        """One sample as ``prompt_ids`` (conditioned), ``bare_ids`` (not) and ``completion_ids``."""
        prompt = self.conditioned(sample.prompt, self.conditioned.condition.text(sample, label))
        prompt_ids, completion_ids = self.encode(prompt), sample.completion_ids
        if self.max_length is not None:
            room = self.max_length - len(prompt_ids)
            if room < 1:
                raise ValueError(
                    f"The prompt of sample {sample.sample_index} of dataset row {sample.prompt_index} has, with its "
                    f"condition, {len(prompt_ids)} tokens and max_length is {self.max_length}: no room for a "
                    "completion. Raise max_length or leave the row out."
                )
            if len(completion_ids) > room:  # of a judge's words nobody knows the length before
                logger.warning_once(
                    "Completions that are, with their prompt and condition, longer than "
                    f"max_length={self.max_length} are cut there and train no EOS."
                )
            completion_ids = completion_ids[:room]
        return {"prompt_ids": prompt_ids, "bare_ids": self.encode(sample.prompt), "completion_ids": completion_ids}


@dataclass
class ConditionedCollator(DataCollatorMixin):
    """Batch rows of :class:`ConditionedRows`: a ``GroupBatch`` of groups with one completion, twice.

    The second, its names starting with ``bare_``, has the prompts without condition, for the reference.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        collate = GroupCollator(self.pad_token_id, self.pad_to_multiple_of, torch.float32)
        batch = {}
        for prefix, prompt in (("", "prompt_ids"), (BARE, "bare_ids")):
            groups = [
                {"prompt_ids": e[prompt], "completion_ids": [e["completion_ids"]], "scores": [0.0]} for e in examples
            ]
            batch |= {prefix + name: tensor for name, tensor in collate(groups).items() if name != "scores"}
        return batch


def bare(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch whose prompts have no condition."""
    return {name.removeprefix(BARE): tensor for name, tensor in batch.items() if name.startswith(BARE)}
