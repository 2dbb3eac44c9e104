"""Drawing: the log-probs are the model's, the samples are the prompt's own, the distribution is the model's own."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from contrastive_align.models.shared_prompt import ATTENTION_NAME
from contrastive_align.sampling import Drawn, PolicyProposal, decode, draw
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.sampling.decode import _sample_tokens, score
from contrastive_align.sampling.noise import exponential_noise


VOCABULARY, PAD, EOS = 24, 0, (1, 2, 3, 4)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
SEEDS = [11, 12, 13, 14]
SHAPE = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 16}
CAUSAL = {**SHAPE, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "initializer_range": 0.3}
CAUSAL |= {"max_position_embeddings": 64}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
SMALL_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SMALL_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64, "init_std": 0.3}
SMALL_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **SMALL_GPT2)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**CAUSAL, **WINDOW, attn_implementation="eager")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**CAUSAL, **WINDOW)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **SMALL_T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **SMALL_BART)),
    "lora": lambda: _with_lora(LlamaForCausalLM(LlamaConfig(**CAUSAL))),
}


# Softmax or states in float32, whatever the weights are.
COMPUTE_IN_FLOAT32 = ("gemma2", "bloom", "mamba")


def _with_lora(model):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(model, config)


def make(name: str, dtype=None):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype or (torch.float32 if name in COMPUTE_IN_FLOAT32 else torch.float64)).eval()


def tolerance(name: str) -> float:
    return 1e-5 if name in COMPUTE_IN_FLOAT32 else 1e-10


def draw_from(model, prompts=PROMPTS, seeds=SEEDS, **changes) -> Drawn:
    given = {"per_prompt": 5, "max_new_tokens": 9, "eos_token_ids": EOS, "pad_token_id": PAD}
    return draw(model, prompts, seeds=seeds, **{**given, **changes})


@torch.no_grad()
def by_itself(model, prompt: list[int], completion: list[int]) -> float:
    """The completion's log-prob from one forward pass over one unpadded row."""
    if model.config.is_encoder_decoder:
        inputs = torch.tensor([[model.config.decoder_start_token_id, *completion[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=inputs).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


def all_by_themselves(model, drawn: Drawn) -> torch.Tensor:
    rows = zip(PROMPTS, drawn.completion_ids, strict=True)
    return torch.tensor([[by_itself(model, p, c) for c in cs] for p, cs in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_the_models(name):
    model = make(name)
    drawn = draw_from(model)
    expected = all_by_themselves(model, drawn)
    torch.testing.assert_close(drawn.logps, expected, atol=tolerance(name), rtol=0)
    lengths = {len(ids) for row in drawn.completion_ids for ids in row}
    assert min(lengths) < 9 == max(lengths)  # some ended and were dropped, some did not
    rows = [(p, c) for p, cs in zip(PROMPTS, drawn.completion_ids, strict=True) for c in cs]
    scored = score(model, [p for p, _ in rows], [c for _, c in rows], pad_token_id=PAD, rows_at_once=7)
    torch.testing.assert_close(scored, expected.flatten(), atol=tolerance(name), rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5"])
def test_logps_in_float32(name):
    model = make(name, torch.float32)
    drawn = draw_from(model)
    assert drawn.logps.dtype == torch.float64
    torch.testing.assert_close(drawn.logps, all_by_themselves(model, drawn), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_the_same_whatever_is_beside_them(name):
    model = make(name)
    together = draw_from(model)
    for c in range(len(PROMPTS)):
        alone = draw_from(model, PROMPTS[c : c + 1], SEEDS[c : c + 1], rows_at_once=2 + c)
        assert alone.completion_ids == together.completion_ids[c : c + 1]
        torch.testing.assert_close(alone.logps, together.logps[c : c + 1], atol=tolerance(name), rtol=0)
        assert torch.equal(alone.truncated, together.truncated[c : c + 1])
    assert draw_from(model, rows_at_once=11).completion_ids == together.completion_ids
    fewer = draw_from(model, per_prompt=2)
    assert fewer.completion_ids == [row[:2] for row in together.completion_ids]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_shared_prompt_attention_gives_the_same(name):
    model = make(name)
    before = draw_from(model)
    model.set_attn_implementation(ATTENTION_NAME)
    after = draw_from(model)
    assert after.completion_ids == before.completion_ids
    torch.testing.assert_close(after.logps, before.logps, atol=tolerance(name), rtol=0)


def test_the_distribution_is_the_models():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CAUSAL, "vocab_size": 5})).double()
    prompt, eos, n = [2, 3, 4], 1, 20_000
    drawn = draw_from(model, [prompt], [0], per_prompt=n, max_new_tokens=3, eos_token_ids=[eos], rows_at_once=5_000)
    others = [t for t in range(5) if t != eos]
    space = [[*head, eos] for size in range(3) for head in itertools.product(others, repeat=size)]
    space += [list(ids) for ids in itertools.product(others, repeat=3)]
    p = torch.tensor([by_itself(model, prompt, ids) for ids in space], dtype=torch.float64).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    ids = [tuple(c) for c in drawn.completion_ids[0]]
    seen = torch.tensor([ids.count(tuple(s)) for s in space])
    assert int(seen.sum()) == n
    z = (seen - n * p) / (n * p * (1 - p)).sqrt()
    assert float(z.abs().max()) < 4
    enough = n * p > 5
    chi2 = float((((seen - n * p) ** 2) / (n * p))[enough].sum())
    freedom = int(enough.sum()) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def reshaped(p: list[float], temperature=1.0, top_k=0, top_p=1.0, suppress_ids=()) -> list[float]:
    """The distribution to be drawn from, by the definitions, in Python's own arithmetic."""
    weights = [0.0 if v in suppress_ids else x ** (1 / temperature) for v, x in enumerate(p)]
    likeliest = sorted(range(len(p)), key=lambda v: -weights[v])[: top_k or len(p)]
    weights = [x / sum(weights[u] for u in likeliest) if v in likeliest else 0.0 for v, x in enumerate(weights)]
    kept, reached = set(), 0.0
    for v in likeliest:
        if reached < top_p:
            kept.add(v)
            reached += weights[v]
    return [x / reached if v in kept else 0.0 for v, x in enumerate(weights)]


CHANGES = [
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_p": 0.7},
    {"top_k": 3},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
    {"suppress_ids": (0, 3, 3)},
    {"temperature": 2.0, "top_p": 0.6, "suppress_ids": [2]},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_distribution_is_the_one_asked_for(changes):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**CAUSAL, "vocab_size": 7})).double()

    @torch.no_grad()
    def next_tokens(ids: list[int]) -> list[float]:
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()
        return reshaped(p, **changes)

    prompt, eos, n = [2, 3, 4], 1, 8_000
    exact = {}
    for first, p in enumerate(next_tokens(prompt)):
        if first == eos:
            exact[first,] = p
        else:
            exact |= {(first, second): p * q for second, q in enumerate(next_tokens([*prompt, first]))}
    assert sum(exact.values()) == pytest.approx(1, abs=1e-12)
    settings = {"per_prompt": n, "max_new_tokens": 2, "eos_token_ids": [eos], "rows_at_once": 20_000}
    drawn = draw_from(model, [prompt], [0], **settings, **changes)
    seen = Counter(map(tuple, drawn.completion_ids[0]))
    possible = {ids: p for ids, p in exact.items() if p > 0}
    assert set(seen) <= set(possible)
    assert not {v for ids in seen for v in ids} & set(changes.get("suppress_ids", ()))
    for ids, p in possible.items():
        assert abs(seen[ids] - n * p) < 4 * (n * p * (1 - p)) ** 0.5 + 1, ids
    for ids, logp in zip(drawn.completion_ids[0], drawn.logps[0].tolist(), strict=True):
        assert logp == pytest.approx(math.log(exact[tuple(ids)]), abs=1e-10)


def test_asking_for_nothing_changes_nothing(monkeypatch):
    model = make("llama")
    before = draw_from(model)
    monkeypatch.setattr(Adjustment, "apply", lambda *_, **__: pytest.fail("a pass over the logits for nothing"))
    same = draw_from(model, temperature=1.0, top_k=0, top_p=1.0, suppress_ids=[])
    assert same.completion_ids == before.completion_ids
    assert torch.equal(same.logps, before.logps)


def test_extreme_changes_are_greedy():
    model = make("llama", torch.float32)
    model.lm_head.weight.data *= 100  # so that the logits divided by the temperature are too large for float32
    cold = draw_from(model, temperature=1e-38, per_prompt=2)
    narrow = draw_from(model, top_p=1e-9, per_prompt=2)
    assert cold.completion_ids == narrow.completion_ids
    assert all(first == second for first, second in cold.completion_ids)
    assert (cold.logps == 0).all()
    assert (narrow.logps == 0).all()
    for half in (Adjustment(top_p=0.5), Adjustment(top_k=2)):
        assert half.apply(torch.zeros(1, 4)).tolist() == [[0, 0, -math.inf, -math.inf]]


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_changes_hold_for_every_kind_of_model(name):
    drawn = draw_from(make(name), suppress_ids=EOS, temperature=0.9)
    assert drawn.truncated.all()
    assert not {v for row in drawn.completion_ids for ids in row for v in ids} & set(EOS)


def test_changes_that_are_refused():
    model = make("llama")
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"temperature=.*do_sample=False"):
            draw_from(model, temperature=temperature)
    for top_p in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="top_p="):
            draw_from(model, top_p=top_p)
    for top_k in (-1, 1.5):
        with pytest.raises(ValueError, match="top_k="):
            draw_from(model, top_k=top_k)
    for ids, found in (([24], "id 24"), ([-1], "id -1"), (range(24), "all of them")):
        with pytest.raises(ValueError, match=f"suppress_ids has {found}, and LlamaForCausalLM has 24 tokens"):
            draw_from(model, suppress_ids=ids)


