"""The kernels for CUDA, with torch's own replaced by sums that demand and return what those do."""

import pytest
import torch
from test_attention import row, whole

from contrastive_align.models import kernels
from contrastive_align.models.kernels import cuda
from contrastive_align.models.kernels.cuda import FlashKernel, MemoryEfficientKernel
from contrastive_align.models.shared_prompt import shared_prompt_attention


def scores(q, k, causal, scale, window):
    """Of one document (H, queries, keys), and what is seen. A causal mask ends at the last query and the last key."""
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    sees = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        sees &= distance <= window
    found = scale * torch.einsum("qhd,khd->hqk", q.float(), k.float())
    return found.masked_fill(~sees, -torch.inf)


def documents(cu_q, cu_k, max_q, max_k, q, k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert len(cu_q) == len(cu_k) > 1 and (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k) and max_q > 0 < max_k
    return zip(*(cu.tolist()[i:][: len(cu) - 1] for cu in (cu_q, cu_k) for i in (0, 1)), strict=True)


def forward(q, k, v, lengths, causal, scale, window=None):
    """Outputs and, of each document, log-sum-exps (H, queries)."""
    output, sums = torch.full((len(q), q.size(1), v.size(-1)), torch.nan, dtype=q.dtype), []
    for a, b, c, d in documents(*lengths, q, k):
        s = scores(q[a:b], k[c:d], causal, scale, window)
        output[a:b] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[c:d].float()).to(q.dtype)
        if d == c:
            output[a:b] = torch.nan
        sums.append(s.logsumexp(-1))
    return output, sums


def backward(grad, q, k, v, output, sums, lengths, causal, scale, window=None):
    """The gradients; those of queries without keys are what was in memory."""
    dq, dk, dv = (torch.full(t.shape, torch.nan) for t in (q, k, v))
    for (a, b, c, d), lse in zip(documents(*lengths, q, k), sums, strict=True):
        g, o = grad[a:b].float(), output[a:b].float()
        p = (scores(q[a:b], k[c:d], causal, scale, window) - lse[..., None]).exp()
        slope = scale * p * (torch.einsum("qhd,khd->hqk", g, v[c:d].float()) - (g * o).sum(-1).t()[..., None])
        dk[c:d], dv[c:d] = torch.einsum("hqk,qhd->khd", slope, q[a:b].float()), torch.einsum("hqk,qhd->khd", p, g)
        if d > c:
            dq[a:b] = torch.einsum("hqk,khd->qhd", slope, k[c:d].float())
    return [x.to(t.dtype) for x, t in zip((dq, dk, dv), (q, k, v), strict=True)]


def flash_takes(*tensors, dropout, size):
    assert dropout == 0.0 and size % 8 == 0 and size <= 256
    for t in tensors:
        assert t.dtype in (torch.bfloat16, torch.float16) and t.dim() == 3 and t.stride(-1) == 1 and t.size(-1) == size


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
    flash_takes(q, k, v, dropout=dropout, size=q.size(-1))
    heads, length = q.size(1), _window(causal, **window)
    if max_q == 1 and heads > k.size(1) and length is None:
        assert len(q) == len(cu_q) - 1  # queries become heads, one document after the other
    groups = heads // k.size(1)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    output, sums = forward(q, k, v, (cu_q, cu_k, max_q, max_k), causal, scale, length)
    sums = torch.cat(sums, 1).float()
    assert not debug
    return output, sums.masked_fill(sums == -torch.inf, torch.inf), torch.empty(2), torch.empty(()), torch.empty(0)


def _window(causal, window_size_left=None, window_size_right=None):
    assert window_size_right == (None if window_size_left is None else 0) and (causal or window_size_left is None)
    return window_size_left


def flash_backward(
    grad, q, k, v, output, sums, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale, **window
):
    flash_takes(grad.contiguous(), q, k, v, output, dropout=dropout, size=q.size(-1))
    assert sums.shape == (q.size(1), len(q)) and sums.dtype == torch.float32 and sums.is_contiguous()
    assert (state.shape, unused.shape) == ((2,), ())
    kv_heads, groups = k.size(1), q.size(1) // k.size(1)
    wide = (t.repeat_interleave(groups, 1) for t in (k, v))
    sums = sums.split(cu_q.diff().tolist(), 1)
    lengths = cu_q, cu_k, max_q, max_k
    dq, dk, dv = backward(grad, q, *wide, output, sums, lengths, causal, scale, _window(causal, **window))
    return dq, *(d.unflatten(1, (kv_heads, groups)).sum(2) for d in (dk, dv))


