"""The LM head only where it is needed: completion tokens, a tile of their logits at a time.

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

from contrastive_align.models.gradients import first_derivative_only
from contrastive_align.models.token_loss import head_parameters


TILE = 2**21  # logits made at once, which the cache holds
ROWS = 1024  # tokens of a tile, at most
KEPT = 5 * 2**25  # logits that stay for the backward pass (640 MB in float32), which makes the others again
LARGEST = 1e30  # a sum of exponentials that is safe in float32


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

    A tile of the logits at a time, some tokens by some words, as flash attention goes over keys. With logits z, an
    offset c per token, e_v = exp(z_v - c), T = sum_v e_v and the slope s_v of the softcap,

    .. math:: T \frac{\partial \log p_y}{\partial z_v} = s_y (T - e_y) \, 1[v = y] - s_v e_v \, 1[v \ne y] ,

    where T - e_y is summed without e_y. While the cache holds a tile, the s_v e_v take the place of its logits, and
    their product with W joins the gradient with respect to the hidden states. That with respect to the weights is made
    in the backward pass, of the first ``KEPT`` of them, which stay, and of the others, which are made again; where the
    head is frozen (LoRA), nothing is kept and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, token_stats, slopes, keep=0):
        head = _Head(weight, bias, scale, softcap)
        tiles = _Tiles(len(labels), len(weight), head.precise)
        tiles.keep(keep)
        sums = _Sums.zeros(len(labels), hidden.size(1), head.precise, token_stats, slopes)
        rounded = hidden.to(head.dtype)
        for part in tiles.parts():
            _score(head, tiles, part, rounded[part], labels[part], sums.of(part))
        totals, shifted = sums.totals(), sums.chosen - sums.offset
        log_totals = totals.log()
        entropy = mean_logits = is_top1 = None
        if token_stats:
            entropy = log_totals - (sums.weighted + shifted.exp() * shifted) / totals
            mean_logits, is_top1 = sums.logits / len(weight), sums.chosen == sums.tops
            ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        slope = None
        if slopes:
            at_label = head.weight[labels] * (sums.others * head.steepness(sums.chosen))[:, None]
            slope = ((at_label - sums.slope) / totals[:, None]).to(head.dtype)
        ctx.save_for_backward(hidden, weight, bias, labels, sums.chosen, sums.offset, sums.others, slope)
        ctx.scale, ctx.softcap, ctx.dtype, ctx.kept = scale, softcap, head.dtype, tiles.kept
        return shifted - log_totals, entropy, mean_logits, is_top1

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad, *_):
        hidden, weight, bias, labels, chosen, offset, others, slope = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = (ctx.scale * grad)[:, None]
        grad_hidden = (slope * grad).to(hidden.dtype) if of_hidden else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            kept, ctx.kept = ctx.kept, None  # whose memory is given back: a second backward pass makes it anew
            head = _Head(weight, bias, ctx.scale, ctx.softcap, ctx.dtype)
            tiles = _Tiles(len(labels), len(weight), head.precise, kept)
            rounded = hidden.to(head.dtype)
            rows = grad / (others + torch.exp(chosen - offset))[:, None]
            at_label = rows * (others * head.steepness(chosen))[:, None]
            scaled = rounded.to(head.precise) * rows
            new = torch.empty_like if len(labels) else torch.zeros_like
            grad_weight = new(weight, dtype=head.precise) if of_weight else None
            grad_bias = torch.zeros_like(bias, dtype=head.precise) if of_bias else None
            for words in tiles.words():
                for part in tiles.parts(whole=True):
                    e = tiles.memory(part, words)
                    if not tiles.is_kept(part):
                        head.logits(rounded[part], words, e)
                        head.exponentials(e, offset[part], _positions(labels[part], words))
                    if of_weight:
                        grad_weight[words].addmm_(e.T, scaled[part], beta=float(part.start > 0), alpha=-1)
                    if of_bias:
                        grad_bias[words] -= rows[part, 0] @ e
            tiles.give_back()
            if of_weight:
                grad_weight = grad_weight.index_add_(0, labels, rounded * at_label).to(weight.dtype)
            if of_bias:
                grad_bias = grad_bias.index_add_(0, labels, at_label[:, 0]).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


@dataclass
class _Sums:
    """Of each token: its label's logit, the offset, the other words' exponentials, and what else was asked for."""

    chosen: Tensor
    offset: Tensor
    others: Tensor
    tops: Tensor | None = None  # largest logit
    logits: Tensor | None = None  # their sum
    weighted: Tensor | None = None  # sum of e (z - c)
    slope: Tensor | None = None  # (n, H): sum of s e W, without the label's

    @classmethod
    def zeros(cls, tokens: int, width: int, dtype: torch.dtype, token_stats: bool, slopes: bool) -> _Sums:
        values = [torch.zeros(tokens, dtype=dtype) for _ in range(6 if token_stats else 3)]
        return cls(*values, **{"slope": torch.zeros(tokens, width, dtype=dtype)} if slopes else {})

    def of(self, part: slice) -> _Sums:
        """Those of some tokens, to write to."""
        return _Sums(*(None if value is None else value[part] for value in vars(self).values()))

    def totals(self) -> Tensor:
        return self.others + torch.exp(self.chosen - self.offset)

    def clear(self) -> None:
        for value in vars(self).values():
            if value is not None:
                value.zero_()


def _score(
    head: _Head, tiles: _Tiles, part: slice, hidden: Tensor, labels: Tensor, sums: _Sums, offset: Tensor | None = None
) -> None:
    """Sum up the tiles of some tokens. The largest logit of a token's first tile is its offset, where that serves."""
    for words in tiles.words():
        z = head.logits(hidden, words, tiles.memory(part, words))
        at = _positions(labels, words)
        sums.chosen[at[0]] = z[at]
        if words.start == 0:
            sums.offset.copy_(z.amax(-1) if offset is None else offset)
        if sums.tops is not None:
            top = z.amax(-1)
            sums.tops.copy_(top if words.start == 0 else sums.tops.maximum(top))
            sums.logits += z.sum(-1)
        head.exponentials(z, sums.offset, at, sums)
        if sums.slope is not None:
            head.add_product(sums.slope, z, words)
    if offset is None and not (sums.totals() < LARGEST).all():  # other tiles have far larger ones
        tops = [head.logits(hidden, words, tiles.memory(part, words)).amax(-1) for words in tiles.words()]
        sums.clear()
        _score(head, tiles, part, hidden, labels, sums, torch.stack(tops).amax(0))


