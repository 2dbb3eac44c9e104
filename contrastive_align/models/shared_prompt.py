"""The packed row, in which the K completions of a group share one copy of their prompt, and its attention.

A group becomes ``prompt without its last token | branch 1 | branch 2 | ...``. A branch is the prompt's last token, at
its own position, followed by the completion without its last token. So the output at every branch position predicts one
completion token, and labels need no shift across branches. Each branch attends to the prompt and to itself, with
positions that continue from the prompt's end, and gives the same numbers as a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from contrastive_align.models.cpu.merged_attention import TAKES_GROUPED_QUERIES, can_merge, merged_attention


ATTENTION_NAME = "shared_prompt"  # in transformers' registry
BLOCK_QUERIES = 256  # approximate number of queries in a block on a CPU
LOWER_RIGHT_DEVICES = ("cuda",)  # flash kernels take no mask here, but align the causal triangle with the last keys
UNUSED_TENSORS = ("position_ids", "cache_position")  # models pass these to every attention, and none reads them
LONG_PROMPT = 256  # mean prompt tokens from which merged_attention is faster on a CPU


class Segment(NamedTuple):
    """The lengths of one group's part of the packed row: the shared prompt, then its branches."""

    prompt: int
    branches: tuple[int, ...]


class SharedPrompt:
    """The layout of a packed row, which reaches the attention through the model's keyword arguments.

    ``attention_calls`` counts the attention layers that received it; it stays 0 in a model that drops keywords. Not a
    dataclass, because FSDP would pass a copy of one to the model.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.attention_calls = 0
        self._masks: dict = {}

    @property
    def long_prompts(self) -> bool:
        """Whether the prompts are on average long enough for ``merged_attention``, and none is empty."""
        prompts = [s.prompt for s in self.segments]
        return min(prompts) > 0 and sum(prompts) >= LONG_PROMPT * len(prompts)

    def mask(self, prompt: int, branch: int, window: int | None, like: Tensor) -> Tensor:
        """Return the additive mask (branch, prompt + branch), causal and limited to ``window`` keys if given."""
        key = (prompt, branch, window, like.dtype, like.device)
        if key not in self._masks:
            q = torch.arange(prompt, prompt + branch, device=like.device)[:, None]
            k = torch.arange(prompt + branch, device=like.device)[None, :]
            hidden = (k > q) if window is None else (k > q) | (k <= q - window)
            self._masks[key] = like.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        return self._masks[key]

    def branch_positions(self, device: torch.device) -> Tensor:
        """Return the positions in the row that belong to a branch."""
        lengths = torch.tensor([length for s in self.segments for length in (s.prompt, sum(s.branches))])
        in_branch = torch.arange(len(lengths)) % 2
        return in_branch.repeat_interleave(lengths).nonzero()[:, 0].to(device)


def pack(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], SharedPrompt]:
    """Pack a padded batch of :class:`~contrastive_align.data.GroupCollator` into one row of n tokens.

    Returns:
        ``input_ids``, ``position_ids`` and ``shift_labels``, each (1, n), and the row's layout. The labels are -100 on
        the prompts and one completion token at every branch position, in the order of the batch's rows.
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
    # torch.compile makes another graph for a view, so the rows are stacked.
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
    """Attend over a packed row, segment by segment. The signature is that of transformers' attention interface.

    Without ``shared_prompt`` this is plain attention, so that the model still samples and takes padded batches.

    Args:
        query: (1, H, n, D).
        key, value: (1, H or fewer, n, D).
        shared_prompt: the layout of the row.

    Returns:
        (1, n, H, D), and None in place of attention weights.

    Raises:
        NotImplementedError: the model passes a mask of its own, sinks, biases, or other tensors that a packed row does
            not support.
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
        elif attention_mask.dtype == torch.bool:  # a finite minimum, since padding rows have no visible key
            minimum = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, minimum)
        return _attend(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None
    unknown = [name for name, value in kwargs.items() if torch.is_tensor(value) and name not in UNUSED_TENSORS]
    if attention_mask is not None and attention_mask.numel() > 1:  # not the placeholder that completion_logps passes
        unknown.append("a mask of its own")
    if unknown:  # such as sinks, biases, or the indices of sparse attention
        raise NotImplementedError(
            f"{type(module).__name__} gives its attention {' and '.join(unknown)}, which the shared-prompt layout does "
            "not support; set layout='padded'"
        )
    return _attend_by_segment(shared_prompt, query, key, value, sliding_window, dropout, scaling, softcap), None


@torch.compiler.disable  # the lengths differ from batch to batch
def _attend_by_segment(
    shared_prompt: SharedPrompt, query: Tensor, key: Tensor, value: Tensor, window, dropout, scaling, softcap
) -> Tensor:
    """Attend over a packed row: (1, H, n, D) -> (1, n, H, D)."""
    shared_prompt.attention_calls += 1
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as torch's own attention does
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    # With a mask, only a CPU's kernel takes fewer heads of keys than of queries.
    if softcap is not None or device != "cpu" or not TAKES_GROUPED_QUERIES:
        groups = query.size(1) // key.size(1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    segments = shared_prompt.segments
    unlimited = window is None or all(s.prompt + max(s.branches) <= window for s in segments)
    if unlimited and softcap is None and not dropout and shared_prompt.long_prompts and can_merge(query, key, value):
        return merged_attention(query, key, value, segments, scaling).transpose(1, 2)
    # Split once, whose gradient is one concatenation: the gradient of each slice is as long as the row.
    sizes = [length for s in segments for length in (s.prompt, *s.branches)]
    pieces = zip(*(t.split(sizes, 2) for t in (query, key, value)), strict=True)
    outputs = []
    attend = partial(_causal, shared_prompt, window=window, dropout=dropout, scaling=scaling, softcap=softcap)
    for prompt, branches in segments:
        q, prompt_k, prompt_v = next(pieces)
        if prompt:
            outputs += attend(q, prompt_k, prompt_v)
        for _ in branches:
            q, k, v = next(pieces)
            outputs += attend(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


class LastMlp:
    """Hooks that compute the last layer's MLP for branches only: nothing reads what it returns for a prompt.

    With prompts of 1,300 tokens, a step at K = 4 takes 4% less memory on a CPU.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        self.shared_prompt: SharedPrompt | None = None  # what the attention received, until the MLP has read it
        mlp.last_mlp = self
        self._hooks = [
            attention.register_forward_pre_hook(self._read, with_kwargs=True),
            mlp.register_forward_pre_hook(self._take_branches),
            mlp.register_forward_hook(self._put_back),
        ]

    @classmethod
    def add_to(cls, model: PreTrainedModel) -> LastMlp | None:
        """Return None, and change nothing, if the model has no such layers, or experts: their loss counts prompts."""
        config = model.config.get_text_config()
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
        attention, mlp = (getattr(stacks[0][-1], name, None) if stacks else None for name in ("self_attn", "mlp"))
        if attention is None or mlp is None or hasattr(mlp, "last_mlp") or any("expert" in k for k in config.to_dict()):
            return None
        return cls(attention, mlp)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _read(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shared_prompt = kwargs.get("shared_prompt")

    @torch.compiler.disable
    def _take_branches(self, mlp: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.shared_prompt is None:
            return None
        (hidden,) = args
        self._rows, self._positions = hidden.size(1), self.shared_prompt.branch_positions(hidden.device)
        return (hidden[:, self._positions],)

    @torch.compiler.disable
    def _put_back(self, mlp: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.shared_prompt is None:
            return None
        self.shared_prompt = None
        return output.new_zeros(1, self._rows, output.size(2)).index_copy(1, self._positions, output)


def _causal(
    shared_prompt: SharedPrompt, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, **options
) -> list[Tensor]:
    """Causal attention whose queries align with the last keys, in blocks of queries on a CPU."""
    total, length = k.size(2), q.size(2)
    window = window if window is not None and window < total else None
    blocks = max(1, round(length / BLOCK_QUERIES)) if q.device.type == "cpu" else 1
    if blocks == 1 and softcap is None and window is None:
        if length == total:
            return [_attend(q, k, v, None, softcap=None, **options)]
        if q.device.type in LOWER_RIGHT_DEVICES:
            return [_attend(q, k, v, causal_lower_right(length, total), softcap=None, **options)]
    # All blocks share the largest one's mask: aligned at their last keys, they see the same pattern.
    size = -(-length // blocks)
    mask = shared_prompt.mask(total - size, size, window, q)
    outputs, end = [], total - length
    for block in q.tensor_split(blocks, 2):
        end += block.size(2)
        keys = (k, v) if end == total else (k[:, :, :end], v[:, :, :end])
        outputs.append(_attend(block, *keys, mask[size - block.size(2) :, total - end :], softcap=softcap, **options))
    return outputs


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CausalBias | None, dropout: float, scaling, softcap
) -> Tensor:
    """Attend with queries (1, H, q, D), causally where ``mask`` is None."""
    if softcap is None:
        grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    scores = (q @ k.transpose(2, 3)) * (scaling if scaling is not None else q.size(-1) ** -0.5)
    weights = torch.softmax(softcap * torch.tanh(scores / softcap) + mask, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


@contextmanager
def record_windows() -> Iterator[tuple[set[int], set[int]]]:
    """Yield the windows (or chunk sizes) of a model's masks, and those that its attention calls receive.

    A packed row has no mask, so a window that reaches the masks only would be lost.
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
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)


_register(shared_prompt_attention, sdpa_mask)
