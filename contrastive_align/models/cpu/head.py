"""The LM head on a CPU: log-probs of completion tokens, computed a tile of their logits at a time.

TRL's fused head does this in a Triton kernel on GPUs; elsewhere it scores every position, prompts and padding included.
With shared prompts of some 1,200 tokens, this head leaves a training step at K = 4 with 0.24 to 0.28 of the memory that
padded rows with full logits take above the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


TILE_LOGITS = 2**21  # logits of a tile, which fit into the cache
CHUNK_LOGITS = 2**23  # logits of a chunk, where a loss reads all of a token's logits
BLOCK_LOGITS = 2**19  # logits of a chunk that a loss takes at once, which fit into the cache with all that it computes
TILE_TOKENS = 1024  # tokens of a tile, at most
KEPT_LOGITS = 5 * 2**25  # logits kept for the backward pass (640 MB in float32), which recomputes all others
SAFE_SUM = 1e30  # a sum of exponentials that float32 holds with room to spare


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float,
    softcap: float | None,
    token_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    r"""Compute the log-prob of every label without holding the logits of all tokens.

    .. math:: \log \mathrm{softmax}\big( \mathrm{softcap} \tanh(\mathrm{scale}\, (W h + b) / \mathrm{softcap}) \big)_y

    Args:
        hidden: (n, H) the hidden states that predict ``labels``, (n,) token ids.
        weight, bias: (V, H) and (V,) or None, of the head.
        scale, softcap: the factor of the logits, and the model's ``final_logit_softcapping`` or None.
        token_stats: whether to compute more than the log-probs.

    Returns:
        The log-probs (n,) in nats, once differentiable in ``hidden``, ``weight`` and ``bias``; and without a gradient,
        or None, the entropy in nats, the mean logit, and whether the label has the largest logit.
    """
    backward = torch.is_grad_enabled()
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    hidden_grad, kept_logits = backward and hidden.requires_grad, KEPT_LOGITS if backward and trained else 0
    return _ScoreTokens.apply(hidden, weight, bias, labels, scale, softcap, token_stats, hidden_grad, kept_logits)


class _ScoreTokens(torch.autograd.Function):
    r"""Go over the logits in tiles of some tokens by some words, as flash attention goes over keys.

    With logits z, an offset c per token, e_v = exp(z_v - c), T = sum_v e_v and the derivative s_v of the softcap,

    .. math:: T \frac{\partial \log p_y}{\partial z_v} = s_y (T - e_y) \, 1[v = y] - s_v e_v \, 1[v \ne y] ,

    where T - e_y is summed without e_y. While the cache holds a tile, the s_v e_v replace its logits, and their product
    with W is added to the gradient of the hidden states. For the gradient of the weights, the first ``KEPT_LOGITS`` of
    the s_v e_v are kept, and the backward pass recomputes the others. With a frozen head (LoRA), nothing is kept and
    nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, token_stats, hidden_grad, kept_logits=0):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype  # float16 cannot hold a sum of exponentials
        head = _TiledHead(weight, bias, scale, softcap, dtype)
        tiles = _Tiles(len(labels), len(weight), head.precise)
        tiles.keep(kept_logits)
        sums = _TokenSums.zeros(len(labels), hidden.size(1), head.precise, token_stats, hidden_grad)
        rounded = hidden.to(head.dtype)
        for part in tiles.parts():
            _sum_tiles(head, tiles, part, rounded[part], labels[part], sums.of(part))
        totals, shifted = sums.totals(), sums.chosen - sums.offset
        log_totals = totals.log()
        entropy = mean_logits = is_top1 = None
        if token_stats:
            entropy = log_totals - (sums.weighted + shifted.exp() * shifted) / totals
            mean_logits, is_top1 = sums.logits / len(weight), sums.chosen == sums.tops
            ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        slope = None
        if hidden_grad:
            at_label = head.weight[labels] * (sums.others * head.softcap_slope(sums.chosen))[:, None]
            slope = sums.slope.neg_().add_(at_label).div_(totals[:, None]).to(head.dtype)
        ctx.save_for_backward(hidden, weight, bias, labels, sums.chosen, sums.offset, sums.others, slope)
        ctx.scale, ctx.softcap, ctx.dtype, ctx.kept = scale, softcap, head.dtype, tiles.kept
        return shifted - log_totals, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():  # the graph would be missing, and the second derivative silently 0
            raise RuntimeError("ScoreTokens has no second derivative: leave out create_graph=True.")
        hidden, weight, bias, labels, chosen, offset, others, slope = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = (ctx.scale * grad)[:, None]
        grad_hidden = (slope * grad).to(hidden.dtype) if of_hidden else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            kept, ctx.kept = ctx.kept, None  # a second backward pass through this graph recomputes them
            head = _TiledHead(weight, bias, ctx.scale, ctx.softcap, ctx.dtype)
            tiles = _Tiles(len(labels), len(weight), head.precise, kept)
            rounded = hidden.to(head.dtype)
            rows = grad / (others + torch.exp(chosen - offset))[:, None]
            at_label = rows * (others * head.softcap_slope(chosen))[:, None]
            scaled = rounded.to(head.precise) * rows
            new = torch.empty_like if len(labels) else torch.zeros_like
            grad_weight = new(weight, dtype=head.precise) if of_weight else None
            grad_bias = torch.zeros_like(bias, dtype=head.precise) if of_bias else None
            for words in tiles.words():
                for part in tiles.parts(kept_as_one=True):
                    e = tiles.memory(part, words)
                    if not tiles.is_kept(part):
                        head.logits(rounded[part], words, e)
                        head.exponentials(e, offset[part], _label_positions(labels[part], words))
                    if of_weight:
                        grad_weight[words].addmm_(e.T, scaled[part], beta=float(part.start > 0), alpha=-1)
                    if of_bias:
                        grad_bias[words] -= rows[part, 0] @ e
            tiles.give_back()
            if of_weight:
                of_labels = torch.mul(rounded, at_label, out=scaled)
                grad_weight = grad_weight.index_add_(0, labels, of_labels).to(weight.dtype)
            if of_bias:
                grad_bias = grad_bias.index_add_(0, labels, at_label[:, 0]).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