def _positions(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Rows and columns of a tile where a token has its label."""
    rows = ((labels >= words.start) & (labels < words.stop)).nonzero()[:, 0]
    return rows, labels[rows] - words.start


_spare: dict[torch.dtype, Tensor] = {}


class _Tiles:
    """Where the tiles lie: those of the first tokens in memory that stays, all others one after the other in one place.

    On a CPU fresh pages cost as much again as a product. The memory that stayed serves the next step again.
    """

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, kept: Tensor | None = None) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary
        self._rows = min(tokens, ROWS)
        self._words = min(vocabulary, max(1, TILE // max(1, self._rows)))
        self._scratch = torch.empty(self._rows * self._words, dtype=dtype)
        self.kept = self._scratch[:0] if kept is None else kept

    def keep(self, most: int) -> None:
        """Let those of the first tokens stay, at most so many logits."""
        size = min(self.tokens, most // self.vocabulary) * self.vocabulary
        if not size:  # what is spare waits for a pass that has a use for it
            return
        spare = _spare.pop(self._scratch.dtype, None)
        if spare is None or spare.numel() < size:
            spare = torch.empty(size, dtype=self._scratch.dtype)
        self.kept = spare[:size]

    def give_back(self) -> None:
        if self.kept.numel():
            _spare[self.kept.dtype] = self.kept.new_empty(0).set_(self.kept.untyped_storage())

    def words(self) -> list[slice]:
        return _slices(0, self.vocabulary, self._words)

    def parts(self, whole: bool = False) -> list[slice]:
        """Of the tokens; ``whole``: those that are kept as one."""
        kept = len(self.kept) // self.vocabulary
        return _slices(0, kept, kept if whole else self._rows) + _slices(kept, self.tokens, self._rows)

    def is_kept(self, part: slice) -> bool:
        return part.stop <= len(self.kept) // self.vocabulary

    def memory(self, part: slice, words: slice) -> Tensor:
        if self.is_kept(part):
            rows = len(self.kept) // self.vocabulary
            return self.kept[words.start * rows : words.stop * rows].view(rows, -1)[part]
        shape = part.stop - part.start, words.stop - words.start
        return self._scratch[: shape[0] * shape[1]].view(shape)


def _slices(start: int, stop: int, most: int) -> list[slice]:
    """As few as can be, of at most so many, and of about the same length: short ones waste a product's start."""
    length = stop - start
    count = -(-length // most) if length else 0
    return [slice(start + i * length // count, start + (i + 1) * length // count) for i in range(count)]


class _Head:
    """Weights in the dtype of the products; what is made of the products is float32 at least."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
            dtype = torch.float32 if dtype == torch.float16 else dtype  # which cannot hold a sum of exponentials
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.scale, self.softcap, self.dtype = scale, softcap, dtype
        self.precise = torch.promote_types(dtype, torch.float32)
        self._rounded = self.weight.new_empty(0)

    def logits(self, hidden: Tensor, words: slice, out: Tensor) -> Tensor:
        """(tokens, words), in ``out``."""
        product = out if self.dtype == self.precise else self._like(out)
        if self.bias is None:
            torch.mm(hidden, self.weight[words].T, out=product)
        else:
            torch.addmm(self.bias[words], hidden, self.weight[words].T, out=product)
        if product is not out:
            out.copy_(product)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def steepness(self, z: Tensor) -> Tensor | float:
        """The derivative of softcap * tanh(u / softcap) with respect to u, from its value."""
        return 1.0 if self.softcap is None else 1 - (z / self.softcap).square()

    def exponentials(self, z: Tensor, offset: Tensor, labels: tuple[Tensor, Tensor], sums: _Sums | None = None) -> None:
        """s e in place of the logits z of a tile, and 0 where the labels are; e and e (z - c) join the sums."""
        steepness = self.steepness(z)
        shifted = z.sub_(offset[:, None])
        if sums is not None and sums.weighted is not None:
            shifted = shifted.clone()
        # What cannot matter is left out: as denormal numbers it would slow the products 30 times.
        F.threshold_(z.exp_(), 1e-20, 0.0)
        z[labels] = 0.0
        if sums is not None:
            sums.others += z.sum(-1)
            if sums.weighted is not None:
                sums.weighted += shifted.mul_(z).sum(-1)
        if self.softcap is not None:
            z.mul_(steepness)

    def add_product(self, total: Tensor, e: Tensor, words: slice) -> None:
        """e W of these words."""
        if self.dtype == self.precise:
            total.addmm_(e, self.weight[words])
        else:
            total += self._like(e).copy_(e) @ self.weight[words]

    def _like(self, tile: Tensor) -> Tensor:
        """Memory for a tile in the dtype of the products."""
        if self._rounded.numel() < tile.numel():
            self._rounded = self.weight.new_empty(tile.numel())
        return self._rounded[: tile.numel()].view(tile.shape)