def test_impossible_tokens_are_never_drawn_and_logps_have_no_nan():
    logits = torch.full((64, 8), -torch.inf)
    logits[:, 3] = -1000.0
    tokens, logps = _sample_tokens(logits, exponential_noise(torch.arange(64), 0, 8))
    assert (tokens == 3).all()
    assert (logps == 0).all()
    tokens, _ = _sample_tokens(
        torch.zeros(1, 8), torch.full((1, 8), torch.inf).index_fill_(1, torch.tensor([5]), 1e-19)
    )
    assert tokens.tolist() == [5]


def test_looking_less_often_at_what_still_runs_draws_the_same(monkeypatch):
    model = make("llama")
    before = draw_from(model)
    monkeypatch.setitem(decode.LOOK_EVERY, "cpu", 5)
    after = draw_from(model)
    assert after.completion_ids == before.completion_ids and torch.allclose(after.logps, before.logps)
    assert torch.equal(after.truncated, before.truncated)


def test_generation_config_has_no_influence():
    model = make("llama")
    before = draw_from(model)
    config = model.generation_config
    config.temperature, config.top_k, config.top_p, config.min_p = 0.1, 1, 0.1, 0.9
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 5.0, 1, 9
    config.eos_token_id, config.max_new_tokens, config.num_beams, config.use_cache = 7, 2, 3, False
    model.config.use_cache = False
    after = draw_from(model)
    assert after.completion_ids == before.completion_ids
    assert torch.equal(after.logps, before.logps)