@dataclass
class _TokenSums:
    """Running sums over the vocabulary, (n,) each but for ``slope``; those that were not asked for are None."""

    chosen: Tensor  # the label's logit
    offset: Tensor
    others: Tensor  # sum of e without the label's
    tops: Tensor | None = None  # largest logit
    logits: Tensor | None = None  # sum of z
    weighted: Tensor | None = None  # sum of e (z - c)
    slope: Tensor | None = None  # (n, H): sum of s e W without the label's

    @classmethod
    def zeros(cls, tokens: int, width: int, dtype: torch.dtype, token_stats: bool, hidden_grad: bool) -> _TokenSums:
        values = [torch.zeros(tokens, dtype=dtype) for _ in range(6 if token_stats else 3)]
        return cls(*values, **{"slope": torch.zeros(tokens, width, dtype=dtype)} if hidden_grad else {})

    def of(self, part: slice) -> _TokenSums:
        """Return views of some tokens' sums."""
        return _TokenSums(*(None if value is None else value[part] for value in vars(self).values()))

    def totals(self) -> Tensor:
        return self.others + torch.exp(self.chosen - self.offset)


def _sum_tiles(
    head: _TiledHead, tiles: _Tiles, part: slice, hidden: Tensor, labels: Tensor, sums: _TokenSums, offset=None
) -> None:
    """Sum over the tiles of some tokens. The offset is the largest logit of the first tile unless another is given."""
    for words in tiles.words():
        z = head.logits(hidden, words, tiles.memory(part, words))
        at = _label_positions(labels, words)
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
    if offset is None and not (sums.totals() < SAFE_SUM).all():  # a later tile has far larger logits
        tops = [head.logits(hidden, words, tiles.memory(part, words)).amax(-1) for words in tiles.words()]
        for value in filter(torch.is_tensor, vars(sums).values()):
            value.zero_()
        _sum_tiles(head, tiles, part, hidden, labels, sums, torch.stack(tops).amax(0))


