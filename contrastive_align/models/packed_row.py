"""The packed row, in which the K completions of a group share one copy of their prompt.

A batch of groups becomes ``[all prompts | all branches]``. The shared part of a prompt is the prompt without its last
token. A branch is that last token, at its own position, followed by the completion without its last token. So the
output at every branch position predicts one completion token, and labels need no shift across branches.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Segment(NamedTuple):
    """The lengths of one group's part of the packed row: the shared prompt, then its branches."""

    prompt: int
    branches: tuple[int, ...]


class Documents(NamedTuple):
    """Documents that lie one after the other: the queries of each attend to its own keys and to no others.

    The cumulative lengths are int32, one more than there are documents. ``spans`` has the same numbers on the host:
    the start and end of each document's queries, and of its keys.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    spans: list[tuple[int, int, int, int]]
    behind: Tensor | None = None  # (queries,) tokens between a query and the last key; None: the last keys are its own

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device, behind: Tensor | None = None) -> Documents:
        """Return documents of these lengths."""
        cu_q, cu_k = ([0, *accumulate(lengths)] for lengths in (queries, keys))
        spans = list(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False))
        tensors = [to_device(torch.tensor(cu, dtype=torch.int32), device) for cu in (cu_q, cu_k)]
        return cls(*tensors, max(queries, default=0), max(keys, default=0), spans, behind)


class RowTensors(NamedTuple):
    """What a packed row needs on a device."""

    tokens: Tensor  # (n,) each token's index in the flattened padded batch
    own: Documents  # all prompts, then all branches, each attending to itself
    branches: Documents  # all branches, each attending to itself
    to_prompts: Documents  # the branches of each group, attending to its prompt
    without_prompt: Tensor | None  # (branch tokens,) bool: the group's shared prompt is empty; None if none is


class PackedRow:
    """Which tokens of a padded batch make its packed row, and which of them attend to which.

    It is made once a batch, and reaches the attention through the model's keyword arguments. Not a
    dataclass, because FSDP would pass a copy of one to the model.

    >>> row = PackedRow([Segment(2, (2, 1))], width=5)
    >>> row.on(torch.device("cpu")).tokens.tolist()  # of the rows 0 to 4 and 5 to 9
    [0, 1, 2, 3, 7]
    """

    def __init__(self, segments: list[Segment], width: int) -> None:
        self.segments, self.width = segments, width  # of a row of the padded batch
        self.prompt_tokens = sum(s.prompt for s in segments)
        self.longest = max(s.prompt + max(s.branches) for s in segments)
        self.attention_calls = 0  # how many attention layers received this; it stays 0 in a model that drops keywords
        self._on: dict[torch.device, RowTensors] = {}

    @classmethod
    def of_batch(cls, batch: dict[str, Tensor]) -> PackedRow:
        """Return the packed row of a padded batch. Its lengths are read from the device once for all models."""
        masks = [batch[name] for name in ("completion_mask", "attention_mask", "valid")]
        attention_mask, valid, row = _rows.get(masks[0]) or (None, None, None)
        if row is not None and attention_mask is masks[1] and valid is masks[2]:
            return row
        n = len(masks[0])
        lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
        completions, totals, counts = lengths[:n], lengths[n : 2 * n], lengths[2 * n :]
        segments, i = [], 0
        for k in counts:
            segments.append(Segment(totals[i] - completions[i] - 1, tuple(completions[i : i + k])))
            i += k
        row = cls(segments, masks[0].size(1))
        _rows[masks[0]] = (*masks[1:], row)
        return row

    def on(self, device: torch.device) -> RowTensors:
        """Return the row's tensors on a device, without waiting for it."""
        if device not in self._on:
            self._on[device] = self._make(device)
        return self._on[device]

    def _make(self, device: torch.device) -> RowTensors:
        prompts, branches, behind, start = [], [], [], 0
        for prompt, lengths in self.segments:
            prompts.append(torch.arange(start, start + prompt))
            for length in lengths:
                branches.append(torch.arange(start + prompt, start + prompt + length))
                behind.append(torch.arange(length))
                start += self.width
        lengths = [s.prompt for s in self.segments]
        branch_lengths = [n for s in self.segments for n in s.branches if n]
        own = [*filter(None, lengths), *branch_lengths]
        of_groups = [sum(s.branches) for s in self.segments]
        without_prompt = None
        if not all(lengths):
            without_prompt = torch.tensor([not n for n in lengths]).repeat_interleave(torch.tensor(of_groups))
            without_prompt = to_device(without_prompt, device)
        return RowTensors(
            to_device(torch.cat(prompts + branches), device),
            Documents.of(own, own, device),
            Documents.of(branch_lengths, branch_lengths, device),
            Documents.of(of_groups, lengths, device, to_device(torch.cat(behind), device)),
            without_prompt,
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for what runs there."""
    return tensor.to(device, non_blocking=True)


_rows = WeakTensorKeyDictionary()  # completion_mask -> the batch's other masks, and its packed row
