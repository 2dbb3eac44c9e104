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
from torch.autograd.function import once_differentiable
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
        slopes, keep = backward and hidden.requires_grad, KEPT if backward and trained else 0
        values = _ScoreTokens.apply(hidden, head.weight, head.bias, labels, scale, softcap, token_stats, slopes, keep)
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
    r"""log softmax(softcap(scale * (h W^T + b)))[label] of every token.

    With logits z, their largest z* and T = sum_v exp(z_v - z*),

    .. math:: \frac{\partial \log p_y}{\partial z_v} = -\frac1T \big( e^{z_v - z^*} - T\, 1[v = y] \big) .

    The bracket takes the place of the logits, and what stands before it scales the rows of the smaller factor of each
    product. The gradient with respect to the hidden states is made of it at once. That with respect to the weights
    is made in the backward pass, of the first ``KEPT`` brackets, which stay, and of the others, which are made again;
    where the head is frozen (LoRA), nothing is kept and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, token_stats, slopes, keep=0):
        logits = _Logits(weight, bias, scale, softcap, len(labels))
        logits.keep(keep)
        chosen, tops, totals, entropy, mean_logits = (
            hidden.new_empty(len(labels), dtype=logits.values.dtype) for _ in range(5)
        )
        is_top1 = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        slope = torch.empty_like(hidden, dtype=logits.weight.dtype) if slopes else None
        for part in logits.chunks():
            z, y = logits(hidden, part), labels[part]
            chosen[part] = z.gather(1, y[:, None])[:, 0]
            for i in range(0, len(z), BLOCK):
                block = slice(i, i + BLOCK)
                here = slice(part.start + i, min(part.start + i + BLOCK, part.stop))
                tops[here] = z[block].amax(-1)
                if token_stats:
                    mean_logits[here] = z[block].mean(-1)
                p, shifted = logits.exponentials(block, tops[here])
                totals[here] = p.sum(-1)
                if token_stats:
                    entropy[here] = totals[here].log() - shifted.mul_(p).sum(-1) / totals[here]
            if slopes or keep:
                logits.subtract(y, chosen[part], totals[part])
            if slopes:
                slope[part] = logits.times_weight(totals[part])
        ctx.save_for_backward(hidden, weight, bias, labels, chosen, tops, totals, slope)
        ctx.scale, ctx.softcap, ctx.compute, ctx.kept = scale, softcap, logits.weight.dtype, logits.kept
        torch.eq(chosen, tops, out=is_top1)
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return chosen - tops - totals.log(), entropy, mean_logits, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, bias, labels, chosen, tops, totals, slope = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = -ctx.scale * grad[:, None]
        rows = grad / totals[:, None]
        grad_hidden = (slope * grad).to(hidden.dtype) if of_hidden else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            kept, ctx.kept = ctx.kept, None  # whose memory is given back: a second backward pass makes it anew
            logits = _Logits(weight, bias, ctx.scale, ctx.softcap, len(labels), ctx.compute, kept)
            precise = logits.values.dtype
            new = torch.empty_like if len(labels) else torch.zeros_like
            grad_weight = new(weight, dtype=precise) if of_weight else None
            grad_bias = torch.zeros_like(bias, dtype=precise) if of_bias else None
            for part in logits.chunks():
                if not logits.restore(part):
                    logits(hidden, part)
                    for i in range(0, part.stop - part.start, BLOCK):
                        logits.exponentials(slice(i, i + BLOCK), tops[part][i : i + BLOCK])
                    logits.subtract(labels[part], chosen[part], totals[part])
                if of_weight:
                    h = hidden[part].to(ctx.compute).to(precise) * rows[part]
                    grad_weight.addmm_(logits.values.T, h, beta=0 if part.start == 0 else 1)
                if of_bias:
                    grad_bias += rows[part, 0] @ logits.values
            _give_back(logits.kept)
            grad_weight = grad_weight.to(weight.dtype) if of_weight else None
            grad_bias = grad_bias.to(bias.dtype) if of_bias else None
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


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
    """softcap(scale * (h W^T + b)) of a chunk of tokens at a time, in float32 at least; then what gradients need of it.

    A chunk that ``kept`` has rows for is written there and can be restored; all others are written into the same
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

    def keep(self, most: int) -> None:
        """Let the first chunks of at most ``most`` logits stay."""
        rows = min(self.tokens, most // self._values.size(1)) // self._rows * self._rows
        self.kept = _reused(rows, self._values.size(1), self._values.dtype)

    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self._rows, self.tokens)) for i in range(0, self.tokens, self._rows)]

    def restore(self, part: slice) -> bool:
        """Whether ``values`` is now what was kept of these tokens."""
        if part.stop > len(self.kept):
            return False
        self.values = self.kept[part]
        return True

    def __call__(self, hidden: Tensor, part: slice) -> Tensor:
        """The logits of these tokens, which are ``values`` from now on."""
        if not self.restore(part):
            self.values = self._values[: part.stop - part.start]
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

    def exponentials(self, block: slice, top: Tensor) -> tuple[Tensor, Tensor]:
        """exp(z - top) of a block's logits z, and z - top; the first, times the softcap's slope, takes their place."""
        z = self.values[block]
        shifted = z - top[:, None]
        if self.softcap is None:
            p = torch.exp(shifted, out=z)
        else:
            p = shifted.exp()
            z.copy_(self._steepness(z).mul_(p))
        F.threshold_(z, 1e-20, 0.0)  # what cannot matter: as denormal numbers it would slow the products 30 times
        return p, shifted

    def subtract(self, labels: Tensor, chosen: Tensor, totals: Tensor) -> None:
        """The total, times the softcap's slope, from the exponential of each token's label."""
        taken = totals if self.softcap is None else totals * self._steepness(chosen)
        self.values.scatter_add_(1, labels[:, None], -taken[:, None])

    def times_weight(self, totals: Tensor) -> Tensor:
        """``values / totals`` times W, in the dtype of the products."""
        if self._product.dtype == self.values.dtype:
            return (self.values @ self.weight).div_(totals[:, None])
        # Divided before it is rounded: a sum of 70,000 exponentials is infinite in float16.
        return torch.div(self.values, totals[:, None], out=self._product[: len(self.values)]) @ self.weight

    def _steepness(self, z: Tensor) -> Tensor:
        """The derivative of softcap * tanh(u / softcap) with respect to u, from its value."""
        return 1 - (z / self.softcap).square()
