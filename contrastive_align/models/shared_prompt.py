"""Attention over the packed row, in which the completions of a group share their prompt, in two calls of a kernel.

The first call is causal attention of every prompt and every branch to itself. In the second, all branches of a group
attend to their prompt, without a mask. A softmax over the union of two sets of keys is the mean of the softmaxes over
each set, weighted by their sums of exponentials, so the log-sum-exps merge both outputs. Each branch then gives the
same numbers as a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from contrastive_align.models.kernels import Call, find_kernel
from contrastive_align.models.packed_row import PackedRow


ATTENTION_NAME = "shared_prompt"  # in transformers' registry
UNUSED_TENSORS = ("position_ids", "cache_position")  # models pass these to every attention, and none reads them


def pack(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], PackedRow]:
    """Pack a padded batch of :class:`~contrastive_align.data.GroupCollator` into one row of n tokens.

    Returns:
        ``input_ids``, ``position_ids`` and ``shift_labels``, each (1, n), and the row's layout. The labels are -100 on
        the prompts and one completion token at every branch position, in the order of the batch's rows.
    """
    row = PackedRow.of_batch(batch)
    ids = batch["input_ids"].flatten()
    tokens = row.on(ids.device).tokens[None]
    labels = F.pad(ids[tokens[:, row.prompt_tokens :] + 1], (row.prompt_tokens, 0), value=-100)
    return {"input_ids": ids[tokens], "position_ids": tokens % row.width, "shift_labels": labels}, row


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
    shared_prompt: PackedRow | None = None,
    branches_only: bool = False,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend over a packed row. The signature is that of transformers' attention interface.

    Without ``shared_prompt`` this is plain attention, so that the model still samples and takes padded batches.

    Args:
        query: (1, H, n, D).
        key, value: (1, H or fewer, n, D).
        shared_prompt: the layout of the row.
        branches_only: whether nothing reads what the prompts' queries find, which are left out then.

    Returns:
        (1, n, H, D), and None in place of attention weights.

    Raises:
        NotImplementedError: the model passes dropout, a mask of its own, sinks, biases, or other tensors that a packed
            row does not support.
    """
    if shared_prompt is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return _softcapped(query, key, value, attention_mask, dropout, scaling, sliding_window, softcap), None
    unknown = [name for name, value in kwargs.items() if torch.is_tensor(value) and name not in UNUSED_TENSORS]
    if attention_mask is not None and attention_mask.numel() > 1:  # not the placeholder that completion_logps passes
        unknown.append("a mask of its own")
    if dropout:
        unknown.append(f"a dropout of {dropout:g}")
    if unknown:  # such as sinks, biases, or the indices of sparse attention
        raise NotImplementedError(
            f"{type(module).__name__} gives its attention {' and '.join(unknown)}, which the shared-prompt layout does "
            "not support; set layout='padded'"
        )
    return _attend(shared_prompt, query, key, value, branches_only, scaling, sliding_window, softcap), None


@torch.compiler.disable  # the lengths differ from batch to batch
def _attend(
    row: PackedRow, query: Tensor, key: Tensor, value: Tensor, branches_only: bool, scaling, window, softcap
) -> Tensor:
    """Attend over a packed row: (1, H, n, D) -> (1, n, H, D)."""
    row.attention_calls += 1
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as torch's own attention does
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    # Not t[0], whose gradient would be a copy with heads first.
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    window = window if window is not None and window < row.longest else None
    tensors = row.on(query.device)
    p = row.prompt_tokens
    empty = not tensors.branches.spans
    own, without = (tensors.branches, p) if branches_only and not empty else (tensors.own, 0)  # tokens without queries
    parts = [Part(Call(own, True, scale, window, softcap), slice(None), slice(without, None))]
    if p and not empty and window != 1:  # which holds a query's own key alone
        parts.append(Part(Call(tensors.to_prompts, False, scale, window, softcap), slice(p - without, None), slice(p)))
    if without:
        query = query[without:]
    with torch.autocast(device, enabled=False):
        output = _SharedPromptAttention.apply(query, key, value, tensors.without_prompt, parts)
    return (F.pad(output, (0, 0, 0, 0, without, 0)) if without else output)[None]


class Part(NamedTuple):
    """A call of a kernel, and the queries and keys of the row that it is about."""

    call: Call
    queries: slice
    keys: slice


