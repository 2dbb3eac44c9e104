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

from contrastive_align.models.token_loss import head_parameters


CHUNK = 2**25  # logits in memory at once, as many tokens of them as the vocabulary allows: 1,024 at 32,768 words
KEPT = 2**27  # logits that stay for the backward pass (512 MB in float32), which makes the others again
BLOCK = 16  # tokens whose logits are read and written together, which a core's cache holds


@dataclass
class ScoredTokens:
    """One value per scored token, in the order of the positions."""

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: None = None


def add_head(model: PreTrainedModel) -> None:
    """Let ``model(..., shift_labels=..., fused_lm_head=True)`` score the positions with a label, and only these.

    ``token_stats=False`` leaves out all but the log-probs, where that saves something. With ``token_objective=fn`` the
    call returns ``fn(hidden, labels, weight, bias, scale, softcap)`` of these positions' hidden states (n, H), on any
    device: see :func:`~contrastive_align.models.logps.completion_objective`.

    To be called after TRL's ``add_fused_lm_head``. Calls it does not serve (other arguments, other devices, router
    losses) go on to the forward that was there.
    """
    before = model.forward
    config = model.config.get_text_config()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def forward(self, *args, fused_lm_head=False, shift_labels=None, token_stats=True, token_objective=None, **kwargs):
        served = fused_lm_head and shift_labels is not None and not kwargs.get("output_router_logits")
        if token_objective is not None and not served:
            raise ValueError(
                "token_objective needs fused_lm_head=True, shift_labels, and output_router_logits=False: "
                f"found {fused_lm_head=}, shift_labels {'missing' if shift_labels is None else 'given'}, "
                f"output_router_logits={kwargs.get('output_router_logits', False)}."
            )
        if not served or (shift_labels.device.type != "cpu" and token_objective is None):
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return before(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        scored = shift_labels != -100
        head = self.get_output_embeddings()
        hidden, labels = hidden[scored], shift_labels[scored]
        if token_objective is not None:
            return token_objective(hidden, labels, *head_parameters(head), scale, softcap)
        trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        backward = torch.is_grad_enabled()
        frozen, keep = backward and hidden.requires_grad and not trained, KEPT if backward and trained else 0
        values = _ScoreTokens.apply(hidden, head.weight, head.bias, labels, scale, softcap, token_stats, frozen, keep)
        return ScoredTokens(*values) if token_stats else ScoredTokens(values[0])

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
    """log softmax(softcap(scale * (h W^T + b)))[label] of every token.

    The backward pass makes the logits again, but for the first ``KEPT`` of them, which stay (without a softcap as their
    exponentials); where the head is frozen (LoRA), the gradient of a log-prob with respect to its hidden state is made
    at once in the forward pass instead, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, token_stats, frozen, keep=0):
        logits = _Logits(weight, bias, scale, softcap, len(labels))
        logits.keep(keep)
        vectors = (hidden.new_empty(len(labels), dtype=logits.values.dtype) for _ in range(5))
        log_probs, log_total, tops, *stats = vectors
        is_top1 = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        entropy, mean_logits = stats
        slopes = torch.empty_like(hidden) if frozen else None
        for part in logits.chunks():
            z, y = logits(hidden, part), labels[part, None]
            chosen = z.gather(1, y)[:, 0]
            for i in range(0, len(z), BLOCK):
                block = slice(i, i + BLOCK)
                here = slice(part.start + i, min(part.start + i + BLOCK, part.stop))
                top = z[block].amax(-1, keepdim=True)
                if token_stats:
                    is_top1[here] = chosen[block] == top[:, 0]
                    mean_logits[here] = z[block].mean(-1)
                shifted = z[block] - top if token_stats else None
                p = logits.exponentials(block, top)
                total = p.sum(-1)
                tops[here], log_total[here] = top[:, 0], total.log() + top[:, 0]
                if token_stats:
                    entropy[here] = total.log() - shifted.mul_(p).sum(-1) / total
            log_probs[part] = chosen - log_total[part]
            if frozen:
                ones = torch.ones_like(log_total[part])
                slopes[part] = logits.slopes(y, log_total[part], tops[part], ones) @ logits.weight
        ctx.frozen = frozen
        if frozen:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, log_total, tops)
            ctx.scale, ctx.softcap, ctx.compute, ctx.kept = scale, softcap, logits.weight.dtype, logits.kept
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return log_probs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad, *_):
        nothing = (None,) * 6
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None]).to(slopes.dtype), None, None, *nothing
        hidden, weight, bias, labels, log_total, tops = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # what is read is written over: a second backward pass computes it anew
        logits = _Logits(weight, bias, ctx.scale, ctx.softcap, len(labels), ctx.compute, kept)
        wanted = ctx.needs_input_grad
        precise = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        new = torch.empty_like if len(labels) else torch.zeros_like
        grad_weight = new(weight, dtype=precise) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and wanted[2] else None
        for part in logits.chunks():
            logits(hidden, part, again=True)
            d = logits.slopes(labels[part, None], log_total[part], tops[part], grad[part])
            if grad_hidden is not None:
                grad_hidden[part] = d @ logits.weight
            if grad_weight is not None:
                of_part = hidden[part].to(logits.weight.dtype).to(precise)
                grad_weight.addmm_(d.T.to(precise), of_part, beta=0 if part.start == 0 else 1)
            if grad_bias is not None:
                grad_bias += d.sum(0)
        _give_back(logits.kept)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *nothing


_spare: dict[torch.dtype, Tensor] = {}


def _reused(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for (rows, columns), the last step's where it is large enough."""
    spare = _spare.pop(dtype, None)
    if spare is None or spare.numel() < rows * columns:
        spare = torch.empty(rows * columns, dtype=dtype)
    return spare[: rows * columns].view(rows, columns)


def _give_back(memory: Tensor) -> None:
    if memory.numel():
        whole = memory.new_empty(0).set_(memory.untyped_storage())
        _spare[memory.dtype] = whole


class _Logits:
    """softcap(scale * (h W^T + b)) of a chunk of tokens at a time, in float32 at least.

    A chunk that ``kept`` has rows for is written there and can be read again; all others are written into the same
    memory: on a CPU fresh pages cost as much again as the product.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        tokens: int,
        dtype: torch.dtype | None = None,
        kept: Tensor | None = None,
    ):
        if dtype is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.scale, self.softcap, self.tokens = scale, softcap, tokens
        self._rows = max(1, min(tokens, CHUNK // weight.size(0)))
        self._product = self.weight.new_empty(self._rows, weight.size(0))
        precise = torch.promote_types(dtype, torch.float32)
        self._values = self._product if precise == dtype else torch.empty_like(self._product, dtype=precise)
        self.kept = self._values[:0] if kept is None else kept
        self.values = self._values
        self._exponentials = False

    def keep(self, most: int) -> None:
        """Let the first chunks of at most ``most`` logits stay."""
        rows = min(self.tokens, most // self._values.size(1)) // self._rows * self._rows
        self.kept = _reused(rows, self._values.size(1), self._values.dtype)

    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self._rows, self.tokens)) for i in range(0, self.tokens, self._rows)]

    def __call__(self, hidden: Tensor, part: slice, again: bool = False) -> Tensor:
        """The logits of these tokens; ``again``: what was kept in their place, where it was."""
        stays = part.stop <= len(self.kept)
        self.values = self.kept[part] if stays else self._values[: part.stop - part.start]
        self._exponentials = stays and again and self.softcap is None
        if stays and again:
            return self.values
        hidden = hidden[part].to(self.weight.dtype)
        in_place = self._product.dtype == self.values.dtype
        product = self.values if in_place else self._product[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=product)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=product)
        if not in_place:
            self.values.copy_(product)
        if self.scale != 1.0:
            self.values.mul_(self.scale)
        if self.softcap is not None:
            self.values.div_(self.softcap).tanh_().mul_(self.softcap)
        return self.values

    def exponentials(self, block: slice, top: Tensor) -> Tensor:
        """exp(logit - top) of a block of the last chunk, written over its logits but under a softcap."""
        z = self.values[block]
        if self.softcap is not None:  # whose slope is a function of the logits
            return (z - top).exp_()
        self._exponentials = True
        return z.sub_(top).exp_()

    def slopes(self, labels: Tensor, log_total: Tensor, top: Tensor, grad: Tensor) -> Tensor:
        """grad * d log p[label] / d (h W^T + b) of the last chunk, written over its logits or exponentials."""
        chosen = self.values.gather(1, labels) if self.softcap is not None else None
        share = (top - log_total).exp()
        for i in range(0, len(labels), BLOCK):
            block = slice(i, i + BLOCK)
            z = self.values[block]
            slope = -grad[block, None] * self.scale
            if self.softcap is not None:
                slope = slope * (1 - (z / self.softcap).square())
            if not self._exponentials:
                z.sub_(top[block, None]).exp_()
            # What cannot matter goes to 0: as denormal numbers it would slow the products 30 times.
            F.threshold_(z, 1e-20, 0.0).mul_(slope * share[block, None])
        peak = grad[:, None] * self.scale
        if self.softcap is not None:
            peak = peak * (1 - (chosen / self.softcap).square())
        self.values.scatter_add_(1, labels, peak.to(self.values.dtype))
        if self._product.dtype == self.values.dtype:
            return self.values
        return self._product[: len(labels)].copy_(self.values)