def test_ends():
    drawn = draw_from(make("llama"), per_prompt=40)
    rows = [ids for row in drawn.completion_ids for ids in row]
    assert {ids[-1] for ids in rows if ids[-1] in EOS} == set(EOS)
    for ids, cut in zip(rows, drawn.truncated.flatten().tolist(), strict=True):
        assert not any(token in EOS for token in ids[:-1])
        assert cut == (ids[-1] not in EOS)
        assert len(ids) == 9 or not cut
    endless = draw_from(make("llama"), eos_token_ids=[])
    assert endless.truncated.all()
    assert {len(ids) for row in endless.completion_ids for ids in row} == {9}


def test_state_around_is_left_alone():
    model = make("lora").train()
    model.base_model.model.model.layers[0].eval()  # a frozen part stays as it is
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = draw_from(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    torch.manual_seed(123)
    again = draw_from(model)  # dropout of 0.5 would differ
    assert again.completion_ids == first.completion_ids
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="Prompt 0 has no tokens"):
        draw_from(model, [[]], [0])
    assert [module.training for module in model.modules()] == modes


def test_different_seeds_differ():
    model = make("llama")
    drawn = draw_from(model, [PROMPTS[0]] * 3, [1, 2, 1], per_prompt=8)
    assert drawn.completion_ids[0] == drawn.completion_ids[2]
    assert drawn.completion_ids[0] != drawn.completion_ids[1]
    assert len({tuple(ids) for ids in drawn.completion_ids[0]}) > 4  # and the samples of a prompt do


