"""The LM head only where it is needed: completion tokens, a chunk at a time, the logits never kept.

TRL's fused head does this with a kernel where Triton runs. Elsewhere it scores every position, prompts and padding too,
and tiles the vocabulary; there this one takes its place.
"""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


CHUNK = 512  # tokens whose logits stand in memory at once


@dataclass
class ScoredTokens:
    """One value per scored token, in the order of the positions."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    aux_loss: None = None


def add_head(model: PreTrainedModel) -> None:
    """Let ``model(..., shift_labels=..., fused_lm_head=True)`` score the positions with a label, and only these.

    To be called after TRL's ``add_fused_lm_head``. Calls it does not serve (other arguments, other devices, router
    losses) go on to the forward that was there.
    """
    before = model.forward
    config = model.config.get_text_config()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def forward(self, *args, fused_lm_head=False, shift_labels=None, **kwargs):
        served = fused_lm_head and shift_labels is not None and not kwargs.get("output_router_logits")
        if not served or shift_labels.device.type != "cpu":
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return before(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        scored = shift_labels != -100
        head = self.get_output_embeddings()
        values = _ScoreTokens.apply(hidden[scored], head.weight, head.bias, shift_labels[scored], scale, softcap)
        return ScoredTokens(*values)

    model.forward = types.MethodType(forward, model)


def logit_scale(config) -> float:
    """What a model multiplies its logits by, whatever its config calls it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


class _ScoreTokens(torch.autograd.Function):
    """log softmax(softcap(scale * (h W^T + b)))[label]; the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap):
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.scale, ctx.softcap, ctx.compute = scale, softcap, compute
        precise = torch.float64 if compute == torch.float64 else torch.float32
        log_probs, entropy, mean_logits = (hidden.new_empty(len(labels), dtype=precise) for _ in range(3))
        is_top1 = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        w, b = weight.to(compute), None if bias is None else bias.to(compute)
        for i in range(0, len(labels), CHUNK):
            part, y = slice(i, i + CHUNK), labels[i : i + CHUNK, None]
            z = _logits(hidden[part].to(compute), w, b, scale, softcap)
            mean_logits[part] = z.mean(-1)
            is_top1[part] = z.argmax(-1) == y[:, 0]
            chosen = z.gather(1, y)[:, 0]
            top = z.amax(-1, keepdim=True)
            z.sub_(top)
            p = z.exp()
            total = p.sum(-1)
            log_probs[part] = chosen - top[:, 0] - total.log()
            entropy[part] = total.log() - p.mul_(z).sum(-1) / total
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return log_probs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, bias, labels = ctx.saved_tensors
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_weight = grad_weight if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for i in range(0, len(labels), CHUNK):
            part, y = slice(i, i + CHUNK), labels[i : i + CHUNK, None]
            h, g = hidden[part].to(ctx.compute), grad[part, None]
            z = _logits(h, w, b, ctx.scale, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (z / ctx.softcap).square()
            # Probabilities that cannot matter go to 0: as denormal numbers they would slow the products 30 times.
            d = F.threshold_(torch.softmax(z, -1), 1e-20, 0.0).mul_(-g)
            d.scatter_add_(1, y, g.to(d.dtype))
            if slope is not None:
                d.mul_(slope)
            d = d.mul_(ctx.scale).to(ctx.compute) if ctx.scale != 1.0 else d.to(ctx.compute)
            grad_hidden[part] = (d @ w).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(d.T.to(grad_weight.dtype), h.to(grad_weight.dtype))
            if grad_bias is not None:
                grad_bias += d.sum(0).to(grad_bias.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None, None, None


def _logits(h: Tensor, w: Tensor, b: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = F.linear(h, w, b)
    z = z if z.dtype == torch.float64 else z.float()
    z = z.mul_(scale) if scale != 1.0 else z
    return z if softcap is None else softcap * torch.tanh(z / softcap)
