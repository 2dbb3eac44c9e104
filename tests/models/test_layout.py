"""The shared-prompt layout gives what rows of their own give, on every architecture, or is refused."""

import contextlib
import copy
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.data import GroupCollator
from contrastive_align.models import kernel, kernels, shared_prompt
from contrastive_align.models.cpu import head
from contrastive_align.models.cpu.head import _ScoreTokens
from contrastive_align.models.head import add_head
from contrastive_align.models.kernels import reference
from contrastive_align.models.last_layer import LastLayer
from contrastive_align.models.layout import _own_logps, choose_layout
from contrastive_align.models.logps import completion_logps
from contrastive_align.models.noise import measure_noise
from contrastive_align.models.packed_row import PackedRow, Segment
from contrastive_align.models.shared_prompt import ATTENTION_NAME, pack, shared_prompt_attention


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The window is shorter than the prompts, and than some completions.
ARCHITECTURES = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"sliding_window": 7}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0}),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6}),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (hf.GPTNeoXConfig, {}),
    "phi3": (hf.Phi3Config, {}),
    "olmo2": (hf.Olmo2Config, {}),
    "opt": (hf.OPTConfig, {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.5}),
    "granite": (hf.GraniteConfig, {"logits_scaling": 2.0}),
}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
CANNOT = {
    "stablelm": (hf.StableLmConfig, {}),  # drops the keywords
    "bloom": (hf.BloomConfig, {"n_layer": 2, "n_head": 4}),  # ALiBi
    "mamba": (hf.MambaConfig, {}),
    "gpt_oss": (hf.GptOssConfig, {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks
    # Windows and chunks of the masks alone, longer than the batch that is tried; keys of sparse attention.
    "phimoe": (hf.PhimoeConfig, {"sliding_window": 64, "num_local_experts": 2}),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        {"sliding_window": 64, "use_sliding_window": True, "num_experts": 2, "num_experts_per_tok": 1, **EXPERTS},
    ),
    "llama4": (
        hf.Llama4TextConfig,
        {"attention_chunk_size": 64, "head_dim": 8, "num_local_experts": 1, "intermediate_size_mlp": 64},
    ),
    "deepseek_v32": (
        hf.DeepseekV32Config,
        {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"index_topk": 32, **EXPERTS},
    ),
}


def build(config_class, extra, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **extra}))
    with torch.no_grad():  # far from the start of training, where all log-probs are alike
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def groups(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(9), "completion_ids": [ids(4), ids(11), ids(1)], "scores": [1.0, 2.0, 3.0]},
        {"prompt_ids": ids(1), "completion_ids": [ids(5), ids(3)], "scores": [1.0, 0.0]},
        {"prompt_ids": ids(20), "completion_ids": [ids(8), ids(8)], "scores": [1.0, 0.0]},
    ]


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(0.5, 1.5, logps.numel()).view_as(logps)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


VARIANTS = ["plain", "checkpointing", "reentrant", "reference kernel"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_equal_rows_of_their_own(name, variant, monkeypatch):
    if variant == "reference kernel":
        monkeypatch.setattr(kernels, "KERNELS", (reference.ReferenceKernel(),))
        monkeypatch.setattr(kernel, "BLOCK_QUERIES", 3)
    model = build(*ARCHITECTURES[name]).train()
    batch = GroupCollator(0)(groups())
    expected = _own_logps(model, batch)
    expected_gradient = gradients(model, expected)
    add_head_over_plain(model)
    assert choose_layout(model, "shared") == "shared"
    if variant in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": variant == "reentrant"})
    for layout in ("shared", "padded"):
        found = completion_logps(model, batch, layout=layout).logps
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-4), layout
        gap = (gradients(model, found) - expected_gradient).norm() / expected_gradient.norm()
        assert gap < 1e-5, layout


