"""Compare the attention layers of two passes over the same tokens, each layer by itself.

Rounding adds up over layers, and in 16 bits it hides the fault of one layer from the log-probs. A layer that receives
the inputs of the other pass differs by its own rounding alone: by 0.3% of its output in bfloat16, at any depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


Run = Callable[[], Any]


class RecordedLayers:
    """The inputs and outputs of each attention layer in a pass over a padded batch.

    Args:
        layers: modules of which the first argument is hidden states (B, T, D), and the first result too.
        run: the pass.
        counts: (B, T), 1 for the tokens to compare, 0 for padding.
    """

    def __init__(self, layers: list[nn.Module], run: Run, counts: Tensor) -> None:
        self._layers, self._counts = layers, counts.flatten().bool().cpu()
        self._inputs: list[Tensor] = []  # of each call, each (B * T, D)
        self._outputs: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            self._inputs.append(_copy(hidden))
            return hidden

        with _hooks(layers, keep, lambda output: self._outputs.append(_copy(output))):
            run()

    def gaps(self, runs: Iterable[tuple[Run, Tensor]]) -> Tensor:
        """Return how far the layers of other passes are from those of this one, relative to the norm of this one's.

        Every call of a layer receives its inputs of this pass, so that no layer sees the rounding of another.

        Args:
            runs: passes over parts of this one's tokens, each with the indices (n,) of its tokens in the flattened
                batch.

        Returns:
            (calls + 1,): the distance of the first layer's inputs, before they are replaced, then that of the outputs
            of every call.

        Raises:
            RuntimeError: the layers are called less often than in this pass.
        """
        squares = sum(self._squares(run, tokens.cpu()) for run, tokens in runs)
        return (squares[0] / squares[1].clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()

    def _squares(self, run: Run, tokens: Tensor) -> Tensor:
        """Return the squared norms of the differences and of the recorded tensors, (2, calls + 1)."""
        counts, found, calls = self._counts[tokens], [], 0

        def compare(output: Tensor, recorded: Tensor) -> None:
            ours, theirs = (t[counts].cpu().double() for t in (output.flatten(0, 1), recorded[tokens]))
            found.append(torch.stack([(ours - theirs).square().sum(), theirs.square().sum()]))

        def give(hidden: Tensor) -> Tensor:
            nonlocal calls
            recorded = self._inputs[calls]
            if not calls:
                compare(hidden, recorded)
            calls += 1
            return recorded[tokens].view_as(hidden)

        with _hooks(self._layers, give, lambda output: compare(output, self._outputs[calls - 1])):
            run()
        if calls < len(self._inputs):
            raise RuntimeError(f"{calls} calls of attention instead of {len(self._inputs)}")
        return torch.stack(found, 1)


def _copy(hidden: Tensor) -> Tensor:
    """(B, T, D) -> (B * T, D). A model may add its residual to an attention's output in place."""
    return hidden.flatten(0, 1).clone()


@contextmanager
def _hooks(layers: list[nn.Module], give: Callable[[Tensor], Tensor], read: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass the hidden states that the layers receive through ``give``, and their outputs to ``read``."""

    def before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            return (give(args[0]), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": give(kwargs["hidden_states"])}
        return None

    def after(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if args or "hidden_states" in kwargs:
            read(output if isinstance(output, Tensor) else output[0])

    hooks = []
    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            hooks.append(layer.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
