"""The last layer goes as far as the keys and values of a prompt: nothing reads what else it would make of it.

So it sees a packed row in two calls. The first has the prompts alone and ends in the attention, which keeps their keys
and values and raises :class:`PromptsRead`, as torch's checkpoints end a pass that they make again. The second has the
branches, which read them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from contrastive_align.models.attention import PromptsRead, SharedPrompt


def stop_prompts_at_keys(model: PreTrainedModel) -> bool:
    """Let the last layer stop at the prompts' keys and values, on packed rows.

    Not to be called for sharded models, whose hooks count on every call to end. ``False`` where there is no such layer,
    or where something else has its forward in hand (offloaded weights).
    """
    layer = _last_layer(model)
    if layer is None or "forward" in vars(layer):
        return False
    if not is_stopped(model):
        own = type(layer)
        layer.__class__ = type(
            own.__name__, (_StopsAtKeys, own), {"__module__": own.__module__, "__doc__": own.__doc__}
        )
    return True


def run_prompts_whole(model: PreTrainedModel) -> None:
    """Undo :func:`stop_prompts_at_keys`."""
    if is_stopped(model):
        layer = _last_layer(model)
        layer.__class__ = _own(type(layer))


def is_stopped(model: PreTrainedModel) -> bool:
    """Whether :func:`stop_prompts_at_keys` holds for it."""
    return isinstance(_last_layer(model), _StopsAtKeys)


def _last_layer(model: PreTrainedModel) -> nn.Module | None:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    stacks = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    return stacks[0][-1] if len(stacks) == 1 else None


class _StopsAtKeys:
    """Stands before a layer's own class, so that a checkpoint holds both calls.

    transformers makes it of the first class's forward. A checkpoint of the first call alone would lose the gradient of
    the keys, or find its pass ended.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own; of a packed row, what comes out is 0 at the prompts."""
        shared = kwargs.get("shared_prompt")
        if shared is None or not any(s.prompt for s in shared.segments):
            return super().forward(*args, **kwargs)
        (args_of_prompts, args_of_branches), (of_prompts, of_branches) = (_cut(x, shared) for x in (args, kwargs))
        prompts = shared.for_part("prompts")
        try:
            super().forward(*args_of_prompts, **of_prompts | {"shared_prompt": prompts})
        except PromptsRead:
            pass
        else:
            if shared.layers_seen:
                raise RuntimeError("The last layer never reached the shared-prompt attention, which others did.")
            return super().forward(*args, **kwargs)  # as the others: the whole model has another attention
        branches = shared.for_part("branches", prompts.keys_and_values)
        outputs = super().forward(*args_of_branches, **of_branches | {"shared_prompt": branches})
        shared.stops += branches.layers_seen - shared.layers_seen  # more than one: see _check_attention in logps.py
        shared.layers_seen = branches.layers_seen
        hidden, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        zeros = hidden.new_zeros(1, sum(shared.lengths[::2]), hidden.size(2))
        hidden = shared.join(zeros, hidden, 1)
        return (hidden, *others) if isinstance(outputs, tuple) else hidden

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copied and pickled as its own class, which can be found by its name."""
        _, (stopping, *_), *state = super().__reduce_ex__(protocol)
        return _new, (_own(stopping),), *state


def _own(stopping: type) -> type:
    return stopping.__mro__[2]


def _new(own: type) -> nn.Module:
    return own.__new__(own)


def _cut(value: Any, shared: SharedPrompt) -> tuple[Any, Any]:
    """What the prompts and what the branches get of an argument: of tensors along the row, their parts."""
    if isinstance(value, dict):
        parts = {name: _cut(v, shared) for name, v in value.items()}
        return tuple({name: part[i] for name, part in parts.items()} for i in range(2))
    if isinstance(value, tuple | list):
        parts = [_cut(v, shared) for v in value]
        return tuple(type(value)(part[i] for part in parts) for i in range(2))
    axis = _axis(value, sum(shared.lengths)) if isinstance(value, Tensor) else None
    return (value, value) if axis is None else shared.cut(value, axis)


def _axis(tensor: Tensor, length: int) -> int | None:
    """Where a tensor goes along the row: (1, n, ...), else (..., n)."""
    if tensor.dim() > 1 and tensor.size(1) == length:
        return 1
    return -1 if tensor.dim() and tensor.size(-1) == length else None
