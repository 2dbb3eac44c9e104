"""The last layer of a packed row, of which only the branches are read.

A prompt reaches its branches through keys and values. In the last layer nothing reads what else a prompt computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from contrastive_align.models.packed_row import PackedRow


PROJECTIONS = ("q_proj", "o_proj")  # in most attentions; one that has other names computes these for prompts, too


class LastLayer:
    """Hooks that compute the last layer for branches only; 0 takes the place of what it would return for prompts.

    The projections of queries and outputs, the queries of the attention, and the MLP are those of branches. Keys and
    values are those of all tokens.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        self.shared_prompt: PackedRow | None = None  # what the attention received, until the MLP has read it
        self._of_mlp = [attention.register_forward_pre_hook(self._read, with_kwargs=True), *self._cut(mlp)]
        self._of_mlp.append(mlp.register_forward_hook(self._end))
        self._of_attention = [attention.register_forward_pre_hook(self._say_so, with_kwargs=True)]
        for module in (getattr(attention, name, None) for name in PROJECTIONS):
            self._of_attention += self._cut(module) if isinstance(module, nn.Module) else []

    def _cut(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_pre_hook(self._take_branches), module.register_forward_hook(self._put_back)]

    @classmethod
    def add_to(cls, model: PreTrainedModel) -> LastLayer | None:
        """Return None, and change nothing, if the model has no such layers, or experts: their loss counts prompts."""
        config = model.config.get_text_config()
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
        attention, mlp = (getattr(stacks[0][-1], name, None) if stacks else None for name in ("self_attn", "mlp"))
        if attention is None or mlp is None or any("expert" in k for k in config.to_dict()):
            return None
        model.last_layer = cls(attention, mlp)
        if getattr(attention, "_compiled_call_impl", None) is not None:
            model.last_layer.spare_attention()
        return model.last_layer

    @classmethod
    def remove_from(cls, model: PreTrainedModel) -> None:
        """Remove the hooks, if there are any: the model then computes all tokens in all layers."""
        if isinstance(last_layer := model.__dict__.pop("last_layer", None), cls):
            for hook in last_layer._of_mlp + last_layer._of_attention:
                hook.remove()

    def spare_attention(self) -> None:
        """Let the attention compute all tokens: one that is compiled is the same in all layers, and without hooks."""
        for hook in self._of_attention:
            hook.remove()

    @torch.compiler.disable
    def _read(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shared_prompt = kwargs.get("shared_prompt")

    @torch.compiler.disable
    def _say_so(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return None if self.shared_prompt is None else (args, {**kwargs, "branches_only": True})

    @torch.compiler.disable
    def _take_branches(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.shared_prompt is None:
            return None
        (hidden,) = args
        return (hidden[:, self.shared_prompt.prompt_tokens :],)

    @torch.compiler.disable
    def _put_back(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        return None if self.shared_prompt is None else F.pad(output, (0, 0, self.shared_prompt.prompt_tokens, 0))

    @torch.compiler.disable
    def _end(self, mlp: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.shared_prompt = None