def tokens_per_module(model, layout, monkeypatch):
    """How many tokens each module of a layer received in a pass, by the module's name, and the attention's queries."""
    found = {name: [] for name in ("q_proj", "k_proj", "o_proj", "up_proj", "queries")}

    def find_kernel(query, key, value, call):
        if call.causal:
            found["queries"].append(query.size(0))
        return kernels.find_kernel(query, key, value, call)

    with monkeypatch.context() as patch, contextlib.ExitStack() as hooks:
        patch.setattr(shared_prompt, "find_kernel", find_kernel)
        for name, module in model.named_modules():
            if (name := name.rpartition(".")[2]) in found:
                hook = module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].size(1)))
                hooks.callback(hook.remove)
        completion_logps(model, GroupCollator(0)(groups()), layout=layout)
    return found


def test_the_last_layer_computes_branches_only(monkeypatch):
    model = add_head_over_plain(build(*ARCHITECTURES["qwen2"]))
    batch = GroupCollator(0)(groups())
    branches = int(batch["completion_mask"].sum())
    everything = branches + 8 + 0 + 19
    for dtype in (torch.float32, torch.bfloat16):  # the second time, the hooks of the first are there
        assert choose_layout(model.to(dtype), "shared") == "shared"
        for each in (model, copy.deepcopy(model)):  # a copy's hooks read the copy's attention
            tokens = tokens_per_module(each, "shared", monkeypatch)
            assert tokens.pop("k_proj") == [everything] * 3
            assert all(found == [everything, everything, branches] for found in tokens.values()), tokens
    copied = copy.deepcopy(model)
    LastLayer.remove_from(copied)
    assert all(found == [everything] * 3 for found in tokens_per_module(copied, "shared", monkeypatch).values())
    assert tokens_per_module(model, "shared", monkeypatch)["up_proj"] == [everything, everything, branches]
    padded = tokens_per_module(model, "padded", monkeypatch)
    assert padded.pop("queries") == []
    assert all(found == [batch["input_ids"].size(1)] * 3 for found in padded.values())
    assert not hasattr(build_with_experts(), "last_layer")


def build_with_experts():
    model = add_head_over_plain(build(hf.MixtralConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}))
    assert choose_layout(model, "shared") == "shared"
    return model


