"""The conditional loss of many tokens and its gradient, a chunk of logits at a time.

Two vocabularies of logits for every token of a batch would not fit into memory. Each token's weight is known before, so
the forward pass also computes the gradient of every chunk, and nothing is computed twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_align.losses import ConditionalTerms, conditional
from contrastive_align.models.cpu.head import HeadWeights
from contrastive_align.models.logits_at_once import rows_at_once


NEGLIGIBLE = 1e-20  # smaller slopes become 0: as denormal numbers they would slow the products 30 times


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
    kl_coef: float,
    entropy_coef: float,
    kl_direction: str,
    outside: tuple[int, ...] = (),
    weights: Tensor | None = None,
) -> ConditionalTerms:
    r"""Sum :func:`~contrastive_align.losses.conditional` over the completion tokens of a batch, with weights.

    .. math:: L = \sum_t w_t\, \ell_t(z_t), \qquad
        z_t = \mathrm{softcap} \cdot \tanh\big( \mathrm{scale}\, (W h_t + b) / \mathrm{softcap} \big)

    The logits z are at least float32 and exist for one chunk of tokens at a time. Under autocast the products with W
    are in autocast's dtype. Differentiable once, in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (n, H) the policy's last hidden states at the positions that predict ``labels``, (n,) token ids.
        weight, bias: (V, H) and (V,) or None, of the policy's head.
        reference: hidden states (n, H_ref), weight (V_ref, H_ref) and bias of the reference, V_ref <= V, used without a
            gradient; None if ``kl_coef`` is 0 and the KL need not be measured.
        scale, ref_scale: the factors of the logits of policy and reference.
        softcap, ref_softcap: their ``final_logit_softcapping``, or None.
        kl_coef, entropy_coef, kl_direction, outside: as in :func:`~contrastive_align.losses.conditional`.
        weights: (n,) w_t without a gradient, 1 if None. A token of weight 0 has no part in loss and gradient, even if
            its values are not finite.

    Returns:
        ``loss``, a scalar with a gradient; the other terms are (n,), in nats per token, without a gradient.

    Raises:
        ValueError: the cases of :func:`~contrastive_align.losses.conditional`, or shapes that do not match.
        RuntimeError: a second backward pass through the same loss.

    >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.eye(4, 3)
    >>> terms = token_loss(hidden, head, None, torch.tensor([0, 1]), kl_coef=0.0, entropy_coef=0.0,
    ...                    kl_direction="reverse", weights=torch.tensor([0.5, 0.5]))
    >>> terms.loss.backward()
    >>> round(terms.loss.item(), 4), hidden.grad  # log 4, and half of p - one-hot for the first three words
    (1.3863, tensor([[-0.3750,  0.1250,  0.1250],
            [ 0.1250, -0.3750,  0.1250]]))
    """
    _check_shapes(hidden, weight, bias, labels, weights)
    policy, scored = ChunkedHead(weight, bias, scale, softcap), None
    if reference is not None:
        ref_hidden, ref_weight, ref_bias = (None if x is None else x.detach() for x in reference)
        _check_shapes(ref_hidden, ref_weight, ref_bias, labels, None, of="reference ")
        scored = (ref_hidden, ChunkedHead(ref_weight, ref_bias, ref_scale, ref_softcap))
    terms = dict(kl_coef=kl_coef, entropy_coef=entropy_coef, kl_direction=kl_direction, outside=tuple(outside))
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return ConditionalTerms(*_TokenLoss.apply(hidden, weight, bias, labels, weights, policy, scored, terms, wanted))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, weights, policy, reference, terms, wanted):
        n = len(labels)
        weights = hidden.new_ones(n, dtype=policy.precise) if weights is None else weights.detach().to(policy.precise)
        # Slopes are divided by the largest weight, so that 16 bits hold them; backward multiplies by it again.
        unit = weights.abs().max() if n else weights.new_ones(())
        unit = torch.where(unit > 0, unit, 1)
        losses, *measured = (weights.new_zeros(n) for _ in range(4))
        grads = _Gradients(hidden, weight, bias, policy, wanted)
        rows, block_rows = rows_at_once(hidden.device, len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(0, n, rows):
                products = policy.products(hidden[part].to(policy.dtype))
                if reference is not None:
                    ref_hidden, ref_head = reference
                    ref_products = ref_head.products(ref_hidden[part].to(ref_head.dtype))
                for block in _slices(part.start, part.stop, block_rows):
                    local = slice(block.start - part.start, block.stop - part.start)
                    product = products[local].detach().requires_grad_(any(wanted))
                    ref_logits = None if reference is None else ref_head.logits(ref_products[local])
                    with torch.set_grad_enabled(any(wanted)):
                        found = conditional(policy.logits(product), labels[block], reference_logits=ref_logits, **terms)
                    for whole, values in zip((losses, *measured), found, strict=True):
                        whole[block] = values.detach()
                    if any(wanted):
                        (slopes,) = torch.autograd.grad(found.loss, product, weights[block] / unit)
                        slopes[weights[block] == 0] = 0.0
                        products[local] = F.hardshrink(slopes, NEGLIGIBLE)
                if any(wanted):
                    grads.add(products, part)
        ctx.grads, ctx.unit = grads, unit
        ctx.mark_non_differentiable(*measured)
        return (weights * losses.masked_fill(weights == 0, 0.0)).sum(), *measured

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():  # the graph would be missing, and the second derivative silently 0
            raise RuntimeError("TokenLoss has no second derivative: leave out create_graph=True.")
        if ctx.grads is None:
            raise RuntimeError("The gradient of this token_loss was used already: call token_loss again.")
        grads, ctx.grads = ctx.grads, None  # scaled in place below, since a head's gradient is as large as the head
        return *grads.times(grad * ctx.unit), *(None,) * 6


class ChunkedHead(HeadWeights):
    """softcap(scale * (h W^T + b)), in two steps: the products of a chunk, and the logits of some of these."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        super().__init__(weight, bias, scale, softcap, dtype)

    def logits(self, products: Tensor) -> Tensor:
        z = products.to(self.precise)
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class _Gradients:
    """d L / d (hidden, weight, bias), summed in float32 at least, from the slopes d L / d (h W^T + b)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: ChunkedHead, wanted: list[bool]):
        self._inputs, self._head = hidden.detach(), head
        self._dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        self.hidden = torch.empty_like(hidden, dtype=head.precise) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.precise) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=head.precise) if wanted[2] else None

    def add(self, slopes: Tensor, part: slice) -> None:
        if self.hidden is not None:
            self.hidden[part] = slopes @ self._head.weight
        if self.weight is not None:
            h = self._inputs[part].to(slopes.dtype)
            if self.weight.dtype == slopes.dtype:
                self.weight.addmm_(slopes.T, h)
            else:  # products in 16 bits, a piece of the vocabulary at a time, to be summed in 32
                for words in _slices(0, len(self.weight), 2**14):
                    self.weight[words] += slopes[:, words].T @ h
        if self.bias is not None:
            self.bias += slopes.sum(0, dtype=self.bias.dtype)

    def times(self, factor: Tensor) -> list[Tensor | None]:
        return [
            None if x is None else x.mul_(factor).to(dtype)
            for x, dtype in zip((self.hidden, self.weight, self.bias), self._dtypes, strict=True)
        ]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _check_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None, of: str = ""
) -> None:
    n, size = len(labels), len(weight)
    if hidden.shape != (n, weight.shape[-1]):
        raise ValueError(
            f"{of}hidden is {tuple(hidden.shape)} for {n} labels and a {of}weight {tuple(weight.shape)}, expected "
            f"{(n, weight.shape[-1])}: one hidden state for each label."
        )
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"{of}bias is {tuple(bias.shape)}, expected {(size,)}, as its weight has {size} rows.")
    if weights is not None and weights.shape != (n,):
        raise ValueError(f"weights are {tuple(weights.shape)}, expected {(n,)}: one for each label.")
