"""The attention of a packed row against a softmax with the whole mask; every kernel against plain sums."""

import pytest
import torch

from contrastive_align.data.packed_row import PackedRow, Segment
from contrastive_align.models.shared_prompt import shared_prompt_attention


ROWS = {
    "one group": [(300, (40, 1, 70))],
    "several": [(257, (3, 5)), (290, (100,)), (400, (1, 1, 1))],
    "an empty prompt among others": [(60, (9, 4)), (0, (2, 3)), (1, (1, 2))],
    "no prompt at all": [(0, (9, 4)), (0, (2,))],
    "of one branch": [(260, (30,))],
    "branches of nothing": [(300, (0, 4)), (280, (5, 0, 7)), (270, (6, 0)), (260, (0,))],
    "blocks of the kernel": [(1030, (800, 600))],
}


def row(lengths, heads=(4, 2), size=8, dtype=torch.float64, window=None, seed=0):
    """Queries, keys and values of a packed row, its layout, and for every query the keys that it sees."""
    torch.manual_seed(seed)
    layout = PackedRow([Segment(*segment) for segment in lengths], width=10**4)
    documents = [(g, 0, prompt, True) for g, (prompt, _) in enumerate(lengths)]
    documents += [(g, prompt, n, False) for g, (prompt, branches) in enumerate(lengths) for n in branches]
    group, document, position, is_prompt = (
        torch.tensor([x for i, d in enumerate(documents) for x in of(i, *d)])
        for of in (
            lambda i, g, start, n, p: [g] * n,
            lambda i, g, start, n, p: [i] * n,
            lambda i, g, start, n, p: range(start, start + n),
            lambda i, g, start, n, p: [p] * n,
        )
    )
    sees = (document[:, None] == document) | ((group[:, None] == group) & is_prompt.bool() & ~is_prompt.bool()[:, None])
    distance = position[:, None] - position
    sees &= (distance >= 0) & (distance < (window or 10**6))
    q, k, v = (torch.randn(1, len(group), h, size, dtype=dtype).transpose(1, 2) for h in (heads[0], heads[1], heads[1]))
    return (q, k, v), layout, sees


def whole(q, k, v, sees, softcap=None):
    """Attention (1, H, n, D) with a mask, and its log-sum-exps (1, H, n), by their definition."""
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    scores = 0.3 * q @ k.transpose(2, 3)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v), scores.logsumexp(-1)


def with_gradients(attend, tensors, slope):
    inputs = [t.detach().requires_grad_() for t in tensors]
    output = attend(*inputs)
    return output, *torch.autograd.grad(output, inputs, slope)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"softcap": 3.0}], ids=str)
def test_output_and_gradients_equal_a_softmax_with_the_whole_mask(lengths, heads, options):
    tensors, layout, sees = row(lengths, heads, window=options.get("sliding_window"))
    tensors = 3 * tensors[0], *tensors[1:]  # scores far apart: the weights of the parts too

    def shared(q, k, v):
        return shared_prompt_attention(None, q, k, v, None, scaling=0.3, shared_prompt=layout, **options)[0]

    def masked(q, k, v):
        return whole(q, k, v, sees, options.get("softcap"))[0].transpose(1, 2)

    slope = torch.randn_like(tensors[0].transpose(1, 2))
    results = (with_gradients(attend, tensors, slope) for attend in (masked, shared))
    for want, found in zip(*results, strict=True):
        assert (want - found).abs().max() < 1e-11 * want.abs().max()