def test_a_last_layer_that_needs_its_prompts_keeps_them():
    class Whole(hf.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            if x.size(1) != self.seen:
                raise RuntimeError("rows are missing")
            return super().forward(x)

    model = add_head_over_plain(build(*ARCHITECTURES["llama"]))
    attention, mlp = model.model.layers[-1].self_attn, model.model.layers[-1].mlp
    mlp.__class__ = Whole
    attention.register_forward_hook(lambda module, args, output: setattr(mlp, "seen", output[0].size(1)))
    assert choose_layout(model, "shared") == "shared"
    assert not hasattr(model, "last_layer") and not attention.o_proj._forward_pre_hooks
    batch = GroupCollator(0)(groups())
    found = completion_logps(model, batch, layout="shared").logps
    assert torch.allclose(found, _own_logps(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["its own forward", "called again", "no attention", "attends twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusual_layers_share_prompts(what, dtype):
    """As accelerate's hooks, models that go over their layers more than once, and DiffLlama have them."""
    attends_twice = (hf.DiffLlamaConfig, {"head_dim": 8})
    model = add_head_over_plain(build(*(attends_twice if what == "attends twice" else ARCHITECTURES["llama"])))
    last = model.model.layers[-1]
    if what == "its own forward":
        last.forward = last.forward
    elif what == "called again":
        model.model.layers[1] = last
    elif what == "no attention":

        class Narrow(type(last)):
            def forward(self, hidden_states, *args, **kwargs):
                return hidden_states + self.mlp(hidden_states)

        last.__class__ = Narrow
    assert choose_layout(model.to(dtype), "shared") == "shared"
    if dtype == torch.float32:
        batch = GroupCollator(0)(groups())
        found = completion_logps(model, batch, layout="shared").logps
        assert torch.allclose(found, _own_logps(model, batch), rtol=1e-5, atol=1e-5)


def add_head_over_plain(model):
    """As the trainer does: TRL's fused head, then ours."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_head(model)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_the_head_gives_what_the_logits_give(name):
    model = build(*ARCHITECTURES[name])
    batch = GroupCollator(0)(groups())
    add_head_over_plain(model)
    result = completion_logps(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scored = batch["completion_mask"][:, 1:].bool()
    log_probs = logits.log_softmax(-1)[scored]
    assert torch.allclose(result.tokens["entropy"], -(log_probs.exp() * log_probs).sum(-1), atol=1e-5)
    assert torch.allclose(result.tokens["mean_logits"], logits[scored].mean(-1), atol=1e-5)
    assert torch.equal(result.tokens["is_top1"], logits[scored].argmax(-1) == batch["input_ids"][:, 1:][scored])
    chosen = log_probs.gather(1, batch["input_ids"][:, 1:][scored][:, None])[:, 0]
    lengths = batch["completion_mask"].sum(1).tolist()
    want = torch.stack([part.sum() for part in chosen.split(lengths)])
    assert torch.allclose(result.logps[batch["valid"]], want, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 3 * 7, 10**6])
def test_the_gradient_of_the_head_by_gradcheck(keep, monkeypatch):
    """No logits kept, a chunk of them, all; and backward passes one after the other through one graph."""
    monkeypatch.setattr(head, "TILE_LOGITS", 2 * 3)  # two tokens by three words
    monkeypatch.setattr(head, "TILE_TOKENS", 2)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    bias, labels = torch.randn(7, dtype=torch.float64), torch.randint(7, (5,))
    for scale, softcap in ((1.0, None), (0.3, 2.0)):

        def log_probs(h, w, b, scale=scale, softcap=softcap):
            keeps = keep if w.requires_grad else 0
            return _ScoreTokens.apply(h, w, b, labels, scale, softcap, True, h.requires_grad, keeps)[0]

        inputs = h, w, b = tuple(t.detach().requires_grad_() for t in (hidden, weight, bias))
        assert torch.autograd.gradcheck(log_probs, inputs)
        trained = torch.autograd.grad(log_probs(h, w, b).square().sum(), inputs)
        (frozen_head,) = torch.autograd.grad(log_probs(h, w.detach(), b.detach()).square().sum(), (h,))
        frozen_body = torch.autograd.grad(log_probs(h.detach(), w, b).square().sum(), (w, b))
        for a, b in zip(trained, (frozen_head, *frozen_body), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
        twice = log_probs(*inputs).square().sum()
        first, second = (torch.autograd.grad(twice, inputs, retain_graph=True) for _ in range(2))
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first, second, strict=True))


def test_graphs_side_by_side_do_not_share_their_logits():
    torch.manual_seed(0)
    weight, labels = torch.randn(7, 4, requires_grad=True), torch.randint(7, (5,))

    def run(*hidden):
        graphs = [_ScoreTokens.apply(h, weight, None, labels, 1.0, None, False, True, 10**6)[0].sum() for h in hidden]
        return [torch.autograd.grad(graph, weight)[0] for graph in graphs]

    one, other = torch.randn(2, 5, 4)
    for a, b in zip(run(one, other), run(one) + run(other), strict=True):
        assert torch.equal(a, b)


def test_a_pass_without_gradients_leaves_the_memory_of_the_last_step(monkeypatch):
    monkeypatch.setattr(head, "_spare_memory", {})
    hidden, weight, labels = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.arange(5)
    places = set()
    for keep in (5 * 7, 0, 5 * 7):
        found = _ScoreTokens.apply(hidden, weight, None, labels, 1.0, None, False, False, keep)[0]
        if keep:
            assert not head._spare_memory
            found.sum().backward()
        assert head._spare_memory[torch.float32].numel() == 5 * 7
        places.add(head._spare_memory[torch.float32].data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("dtype, near", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_the_heads_gradient_in_half_precision(dtype, near):
    """A vocabulary whose sum of exponentials float16 cannot hold, against float64."""
    torch.manual_seed(0)
    hidden, weight, labels = (0.01 * torch.randn(4, 32)).to(dtype), torch.randn(70_000, 32).to(dtype), torch.arange(4)
    found = [t.clone().requires_grad_() for t in (hidden, weight)]
    _ScoreTokens.apply(*found, None, labels, 1.0, None, False, True, 10**9)[0].sum().backward()
    want = [t.double().requires_grad_() for t in (hidden, weight)]
    (want[0] @ want[1].T).log_softmax(-1).gather(1, labels[:, None]).sum().backward()
    for a, b in zip(found, want, strict=True):
        assert (a.grad - b.grad).norm() < near * b.grad.norm()


@pytest.mark.parametrize("slopes", [False, True])
def test_the_head_where_the_first_words_say_nothing_of_the_others(slopes, monkeypatch):
    """Logits of +-400 in float32, the largest in other tiles than the first; and p_y = 1 - 1e-9."""
    monkeypatch.setattr(head, "TILE_LOGITS", 4 * 8)
    monkeypatch.setattr(head, "TILE_TOKENS", 4)
    torch.manual_seed(0)
    hidden, labels = torch.eye(6), torch.tensor([20, 3, 20, 7, 29, 5])
    weight = torch.randn(30, 6)
    weight[20, :3], weight[:8, 3], weight[29, 4], weight[5, 5] = 400.0, -400.0, 21.0, -300.0
    inputs = [t.clone().requires_grad_() for t in (hidden, weight)]
    found = _ScoreTokens.apply(inputs[0], inputs[1], None, labels, 1.0, None, True, slopes, 2 * 30)
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    log_p = (wide[0] @ wide[1].T).log_softmax(-1)
    want = log_p.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(found[0].double(), want, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found[1].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-6)
    assert torch.equal(found[3], log_p.argmax(-1) == labels)
    if slopes:
        for a, b in zip(
            torch.autograd.grad(found[0].sum(), inputs), torch.autograd.grad(want.sum(), wide), strict=True
        ):
            assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-12)


def _score(hidden):
    return _ScoreTokens.apply(hidden, torch.ones(7, 5), None, torch.arange(3), 1.0, None, False, True)[0]


def _objective(hidden):
    from contrastive_align.models.token_loss import token_loss

    terms = {"kl_coef": 0.0, "entropy_coef": 0.1, "kl_direction": "reverse"}
    return token_loss(hidden, torch.ones(7, 5), None, torch.arange(3), **terms).loss


def _attention(query):
    layout = PackedRow([Segment(300, (2, 3))], width=400)
    query = query.expand(305, 3, 5).transpose(0, 1)[None]
    return shared_prompt_attention(None, query, query, query, None, shared_prompt=layout)[0]


@pytest.mark.parametrize("what", [_score, _objective, _attention])
def test_no_second_derivative_is_zero_without_a_word(what):
    """Neither where the gradient that comes in is a constant, nor through one that is not, nor to another leaf."""
    hidden, other = torch.randn(3, 5, requires_grad=True), torch.randn((), requires_grad=True)
    for loss in (what(hidden).sum(), other * what(hidden).sum()):
        with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_head_against_a_plain_projection(softcap, monkeypatch):
    """More tokens than a chunk, and chunks that blocks do not fill."""
    monkeypatch.setattr(head, "TILE_LOGITS", 40 * 13)
    monkeypatch.setattr(head, "TILE_TOKENS", 40)
    torch.manual_seed(0)
    hidden, weight = torch.randn(101, 16, dtype=torch.float64), torch.randn(33, 16, dtype=torch.float64)
    labels = torch.randint(33, (101,))
    found = _ScoreTokens.apply(hidden, weight, None, labels, 0.5, softcap, True, False)
    logits = 0.5 * hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    want = (log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), logits.mean(-1))
    for a, b in zip(found, want, strict=False):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[3], logits.argmax(-1) == labels)
    bare = _ScoreTokens.apply(hidden, weight, None, labels, 0.5, softcap, False, False)
    assert torch.equal(bare[0], found[0])


@pytest.mark.parametrize("name", CANNOT)
def test_models_that_cannot_go_padded_or_raise(name, caplog):
    model = build(*CANNOT[name])
    own = model.config._attn_implementation
    logging.getLogger("contrastive_align.models.layout").propagate = True
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        assert choose_layout(model, "auto") == "padded"
    assert type(model).__name__ in caplog.text and "no shared-prompt layout" in caplog.text
    assert choose_layout(model, "auto", sharded=True) == "padded"
    assert model.config._attn_implementation == own
    for sharded in (False, True):
        with pytest.raises(ValueError, match="layout='padded'"):
            choose_layout(model, "shared", sharded=sharded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_convolutions_are_found_whatever_rounding_hides(dtype):
    """Of a last layer that mixes 3 tokens, log-probs in 16 bits tell less than a float32 model of the class."""
    model = build(hf.Lfm2Config, {"layer_types": ["full_attention", "full_attention", "conv"]}).to(dtype)
    assert choose_layout(add_head_over_plain(model), "auto") == "padded"


def test_an_embedding_may_have_more_words_than_the_head():
    model = build(hf.LlamaConfig, {"tie_word_embeddings": False})
    more = torch.nn.Embedding(model.config.vocab_size + 40, model.config.hidden_size)
    model.set_input_embeddings(more)
    assert choose_layout(add_head_over_plain(model), "shared") == "shared"


def rescale(model, seed=0):
    """Draw weights with which a model neither dies out nor explodes, however deep."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.size(-1) ** -0.5)
    return model


def deep(layers, width=64, seed=0):
    """A random Llama."""
    model = rescale(
        AutoModelForCausalLM.from_config(
            hf.LlamaConfig(**SHAPE | {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 1000})
        ),
        seed,
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


@pytest.mark.parametrize(("layers", "width"), [(2, 64), (24, 64), (48, 32), (32, 128)])
def test_rounding_grows_with_depth_and_what_it_hides_is_measured(layers, width):
    model = add_head_over_plain(deep(layers, width).to(torch.bfloat16))
    assert choose_layout(model, "auto") == "shared"


def leak(share, to):
    """Tokens see a share of what another one sees."""

    def wrong(model):
        def add(module, args, kwargs, output):
            if "shared_prompt" in kwargs:
                hidden = output[0].clone()
                hidden[:, to] += share * output[0][:, to].roll(9, 1)
                return (hidden, *output[1:])

        model.model.layers[1].self_attn.register_forward_hook(add, with_kwargs=True)

    return wrong


def shifted_positions(by, tokens):
    def wrong(model):
        def shift(module, args, kwargs):
            if "shared_prompt" in kwargs:
                positions = kwargs["position_ids"].clone()
                positions[:, tokens] += by
                return args, {**kwargs, "position_ids": positions}

        model.model.register_forward_pre_hook(shift, with_kwargs=True)

    return wrong


def window_of_a_layer(window):
    """A layer whose attention is told another window than its mask has."""

    def wrong(model):
        model.model.layers[0].self_attn.sliding_window = window

    return wrong


def scale_of_a_layer(factor, layer):
    def wrong(model):
        def scale(module, args, kwargs):
            module.scaling = module.head_dim**-0.5 * (factor if "shared_prompt" in kwargs else 1)

        model.model.layers[layer].self_attn.register_forward_pre_hook(scale, with_kwargs=True)

    return wrong


def positions_of_a_layer(by, layer, tokens):
    def wrong(model):
        def shift(module, args, kwargs):
            if "shared_prompt" not in kwargs:
                return None
            cos, sin = (t.clone() for t in kwargs["position_embeddings"])
            for t in (cos, sin):
                t[:, tokens] = t[:, tokens].roll(by, 1)
            return args, {**kwargs, "position_embeddings": (cos, sin)}

        model.model.layers[layer].self_attn.register_forward_pre_hook(shift, with_kwargs=True)

    return wrong


def lost_values(layer, token):
    def wrong(model):
        attention, shared = model.model.layers[layer].self_attn, []
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: shared.append("shared_prompt" in kwargs), with_kwargs=True
        )

        def lose(module, args, values):
            if shared[-1]:
                values = values.clone()
                values[:, token] = 0
            return values

        attention.v_proj.register_forward_hook(lose)

    return wrong


BRANCHES, SOME_BRANCHES = slice(16, None), slice(19, 31)  # of the row that is tried
WRONG = {f"a leak of {share:.0%} at {to}": leak(share, to) for share in (0.01, 0.03, 0.1, 1.0)
         for to in (slice(None), SOME_BRANCHES)}  # fmt: skip
WRONG |= {f"positions {by:+} at {tokens}": shifted_positions(by, tokens) for by in (1, 2, 5)
          for tokens in (BRANCHES, SOME_BRANCHES, slice(0, 5))}  # fmt: skip
WRONG |= {f"a window of {window}": window_of_a_layer(window) for window in (None, 3, 40)}
WRONG |= {f"a scale of {factor} times in layer {layer}": scale_of_a_layer(factor, layer)
          for factor, layer in ((1.03, 0), (0.8, 11))}  # fmt: skip
WRONG |= {f"positions {by:+} at {tokens} of layer 5": positions_of_a_layer(by, 5, tokens)
          for by, tokens in ((1, SOME_BRANCHES), (1, slice(0, 5)))}  # fmt: skip
WRONG |= {f"value {token} of layer {layer}, lost": lost_values(layer, token) for layer, token in ((3, 2), (11, 30))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_is_wrong_on_purpose_is_found(what, dtype):
    """Wrong in this model alone: the small one of its class is right."""
    model = build(*ARCHITECTURES["gemma2"]) if "window" in what else deep(12)
    WRONG[what](model)
    assert choose_layout(add_head_over_plain(model.to(dtype)), "auto") == "padded"


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_that_rounds_its_scores_is_no_difference(name, dtype):
    """Eager attention, the only one that Gemma 2 has, rounds in the same way in every batch; a kernel does not."""
    model = rescale(build(*ARCHITECTURES[name]), seed=2)
    model.set_attn_implementation("eager")
    assert choose_layout(add_head_over_plain(model.to(dtype)), "auto") == "shared"
    with pytest.raises(ValueError, match=r"differs? by"):
        model.set_attn_implementation("eager")
        scale_of_a_layer(1.03, 1)(model)
        choose_layout(model, "shared")


def test_eager_attention_that_overflows_says_nothing():
    model = deep(2)
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.data.mul_(1500)
    attention.k_proj.weight.data.mul_(100)
    attention.scaling = 1e-6
    assert choose_layout(add_head_over_plain(model.to(torch.float16)), "auto") == "shared"
    lengths, infinite = torch.tensor([1]), torch.tensor([torch.inf])
    assert measure_noise(torch.zeros(1), lengths, lambda batch: (infinite, lengths), [[{}]]) == 0


@pytest.mark.parametrize("what", ["model", "layers"])
def test_a_compiled_model_is_tried_without_its_graphs(what):
    """They ignore hooks that are added after they were made."""
    model = add_head_over_plain(deep(2).to(torch.bfloat16))
    batch = GroupCollator(0)(groups())
    for module in [model] if what == "model" else model.model.layers:
        module.compile(backend="eager")
    with torch.no_grad():
        expected = _own_logps(model, batch)
        assert choose_layout(model, "auto") == "shared"
        found = completion_logps(model, batch, layout="shared").logps
    assert torch.allclose(found, expected, atol=0.5)


def test_an_attention_whose_output_is_changed_in_place():
    """It returns a list, too."""

    class Attention(hf.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            return list(super().forward(*args, **kwargs))

    class InPlace(hf.models.llama.modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            hidden, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden += hidden_states
            return hidden + self.mlp(self.post_attention_layernorm(hidden))

    model = add_head_over_plain(deep(12).to(torch.bfloat16))
    for layer in model.model.layers:
        layer.__class__, layer.self_attn.__class__ = InPlace, Attention
    assert choose_layout(model, "shared") == "shared"
    model.set_attn_implementation("sdpa")
    scale_of_a_layer(1.03, 0)(model)
    with pytest.raises(ValueError, match="the output of its attention 1 differs"):
        choose_layout(model, "shared")


@pytest.mark.parametrize("window", [None, 32, 96])
def test_a_window_that_one_layer_of_many_has_otherwise(window, caplog):
    """Windows are longer than what is tried, and other layers have the right one."""
    model = add_head_over_plain(build(hf.Gemma3TextConfig, {**ARCHITECTURES["gemma3"][1], "sliding_window": 64}))
    model.model.layers[3].self_attn.sliding_window = window
    logging.getLogger("contrastive_align.models.layout").propagate = True
    with caplog.at_level(logging.WARNING):
        assert choose_layout(model, "auto") == "padded"
    assert f"a mask with a window of 64 tokens, but a sliding_window of {window}" in caplog.text


def test_dropout_of_attention_weights_is_padded(caplog):
    """Of training: the model that is tried in evaluation mode has none."""
    model = add_head_over_plain(build(hf.LlamaConfig, {"attention_dropout": 0.1})).eval()
    logging.getLogger("contrastive_align.models.layout").propagate = True
    with caplog.at_level(logging.WARNING):
        assert choose_layout(model, "auto") == "padded"
    assert "its attention has a dropout of 0.1" in caplog.text and not model.training


def test_log_probs_that_are_no_numbers_say_nothing_for_the_shared_layout():
    model = add_head_over_plain(build(*ARCHITECTURES["llama"]))
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    assert choose_layout(model, "auto") == "padded"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "mixtral"])
def test_what_can_is_found_in_16_bits_too(name):
    experts = (hf.MixtralConfig, {"num_local_experts": 4})
    model = build(*(experts if name == "mixtral" else ARCHITECTURES[name])).to(torch.bfloat16)
    assert choose_layout(add_head_over_plain(model), "shared") == "shared"


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
def test_windows_longer_than_what_is_tried_and_shorter_than_the_rows(name):
    config_class, extra = ARCHITECTURES[name]
    model = build(config_class, {**extra, "sliding_window": 48}).eval()
    rows = groups()
    for row in rows[::2]:
        row["prompt_ids"] = 7 * row["prompt_ids"]
    batch = GroupCollator(0)(rows)
    with torch.no_grad():
        expected = _own_logps(model, batch)
        assert choose_layout(add_head_over_plain(model), "shared") == "shared"
        found = completion_logps(model, batch, layout="shared").logps
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-4)


def test_tensors_and_masks_that_the_packed_row_does_not_heed_raise():
    (q, k, v), layout = (torch.randn(1, 2, 7, 4) for _ in range(3)), PackedRow([Segment(3, (2, 2))], width=5)
    for options, told in (
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "a mask of its own"),
        ({"attention_mask": None, "sinks": torch.zeros(4)}, "sinks"),
        ({"attention_mask": None, "dropout": 0.1}, "a dropout of 0.1"),
    ):
        with pytest.raises(NotImplementedError, match=f"Linear gives its attention {told}.*layout='padded'"):
            shared_prompt_attention(torch.nn.Linear(1, 1), q, k, v, **options, shared_prompt=layout)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_weights_are_sharded_a_small_model_of_the_class_is_tried(name):
    model = build(*ARCHITECTURES[name])
    state = torch.get_rng_state()
    for p in model.parameters():  # as on the ranks that FSDP sends the weights to later
        p.data.fill_(torch.nan)
    config = model.config.to_json_string()
    assert choose_layout(model, "auto", sharded=True) == "shared"
    assert model.config._attn_implementation == ATTENTION_NAME
    assert model.config.to_json_string() == config and torch.equal(torch.get_rng_state(), state)


def test_weights_sharded_over_two_processes_give_the_same():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = Path(__file__).with_name("fsdp_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, str(worker)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_packed_row_that_meets_another_attention_raises():
    model = build(*ARCHITECTURES["llama"])
    add_head_over_plain(model)
    batch = GroupCollator(0)(groups())
    assert choose_layout(model, "shared") == "shared"
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="never reached the attention of LlamaForCausalLM"):
        completion_logps(model, batch, layout="shared")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_nothing_leaks(name):
    """Changing one completion or one neighbour group moves no other completion's log-prob by a bit."""
    model = build(*ARCHITECTURES[name])
    add_head_over_plain(model)
    choose_layout(model, "shared")
    rows = groups()
    with torch.no_grad():
        before = completion_logps(model, GroupCollator(0)(rows), layout="shared").logps
        rows[0]["completion_ids"][1] = [5] * 11
        rows[2]["prompt_ids"] = [7] * 20
        after = completion_logps(model, GroupCollator(0)(rows), layout="shared").logps
    same = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    assert torch.equal(before[same], after[same])
    assert (before[~same] != after[~same]).all()


def test_the_packed_row():
    batch = GroupCollator(0)(
        [
            {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6]], "scores": [1.0, 0.0]},
            {"prompt_ids": [8, 9], "completion_ids": [[7]], "scores": [1.0]},
        ]
    )
    packed, layout = pack(batch)
    assert packed["input_ids"].tolist() == [[1, 2, 8, 3, 4, 3, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 2, 3, 2, 1]]
    assert packed["shift_labels"].tolist() == [[-100, -100, -100, 4, 5, 6, 7]]
    assert layout.segments == [(2, (2, 1)), (1, (1,))]
    again, same = pack(batch)
    assert same is layout and all(torch.equal(again[name], packed[name]) for name in packed)
    half = {**batch, "valid": batch["valid"][:1]}  # with the same completion_mask
    assert pack(half)[1].segments == layout.segments[:1]


def test_a_model_set_to_it_still_samples_and_saves_as_before(tmp_path):
    for name in ("llama", "gemma2", "mistral"):
        model = build(*ARCHITECTURES[name]).eval()
        ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
        mask = (ids != 0).long()
        kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        before = model.generate(ids, **kwargs)
        add_head_over_plain(model)
        choose_layout(model, "shared")
        assert model.config._attn_implementation == ATTENTION_NAME
        assert torch.equal(model.generate(ids, **kwargs), before), name
        model.save_pretrained(tmp_path / name)
        assert ATTENTION_NAME not in (tmp_path / name / "config.json").read_text()


# ----------------------------------------------------------------------------------------------- through the trainer


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "beta": 0.1,
}


