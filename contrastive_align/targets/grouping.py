"""Samples in a row -> samples by prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def group_by_prompt(
    phi: Tensor, log_weights: Tensor | None = None, prompt_index: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(phi (C, M, J), log_weights (C, M) or None, valid (C, M) bool or None), on the CPU, in float64.

    Args:
        phi: (n, J), or (C, M, J), which stays as it is.
        log_weights, valid: (n,) and None, or (C, M).
        prompt_index: (n,) the number of each sample's prompt, 0 to C - 1, in any order. Default: one prompt.

    Raises:
        ValueError: shapes that do not fit each other, or a prompt without a sample.

    >>> phi, _, valid = group_by_prompt(torch.tensor([[1.0], [2.0], [3.0]]), prompt_index=torch.tensor([0, 1, 0]))
    >>> phi.squeeze(-1).tolist(), valid.tolist()
    ([[1.0, 3.0], [2.0, 0.0]], [[True, True], [True, False]])
    """
    phi = phi.detach().to("cpu", torch.float64)
    log_weights = None if log_weights is None else log_weights.detach().to("cpu", torch.float64)
    if phi.ndim not in (2, 3):
        raise ValueError(f"phi has the shape {tuple(phi.shape)}, expected (n, J) or (prompts, samples, J).")
    for name, given in (("log_weights", log_weights), ("valid", valid), ("prompt_index", prompt_index)):
        if given is not None and given.shape != phi.shape[:-1]:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, expected {tuple(phi.shape[:-1])} as phi.")
    if phi.ndim == 3:
        if prompt_index is not None:
            raise ValueError("phi (prompts, samples, J) is by prompt already: leave prompt_index out.")
        return phi, log_weights, None if valid is None else valid.cpu()
    if valid is not None:
        raise ValueError("valid marks what is missing of phi (prompts, samples, J); from phi (n, J) leave rows out.")
    if not len(phi):
        raise ValueError("phi has no rows, expected samples.")
    if prompt_index is None:
        return phi.unsqueeze(0), None if log_weights is None else log_weights.unsqueeze(0), None
    index = prompt_index.detach().cpu().long()
    if index.min() < 0:
        raise ValueError(f"prompt_index has {int(index.min())}, expected numbers from 0.")
    counts = torch.bincount(index)
    if not counts.all():
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"{len(missing)} of {len(counts)} prompts have no sample, the first being {missing[:5]}.")
    order = torch.argsort(index, stable=True)
    place = torch.empty_like(index)
    place[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    shape = (len(counts), int(counts.max()))
    grouped = phi.new_zeros(*shape, phi.size(-1))
    grouped[index, place] = phi
    valid = torch.zeros(shape, dtype=torch.bool)
    valid[index, place] = True
    weights = None
    if log_weights is not None:
        weights = phi.new_full(shape, -torch.inf)
        weights[index, place] = log_weights
    return grouped, weights, valid
