"""Attention over a packed row on a CPU, in parts that need no mask, merged by their log-sum-exps.

A softmax over the union of two sets of keys is the mean of the softmaxes over each, weighted by their sums of
exponentials. So the prompt with its first branch, which follows it in memory, is one causal row; every other branch is
one of its own; and what these read of the prompt is a single call without a mask, for all of them together: the
kernel's fastest case. Where the prompts ask nothing (a model's last layer), the first branch is as the others. Of the
backward pass nothing changes but that every part is given the merged output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from contrastive_align.models.gradients import first_derivative_only


# The kernel behind F.scaled_dot_product_attention, which keeps the log-sum-exp to itself.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
READS_SHARED_KEYS = Version(torch.__version__) >= Version("2.9")  # fewer heads of keys than of queries


class _Branch(NamedTuple):
    """Where its queries stand, and its keys: elsewhere if the prompts ask nothing."""

    queries: slice
    keys: slice


class _Group(NamedTuple):
    """Where a group's parts stand in the row. ``first`` is the prompt with its first branch, if the prompt asks.

    The other branches, all of them if it does not, stand at ``others`` among the queries.
    """

    prompt: slice
    first: slice | None
    others: slice
    branches: list[_Branch]


def _groups(segments: Sequence[tuple[int, Sequence[int]]], prompts_ask: bool) -> Iterator[_Group]:
    start = skipped = 0  # skipped: prompt tokens before, which are not among the queries
    for prompt, lengths in segments:
        end = start + prompt
        keys_of_prompt, first = slice(start, end), None
        if prompts_ask:
            end += lengths[0]
            first, lengths = slice(start, end), lengths[1:]
        else:
            skipped += prompt
        others, branches = end - skipped, []
        for length in filter(None, lengths):
            branches.append(_Branch(slice(end - skipped, end - skipped + length), slice(end, end + length)))
            end += length
        yield _Group(keys_of_prompt, first, slice(others, end - skipped), branches)
        start = end


def merges(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors as they are."""
    alike = query.dtype == key.dtype == value.dtype and query.size(-1) == key.size(-1) == value.size(-1)
    dense = all(t.stride(-1) == 1 for t in (query, key, value))
    return query.device.type == "cpu" and alike and dense


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[tuple[int, Sequence[int]]], scale: float | None
) -> Tensor:
    """(1, H, n, D) queries, (1, H or fewer, n, D) keys and values of a packed row -> (1, H, n, D).

    ``segments``: the lengths of each group's prompt, at least one token, and of its branches. A branch attends to its
    prompt and, causally, to itself; a prompt, causally, to itself, or not at all: the queries may be those of the
    branches alone. ``scale``: of the scores, 1 / sqrt(D) where None.
    """
    groups = list(_groups(segments, prompts_ask=query.size(2) == key.size(2)))
    return _MergedAttention.apply(query, key, value, groups, scale)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, groups: list[_Group], scale: float | None) -> Tensor:
        def attend(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor]:
            return _attend(query[:, :, q], key[:, :, k], value[:, :, k], 0.0, causal, scale=scale)

        batch, heads, n, size = query.shape
        output = query.new_empty(batch, n, heads, size).transpose(1, 2)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        for prompt, first, others, branches in groups:
            if first is not None:
                output[:, :, first], log_sums[:, :, first] = attend(first, first, True)
            if not branches:
                continue
            of_prompt, log_sums_of_prompt = attend(others, prompt, False)
            for branch, keys in branches:
                here = slice(branch.start - others.start, branch.stop - others.start)
                a, log_a = of_prompt[:, :, here], log_sums_of_prompt[:, :, here]
                b, log_b = attend(branch, keys, True)
                weight = torch.sigmoid(log_b - log_a).unsqueeze(-1)
                if a.dtype == weight.dtype:
                    torch.lerp(a, b, weight, out=output[:, :, branch])
                else:
                    output[:, :, branch] = torch.lerp(a.to(weight.dtype), b.to(weight.dtype), weight)
                torch.logaddexp(log_a, log_b, out=log_sums[:, :, branch])
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.scale = groups, scale
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors

        def gradients(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            of_queries = (output[:, :, q], log_sums[:, :, q], 0.0, causal)
            tensors = (slope[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], *of_queries)
            return _attend_backward(*tensors, scale=ctx.scale)

        dq, dk, dv = (torch.empty_like(t) for t in (query, key, value))
        for prompt, first, others, branches in ctx.groups:
            if first is not None:
                dq[:, :, first], dk[:, :, first], dv[:, :, first] = gradients(first, first, True)
            else:
                dk[:, :, prompt] = dv[:, :, prompt] = 0
            if not branches:
                continue
            dq_of_prompt, dk_prompt, dv_prompt = gradients(others, prompt, False)
            dk[:, :, prompt] += dk_prompt
            dv[:, :, prompt] += dv_prompt
            for branch, keys in branches:
                here = slice(branch.start - others.start, branch.stop - others.start)
                own, dk[:, :, keys], dv[:, :, keys] = gradients(branch, keys, True)
                torch.add(dq_of_prompt[:, :, here], own, out=dq[:, :, branch])
        return dq, dk, dv, None, None
