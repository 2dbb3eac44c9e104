"""The chunked loss equals plain full-logit torch, in value and gradient; the seam hands it the right tensors."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

import contrastive_align.models.token_loss as module
from contrastive_align.data import GroupCollator
from contrastive_align.losses import conditional
from contrastive_align.models.head import add_head
from contrastive_align.models.logits_at_once import rows_at_once
from contrastive_align.models.logps import completion_objective
from contrastive_align.models.shared_prompt import ATTENTION_NAME
from contrastive_align.models.token_loss import token_loss


N, H, V = 23, 8, 41


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, several blocks in each, the last ones shorter."""
    monkeypatch.setattr(module, "rows_at_once", lambda device, vocabulary: (9, 4))


def case(dtype=torch.float64, seed=0, ref_size=V, ref_width=5):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = (make(*shape).requires_grad_() for shape in ((N, H), (V, H), (V,)))
    reference = (make(N, ref_width), make(ref_size, ref_width), make(ref_size))
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator), reference, make(N).abs()


def cap(logits, scale, softcap):
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def in_full(hidden, weight, bias, labels, *, reference, scale=1.0, softcap=None, ref_scale=1.0, ref_softcap=None,
            weights=None, **terms):  # fmt: skip
    logits = cap(torch.nn.functional.linear(hidden, weight, bias), scale, softcap)
    ref_logits = None if reference is None else cap(torch.nn.functional.linear(*reference), ref_scale, ref_softcap)
    found = conditional(logits, labels, reference_logits=ref_logits, **terms)
    return (found.loss if weights is None else weights * found.loss).sum(), found.nll, found.kl, found.entropy


VARIANTS = {
    "plain": {},
    "scaled": {"scale": 0.25, "ref_scale": 3.0},
    "capped": {"softcap": 2.0, "ref_softcap": 3.0, "scale": 1.5},
    "outside": {"outside": (0, 7, V - 1)},
    "weighted": {"weights": None},
}


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ref_size", [V, V - 3])
def test_it_equals_full_logits(small_chunks, direction, variant, ref_size):
    *inputs, labels, reference, weights = case(ref_size=ref_size)
    options = {"kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": direction, **VARIANTS[variant]}
    if variant == "weighted":
        options["weights"] = weights
    found = token_loss(*inputs, labels, reference=reference, **options)
    wanted = in_full(*inputs, labels, reference=reference, **options)
    for x, y in zip((found.loss, found.nll, found.kl, found.entropy), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)
    assert found.loss.dtype == torch.float64
    # The scalar that comes in is the step's: gradient accumulation, a loss scale, another term.
    ours = torch.autograd.grad(3.0 * found.loss, inputs)
    theirs = torch.autograd.grad(3.0 * wanted[0], inputs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)


