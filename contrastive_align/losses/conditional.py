"""The loss of conditional training: negative log-likelihood + KL to the reference - entropy, at each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


KL_DIRECTIONS = ("reverse", "forward")


class ConditionalTerms(NamedTuple):
    """The terms of :func:`conditional`, (n,) nats per token each; ``loss`` is their weighted sum."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor


def conditional(
    logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    kl_coef: float,
    entropy_coef: float,
    kl_direction: str,
    outside: tuple[int, ...] = (),
) -> ConditionalTerms:
    r"""Return the loss of conditional training and its terms at each completion token.

    .. math:: \ell_t = -\log\pi(y_t) + c_{KL}\, KL_t - c_H\, H(\pi), \qquad
        KL_t = KL(\pi' \| r') \text{ (reverse)} \quad\text{or}\quad KL(r' \| \pi') \text{ (forward)}

    pi is the policy's next-token distribution after the conditioned prompt, r the reference's, which sees no condition.
    Quark, arXiv:2205.13636, penalises the reverse KL; ALT, arXiv:2407.16970, the forward one. pi' and r' are
    renormalised over the tokens that both vocabularies have and that are not ``outside``: the reference does not know
    the tokens that stand for conditions, so these are cut off before the KL. The likelihood and the entropy H are over
    the policy's full vocabulary, as published; a label is a completion token and never stands for a condition.

    Args:
        logits: (n, V) of the policy. The only input with a gradient.
        labels: (n,) token ids.
        reference_logits: (n, V_ref), V_ref <= V: its tokens are the policy's first V_ref ones. May be None when
            ``kl_coef`` is 0, and the KL is then given as 0.
        kl_coef, entropy_coef: weights of the KL and of the entropy bonus, which are only measured where these are 0.
        kl_direction: ``"reverse"`` or ``"forward"``.
        outside: ids of the tokens that stand for conditions.

    A logit of -inf is a word with probability 0, and 0 log 0 = 0. Where one distribution excludes a word that the other
    needs (r' in the reverse, pi' in the forward direction) the KL is infinite, and so given.

    Returns:
        Four (n,) tensors, in nats.

    Raises:
        ValueError: ``kl_coef`` without ``reference_logits``; an unknown direction; shapes or ids not as above.

    >>> logits, reference = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> terms = conditional(logits, torch.tensor([0]), reference_logits=reference, kl_coef=0.1, entropy_coef=0.0,
    ...                     kl_direction="reverse")  # of (2/3, 1/3) to (1/4, 3/4): 2/3 log 8/3 + 1/3 log 4/9
    >>> [round(term.item(), 4) for term in terms]
    [0.7315, 0.6931, 0.3836, 1.0397]
    """
    _check(logits, labels, reference_logits, kl_coef, kl_direction, outside)
    log_pi = logits.log_softmax(-1)
    nll = -log_pi.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = nll
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_coef != 0):
        entropy = -_expected(log_pi.exp(), log_pi)
    if entropy_coef != 0:
        loss = loss - entropy_coef * entropy
    if reference_logits is None:
        return ConditionalTerms(loss, nll, torch.zeros_like(nll), entropy)
    with torch.set_grad_enabled(torch.is_grad_enabled() and kl_coef != 0):
        log_r = _shared(reference_logits.detach().to(logits.dtype), reference_logits.shape[-1], outside).log_softmax(-1)
        if reference_logits.shape[-1] != logits.shape[-1] or len(outside):
            log_pi = _shared(logits, reference_logits.shape[-1], outside).log_softmax(-1)
        if kl_direction == "reverse":
            kl = _expected(log_pi.exp(), log_pi - log_r)
        else:
            kl = _expected(log_r.exp(), log_r - log_pi)
    if kl_coef != 0:
        loss = loss + kl_coef * kl
    return ConditionalTerms(loss, nll, kl, entropy)


def _shared(logits: Tensor, size: int, outside: tuple[int, ...]) -> Tensor:
    """(n, V) -> (n, size): the words outside have probability 0."""
    logits = logits[..., :size]
    known = [i for i in outside if i < size]
    if not known:
        return logits
    return logits.index_fill(-1, torch.tensor(known, device=logits.device), -torch.inf)


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v values_v where what has probability 0 does not count, whatever its value."""
    return (p * values.masked_fill(p == 0, 0.0)).sum(-1)


def _check(logits, labels, reference_logits, kl_coef: float, kl_direction: str, outside: tuple[int, ...]) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected (n, V) and (n,): flatten "
            "batch and time, and keep completion tokens only."
        )
    if kl_direction not in KL_DIRECTIONS:
        raise ValueError(
            f"kl_direction is {kl_direction!r}, expected 'reverse', KL(policy || reference), as in Quark, or "
            "'forward', KL(reference || policy), as in ALT."
        )
    vocabulary = logits.shape[1]
    unknown = [i for i in outside if not 0 <= i < vocabulary]
    if unknown:
        raise ValueError(f"outside has token id {unknown[0]}, expected ids of the policy's {vocabulary} tokens.")
    if reference_logits is None:
        if kl_coef != 0:
            raise ValueError(f"kl_coef is {kl_coef}, but reference_logits is None. Give them, or set kl_coef to 0.")
        return
    n, size = reference_logits.shape
    if n != len(logits) or size > vocabulary:
        raise ValueError(
            f"reference_logits are {(n, size)}, expected ({len(logits)}, V_ref) with V_ref at most {vocabulary}: the "
            "policy's tokens are the reference's, and those added behind them."
        )
    if len({i for i in outside if i < size}) == size:
        raise ValueError(f"All {size} tokens of the reference are outside: there is nothing to take a KL over.")