class _SharedPromptAttention(torch.autograd.Function):
    """Both calls. Each one's backward kernel receives the merged output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, without_prompt: Tensor | None, parts: list[Part]
    ) -> Tensor:
        ctx.parts, states = [], []
        for call, q, k in parts:
            tensors = query[q], key[k], value[k]
            kernel = find_kernel(*tensors, call)
            found, sums, state = kernel.forward(*tensors, call)
            if call.causal:
                output, log_sums = found, sums
            else:
                if without_prompt is not None:
                    found = found.masked_fill(without_prompt[:, None, None], 0.0)
                    sums = sums.masked_fill(without_prompt, -torch.inf)
                _merge_(output[q], log_sums[:, q], found, sums)
            ctx.parts.append((kernel, call, q, k, len(state)))
            states += state
        ctx.save_for_backward(query, key, value, output, log_sums, without_prompt, *states)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the graph would be missing, and the second derivative silently 0
            raise RuntimeError("Shared-prompt attention has no second derivative: leave out create_graph=True.")
        query, key, value, output, log_sums, without_prompt, *states = ctx.saved_tensors
        grads: tuple[Tensor, ...] = ()
        for kernel, call, q, k, n in ctx.parts:
            state, states = tuple(states[:n]), states[n:]
            tensors = grad[q], query[q], key[k], value[k], output[q], log_sums[:, q]
            dq, dk, dv = kernel.backward(*tensors, state, call)
            if call.causal:
                grads = dq, *(F.pad(d, (0, 0, 0, 0, k.start, 0)) if k.start else d for d in (dk, dv))
                continue
            if without_prompt is not None:
                dq = dq.masked_fill(without_prompt[:, None, None], 0.0)
            for whole, part, found in zip(grads, (q, k, k), (dq, dk, dv), strict=True):
                whole[part] += found
        return *grads, None, None


def _merge_(output: Tensor, log_sums: Tensor, found: Tensor, sums: Tensor) -> None:
    """Merge attention to further keys, and its log-sum-exps (H, n), into ``output`` (n, H, D) and ``log_sums``."""
    weight = torch.sigmoid(sums - log_sums).t()[..., None]
    if found.dtype == weight.dtype:
        torch.lerp(output, found, weight, out=output)
    else:
        output.copy_(torch.lerp(output.to(weight.dtype), found.to(weight.dtype), weight))
    torch.logaddexp(log_sums, sums, out=log_sums)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling, window, softcap: float
) -> Tensor:
    """Attend over padded rows with a softcap: (B, H, n, D) -> (B, n, H, D)."""
    groups = query.size(1) // key.size(1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if mask is None:
        q = torch.arange(key.size(2) - query.size(2), key.size(2), device=query.device)[:, None]
        k = torch.arange(key.size(2), device=query.device)
        mask = (k <= q) if window is None else (k <= q) & (k > q - window)
    if mask.dtype == torch.bool:  # a finite minimum, since padding rows have no visible key
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    scores = (query @ key.transpose(2, 3)) * (scaling if scaling is not None else query.size(-1) ** -0.5)
    weights = torch.softmax(softcap * torch.tanh(scores / softcap) + mask, -1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


class AttentionOptions(NamedTuple):
    """What a model's masks and its calls of attention were told, other than 0 and None."""

    layers: list[nn.Module]  # that called it
    mask_windows: set[int]  # or chunk sizes
    windows: set[int]
    unlike: set[tuple[int | None, int | None]]  # windows of a call's mask and of the call, where these differ
    dropouts: set[float]


@contextmanager
def record_options() -> Iterator[AttentionOptions]:
    """Record the options of a model's masks and attention calls.

    A packed row has no mask, so a window that reaches the masks only would be lost.
    """
    found, masks = AttentionOptions([], set(), set(), set(), set()), []

    def mask(*args, local_size: int | None = None, **kwargs) -> Tensor | None:
        found.mask_windows.update({local_size} - {None})
        made = sdpa_mask(*args, local_size=local_size, **kwargs | {"allow_is_causal_skip": False})
        masks.append((made, local_size))
        return made

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[Tensor, None]:
        found.windows.update({sliding_window} - {None})
        found.dropouts.update({dropout} - {0.0})
        found.unlike.update((w, sliding_window) for made, w in masks if made is attention_mask and w != sliding_window)
        if module not in found.layers:
            found.layers.append(module)
        options = {"sliding_window": sliding_window, "dropout": dropout, **kwargs}
        return shared_prompt_attention(module, query, key, value, attention_mask, **options)

    try:
        _register(attend, mask)
        yield found
    finally:
        _register(shared_prompt_attention, sdpa_mask)


def _register(attention: Callable, mask: Callable) -> None:
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)


_register(shared_prompt_attention, sdpa_mask)