def test_autocast():
    model = make("llama", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw_from(model)
    torch.testing.assert_close(drawn.logps, all_by_themselves(model, drawn), atol=0.3, rtol=0.05)


def test_refusals():
    model = make("llama")
    with pytest.raises(ValueError, match="1 seeds for 4 prompts"):
        draw_from(model, seeds=[1])
    with pytest.raises(ValueError, match="Prompt 2 has 7 tokens and max_new_tokens is 60: 67 positions"):
        draw_from(model, max_new_tokens=60)
    with pytest.raises(ValueError, match="at least 1"):
        draw_from(model, per_prompt=0)
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        draw_from(broken)
    assert draw_from(model, [], []).logps.shape == (0, 5)


# ------------------------------------------------------------------------------------------------- PolicyProposal


@pytest.fixture(scope="module")
def llama(tiny_llama):
    path = tiny_llama()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64), AutoTokenizer.from_pretrained(path)


def proposal_of(llama, **changes):
    model, tokenizer = llama
    return PolicyProposal(changes.pop("model", model), tokenizer, **{"max_new_tokens": 6, **changes})


def test_the_model_itself_is_the_base(llama):
    samples = proposal_of(llama).sample(["a b", "c"], 3)
    assert samples.prompt_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(samples.logps, samples.base_logps)
    assert samples.completions == llama[1].batch_decode(samples.completion_ids, skip_special_tokens=True)
    prompt = llama[1]("c")["input_ids"]
    expected = by_itself(llama[0], prompt, list(samples.completion_ids[4]))
    assert float(samples.logps[4]) == pytest.approx(expected, abs=1e-10)


def test_the_base_is_the_adapter_off_or_another_model(llama, tiny_llama):
    base = copy.deepcopy(llama[0])
    model = _with_lora(copy.deepcopy(base)).train()
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    off = proposal_of(llama, model=model, seed=3).sample(["a b", "c"], 4)
    beside = proposal_of(llama, model=model, seed=3, base=base).sample(["a b", "c"], 4)
    assert off.completion_ids == beside.completion_ids
    torch.testing.assert_close(off.base_logps, beside.base_logps, atol=1e-10, rtol=0)
    torch.testing.assert_close(off.logps, beside.logps, atol=1e-10, rtol=0)
    assert (off.logps - off.base_logps).abs().min() > 1e-3
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.training


def test_a_prefix_is_seen_by_the_proposal_only(llama):
    samples = proposal_of(llama, prefix="d e ").sample(["a b"], 2)
    seen, bare = (llama[1](text)["input_ids"] for text in ("d e a b", "a b"))
    for i in range(2):
        ids = list(samples.completion_ids[i])
        assert float(samples.logps[i]) == pytest.approx(by_itself(llama[0], seen, ids), abs=1e-10)
        assert float(samples.base_logps[i]) == pytest.approx(by_itself(llama[0], bare, ids), abs=1e-10)
    with pytest.raises(TypeError, match="text before text"):
        proposal_of(llama, prefix=[{"role": "system", "content": "d"}]).sample(["a b"], 2)


def test_conversations(llama):
    model, tokenizer = llama[0], copy.deepcopy(llama[1])
    chat = [{"role": "user", "content": "a b"}]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        PolicyProposal(model, tokenizer, max_new_tokens=4).sample([chat], 1)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}c{% endif %}"
    )
    system = [{"role": "system", "content": "d"}]
    proposal = PolicyProposal(model, tokenizer, max_new_tokens=4, prefix=system)
    samples = proposal.sample([chat], 2)
    assert [m["role"] for m in samples.completions[0]] == ["assistant"]
    seen, bare = (tokenizer(text)["input_ids"] for text in ("d a b c", "a b c"))
    ids = list(samples.completion_ids[1])
    assert float(samples.logps[1]) == pytest.approx(by_itself(model, seen, ids), abs=1e-10)
    assert float(samples.base_logps[1]) == pytest.approx(by_itself(model, bare, ids), abs=1e-10)


def test_calls_are_fresh_and_resumed(llama):
    proposal = proposal_of(llama, seed=5)
    first, state = proposal.sample(["a b"], 4), proposal.state_dict()
    second = proposal.sample(["a b"], 4)
    assert first.completion_ids != second.completion_ids
    resumed = proposal_of(llama, seed=5)
    resumed.load_state_dict(state)
    assert resumed.sample(["a b"], 4).completion_ids == second.completion_ids
    assert resumed.drawn == 8
    assert resumed.truncated == proposal.truncated
    assert proposal_of(llama, seed=6).sample(["a b"], 4).completion_ids != first.completion_ids