def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask, log_sums, *, scale):
    assert len(q) == len(k) == len(v) == 1 and q.size(2) == k.size(2) == v.size(2) and bias is None and log_sums
    assert dropout == 0.0 and all(t.stride(-1) == 1 for t in (q, k, v)) and q.dtype == k.dtype == v.dtype
    output, sums = forward(q[0], k[0], v[0], (cu_q, cu_k, max_q, max_k), mask == 1, scale)
    padded = torch.full((len(sums), q.size(2), -(-max_q // 32) * 32), torch.nan)
    for place, found in zip(padded, sums, strict=True):
        place[:, : found.size(1)] = found
    return output[None], padded, torch.empty(()), torch.empty(()), max_q, max_k


def efficient_backward(
    grad, q, k, v, bias, output, cu_q, cu_k, max_q, max_k, sums, dropout, seed, offset, mask, of_bias, *, scale
):
    assert q.shape[:3] == grad.shape[:3] == output.shape[:3] and k.shape[:3] == v.shape[:3] and len(q) == len(k) == 1
    assert q.size(2) == k.size(2) and bias is None and not of_bias and dropout == 0.0
    assert output.is_contiguous() and (seed.shape, offset.shape) == ((), ())
    shape = len(cu_q) - 1, q.size(2), -(-max_q // 32) * 32
    assert sums.shape == shape and sums.dtype == torch.float32 and sums.is_contiguous()
    own = [of_one[:, :n] for of_one, n in zip(sums, cu_q.diff().tolist(), strict=True)]
    lengths = cu_q, cu_k, max_q, max_k
    found = backward(grad[0], q[0], k[0], v[0], output[0], own, lengths, mask == 1, scale)
    return *(d[None] for d in found), None


@pytest.fixture
def on_cuda(monkeypatch):
    """Calls of torch's kernels, as if the tensors of a CPU were on a GPU."""
    called = []
    for stand_in, name in ((flash, "_flash"), (flash_backward, "_flash_backward"), (efficient, "_efficient"),
                           (efficient_backward, "_efficient_backward")):  # fmt: skip

        def run(*args, name=name, stand_in=stand_in, **kwargs):
            called.append(name)
            return stand_in(*args, **kwargs)

        monkeypatch.setattr(cuda, name, run)
    monkeypatch.setattr(kernels, "KERNELS", (FlashKernel(), MemoryEfficientKernel()))
    monkeypatch.setattr(cuda, "_is_nvidia", lambda device, since=(0, 0): since <= (8, 0))
    return called


SMALL = {
    "several": [(40, (3, 35)), (33, (10,)), (5, (1, 1, 1))],
    "an empty prompt among others": [(60, (9, 4)), (0, (2, 3)), (1, (1, 2))],
    "no prompt at all": [(0, (9, 4)), (0, (2,))],
    "of one token": [(0, (1,)), (2, (1,))],
}


@pytest.mark.parametrize("lengths", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype, size, value_size, heads", [
    (torch.bfloat16, 24, 24, (4, 4)), (torch.float16, 8, 8, (6, 2)), (torch.float32, 24, 24, (6, 2)),
    (torch.float32, 8, 40, (4, 4)), (torch.bfloat16, 264, 264, (6, 2)),
])  # fmt: skip
def test_output_and_gradients_on_cuda(lengths, dtype, size, value_size, heads, on_cuda):
    tensors, layout, sees = row(lengths, heads, size, seed=1)
    tensors = [*tensors[:2], tensors[2].repeat(1, 1, 1, 5)[..., :value_size]]
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    found = shared_prompt_attention(None, *tensors, None, scaling=0.3, shared_prompt=layout)[0]
    slope = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, slope)
    name = "_flash" if dtype != torch.float32 and size <= 256 else "_efficient"
    calls = 2 if layout.prompt_tokens else 1
    assert on_cuda == calls * [name] + calls * [f"{name}_backward"]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = whole(*exact, sees)[0].transpose(1, 2)
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    for x, y in zip((found, *grads), (wanted, *torch.autograd.grad(wanted, exact, slope.double())), strict=True):
        assert x.dtype == dtype and (x.double() - y).abs().max() <= rounding * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [*SMALL.values(), [(9, (0, 0))]], ids=[*SMALL, "branches of nothing"])
def test_branches_alone_on_cuda(lengths, dtype, on_cuda):
    tensors, layout, sees = row(lengths, (6, 2), 8, seed=1)
    tensors, p = [t.to(dtype).requires_grad_() for t in tensors], layout.prompt_tokens
    given = {"scaling": 0.3, "shared_prompt": layout, "branches_only": True}
    found = shared_prompt_attention(None, *tensors, None, **given)[0][:, p:]
    slope = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, slope)
    calls, name = 2 if p and slope.numel() else 1, "_flash" if dtype == torch.bfloat16 else "_efficient"
    assert on_cuda == calls * [name] + calls * [f"{name}_backward"]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = whole(*exact, sees)[0].transpose(1, 2)[:, p:]
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    for x, y in zip((found, *grads), (wanted, *torch.autograd.grad(wanted, exact, slope.double())), strict=True):
        assert x.dtype == dtype and (x.double() - y).abs().sum() <= rounding * y.abs().sum()


@pytest.mark.parametrize("window", [1, 5, 40])
def test_windows_of_documents_on_cuda(window, on_cuda):
    """Those of branches to their prompt have no kernel of torch's."""
    tensors, layout, sees = row([(0, (30, 50)), (0, (7,))], (4, 2), 8, torch.bfloat16, window)
    found = shared_prompt_attention(None, *tensors, None, scaling=0.3, sliding_window=window, shared_prompt=layout)[0]
    wanted = whole(*(t.double() for t in tensors), sees)[0].transpose(1, 2)
    assert on_cuda == ["_flash"] and (found - wanted).abs().max() < 3e-2
