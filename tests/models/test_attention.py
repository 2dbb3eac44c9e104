"""The attention of a packed row against a softmax with the whole mask; every kernel against plain sums."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from contrastive_align.data import GroupCollator
from contrastive_align.models import kernel, kernels, packed_row
from contrastive_align.models.cpu.attention import CpuKernel
from contrastive_align.models.head import add_head
from contrastive_align.models.kernel import Call
from contrastive_align.models.kernels import cuda
from contrastive_align.models.kernels.reference import ReferenceKernel
from contrastive_align.models.logps import completion_logps, completion_objective
from contrastive_align.models.packed_row import Documents, PackedRow, Segment
from contrastive_align.models.shared_prompt import ATTENTION_NAME, shared_prompt_attention
from contrastive_align.models.token_loss import token_loss
from contrastive_align.trl_seam import add_fused_lm_head


ROWS = {
    "one group": [(300, (40, 1, 70))],
    "several": [(257, (3, 5)), (290, (100,)), (400, (1, 1, 1))],
    "an empty prompt among others": [(60, (9, 4)), (0, (2, 3)), (1, (1, 2))],
    "no prompt at all": [(0, (9, 4)), (0, (2,))],
    "of one branch": [(260, (30,))],
    "of one branch of nothing": [(260, (0,))],
    "one group, branches of nothing": [(260, (0, 5, 0))],
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


def whole(q, k, v, sees, softcap=None, more=None):
    """Attention (1, H, n, D) with a mask, and its log-sum-exps (1, H, n), by their definition.

    ``more``: keys and values that all see, and that give nothing to the gradient of the queries.
    """
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    scores = 0.3 * q @ k.transpose(2, 3)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).masked_fill(~sees, -torch.inf)
    if more is not None:
        scores, v = torch.cat([scores, 0.3 * q.detach() @ more[0].transpose(2, 3)], 3), torch.cat([v, more[1]], 2)
    return (scores.softmax(-1) @ v), scores.logsumexp(-1)


def with_gradients(attend, tensors, slope):
    inputs = [t.detach().requires_grad_() for t in tensors]
    output = attend(*inputs)
    return output, *torch.autograd.grad(output, inputs, slope)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"sliding_window": 1}, {"softcap": 3.0}], ids=str)
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
        assert (want - found).abs().max() <= 1e-11 * want.abs().max() + 1e-12  # in a window of 1 some are 0


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"sliding_window": 1}, {"softcap": 3.0}], ids=str)
def test_branches_alone_give_what_they_give_beside_their_prompts(lengths, options):
    tensors, layout, _ = row(lengths, window=options.get("sliding_window"))
    slope = torch.randn_like(tensors[0].transpose(1, 2))
    slope[:, : layout.prompt_tokens] = 0.0

    def attend(branches_only):
        given = {"scaling": 0.3, "shared_prompt": layout, "branches_only": branches_only, **options}
        return with_gradients(lambda *t: shared_prompt_attention(None, *t, None, **given)[0], tensors, slope)

    (want, *wanted), (output, *gradients) = attend(False), attend(True)
    assert torch.allclose(want[:, layout.prompt_tokens :], output[:, layout.prompt_tokens :], atol=1e-12)
    for want, found in zip(wanted, gradients, strict=True):
        assert (want - found).abs().max() <= 1e-11 * want.abs().max() + 1e-12


CALLS = {
    "causal": (True, None, None),
    "causal, a window": (True, 5, None),
    "causal, a softcap": (True, None, 3.0),
    "to other keys": (False, None, None),
    "to other keys, a window": (False, 8, None),
    "to other keys, a window and a softcap": (False, 8, 3.0),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("tested", [CpuKernel(), ReferenceKernel()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_contract_of_every_kernel(tested, what, dtype, monkeypatch):
    """Output, log-sum-exps, and gradients where these keys are a part of more keys, document by document."""
    monkeypatch.setattr(kernel, "BLOCK_QUERIES", 7)
    torch.manual_seed(0)
    causal, window, softcap = CALLS[what]
    queries, keys = [12, 3, 20], [12, 3, 20] if causal else [6, 30, 1]
    behind = None if causal else torch.cat([torch.arange(n) for n in (5, 7, 3, 11, 9)])  # two branches, one, two
    call = Call(Documents.of(queries, keys, torch.device("cpu"), behind), causal, 0.3, window, softcap)
    q, k, v = (torch.randn(sum(n), h, 8, dtype=dtype) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    if not tested.serves(q, k, v, call):
        assert isinstance(tested, CpuKernel) and softcap is not None
        return
    output, log_sums, state = tested.forward(q, k, v, call)
    assert log_sums.shape == (4, sum(queries)) and log_sums.dtype == torch.promote_types(dtype, torch.float32)
    grad = torch.randn_like(q)
    more = torch.randn(2, 1, 4, 9, 8, dtype=torch.float64)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    merged, merged_sums = [], []
    for a, b, c, d in call.documents.spans:
        distance = torch.arange(b - a) if causal else d - c + behind[a:b]
        distance = distance[:, None] - torch.arange(d - c)
        sees = (distance >= 0) & (distance < (window or 10**6))
        query, key, value = (t[x:y].transpose(0, 1)[None] for t, x, y in zip(exact, (a, c, c), (b, d, d), strict=True))
        alone, sums = whole(query, key, value, sees, softcap)
        alone = alone.masked_fill(~sees.any(1)[:, None], 0.0)  # of queries without keys
        assert torch.allclose(output[a:b].double(), alone[0].transpose(0, 1), atol=rounding)
        assert torch.allclose(log_sums[:, a:b].double(), sums[0], atol=rounding)
        both, sums = whole(query, key, value, sees, softcap, more)
        merged.append(both[0].transpose(0, 1))
        merged_sums.append(sums[0])
    merged, merged_sums = torch.cat(merged), torch.cat(merged_sums, 1)
    wanted = torch.autograd.grad(merged, exact, grad.double())
    kept = merged.detach().to(dtype), merged_sums.detach().to(log_sums.dtype)
    for x, y in zip(tested.backward(grad, q, k, v, *kept, state, call), wanted, strict=True):
        assert x.dtype == dtype and (x.double() - y).abs().max() < rounding * y.abs().max()


class Count(TorchDispatchMode):
    """Names of the attention kernels that are called, and the shapes that they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "attention" in name:
            self.calls.append((name, [tuple(t.shape) for t in args if torch.is_tensor(t)]))
        if name == "_efficient_attention_backward":  # torch 2.13's shapes of it do not take all of its arguments
            return (*(torch.empty_like(t) for t in args[1:4]), None)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def meta_is_cuda(monkeypatch):
    """Tensors without memory take the way of those on a GPU. Whatever reads a value of one raises."""
    monkeypatch.setattr(cuda, "_is_nvidia", lambda device, since: device.type == "meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which meta tensors do not have
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: contextlib.nullcontext())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [2, 16, 64])
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (32, 32)])
def test_two_calls_a_layer_on_cuda_and_bytes_that_are_kept_once(heads, kv_heads, k, dtype, meta_is_cuda):
    """On tensors without memory: which of torch's kernels would run on a GPU, with which shapes, and what they keep."""
    row = PackedRow([Segment(1023, (512,) * k), Segment(200, (30, 7))], width=2000)
    n, d, kept = sum(s.prompt + sum(s.branches) for s in row.segments), 128, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), storage)  # the storage alive, so that its number is not used twice
        return tensor

    q, key, v = (
        torch.empty(1, n, h, d, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    with Count() as count:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = shared_prompt_attention(None, q, key, v, None, shared_prompt=row)[0]
        assert output.shape == (1, n, heads, d) and output.dtype == dtype
        grads = torch.autograd.grad(output, (q, key, v), torch.empty_like(output))
    assert [g.shape for g in grads] == [t.shape for t in (q, key, v)]
    name = "_flash_attention" if dtype == torch.bfloat16 else "_efficient_attention"
    assert [name for name, _ in count.calls] == 2 * [f"{name}_forward"] + 2 * [f"{name}_backward"]
    (own, to_prompts), prompts = (shapes for _, shapes in count.calls[:2]), row.prompt_tokens
    if dtype == torch.bfloat16:
        assert own == [(n, heads, d), *2 * [(n, kv_heads, d)], *2 * [(2 + k + 2 + 1,)]]
        assert to_prompts == [(n - prompts, heads, d), *2 * [(prompts, kv_heads, d)], *2 * [(2 + 1,)]]
    once = q.element_size() * d * n * (2 * heads + 2 * kv_heads) + 4 * heads * n
    assert sum(size for size, _ in kept.values()) <= 1.15 * once


def ids(n):
    return torch.arange(3, 3 + n).tolist()


LAYERS, WORDS = 3, 128_000


def log_probs(model, batch):
    """The head is TRL's, with the tiles that it has where there is no Triton."""
    found = completion_logps(model, batch, layout="shared")
    assert found.logps.shape == batch["valid"].shape and found.logps.dtype == torch.float32
    assert {x.shape for x in (*found.tokens.values(), found.completion_index)} == {(197,)}
    return found.logps.sum()


def conditional_loss(model, batch):
    def objective(hidden, labels, weight, bias, scale, softcap):
        terms = dict(kl_coef=0.0, entropy_coef=0.0, kl_direction="reverse")
        return token_loss(hidden, weight, bias, labels, scale=scale, softcap=softcap, **terms).loss

    return completion_objective(model, batch, objective, layout="shared")


@pytest.mark.parametrize("loss", [log_probs, conditional_loss])
def test_a_pass_on_cuda_reads_no_value_of_it(loss, meta_is_cuda):
    """A whole model on tensors without memory, forward and backward, its head included."""
    rows = [(300, (100, 57)), (40, (10,) * 4)]
    groups = [
        {"prompt_ids": ids(p), "completion_ids": [ids(n) for n in lengths], "scores": [0.0] * len(lengths)}
        for p, lengths in rows
    ]
    batch = GroupCollator(0)(groups)
    row = PackedRow.of_batch(batch)
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    packed_row._rows[batch["completion_mask"]] = batch["attention_mask"], batch["valid"], row
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=WORDS)).bfloat16()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_head(model)
    model.set_attn_implementation(ATTENTION_NAME)
    with Count() as count:
        loss(model, batch).backward()
    calls = Counter(name for name, _ in count.calls)
    assert calls == {"_flash_attention_forward": 2 * LAYERS, "_flash_attention_backward": 2 * LAYERS}
    assert model.lm_head.weight.grad.shape == (WORDS, 512)