def test_without_bias_and_without_reference(small_chunks):
    hidden, weight, _, labels, _, weights = case()
    options = {"reference": None, "kl_coef": 0.0, "entropy_coef": 0.3, "kl_direction": "reverse", "weights": weights}
    found = token_loss(hidden, weight, None, labels, **options)
    wanted = in_full(hidden, weight, None, labels, **options)
    torch.testing.assert_close(found.loss, wanted[0])
    assert (found.kl == 0).all()
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (found.loss, wanted[0]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_trained_gets_a_gradient(small_chunks, trained):
    *inputs, labels, reference, _ = case()
    inputs = [x.detach().requires_grad_(t) for x, t in zip(inputs, trained, strict=True)]
    options = {"reference": reference, "kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "forward"}
    token_loss(*inputs, labels, **options).loss.backward()
    (wanted,) = torch.autograd.grad(in_full(*inputs, labels, **options)[0], [inputs[trained.index(True)]])
    for x, t in zip(inputs, trained, strict=True):
        assert (x.grad is not None) == t
    torch.testing.assert_close(inputs[trained.index(True)].grad, wanted)


def test_without_grad_no_gradient_is_made(small_chunks, monkeypatch):
    *inputs, labels, reference, _ = case()
    options = {"reference": reference, "kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "forward"}
    wanted = token_loss(*inputs, labels, **options)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        found = token_loss(*inputs, labels, **options)
    assert not found.loss.requires_grad
    for name in ("loss", "nll", "kl", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
        assert name == "loss" or not getattr(wanted, name).requires_grad


def test_a_token_of_weight_zero_has_no_part(small_chunks):
    *inputs, labels, reference, weights = case()
    options = {"kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "reverse"}
    weights[5] = 0
    kept = [i for i in range(N) if i != 5]
    reference[0][5] = torch.nan
    found = token_loss(*inputs, labels, reference=reference, weights=weights, **options)
    assert found.kl[5].isnan()
    ours = torch.autograd.grad(found.loss, inputs)
    hidden, weight, bias = inputs
    wanted = in_full(
        hidden[kept], weight, bias, labels[kept], reference=(reference[0][kept], *reference[1:]),
        weights=weights[kept], **options,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, wanted[0])
    torch.testing.assert_close(ours, torch.autograd.grad(wanted[0], inputs))


def test_no_tokens_and_no_weight_at_all():
    hidden, weight, bias, labels, reference, weights = case()
    options = {"kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "reverse"}
    none = (hidden[:0], weight, bias, labels[:0])
    for found in (
        token_loss(*none, reference=(reference[0][:0], *reference[1:]), **options),
        token_loss(hidden, weight, bias, labels, reference=reference, weights=0 * weights, **options),
    ):
        assert found.loss == 0
        for grad in torch.autograd.grad(found.loss, (hidden, weight, bias)):
            assert (grad == 0).all()


def test_backward_runs_once():
    *inputs, labels, reference, _ = case()
    found = token_loss(*inputs, labels, reference=reference, kl_coef=0.1, entropy_coef=0.0, kl_direction="forward")
    found.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call token_loss again"):
        found.loss.backward()


def test_under_activation_checkpointing(small_chunks):
    *inputs, labels, reference, _ = case()
    options = {"reference": reference, "kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "forward"}
    loss = checkpoint(lambda *x: token_loss(*x, labels, **options).loss, *inputs, use_reentrant=False)
    ours = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(in_full(*inputs, labels, **options)[0], inputs))


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_sixteen_bits_the_logits_are_in_thirty_two(small_chunks, how):
    stored = torch.float32 if how == "autocast" else torch.bfloat16
    *inputs, labels, reference, weights = case(stored)
    options = {"kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "reverse", "weights": 1e-6 * weights}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = token_loss(*inputs, labels, reference=reference, **options)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    wanted = in_full(*rounded, labels, reference=tuple(x.bfloat16().double() for x in reference), **options)
    assert found.loss.dtype == found.kl.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), wanted[0], rtol=1e-2, atol=0)
    # All that is rounded to 16 bits are the products: from these on the loss is as of single precision.
    logits, ref_logits = (
        torch.nn.functional.linear(*(x.detach().bfloat16() for x in given)).double() for given in (inputs, reference)
    )
    terms = {name: options[name] for name in ("kl_coef", "entropy_coef", "kl_direction")}
    precise = conditional(logits, labels, reference_logits=ref_logits, **terms)
    for name in ("nll", "kl", "entropy"):
        assert (getattr(found, name) - getattr(precise, name)).abs().median() < 1e-5
    ours, theirs = torch.autograd.grad(found.loss, inputs), torch.autograd.grad(wanted[0], rounded)
    for x, y, given in zip(ours, theirs, inputs, strict=True):
        assert x.dtype == given.dtype
        assert (x.double() - y).norm() < 0.02 * y.norm()


def test_float64_stays_so_under_autocast():
    *inputs, labels, reference, _ = case()
    options = {"reference": reference, "kl_coef": 0.4, "entropy_coef": 0.3, "kl_direction": "reverse"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_loss(*inputs, labels, **options)
    torch.testing.assert_close(found.loss, in_full(*inputs, labels, **options)[0], rtol=0, atol=1e-8)


def test_no_slope_is_a_denormal(monkeypatch):
    seen = []
    keep = module._Gradients.add
    monkeypatch.setattr(module._Gradients, "add", lambda self, d, part: (seen.append(d.clone()), keep(self, d, part)))
    hidden, weight, bias, labels, reference, _ = case(torch.float32)
    reference = tuple(20.0 * x for x in reference)
    for direction, coef in (("forward", 0.1), ("reverse", 0.1), ("forward", 0.0)):
        options = {"reference": reference, "kl_coef": coef, "entropy_coef": 0.1, "kl_direction": direction}
        token_loss(hidden, weight, bias, labels, scale=40.0, weights=torch.full((N,), 1e-4), **options).loss.backward()
    for slopes in seen:
        assert ((slopes == 0) | (slopes.abs() >= 1e-20)).all() and (slopes == 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(N - 1, H)}, "hidden is .* one hidden state for each label"),
        ({"bias": torch.zeros(V + 1)}, "bias is"),
        ({"weights": torch.zeros(N, 1)}, "weights are"),
        ({"reference": (torch.zeros(N, 4), torch.zeros(V, 5), None)}, "reference hidden is"),
        ({"reference": None}, "kl_coef is 0.1"),
        ({"reference": (torch.zeros(N, 5), torch.zeros(V + 1, 5), None)}, "V_ref at most"),
    ],
)
def test_it_says_what_is_wrong(change, message):
    hidden, weight, bias, labels, reference, _ = case()
    given = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "reference": reference, **change}
    with pytest.raises(ValueError, match=message):
        token_loss(**given, kl_coef=0.1, entropy_coef=0.0, kl_direction="forward")


# The seam: models hand their completion tokens' hidden states over, in the same order under every layout.

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.5}),
}
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # whatever its weights are in, a model rotates and attends in single precision
TERMS = {"kl_coef": 0.3, "entropy_coef": 0.1, "kl_direction": "forward"}


