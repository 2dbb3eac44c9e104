"""The last layer makes keys and values of a prompt, and no more: nothing reads what else it would make.

So it sees a packed row in two calls. The first has the prompts alone and ends in the attention, which keeps their keys
and values and raises :class:`PromptsRead`, as torch's checkpoints end a pass that they make again. The second has the
branches, which read them.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from contrastive_align.models.attention import PromptsRead, SharedPrompt


def stop_prompts_at_keys(model: PreTrainedModel) -> bool:
    """Let the last layer stop at the prompts' keys and values, on packed rows; ``False`` where that cannot be tried.

    As where something else has the layer's forward in hand (offloaded weights). Not for sharded models: their hooks
    count on every call to end.
    """
    layer = _last_layer(model)
    if layer is None or ("forward" in vars(layer) and not is_stopped(model)):
        return False
    layer.forward = types.MethodType(forward, layer)
    return True


def run_prompts_whole(model: PreTrainedModel) -> None:
    """Undo :func:`stop_prompts_at_keys`."""
    if is_stopped(model):
        del _last_layer(model).forward


def is_stopped(model: PreTrainedModel) -> bool:
    """Whether :func:`stop_prompts_at_keys` holds for it."""
    layer = _last_layer(model)
    return layer is not None and getattr(vars(layer).get("forward"), "__func__", None) is forward


def _last_layer(model: PreTrainedModel) -> nn.Module | None:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    stacks = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    return stacks[0][-1] if len(stacks) == 1 else None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward in two calls, where it is given a packed row; what comes out is 0 at the prompts."""
    own_forward, row = type(self).forward, kwargs.get("shared_prompt")
    if row is None or not any(s.prompt for s in row.segments):
        return own_forward(self, *args, **kwargs)
    (args_of_prompts, args_of_branches), (of_prompts, of_branches) = (_cut(x, row) for x in (args, kwargs))
    prompts = row.at("prompts")
    try:
        own_forward(self, *args_of_prompts, **of_prompts | {"shared_prompt": prompts})
    except PromptsRead:
        pass
    else:  # without having met the shared-prompt attention
        return own_forward(self, *args, **kwargs)
    branches = row.at("branches", prompts.keys)
    outputs = own_forward(self, *args_of_branches, **of_branches | {"shared_prompt": branches})
    row.layers_seen = branches.layers_seen
    hidden, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    zeros = hidden.new_zeros(1, sum(row.lengths[::2]), hidden.size(2))
    hidden = row.join(zeros, hidden, 1)
    return (hidden, *others) if isinstance(outputs, tuple) else hidden


def _cut(value: Any, row: SharedPrompt) -> tuple[Any, Any]:
    """What the prompts and what the branches get of an argument: of tensors along the row, their parts."""
    if isinstance(value, dict):
        parts = {name: _cut(v, row) for name, v in value.items()}
        return tuple({name: part[i] for name, part in parts.items()} for i in range(2))
    if isinstance(value, tuple | list):
        parts = [_cut(v, row) for v in value]
        return tuple(type(value)(part[i] for part in parts) for i in range(2))
    axis = _axis(value, sum(row.lengths)) if isinstance(value, Tensor) else None
    return (value, value) if axis is None else row.cut(value, axis)


def _axis(tensor: Tensor, length: int) -> int | None:
    """Where a tensor goes along the row: (1, n, ...), else (..., n)."""
    axes = (1, -1) if tensor.dim() > 1 else range(-tensor.dim(), 0)
    return next((axis for axis in axes if tensor.size(axis) == length), None)
