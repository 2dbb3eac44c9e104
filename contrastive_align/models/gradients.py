"""A guard for the package's autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate a ``Function.backward`` that builds no graph, so that ``create_graph=True`` raises a RuntimeError.

    torch's ``once_differentiable`` raises only where the incoming gradient requires one itself. Under ``loss.sum()``
    the incoming gradient is a constant, and the second derivative would silently be zero.
    """

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            raise RuntimeError(f"{name} has no second derivative: leave out create_graph=True.")
        return backward(ctx, *grads)

    return checked
