"""What the package's own autograd functions have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def first_derivative_only(backward: Callable) -> Callable:
    """For a ``Function.backward`` that makes its gradient outside of any graph: ``create_graph=True`` raises.

    torch's ``once_differentiable`` raises only where the gradient that comes in needs one itself; where that is a
    constant, as under ``loss.sum()``, a second derivative would be zero without a word.
    """

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            raise RuntimeError(f"{name} has no second derivative: leave out create_graph=True.")
        return backward(ctx, *grads)

    return checked