def build(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config_class, extra = FAMILIES[family]
    config = config_class(**{**SHAPE, "initializer_range": 0.2, "tie_word_embeddings": False, **extra, **changes})
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    add_head(model)
    return model


def batch_of(prompt_lengths, seed=0):
    """Three ragged groups, whose completions do not depend on their prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    completions = [[ids(4), ids(7), ids(1)], [ids(5), ids(3)], [ids(6), ids(6)]]
    rows = [
        {"prompt_ids": ids(n), "completion_ids": c, "scores": [0.0] * len(c)}
        for n, c in zip(prompt_lengths, completions, strict=True)
    ]
    return GroupCollator(pad_token_id=0)(rows)


def hidden_of(model, batch, layout):
    model.set_attn_implementation(ATTENTION_NAME if layout == "shared" else "eager")
    return completion_objective(model, batch, lambda hidden, *_: hidden, layout=layout)


def policy_and_reference(model, conditioned, hidden, head, layout):
    """The loss of ``model`` on conditioned prompts, beside a reference that is ``hidden`` under ``head``."""

    def objective(h, labels, weight, bias, scale, softcap):
        return token_loss(
            h, weight, bias, labels, reference=(hidden, head.weight, head.bias), scale=scale, softcap=softcap,
            ref_scale=scale, ref_softcap=softcap, **TERMS,
        )  # fmt: skip

    model.set_attn_implementation(ATTENTION_NAME if layout == "shared" else "eager")
    return completion_objective(model, conditioned, objective, layout=layout)


def own_logits(model, batch):
    """(n, V) at the completion tokens, by the model's own forward, and their labels."""
    model.set_attn_implementation("eager")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    scored = batch["completion_mask"][:, 1:] == 1
    return logits[:, :-1][scored], batch["input_ids"][:, 1:][scored]


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_on_conditioned_prompts_and_reference_on_bare_ones(family, layout):
    model, reference = build(family), build(family, seed=1)
    bare, conditioned = batch_of((6, 1, 9)), batch_of((9, 4, 12))
    with torch.no_grad():
        hidden = hidden_of(reference, bare, layout)
        ref_logits, ref_labels = own_logits(reference, bare)
    found = policy_and_reference(model, conditioned, hidden, reference.get_output_embeddings(), layout)
    logits, labels = own_logits(model, conditioned)
    assert torch.equal(labels, ref_labels)
    wanted = conditional(logits, labels, reference_logits=ref_logits, **TERMS)
    torch.testing.assert_close(found.kl, wanted.kl, **NEAR)
    torch.testing.assert_close(found.loss, wanted.loss.sum(), **NEAR)
    ours = torch.autograd.grad(found.loss, list(model.parameters()))
    theirs = torch.autograd.grad(wanted.loss.sum(), list(model.parameters()))
    torch.testing.assert_close(ours, theirs, **NEAR)


def test_tokens_come_in_the_order_of_the_rows_under_both_layouts():
    model, batch = build(), batch_of((6, 1, 9))
    labels = {}
    for layout in ("padded", "shared"):
        model.set_attn_implementation(ATTENTION_NAME if layout == "shared" else "eager")
        labels[layout] = completion_objective(model, batch, lambda h, labels, *_: labels, layout=layout)
    in_rows = batch["input_ids"][batch["completion_mask"] == 1]
    assert torch.equal(labels["padded"], in_rows) and torch.equal(labels["shared"], in_rows)
    torch.testing.assert_close(hidden_of(model, batch, "padded"), hidden_of(model, batch, "shared"), **NEAR)


def test_an_objective_that_could_not_be_called_is_refused():
    model, ids = build(), torch.ones(1, 4, dtype=torch.long)
    for given in ({}, {"shift_labels": ids}, {"fused_lm_head": True}):
        with pytest.raises(ValueError, match="token_objective needs"):
            model(input_ids=ids, token_objective=lambda *_: None, **given)
    with pytest.raises(ValueError, match="output_router_logits=True"):
        completion_objective(model, batch_of((6, 1, 9)), lambda *_: None, output_router_logits=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["modules_to_save", "trainable_token_indices"])
def test_an_adapter_that_trains_the_head_is_the_head_while_it_is_on(how, tied):
    extra = {
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied},
        "trainable_token_indices": {"trainable_token_indices": [5, 6] if tied else {"lm_head": [5, 6]}},
    }
    base = build(tie_word_embeddings=tied)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], **extra[how])).double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    bare, conditioned = batch_of((6, 1, 9)), batch_of((9, 4, 12))
    with torch.no_grad(), model.disable_adapter():
        hidden, weight = completion_objective(model, bare, lambda h, labels, w, *_: (h, w))
        ref_logits, _ = own_logits(base, bare)
        torch.testing.assert_close(hidden @ weight.T, ref_logits, **NEAR)

    def objective(h, labels, w, bias, *_):
        return token_loss(h, w, bias, labels, reference=(hidden, weight, None), **TERMS)

    found = completion_objective(model, conditioned, objective)
    logits, labels = own_logits(base, conditioned)
    wanted = conditional(logits, labels, reference_logits=ref_logits, **TERMS)
    torch.testing.assert_close(found.loss, wanted.loss.sum(), **NEAR)
    assert found.kl.mean() > 1e-2
    ours = torch.autograd.grad(found.loss, list(trained.values()))
    theirs = torch.autograd.grad(wanted.loss.sum(), list(trained.values()))
    torch.testing.assert_close(ours, theirs, **NEAR)


def test_lora_on_the_head_is_refused():
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        completion_objective(model, batch_of((6, 1, 9)), lambda *_: None)


@pytest.mark.parametrize(("device", "chunks"), [("cpu", 127), ("cuda", 8)])
def test_chunks_are_sized_by_the_device(device, chunks):
    """Of 8,192 tokens at a vocabulary of 128,000."""
    rows, block_rows = rows_at_once(torch.device(device), 128_000)
    assert -(-8192 // rows) == chunks and block_rows < rows
    assert rows_at_once(torch.device(device), 2**40) == (1, 1)
