"""Condition tokens: their rows, LoRA that trains them, and every way of saving and loading."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from contrastive_align import demo
from contrastive_align.conditions.tokens import add_condition_tokens, load_with_condition_tokens, with_trainable_rows
from contrastive_align.models.head import add_head
from contrastive_align.models.loading import verify_saved


TOKENS = [f"<quantile_{i}>" for i in range(5)]
TOKENIZER = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
OLD = len(TOKENIZER)
SHAPE = {"vocab_size": OLD, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
KEYS = {"num_key_value_heads": 4}
GPT2 = {"vocab_size": OLD, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
MODELS = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **k}, tie_word_embeddings=False)),
    "phi": lambda **k: PhiForCausalLM(PhiConfig(**{**SHAPE, **k}, tie_word_embeddings=False)),  # its head has a bias
    "llama_tied": lambda **k: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **k}, tie_word_embeddings=True)),
    "qwen2_tied": lambda **k: Qwen2ForCausalLM(
        Qwen2Config(**{**SHAPE, **k}, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "gpt2_tied": lambda **k: GPT2LMHeadModel(GPT2Config(**{**GPT2, **k})),
    "gemma3_tied": lambda **k: Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, **k}, head_dim=4)),
    "gemma3": lambda **k: Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, **k}, head_dim=4, tie_word_embeddings=False)),
}
KINDS = [(name, torch.float32) for name in MODELS] + [("llama", torch.bfloat16), ("llama_tied", torch.bfloat16)]
QUIET = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def make(name, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = MODELS[name](**changes).to(dtype).eval()
    if name == "phi":
        torch.nn.init.normal_(model.lm_head.bias, 1.0, 0.5)
    return model


def prepared(name, dtype=torch.float32, seed=1, **changes):
    model, tokenizer = make(name, dtype, **changes), copy.deepcopy(TOKENIZER)
    return model, tokenizer, add_condition_tokens(model, tokenizer, TOKENS, seed=seed)


def texts(tokenizer):
    ids = tokenizer(["<quantile_0>a b c d", "<quantile_3>e a a b"], add_special_tokens=False)["input_ids"]
    return torch.tensor([row[:4] for row in ids])


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits.float()


def config(**changes):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "lora_dropout": 0.0, **changes})


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------------- the tokenizer


def test_the_tokenizer_keeps_them_whole_and_drops_them(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mine>"]})
    ids = add_condition_tokens(make("llama"), tokenizer, TOKENS, seed=0)
    assert ids == list(range(OLD + 1, OLD + 6))
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.convert_tokens_to_ids([*TOKENS, "<mine>"]) == [*ids, OLD]
        tokens = each("<quantile_0>a b<quantile_4>", add_special_tokens=False)["input_ids"]
        assert tokens[0] == ids[0]
        assert tokens[-1] == ids[4]
        assert each.decode(tokens, skip_special_tokens=True) == each.decode(tokens[1:-1])
        assert "<quantile_0>" in each.decode(tokens)


def test_texts_that_are_refused():
    ordinary = TOKENIZER.convert_ids_to_tokens(TOKENIZER("a", add_special_tokens=False)["input_ids"][-1])
    cases = [([""], "token 0 is ''"), (["<a>", " <b>"], "token 1 is ' <b>'"), (["<a>", "<a>"], "token 1 is '<a>'")]
    for tokens, found in [*cases, ([ordinary.strip()], "ordinary token")]:
        model, tokenizer = make("llama"), copy.deepcopy(TOKENIZER)
        with pytest.raises(ValueError, match=found):
            add_condition_tokens(model, tokenizer, tokens, seed=0)
        assert len(tokenizer) == OLD == model.config.vocab_size
    assert add_condition_tokens(make("llama"), copy.deepcopy(TOKENIZER), [], seed=0) == []


# ------------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_old_rows_stay_and_new_ones_are_there(name, dtype, tmp_path):
    before = make(name, dtype)
    state = torch.get_rng_state()
    model, tokenizer, ids = make(name, dtype), copy.deepcopy(TOKENIZER), None
    torch.set_rng_state(state)
    ids = add_condition_tokens(model, tokenizer, TOKENS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert ids == list(range(OLD, OLD + 5))
    assert model.config.vocab_size == OLD + 5 == model.get_input_embeddings().num_embeddings
    assert model.dtype == dtype
    tied = name.endswith("tied")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, part)().weight[:OLD], getattr(before, part)().weight)
        assert getattr(model, part)().weight.requires_grad
    plain = torch.tensor([[5, 6, 7, 8]])
    close(logits(model, plain)[..., :OLD], logits(before, plain))
    again = prepared(name, dtype)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = prepared(name, dtype, 2)[0].get_input_embeddings()
    assert not torch.equal(model.get_input_embeddings().weight, other.weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config.vocab_size == OLD + 5
    assert torch.equal(logits(loaded, texts(tokenizer)), logits(model, texts(tokenizer)))


@pytest.mark.parametrize("name", ["phi", "gpt2_tied"])
def test_new_rows_have_the_mean_and_spread_of_the_old(name):
    model, tokenizer = make(name), copy.deepcopy(TOKENIZER)
    shift = torch.arange(16) / 8
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 + shift).add_(shift)
    n = 2_000
    ids = add_condition_tokens(model, tokenizer, [f"<c{i}>" for i in range(n)], seed=0)
    head = model.get_output_embeddings()
    columns = [model.get_input_embeddings().weight, head.weight]
    columns += [head.bias[:, None]] if head.bias is not None else []
    for weight in columns:
        old, new = weight[:OLD], weight[ids]
        error = old.std(0) / n**0.5
        assert ((new.mean(0) - old.mean(0)).abs() < 4.5 * error).all()
        assert ((new.std(0) / old.std(0) - 1).abs() < 0.08).all()


def test_rows_that_are_there_are_used_and_are_not_old_ones():
    model = make("llama", vocab_size=OLD + 8)
    with torch.no_grad():
        model.model.embed_tokens.weight[OLD:] = 1e6
    before = copy.deepcopy(model)
    ids = add_condition_tokens(model, copy.deepcopy(TOKENIZER), TOKENS, seed=0)
    assert model.config.vocab_size == OLD + 8 == len(model.model.embed_tokens.weight)
    assert model.model.embed_tokens.weight[ids].abs().max() < 10
    assert torch.equal(model.model.embed_tokens.weight[OLD + 5 :], before.model.embed_tokens.weight[OLD + 5 :])
    assert torch.equal(model.lm_head.weight[OLD + 5 :], before.lm_head.weight[OLD + 5 :])
    some = make("llama", vocab_size=OLD + 2)
    add_condition_tokens(some, copy.deepcopy(TOKENIZER), TOKENS, seed=0)
    assert some.config.vocab_size == OLD + 5


@pytest.mark.parametrize("name", ["llama", "gpt2_tied"])
def test_again_is_nothing(name):
    model, tokenizer, ids = prepared(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] += 3.0  # trained
    before = copy.deepcopy(model.state_dict())
    assert add_condition_tokens(model, tokenizer, TOKENS[::-1], seed=9) == ids[::-1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    more = add_condition_tokens(model, tokenizer, [*TOKENS, "<other>"], seed=9)
    assert more == [*ids, OLD + 5]
    assert torch.equal(model.get_input_embeddings().weight[ids], before[_name(model) + ".weight"][ids])
    bare = make(name)  # with a tokenizer that has them
    assert add_condition_tokens(bare, tokenizer, TOKENS, seed=1) == ids
    assert torch.equal(bare.get_input_embeddings().weight, prepared(name)[0].get_input_embeddings().weight)


def _name(model):
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


def test_weights_that_are_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="has an adapter already"):
        add_condition_tokens(get_peft_model(model, config()), copy.deepcopy(TOKENIZER), TOKENS, seed=0)
    for weight, found in ((torch.zeros(8, 1, dtype=torch.uint8), "is quantised"), (torch.zeros(0), "partitioned")):
        model, tokenizer = make("llama"), copy.deepcopy(TOKENIZER)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=f"The head of LlamaForCausalLM .*{found}"):
            add_condition_tokens(model, tokenizer, TOKENS, seed=0)
        assert len(tokenizer) == OLD


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def trained():
    """Of each kind, once: base with rows, its LoRA after some steps, tokenizer, ids; the inputs."""
    made = {}

    def make_trained(name, dtype):
        if (name, dtype) not in made:
            base, tokenizer, ids = prepared(name, dtype)
            model = copy.deepcopy(base)
            add_fused_lm_head(model)
            add_head(model)
            model = get_peft_model(model, with_trainable_rows(config(), model, ids))
            _steps(model, texts(tokenizer))
            made[name, dtype] = base, model.eval(), tokenizer, ids
        return made[name, dtype]

    return make_trained


def labels_of(ids):
    return torch.where(torch.arange(ids.size(1)) < 1, -100, ids.roll(-1, 1)).index_fill(1, torch.tensor([3]), -100)


def fused(model, ids):
    return model(input_ids=ids, shift_labels=labels_of(ids), fused_lm_head=True).log_probs


def _steps(model, ids):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (-fused(model, ids).sum()).backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()


@QUIET
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_fused_and_plain_forward_agree_with_the_adapter_on_and_off(name, dtype, trained):
    base, model, tokenizer, _ = trained(name, dtype)
    ids = texts(tokenizer)
    kept = labels_of(ids) != -100
    atol = 1e-5 if dtype == torch.float32 else 0.05

    def plain():
        return logits(model, ids).log_softmax(-1)[kept].gather(1, labels_of(ids)[kept][:, None])[:, 0]

    with torch.no_grad():
        close(fused(model, ids).float(), plain(), atol)
        on = logits(model, ids)
        with model.disable_adapter():
            close(fused(model, ids).float(), plain(), atol)
            assert torch.equal(logits(model, ids), logits(base, ids))
            assert (on - logits(model, ids)).abs().max() > 0.1


@QUIET
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_the_rows_are_trained(name, dtype, trained):
    base, model, _, ids = trained(name, dtype)
    with torch.no_grad():
        rows = torch.arange(OLD + 5)
        moved = (model.get_input_embeddings()(rows) - base.get_input_embeddings()(rows)).abs().amax(1) > 0
        head = (model.get_output_embeddings().weight - base.get_output_embeddings().weight).abs().amax(1) > 0
    assert moved[[ids[0], ids[3]]].all()
    if name.endswith("tied"):
        assert torch.equal(moved, head)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    else:
        assert moved.sum() == 2  # the conditions in the texts
        assert not head.any()
        assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
        trained_rows = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        assert [(p.shape, p.dtype) for p in trained_rows] == [((5, 16), torch.float32)]


@QUIET
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_an_adapter_loads_on_a_bare_base(name, dtype, trained, tmp_path):
    base, model, tokenizer, _ = trained(name, dtype)
    ids = texts(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    verify_saved(tmp_path)
    loaded, its_tokenizer = load_with_condition_tokens(make(name, dtype), tmp_path, seed=1)
    assert torch.equal(texts(its_tokenizer), ids)
    close(logits(loaded.eval(), ids), logits(model, ids))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), logits(base, ids))
    by_hand = PeftModel.from_pretrained(prepared(name, dtype)[0], tmp_path, is_trainable=True)
    close(logits(by_hand.eval(), ids), logits(model, ids))
    assert {n for n, p in by_hand.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@QUIET
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_merged_model_loads(name, dtype, trained, tmp_path):
    _, model, tokenizer, _ = trained(name, dtype)
    ids = texts(tokenizer)
    merged = copy.deepcopy(model).merge_and_unload()
    close(logits(merged, ids), logits(model, ids), 1e-5 if dtype == torch.float32 else 0.2)  # bf16: rounded weights
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())
    close(logits(loaded, ids), logits(merged, ids), 1e-5 if dtype == torch.float32 else 0.2)
    assert loaded.config.vocab_size == OLD + 5
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == name.endswith("tied") == loaded.config.tie_word_embeddings


@QUIET
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("padding", [3, 8])  # too little, which PEFT answers by saving all rows; and enough
def test_an_adapter_on_a_padded_base_and_a_base_in_a_folder(name, padding, tmp_path):
    make(name, vocab_size=OLD + padding).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = copy.deepcopy(TOKENIZER)
    ids = add_condition_tokens(base, tokenizer, TOKENS, seed=1)
    add_fused_lm_head(base)
    model = get_peft_model(base, with_trainable_rows(config(), base, ids))
    _steps(model, texts(tokenizer))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded, _ = load_with_condition_tokens(bare, tmp_path / "adapter", tokens=TOKENS, seed=1)
    close(logits(loaded, texts(tokenizer)), logits(model, texts(tokenizer)))
    with pytest.raises(ValueError, match="no token '<other>'"):
        load_with_condition_tokens(bare, tmp_path / "adapter", tokens=["<other>"])


@QUIET
def test_configs_are_copied_and_merged():
    for name in MODELS:
        model, _, ids = prepared(name)
        given = config(modules_to_save=["score"])
        got = with_trainable_rows(given, model, ids)
        assert given.modules_to_save == ["score"]
        assert given.trainable_token_indices is None
        assert with_trainable_rows(given, model, []).to_dict() == given.to_dict()
        if name.endswith("tied"):
            assert got.ensure_weight_tying
            assert got.modules_to_save[:2] == ["score", _name(model)]
        else:
            assert got.modules_to_save == ["score"]
            assert got.trainable_token_indices == {_name(model): ids}
    model, _, ids = prepared("llama")
    rows = with_trainable_rows(config(trainable_token_indices=[7]), model, ids).trainable_token_indices
    assert rows == {"model.embed_tokens": [7, *ids]}
    given = config(trainable_token_indices={"embed_tokens": [7]})
    assert with_trainable_rows(given, model, ids).trainable_token_indices == {"embed_tokens": [7, *ids]}
    whole = with_trainable_rows(config(modules_to_save=["embed_tokens"]), model, ids)
    assert whole.trainable_token_indices is None


@QUIET
def test_a_users_own_head_and_embedding_are_tied():
    model, tokenizer, ids = prepared("llama_tied")
    given = config(modules_to_save=["embed_tokens", "lm_head"])
    add_fused_lm_head(model)
    model = get_peft_model(model, with_trainable_rows(given, model, ids))
    _steps(model, texts(tokenizer))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_configs_that_are_refused():
    model, _, ids = prepared("llama")
    tied = prepared("llama_tied")[0]
    cases = [
        (PrefixTuningConfig(num_virtual_tokens=2), model, "expected a LoraConfig"),
        (config(target_modules=["q_proj", "embed_tokens"]), model, "target_modules has the embedding"),
        (config(target_modules=r".*\.embed_tokens"), model, "target_modules has the embedding"),
        (config(trainable_token_indices=[7]), tied, "with tied embeddings"),
    ]
    for given, of, found in cases:
        with pytest.raises(ValueError, match=found):
            with_trainable_rows(given, of, ids)
    tied.lm_head.bias = torch.nn.Parameter(torch.zeros(OLD + 5))
    with pytest.raises(ValueError, match="has a bias"):
        with_trainable_rows(config(), tied, ids)