def _label_positions(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of a tile that hold a token's label."""
    rows = ((labels >= words.start) & (labels < words.stop)).nonzero()[:, 0]
    return rows, labels[rows] - words.start


_spare_memory: dict[torch.dtype, Tensor] = {}


class _Tiles:
    """The memory of the tiles: kept for the first tokens, one reused place for all others.

    On a CPU fresh pages cost as much again as a product, so kept memory is reused by the next step.
    """

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, kept: Tensor | None = None) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary
        self._rows = min(tokens, TILE_TOKENS)
        self._words = min(vocabulary, max(1, TILE_LOGITS // max(1, self._rows)))
        self._scratch = torch.empty(self._rows * self._words, dtype=dtype)
        self.kept = self._scratch[:0] if kept is None else kept

    def keep(self, most: int) -> None:
        """Keep the tiles of the first tokens, at most ``most`` logits."""
        size = min(self.tokens, most // self.vocabulary) * self.vocabulary
        if not size:  # spare memory stays for a pass that keeps tiles
            return
        spare = _spare_memory.pop(self._scratch.dtype, None)
        if spare is None or spare.numel() < size:
            spare = torch.empty(size, dtype=self._scratch.dtype)
        self.kept = spare[:size]

    def give_back(self) -> None:
        """Leave the kept memory to the next step."""
        if self.kept.numel():
            _spare_memory[self.kept.dtype] = self.kept.new_empty(0).set_(self.kept.untyped_storage())

    def words(self) -> list[slice]:
        return _even_slices(0, self.vocabulary, self._words)

    def parts(self, kept_as_one: bool = False) -> list[slice]:
        """Return slices of the tokens; with ``kept_as_one`` all tokens with kept tiles are a single slice."""
        kept = len(self.kept) // self.vocabulary
        return _even_slices(0, kept, kept if kept_as_one else self._rows) + _even_slices(kept, self.tokens, self._rows)

    def is_kept(self, part: slice) -> bool:
        return part.stop <= len(self.kept) // self.vocabulary

    def memory(self, part: slice, words: slice) -> Tensor:
        """Return the (tokens, words) memory of a tile."""
        if self.is_kept(part):
            rows = len(self.kept) // self.vocabulary
            return self.kept[words.start * rows : words.stop * rows].view(rows, -1)[part]
        shape = part.stop - part.start, words.stop - words.start
        return self._scratch[: shape[0] * shape[1]].view(shape)


def _even_slices(start: int, stop: int, most: int) -> list[slice]:
    """Split a range into the fewest slices of at most ``most``, of similar lengths: short products are inefficient."""
    length = stop - start
    count = -(-length // most) if length else 0
    return [slice(start + i * length // count, start + (i + 1) * length // count) for i in range(count)]


class HeadWeights:
    """A head in the dtype of its products h W^T + b. All that is computed from these is at least float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype) -> None:
        self.weight, self.bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        self.scale, self.softcap, self.dtype = scale, softcap, dtype
        self.precise = torch.promote_types(dtype, torch.float32)
        self._memory = self.weight.new_empty(0)

    def memory(self, rows: int, words: int) -> Tensor:
        """Return reused memory for products: on a CPU fresh pages cost as much again as a product."""
        if self._memory.numel() < rows * words:
            self._memory = self.weight.new_empty(rows * words)
        return self._memory[: rows * words].view(rows, words)

    def products(self, hidden: Tensor, words: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Write the products of some words to ``out``, or to :meth:`memory`, which the next call overwrites."""
        weight = self.weight[words]
        out = self.memory(len(hidden), len(weight)) if out is None else out
        if self.bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(self.bias[words], hidden, weight.T, out=out)


class _TiledHead(HeadWeights):
    def logits(self, hidden: Tensor, words: slice, out: Tensor) -> Tensor:
        """Write the (tokens, words) logits of a tile to ``out`` and return it."""
        product = self.products(hidden, words, out if self.dtype == self.precise else None)
        if product is not out:
            out.copy_(product)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def softcap_slope(self, z: Tensor) -> Tensor | float:
        """Return the derivative of z = softcap * tanh(u / softcap) with respect to u."""
        return 1.0 if self.softcap is None else 1 - (z / self.softcap).square()

    def exponentials(self, z: Tensor, offset: Tensor, labels: tuple[Tensor, Tensor], sums=None) -> None:
        """Replace a tile's logits z by s e, and by 0 at the labels; add e and e (z - c) to ``sums``."""
        slope = self.softcap_slope(z)
        shifted = z.sub_(offset[:, None])
        if sums is not None and sums.weighted is not None:
            shifted = shifted.clone()
        # Negligible values become 0: as denormal numbers they would slow the products 30 times.
        F.threshold_(z.exp_(), 1e-20, 0.0)
        z[labels] = 0.0
        if sums is not None:
            sums.others += z.sum(-1)
            if sums.weighted is not None:
                sums.weighted += shifted.mul_(z).sum(-1)
        if self.softcap is not None:
            z.mul_(slope)

    def add_product(self, total: Tensor, e: Tensor, words: slice) -> None:
        """Add e W of these words to ``total``."""
        if self.dtype == self.precise:
            total.addmm_(e, self.weight[words])
        else:
            total += self.memory(*e.shape).copy_(e) @ self.weight[words]