def test_calls_of_a_layer_do_not_grow_with_the_batch(monkeypatch):
    calls = []

    class Counting(ReferenceKernel):
        def forward(self, *args):
            calls.append("forward")
            return super().forward(*args)

        def backward(self, *args):
            calls.append("backward")
            return super().backward(*args)

    monkeypatch.setattr(kernels, "KERNELS", (Counting(),))
    for lengths in ([(5, (3,))], 5 * [(9, 16 * (4,))]):
        tensors, layout, _ = row(lengths)
        inputs = [t.requires_grad_() for t in tensors]
        shared_prompt_attention(None, *inputs, None, shared_prompt=layout)[0].sum().backward()
        assert calls == ["forward", "forward", "backward", "backward"]
        calls.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_less_precision(dtype):
    """About as far from float64 as torch's own attention with a mask, which rounds once where this rounds twice."""
    tensors, layout, sees = row([(700, 3 * (150,))], size=64)
    slope = torch.randn_like(tensors[0].transpose(1, 2))

    def masked(q, k, v):
        mask = torch.zeros(sees.shape, dtype=q.dtype).masked_fill(~sees, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

    def shared(q, k, v):
        return shared_prompt_attention(None, q, k, v, None, shared_prompt=layout)[0]

    rounded = [t.to(dtype) for t in tensors]
    results = with_gradients(masked, rounded, slope.to(dtype)), with_gradients(shared, rounded, slope.to(dtype))
    for want, own, found in zip(with_gradients(shared, tensors, slope), *results, strict=True):
        assert found.dtype == dtype and (found - want).norm() < 1.4 * (own - want).norm()


def test_gradients_lie_in_memory_as_their_tensors_do():
    """Projections leave tokens first; a gradient with heads first would be copied twice on its way back to them."""
    row = PackedRow([Segment(30, (20, 10))], width=50)
    tensors = [torch.randn(1, 60, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    grads = torch.autograd.grad(shared_prompt_attention(None, *tensors, None, shared_prompt=row)[0].sum(), tensors)
    assert [g.stride()[1:] for g in grads] == [t.stride()[1:] for t in tensors]


def test_under_autocast_tensors_take_its_dtype():
    """Queries and keys in float32, as a rotary embedding leaves them, values in bfloat16."""
    (q, k, v), layout, _ = row([(300, (40, 70))], dtype=torch.float32)
    k, v = k.to(torch.bfloat16).float(), v.to(torch.bfloat16)
    with torch.autocast("cpu"):
        found = shared_prompt_attention(None, q, k, v, None, shared_prompt=layout)[0]
        wide = [t.double() for t in (q, k, v)]
        assert shared_prompt_attention(None, *wide, None, shared_prompt=layout)[0].dtype == torch.float64
    assert found.dtype == torch.bfloat16
    rounded = [t.to(torch.bfloat16) for t in (q, k, v)]
    assert torch.equal(found, shared_prompt_attention(None, *rounded, None, shared_prompt=layout)[0])


def test_values_of_another_size_than_keys():
    (q, k, v), layout, sees = row([(30, (4, 7)), (2, (3,))])
    found = shared_prompt_attention(None, q, k, v[..., :4], None, scaling=0.3, shared_prompt=layout)[0]
    assert torch.allclose(found, whole(q, k, v[..., :4], sees)[0].transpose(1, 2), rtol=1e-12)
