"""Rows of embedding and head for tokens that a model does not know."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def give_rows(model: PreTrainedModel, rows: int, *, fresh: list[int], old: int, seed: int) -> None:
    """Let the model have so many rows at least; the ``fresh`` ones, and all that it lacked, are drawn from the old."""
    embedding = model.get_input_embeddings()
    had = embedding.weight.size(0)
    if rows > had:
        devices = [embedding.weight.device] if embedding.weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the resizing draws rows of its own
            model.resize_token_embeddings(rows, mean_resizing=False)
    fresh = sorted({*fresh, *range(had, rows)})
    if not fresh:
        return
    known = min(old, had, fresh[0])  # new tokens come after all the old ones
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [embedding.weight]
    if head is not None:
        weights += [] if head.weight is embedding.weight else [head.weight]
        weights += [] if getattr(head, "bias", None) is None else [head.bias]
    for weight in weights:
        weight[fresh] = _alike(weight[:known], len(fresh), generator).to(weight)


def _alike(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rows with the mean and spread of the given ones, each dimension by itself."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    noise = torch.randn(n, *rows.shape[1:], generator=generator).to(rows)
    return rows.mean(0) + rows.std(0, correction=0) * noise
