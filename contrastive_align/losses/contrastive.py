"""Losses on groups: one prompt, K completions, one score each.

Every loss here is a pure function with one signature::

    loss(log_ratios, scores, *, beta, temperature_alpha, valid=None, policy_logps=None, lengths=None) -> (B,)

====================  ============  ================================================================================
argument              shape         meaning
====================  ============  ================================================================================
``log_ratios``        (B, K) nats   sum over the completion's tokens of log pi(y|x) - log ref(y|x)
``scores``            (B, K)        the explicit rewards; higher is better
``beta``              float         implied reward r = beta * log_ratio
``temperature_alpha`` float > 0     labels p = softmax(scores / temperature_alpha); see :func:`target_labels`
``valid``             (B, K) bool   False marks a column that is not there (ragged K); default: all True
``policy_logps``      (B, K) nats   log pi(y|x), summed over tokens; only ``sft`` reads it
``lengths``           (B, K) int    tokens per completion; only ``sft`` reads it
====================  ============  ================================================================================

All of these accept the same keywords, also those they do not need. One of the user's own takes what its parameters
name, see :func:`register_loss`. None averages over the batch. A masked column is as good as removed, in value and in
gradient; a row without any valid column gives 0 and a finite gradient.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_align.registry import Registry, place_of


def target_labels(scores: Tensor, *, temperature_alpha: float, valid: Tensor | None = None) -> Tensor:
    r"""Soft labels over the K completions of a group.

    .. math:: p_i = \mathrm{softmax}(s / \alpha)_i

    Noise Contrastive Alignment, arXiv:2402.05369, section 3 (alpha is the temperature of the explicit rewards).
    A preference, that is a group of two valid completions with scores 1 and 0, is always hard: p = (1, 0) whatever
    ``temperature_alpha``. Equal scores share their label equally.

    Args:
        scores: (B, K).
        temperature_alpha: > 0. Small values give one-hot labels, large ones uniform labels.
        valid: (B, K) bool.

    Returns:
        (B, K), each row summing to 1, or to 0 where no column is valid.

    Raises:
        ValueError: ``temperature_alpha`` is not positive.

    >>> target_labels(torch.tensor([[3.0, 2.0, 2.0]]), temperature_alpha=1.0)
    tensor([[0.5761, 0.2119, 0.2119]])
    >>> target_labels(torch.tensor([[1.0, 0.0]]), temperature_alpha=1.0)
    tensor([[1., 0.]])
    """
    if not temperature_alpha > 0:
        raise ValueError(
            f"temperature_alpha is {temperature_alpha}, expected a number above 0. For one-hot labels use a small one "
            "such as 1e-4."
        )
    valid = _all_valid(scores) if valid is None else valid
    s = scores.masked_fill(~valid, -torch.inf)
    best = s.amax(-1, keepdim=True)
    # Subtract the best score before dividing: scores of 1e4 over 1e-4 would leave no digits for the differences.
    gaps = torch.where(valid, scores - best, 0.0)
    p = torch.softmax((gaps / temperature_alpha).masked_fill(~valid & valid.any(-1, keepdim=True), -torch.inf), -1)
    hard = is_preference(scores, valid=valid).unsqueeze(-1)
    return torch.where(hard, (scores == 1).to(p.dtype), p).masked_fill(~valid, 0.0)


def is_preference(scores: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """(B,) bool: whether a group is a preference, that is two valid completions with scores 1 and 0.

    >>> is_preference(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    tensor([ True, False,  True])
    """
    valid = _all_valid(scores) if valid is None else valid
    return (valid.sum(-1) == 2) & (valid & (scores == 1)).any(-1) & (valid & (scores == 0)).any(-1)


def add_first_score_bonus(scores: Tensor, valid: Tensor, bonus: float) -> Tensor:
    """Return the scores (B, K) with ``bonus`` added to each group's first, except in preferences.

    >>> add_first_score_bonus(torch.tensor([[3.0, 3.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), 0.5)
    tensor([[3.5000, 3.0000, 1.0000]])
    """
    scores = scores.clone()
    scores[:, 0] += bonus * ~is_preference(scores, valid=valid)
    return scores


def nca(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Noise contrastive alignment: each completion is classified on its own, data against noise.

    .. math:: -\sum_i p_i \log\sigma(r_i) - \frac{1}{K} \sum_i \log\sigma(-r_i), \qquad r_i = \beta \cdot
        \text{log\_ratio}_i

    Noise Contrastive Alignment, arXiv:2402.05369, section 4. The optimum pins absolute levels, r_i = ln(K p_i), so the
    likelihood of the best completion need not fall. At policy = reference the loss is 2 ln 2 for every K. On a
    preference it is TRL's ``nca_pair``.

    >>> nca(torch.zeros(1, 4), torch.tensor([[3.0, 1.0, 1.0, 0.0]]), beta=0.1, temperature_alpha=1e-4)
    tensor([1.3863])
    """
    r, p, valid = _rewards_and_labels(log_ratios, scores, beta, temperature_alpha, valid)
    k = valid.sum(-1).clamp(min=1)
    return -(p * F.logsigmoid(r)).sum(-1) - (F.logsigmoid(-r) * valid).sum(-1) / k


def info_nca(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""InfoNCA: cross-entropy between the labels and the softmax of the implied rewards.

    .. math:: -\sum_i p_i \log \mathrm{softmax}(r)_i

    Noise Contrastive Alignment, arXiv:2402.05369, section 3. The optimum is softmax(r) = p with loss H(p); only
    differences are pinned. At policy = reference the loss is ln K. On a preference it is DPO; with soft labels on a
    pair it is conservative DPO.

    >>> info_nca(torch.zeros(1, 4), torch.tensor([[3.0, 1.0, 1.0, 0.0]]), beta=0.1, temperature_alpha=1e-4)
    tensor([1.3863])
    """
    r, p, valid = _rewards_and_labels(log_ratios, scores, beta, temperature_alpha, valid)
    log_softmax = r - _masked_logsumexp(r, valid).unsqueeze(-1)
    return -(p * log_softmax).sum(-1)


def biased_nca(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Biased NCA on pairs: the winner is data, the loser is noise.

    .. math:: -\log\sigma(r_w) - \log\sigma(-r_l)

    The variant of the authors' code for arXiv:2402.05369; TRL calls it ``bco_pair``. Winner and loser are told apart by
    the order of the scores; a tie is the mean of both orders.

    Raises:
        ValueError: a group does not hold exactly two valid completions.

    >>> biased_nca(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0]]), beta=1.0, temperature_alpha=1e-4)
    tensor([0.6265])
    """
    r, s, valid = _rewards_and_scores(log_ratios, scores, beta, valid)
    k = valid.sum(-1)
    if bool(((k != 2) & (k != 0)).any()):
        found = sorted(set(k.tolist()))
        raise ValueError(
            f"biased_nca is defined on pairs, found groups with K in {found}. Use 'nca', which is the same idea for "
            "any K, or keep two completions per group."
        )
    wins = (valid & (s == s.amax(-1, keepdim=True))).to(r.dtype)
    wins = wins / wins.sum(-1, keepdim=True).clamp(min=1)
    losses = valid.to(r.dtype) - wins
    return -(wins * F.logsigmoid(r)).sum(-1) - (losses * F.logsigmoid(-r)).sum(-1)


def dpo(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta,
    temperature_alpha,
    valid=None,
    policy_logps=None,
    lengths=None,
    pairs: str = "all",
) -> Tensor:
    r"""Direct preference optimisation on the pairs that the order of the scores makes.

    .. math:: \frac{1}{|P|} \sum_{(i, j) \in P} -\log\sigma(r_i - r_j), \qquad P \subseteq \{(i, j): s_i > s_j\}

    DPO, arXiv:2305.18290, eq. 7. ``pairs="all"`` takes every pair with different scores, ``"best_vs_rest"`` only those
    whose winner has the group's highest score. Ties make no pair; a group without a pair gives 0 (and still counts
    when the caller averages over the batch).

    Raises:
        ValueError: ``pairs`` is neither ``"all"`` nor ``"best_vs_rest"``.

    >>> dpo(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.0]]), beta=1.0, temperature_alpha=1e-4)
    tensor([0.3133])
    """
    if pairs not in ("all", "best_vs_rest"):
        raise ValueError(f"pairs is {pairs!r}, expected 'all' or 'best_vs_rest'.")
    r, s, valid = _rewards_and_scores(log_ratios, scores, beta, valid)
    beats = valid.unsqueeze(-1) & valid.unsqueeze(-2) & (s.unsqueeze(-1) > s.unsqueeze(-2))
    if pairs == "best_vs_rest":
        beats = beats & (s == s.amax(-1, keepdim=True)).unsqueeze(-1)
    pair_losses = -F.logsigmoid(r.unsqueeze(-1) - r.unsqueeze(-2)) * beats
    return pair_losses.sum((-1, -2)) / beats.sum((-1, -2)).clamp(min=1)


def dpo_best_vs_rest(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """:func:`dpo` with ``pairs="best_vs_rest"``: the baseline of arXiv:2402.05369 on explicit rewards.

    >>> dpo_best_vs_rest(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]]), beta=0.1, temperature_alpha=1e-4)
    tensor([0.6931])
    """
    return dpo(log_ratios, scores, beta=beta, temperature_alpha=temperature_alpha, valid=valid, pairs="best_vs_rest")


def plackett_luce(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Listwise DPO: the Plackett-Luce likelihood of the ranking by score.

    .. math:: -\sum_i \Big( r_i - \log \sum_{j: s_j \le s_i} e^{r_j} \Big)

    DPO, arXiv:2305.18290, appendix A.3. Ties take Breslow's form: tied completions share one denominator,
    which holds all of them. A group whose scores are all equal gives 0. On a pair it is DPO.

    >>> plackett_luce(torch.zeros(1, 3), torch.tensor([[3.0, 2.0, 1.0]]), beta=0.1, temperature_alpha=1e-4)
    tensor([1.7918])
    """
    r, s, valid = _rewards_and_scores(log_ratios, scores, beta, valid)
    not_above = valid.unsqueeze(-2) & (s.unsqueeze(-2) <= s.unsqueeze(-1))  # [b, i, j]: j is still in i's choice set
    denominators = _masked_logsumexp(r.unsqueeze(-2).expand_as(not_above), not_above & valid.unsqueeze(-1))
    lowest = scores.masked_fill(~valid, torch.inf).amin(-1)
    ranked = (s.amax(-1) > lowest) & valid.any(-1)
    return ((denominators - r) * valid).sum(-1) * ranked


def sft(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    beta: float,
    temperature_alpha: float,
    valid: Tensor | None = None,
    policy_logps: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood per token of the best-scored completion, for mixtures such as NCA + 0.1 SFT.

    .. math:: -\log \pi(y_{best} | x) / |y_{best}|

    As ``sft`` in TRL's loss mixtures (there averaged over the tokens of the batch, here per group). Completions tied at
    the top count equally.

    Raises:
        ValueError: ``policy_logps`` or ``lengths`` is missing.

    >>> sft(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), beta=0.1, temperature_alpha=1e-4,
    ...     policy_logps=torch.tensor([[-6.0, -1.0]]), lengths=torch.tensor([[3, 1]]))
    tensor([2.])
    """
    if policy_logps is None or lengths is None:
        raise ValueError("sft needs policy_logps (B, K) and lengths (B, K) beside the log-ratios.")
    valid = _all_valid(scores) if valid is None else valid
    nll = -policy_logps.masked_fill(~valid, 0.0) / lengths.clamp(min=1)
    s = scores.masked_fill(~valid, -torch.inf)
    best = valid & (s == s.amax(-1, keepdim=True))
    return (nll * best).sum(-1) / best.sum(-1).clamp(min=1)


READABLE = "log_ratios scores labels beta temperature_alpha valid policy_logps ref_logps lengths".split()


def _check_loss(name: str, function: Callable[..., Tensor]) -> None:
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [n for n in needed if n not in READABLE] + [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if unknown or not parameters:
        raise ValueError(
            f"The loss {name} ({place_of(function)}) reads {', '.join(map(repr, unknown)) or 'nothing'}, expected "
            f"parameters among {', '.join(READABLE)}: a loss is given, by name, what its parameters name."
        )


# A new loss of the package is a function above, its line here, and its test; one of the user's is registered.
LOSSES = Registry(
    "loss",
    {
        "nca": nca,
        "info_nca": info_nca,
        "biased_nca": biased_nca,
        "dpo": dpo,
        "dpo_best_vs_rest": dpo_best_vs_rest,
        "plackett_luce": plackett_luce,
        "sft": sft,
    },
    _check_loss,
)
_READ_LABELS = (nca, info_nca)  # all of the package's accept temperature_alpha


def register_loss(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss of one's own known by a name, for ``loss_type``.

    Args:
        name: free of case and punctuation, like those in ``LOSSES``.
        function: returns (B,), one number for each group, and is given what its parameters name: the arguments of the
            table above; ``labels`` (B, K), see :func:`target_labels`; ``ref_logps`` (B, K) nats. ``**kwargs`` gets all.

    Returns:
        ``function``, so that ``functools.partial(register_loss, "name")`` decorates.

    Raises:
        ValueError: a name of the package's, or a parameter without a default that is none of these.

    >>> def margin(log_ratios, labels, beta):
    ...     return -beta * ((labels - 1 / labels.size(-1)) * log_ratios).sum(-1)
    >>> _ = register_loss("margin", margin)
    >>> canonical_loss_name("Margin"), reads_labels("margin")
    ('margin', True)
    >>> del LOSSES["margin"]
    """
    return LOSSES.register(name, function)


def group_loss(name: str, **values: Any) -> Tensor:
    """Return the (B,) values of a loss in ``LOSSES``, which is given those of ``READABLE`` that its parameters name.

    A loss that does not name ``valid`` never meets a column that is not there: it is called for each K by itself.

    Raises:
        ValueError: a result of another shape, or without a gradient where the log-ratios have one.
    """
    function = LOSSES[name]
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not everything and "valid" not in parameters and not values["valid"].all():
        return _by_size(name, values)
    if everything or "labels" in parameters:
        labels = target_labels(values["scores"], temperature_alpha=values["temperature_alpha"], valid=values["valid"])
        values["labels"] = labels.to(values["log_ratios"].dtype)
    bound = function.keywords if isinstance(function, partial) else {}
    given = {key: value for key, value in values.items() if (everything or key in parameters) and key not in bound}
    found = function(**given)
    expected = values["scores"].shape[:1]
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    wanted = f"a tensor of shape {tuple(expected)}, one number for each group"
    if shape != tuple(expected):
        raise ValueError(f"The loss {LOSSES.describe(name)} returned {shape}, expected {wanted}.")
    if values["log_ratios"].requires_grad and not found.requires_grad:
        raise ValueError(
            f"The loss {LOSSES.describe(name)} returned a tensor without a gradient, expected {wanted}, made of "
            "log_ratios or policy_logps (not detached)."
        )
    return found


def _by_size(name: str, values: dict[str, Any]) -> Tensor:
    valid = values["valid"]
    sizes, result = valid.sum(-1), values["log_ratios"].new_zeros(len(valid))
    for k in filter(None, sizes.unique().tolist()):  # a group without a completion gives 0
        rows = (sizes == k).nonzero()[:, 0]
        there = valid[rows]
        same = {key: v[rows][there].view(-1, k) if isinstance(v, Tensor) else v for key, v in values.items()}
        result = result.index_put((rows,), group_loss(name, **same))
    return result


# TRL's names for the same losses.
ALIASES = {"sigmoid": "dpo", "nca_pair": "nca", "bco_pair": "biased_nca"}


def canonical_loss_name(name: str | Callable[..., Tensor]) -> str:
    """Return the key of ``LOSSES`` for a name, whatever its case and punctuation; TRL's names are aliases.

    ``file.py:function``, ``package.module:function`` and a callable are registered, see :meth:`Registry.find`.

    Raises:
        ValueError: an unknown name; lists the known ones. A function that is not there, or is no loss.

    >>> canonical_loss_name("InfoNCA"), canonical_loss_name("biasedNCA"), canonical_loss_name("sigmoid")
    ('info_nca', 'biased_nca', 'dpo')
    """
    written = isinstance(name, str) and ":" not in name
    for spelling in (*LOSSES, *ALIASES) if written else ():
        if re.sub(r"[\W_]", "", spelling.lower()) == re.sub(r"[\W_]", "", name.lower()):
            return ALIASES.get(spelling, spelling)
    if (found := LOSSES.find(name)) is not None:
        return found
    raise ValueError(
        f"Unknown loss_type {name!r}. Known: {', '.join(LOSSES)} (and TRL's names {', '.join(ALIASES)}). "
        "TRL's other pair losses (hinge, ipo, ...) are in trl.DPOTrainer. One of your own is 'file.py:function'."
    )


def temperature_for_entropy(scores: Tensor, *, valid: Tensor | None = None, fraction: float = 0.5) -> float | None:
    r"""Find the ``temperature_alpha`` at which the labels' mean entropy is a given share of its largest.

    .. math:: \text{mean}_b\, H(p_b(\alpha)) = f\, \text{mean}_b \ln K_b

    A group has K completions, of which m share the best score: its labels' entropy rises with the temperature from
    ln m to ln K. Where so many tie that mean ln m is above the wish already, the wish is the share f of the way from
    mean ln m to mean ln K, so that there is always a solution. The mean is over the groups whose labels depend on the
    temperature. A preference does not count, being hard at every temperature, nor does a group of equal scores, whose
    labels are uniform at every temperature. Solved by bisection on log alpha, in float64.

    Args:
        scores: (B, K).
        valid: (B, K) bool.
        fraction: f above, between 0 (one-hot labels) and 1 (uniform labels).

    Returns:
        The temperature, or None where no group's labels depend on it.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1.

    >>> round(temperature_for_entropy(torch.tensor([[2.0, 1.0, 0.0]])), 3)
    0.593
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1, both excluded.")
    valid = _all_valid(scores) if valid is None else valid
    s = scores.double()
    best = s.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    below = valid & (s < best)
    depends = below.any(-1) & ~is_preference(s, valid=valid)
    if not depends.any():
        return None
    s, valid, below, best = s[depends], valid[depends], below[depends], best[depends]
    tied = (valid & ~below).sum(-1).double().log().mean()
    uniform = valid.sum(-1).double().log().mean()
    wish = fraction * uniform
    if wish <= tied:
        wish = (1 - fraction) * tied + fraction * uniform
    gaps = (best - s)[below]
    low, high = math.log(gaps.min()) - 7, math.log(gaps.max()) + 14  # at these, the limits to the last digit
    for _ in range(60):
        middle = (low + high) / 2
        entropy = label_entropy(target_labels(s, temperature_alpha=math.exp(middle), valid=valid)).mean()
        low, high = (middle, high) if entropy < wish else (low, middle)
    return math.exp((low + high) / 2)


def label_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of labels (..., K), with 0 log 0 = 0.

    >>> label_entropy(torch.tensor([[0.5, 0.5, 0.0]]))
    tensor([0.6931])
    """
    return torch.special.entr(p).sum(-1)


def _all_valid(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def _rewards_and_scores(
    log_ratios: Tensor, scores: Tensor, beta: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    valid = _all_valid(scores) if valid is None else valid
    return beta * log_ratios.masked_fill(~valid, 0.0), scores.masked_fill(~valid, -torch.inf), valid


def _rewards_and_labels(
    log_ratios: Tensor, scores: Tensor, beta: float, temperature_alpha: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    r, _, valid = _rewards_and_scores(log_ratios, scores, beta, valid)
    p = target_labels(scores, temperature_alpha=temperature_alpha, valid=valid)  # in the scores' own precision
    return r, p.to(r.dtype), valid


def _masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Take the logsumexp over the last dimension where ``mask``; 0 with zero gradient where nothing is masked in."""
    empty = ~mask.any(-1, keepdim=True)
    x = x.masked_fill(~mask & ~empty, -torch.inf)
    return torch.logsumexp(x, -1).masked_fill(empty.squeeze(-1), 0.0)


def reads_labels(name: str) -> bool:
    """Whether a loss depends on ``temperature_alpha``, as it declares.

    >>> reads_labels("nca"), reads_labels("dpo")
    (True, False)
    """
    function = LOSSES[name]
    if name not in LOSSES.hashes:
        return function in _READ_LABELS
    parameters = inspect.signature(function).parameters.values()
    return any(p.name in ("labels", "temperature_alpha") or p.kind is p.VAR_KEYWORD for p in parameters)
