"""The prompt is paid once: the K completions of a group share one copy of it in a packed row.

A group becomes ``prompt without its last token | branch 1 | branch 2 | ...``. A branch is the prompt's last token again
(at its own position) and the completion without its last token, so that labels need no shift across branches: the
output at every branch position predicts one completion token. Each branch attends to the prompt and to itself,
positions continuing from the prompt's end, which makes its numbers those of a row of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from contrastive_align.models.merged_attention import READS_SHARED_KEYS, merged_attention, merges


NAME = "shared_prompt"
QUERIES = 256  # about as many in a block
LOWER_RIGHT = ("cuda",)  # where flash kernels take no mask, but end the causal triangle where the keys end
IGNORED = ("position_ids", "cache_position")  # tensors that models hand to any attention, and none reads
LONG = 256  # tokens of the mean prompt from which on a CPU reads them faster for all branches at once


class Segment(NamedTuple):
    """The lengths of one group's part of the packed row: the shared prompt, then its branches."""

    prompt: int
    branches: tuple[int, ...]


class SharedPrompt:
    """The layout of a packed row. Reaches the attention function through the model's keyword arguments.

    ``layers_seen`` counts the attentions it reached: a model that drops keywords leaves it at 0; ``stops``, those that
    had no more of the prompts than their keys. No dataclass, since FSDP would hand a copy of one to the model.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.layers_seen = 0
        self.stops = 0
        self.part = "row"  # or "prompts", or "branches": what a layer is given
        self.keys_and_values: tuple[Tensor, Tensor] | None = None  # of the prompts, where these are not given
        self._masks: dict = {}

    @property
    def lengths(self) -> list[int]:
        """Of every prompt and, in turn, of all the branches after it."""
        return [length for s in self.segments for length in (s.prompt, sum(s.branches))]

    def cut(self, row: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """A row -> what of it are prompts, and what are branches."""
        parts = row.split(self.lengths, axis)  # whose gradient is one concatenation: that of a slice is a whole row
        return torch.cat(parts[::2], axis), torch.cat(parts[1::2], axis)

    def join(self, prompts: Tensor, branches: Tensor, axis: int) -> Tensor:
        """What ``cut`` has cut."""
        parts = zip(prompts.split(self.lengths[::2], axis), branches.split(self.lengths[1::2], axis), strict=True)
        return torch.cat([part for pair in parts for part in pair], axis)

    def for_part(self, part: str, keys_and_values: tuple[Tensor, Tensor] | None = None) -> SharedPrompt:
        """For a layer that is given but a part of the row: see ``models/last_layer.py``."""
        other = copy.copy(self)
        other.part, other.keys_and_values = part, keys_and_values
        return other

    @property
    def long_prompts(self) -> bool:
        prompts = [s.prompt for s in self.segments]
        return min(prompts) > 0 and sum(prompts) >= LONG * len(prompts)

    def mask(self, prompt: int, branch: int, window: int | None, like: Tensor) -> Tensor:
        """Additive (branch, prompt + branch): lower-right causal, and within ``window`` where there is one."""
        key = (prompt, branch, window, like.dtype, like.device)
        if key not in self._masks:
            q = torch.arange(prompt, prompt + branch, device=like.device)[:, None]
            k = torch.arange(prompt + branch, device=like.device)[None, :]
            hidden = (k > q) if window is None else (k > q) | (k <= q - window)
            self._masks[key] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(
                hidden, -torch.inf
            )
        return self._masks[key]


class PromptsRead(Exception):
    """Ends the call of a layer that is given the prompts alone, once their keys are there."""


def pack(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], SharedPrompt]:
    """A padded GroupBatch -> one packed row (1, n) of ids, positions and shifted labels, and its layout.

    The labels are -100 on the prompts and one completion token at every branch position, in the order of the batch's
    rows, so that the n - (prompt tokens) scored positions are all completion tokens, row after row.
    """
    totals, completions = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
    ids, pieces, labels, positions, segments = batch["input_ids"], [], [], [], []
    row = 0
    for k in batch["valid"].sum(1).tolist():
        shared = totals[row] - completions[row] - 1
        pieces.append(ids[row, :shared])
        labels.append(ids.new_full((shared,), -100))
        positions.append(torch.arange(shared, device=ids.device))
        for i in range(row, row + k):
            end = shared + completions[i]
            pieces.append(ids[i, shared:end])
            labels.append(ids[i, shared + 1 : end + 1])
            positions.append(torch.arange(shared, end, device=ids.device))
        segments.append(Segment(shared, tuple(completions[row : row + k])))
        row += k
    packed = {"input_ids": pieces, "position_ids": positions, "shift_labels": labels}
    # Stacked: torch.compile makes another graph for a view, and what a layer gets of these is none.
    return {name: torch.stack([torch.cat(parts)]) for name, parts in packed.items()}, SharedPrompt(segments)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompt: SharedPrompt | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, n, D) queries -> (1, n, H, D), a segment at a time.

    Without ``shared_prompt`` it is plain attention, so that a model set to it still samples and takes padded batches.
    """
    if shared_prompt is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        groups = query.size(1) // key.size(1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        if attention_mask is None:
            attention_mask = SharedPrompt([]).mask(key.size(2) - query.size(2), query.size(2), sliding_window, query)
        elif attention_mask.dtype == torch.bool:  # a finite minimum: rows of padding attend to nothing at all
            minimum = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, minimum)
        return _attend(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None
    unknown = [name for name, value in kwargs.items() if torch.is_tensor(value) and name not in IGNORED]
    if attention_mask is not None and attention_mask.numel() > 1:  # not the one the row came with
        unknown.append("a mask of its own")
    if unknown:  # sinks, biases, indices of sparse attention: what the packed row does not heed
        raise NotImplementedError(
            f"{type(module).__name__} gives its attention {' and '.join(unknown)}, which has no place in the "
            "shared-prompt layout; set layout='padded'"
        )
    return _by_segments(shared_prompt, query, key, value, sliding_window, dropout, scaling, softcap), None


@torch.compiler.disable  # the lengths of every batch are others
def _by_segments(
    shared_prompt: SharedPrompt,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention over a packed row: (1, H, n, D) -> (1, n, H, D), where n are the queries that were given."""
    shared_prompt.layers_seen += 1
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as torch's own attention does
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    if shared_prompt.part == "prompts":
        shared_prompt.keys_and_values = key, value
        raise PromptsRead
    if shared_prompt.part == "branches":
        prompt_key, prompt_value = shared_prompt.keys_and_values
        key, value = shared_prompt.join(prompt_key, key, 2), shared_prompt.join(prompt_value, value, 2)
    # Grouped queries: a CPU's kernel reads shared keys where they are, with a mask too; a GPU's do not, with a mask.
    if softcap is not None or device != "cpu" or not READS_SHARED_KEYS:
        groups = query.size(1) // key.size(1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    segments = shared_prompt.segments
    whole = sliding_window is None or all(s.prompt + max(s.branches) <= sliding_window for s in segments)
    if whole and softcap is None and not dropout and shared_prompt.long_prompts and merges(query, key, value):
        return merged_attention(query, key, value, segments, scaling).transpose(1, 2)
    # Split once: the gradient of a slice is as long as the row, that of a split is one concatenation.
    sizes = [length for s in segments for length in (s.prompt, *s.branches)]
    asking = sizes if shared_prompt.part == "row" else [length for s in segments for length in (0, *s.branches)]
    pieces = zip(query.split(asking, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = []
    attend = partial(_causal, shared_prompt, window=sliding_window, dropout=dropout, scaling=scaling, softcap=softcap)
    for _, branches in segments:
        q, prompt_k, prompt_v = next(pieces)
        if q.size(2):
            outputs += attend(q, prompt_k, prompt_v)
        for _ in branches:
            q, k, v = next(pieces)
            outputs += attend(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _causal(
    shared_prompt: SharedPrompt, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, **options
) -> list[Tensor]:
    """Attention of queries that stand where the keys end, in blocks on a CPU: none reads the keys after its own."""
    total, length = k.size(2), q.size(2)
    window = window if window is not None and window < total else None
    blocks = max(1, round(length / QUERIES)) if q.device.type == "cpu" else 1
    if blocks == 1 and softcap is None and window is None:
        if length == total:
            return [_attend(q, k, v, None, softcap=None, **options)]
        if q.device.type in LOWER_RIGHT:
            return [_attend(q, k, v, causal_lower_right(length, total), softcap=None, **options)]
    # One mask for all blocks: where they end, they see the same, and what a longer one hides lies further back.
    size = -(-length // blocks)
    mask = shared_prompt.mask(total - size, size, window, q)
    outputs, end = [], total - length
    for block in q.tensor_split(blocks, 2):
        end += block.size(2)
        keys = (k, v) if end == total else (k[:, :, :end], v[:, :, :end])
        outputs.append(_attend(block, *keys, mask[size - block.size(2) :, total - end :], softcap=softcap, **options))
    return outputs


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | CausalBias | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """(1, H, q, D) attention; causal where ``mask`` is None."""
    if softcap is None:
        grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    scores = (q @ k.transpose(2, 3)) * (scaling if scaling is not None else q.size(-1) ** -0.5)
    weights = torch.softmax(softcap * torch.tanh(scores / softcap) + mask, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


@contextmanager
def recorded_windows() -> Iterator[tuple[set[int], set[int]]]:
    """The windows (and chunks) of the masks that a model has made meanwhile, and those its attention was called with.

    A packed row has no mask: a window that reaches a model's masks alone would be lost on it.
    """
    of_masks, of_calls = set(), set()

    def mask(*args, local_size: int | None = None, **kwargs) -> Tensor | None:
        of_masks.update({local_size} - {None})
        return sdpa_mask(*args, local_size=local_size, **kwargs)

    def attend(*args, sliding_window: int | None = None, **kwargs) -> tuple[Tensor, None]:
        of_calls.update({sliding_window} - {None})
        return shared_prompt_attention(*args, sliding_window=sliding_window, **kwargs)

    try:
        _register(attend, mask)
        yield of_masks, of_calls
    finally:
        _register(shared_prompt_attention, sdpa_mask)


def _register(attention: Callable, mask: Callable) -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


_register(shared_prompt_attention, sdpa_mask)