@pytest.mark.parametrize("way", ["full", "lora", "4-bit", "bf16", "cached"])
def test_twenty_steps_take_the_same_way_under_both_layouts(tiny_llama, tmp_path, way):
    model = tiny_llama(hidden_size=64, intermediate_size=128) if way == "4-bit" else tiny_llama()
    extra = {"learning_rate": 1e-3} if way == "4-bit" else {}
    if way in ("lora", "4-bit"):
        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if way == "4-bit":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    own = {k: extra.pop(k) for k in ("peft_config", "quantization_config") if k in extra}
    losses = {}
    for layout in ("shared", "padded"):
        options = {"bf16": way == "bf16", "precompute_ref_log_probs": way == "cached", **extra}
        args = ContrastiveConfig(output_dir=str(tmp_path / layout), layout=layout, **{**COMMON, **options})
        data = demo.load_reward_dataset()["train"].select(range(40))
        trainer = ContrastiveTrainer(model, args=args, train_dataset=data, **own)
        assert trainer.layout == layout
        trainer.train()
        losses[layout] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses["shared"]) == 20 and losses["shared"][0] == pytest.approx(2 * math.log(2), abs=1e-3)
    rounding = 2e-2 if way == "bf16" else 1e-3  # bf16 rounds each step
    assert losses["shared"] == pytest.approx(losses["padded"], abs=rounding)


def test_auto_is_shared_where_it_can_be(tiny_llama, tmp_path):
    args = ContrastiveConfig(output_dir=str(tmp_path), **COMMON)
    data = demo.load_reward_dataset()["train"].select(range(4))
    assert ContrastiveTrainer(tiny_llama(), args=args, train_dataset=data).layout == "shared"
    with pytest.raises(ValueError, match="layout is 'packed'"):
        ContrastiveConfig(output_dir=str(tmp_path), **{**COMMON, "layout": "packed"})
