"""Encoder-decoder models in FDPGTrainer: log-probs against the model's own forward, then training, saving, resuming."""

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig
from test_fdpg_trainer import EOS, LENGTH, PROMPTS, SPACE, WORDS, has_a, make_tokenizer, moment_target, options
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from contrastive_align import FDPGTrainer
from contrastive_align.losses import divergence_value
from contrastive_align.models.noise import WIDER
from contrastive_align.trainers.base import disable_functional_dropout
from contrastive_align.trainers.encoder_decoder import (
    EncoderDecoderCollator,
    add_encoder_decoder_head,
    encoder_decoder_logps,
)


TOKENS = {"pad_token_id": 0, "eos_token_id": EOS, "vocab_size": len(WORDS), "dropout_rate": 0.1, "dropout": 0.1}
LAYERS = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "init_std": 0.5, "bos_token_id": 1,
}  # fmt: skip
KINDS = ("t5", "bart", "marian")


def build(kind="t5", seed=0):
    torch.manual_seed(seed)
    if kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "initializer_factor": 1.0}
        return T5ForConditionalGeneration(T5Config(**TOKENS, **shape, decoder_start_token_id=0))
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**TOKENS, **LAYERS, decoder_start_token_id=EOS))
    model = MarianMTModel(MarianConfig(**TOKENS, **LAYERS, decoder_start_token_id=0))
    model.final_logits_bias.uniform_(-1, 1)  # which Marian's checkpoints have, and T5 has not
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def exact_logps(model, prompt, completions=SPACE):
    """log pi of each completion by the model's plain forward, one length at a time: no padding anywhere."""
    total = torch.zeros(len(completions), dtype=torch.float64)
    for n in {len(ids) for ids in completions}:
        rows = [i for i, ids in enumerate(completions) if len(ids) == n]
        ids = torch.tensor([completions[i] for i in rows])
        start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([prompt] * len(rows)), decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)
            ).logits
        total[rows] = logits.double().log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)
    return total


def make(model, folder, target=None, peft_config=None, **changes):
    given = {"learning_rate": 2e-2, **changes}
    return FDPGTrainer(
        model, args=options(folder, **given), train_dataset=PROMPTS, processing_class=make_tokenizer(),
        target=target or moment_target(), peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_the_models_own(kind):
    model, plain = build(kind).eval(), build(kind).eval()
    plain.load_state_dict(model.state_dict())
    groups = [
        {"prompt_ids": [3, 4, 5, 3, 2], "completion_ids": [[3, 2], [4, 5, 3, 3], [2]]},
        {"prompt_ids": [5, 2], "completion_ids": [[0, 1, 4], [5]]},
    ]
    collate = EncoderDecoderCollator(0, None, model.config.decoder_start_token_id)
    add_encoder_decoder_head(model)
    calls = []
    model.get_encoder().register_forward_hook(lambda module, args, kwargs, out: calls.append(out[0]), with_kwargs=True)
    heads = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: heads.append(args[0].flatten(0, -2)))
    found = encoder_decoder_logps(model, collate(groups))
    wider = EncoderDecoderCollator(0, 8, model.config.decoder_start_token_id)(groups)
    assert wider["input_ids"].shape == (2, 8) and wider["labels"].shape == (5, 8)
    assert torch.allclose(found, encoder_decoder_logps(model, wider), atol=1e-5)
    assert [out.shape[0] for out in calls] == [2, 2]  # a prompt is encoded once
    assert max(map(len, heads)) == 11  # and the head sees completion tokens alone
    want = torch.zeros(2, 3, dtype=torch.float64)
    for i, group in enumerate(groups):
        n = len(group["completion_ids"])
        want[i, :n] = exact_logps(plain, group["prompt_ids"], group["completion_ids"])
    assert torch.allclose(found.double(), want, atol=1e-5)

    found.sum().backward()
    total = 0.0
    for group in groups:
        for ids in group["completion_ids"]:
            start = [model.config.decoder_start_token_id]
            logits = plain(
                input_ids=torch.tensor([group["prompt_ids"]]), decoder_input_ids=torch.tensor([start + ids[:-1]])
            ).logits
            total = total + logits.log_softmax(-1)[0].gather(1, torch.tensor(ids)[:, None]).sum()
    total.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_measured_within_the_positions_of_a_model(kind, tmp_path):
    trainer = make(build(kind), tmp_path)
    batch = trainer.batch_of({"prompt_ids": [3, 4, 5, 2], "completion_ids": [[3, 2], [4, 5, 3, 3, 2]]})
    wider = trainer.other_batches(batch, 2)[1][0]["labels"].size(1)
    assert wider == 5 + (WIDER if kind == "t5" else 32 - 5)
    assert trainer.rounding_on(batch, gap=1.0) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_every_form_is_off(kind):
    model = build(kind)
    disable_functional_dropout(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 3]])}
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_moment(kind, tokenizer, tmp_path):
    model = build(kind)
    ids = tokenizer("a b")["input_ids"]
    phi = torch.tensor(has_a(SPACE), dtype=torch.float64)
    base = exact_logps(model.eval(), ids)
    assert base.exp().sum().item() == pytest.approx(1, abs=1e-5)
    wanted = 0.1 if base.exp() @ phi > 0.5 else 0.9
    trainer = make(model, tmp_path, moment_target(wanted), max_steps=25)
    first = trainer._logps(trainer.collate([{"prompt_ids": ids, "completion_ids": SPACE}]))
    assert torch.allclose(first[0], base, atol=1e-5)
    trainer.train()
    after = exact_logps(trainer.model.eval(), ids).exp() @ phi
    assert abs(after - wanted) < 0.5 * abs(base.exp() @ phi - wanted)
    assert torch.allclose(exact_logps(trainer.reference, ids), base, atol=1e-6)
    trainer.save_model()
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.allclose(exact_logps(saved.eval(), ids), exact_logps(trainer.model.eval(), ids), atol=1e-6)


def test_the_policy_becomes_the_target(tokenizer, tmp_path):
    model, ids = build("marian"), tokenizer("a b")["input_ids"]
    phi = torch.tensor([has_a(SPACE)], dtype=torch.float64).T
    base = exact_logps(model.eval(), ids)
    target = moment_target(0.4)
    target.fit(phi, log_weights=base, min_ess=0)
    log_p = target.log_scores(base, phi).log_softmax(0)
    args = options(
        tmp_path, max_steps=120, num_generations=256, per_device_train_batch_size=256, lr_scheduler_type="linear",
        learning_rate=8e-3, logging_steps=60,
    )  # fmt: skip
    trainer = FDPGTrainer(
        model, args=args, train_dataset=PROMPTS.select([0] * 8), processing_class=tokenizer, target=target
    )
    trainer.train()
    assert divergence_value("tv", base, log_p).item() > 0.2
    assert divergence_value("tv", exact_logps(trainer.model.eval(), ids), log_p).item() < 0.05


def test_lora_is_seq2seq_and_its_base_is_the_adapter_switched_off(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(FDPGTrainer, "reference_is_proven", True)  # the adapter below is not zero at the start
    build("t5").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    trainer = make(str(tmp_path / "base"), tmp_path / "out", peft_config=lora, max_steps=3)
    ids = tokenizer("a b")["input_ids"]
    batch = trainer.collate([{"prompt_ids": ids, "completion_ids": SPACE[:40]}])
    base = exact_logps(build("t5").eval(), ids)[:40]
    assert trainer.reference is None
    assert not torch.allclose(trainer._logps(batch)[0], base, atol=1e-2)
    trainer.train()
    assert torch.allclose(trainer._logps(batch, reference=True)[0], base, atol=1e-5)
    trainer.save_model()
    saved = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(exact_logps(saved, ids)[:40], trainer._logps(batch)[0], atol=1e-5)


def test_an_id_loads_the_model_with_its_head(tmp_path):
    BartModel(build("bart").config).save_pretrained(tmp_path / "headless")  # as facebook/bart-base names its class
    trainer = make(str(tmp_path / "headless"), tmp_path / "out", model_init_kwargs={"dtype": "float32"})
    assert isinstance(trainer.model, BartForConditionalGeneration)
    assert trainer.args.model_init_kwargs == {"dtype": "float32"}


def test_killed_and_resumed_is_not_killed(tokenizer, tmp_path):
    same = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = make(build("bart"), tmp_path / "whole", **same)
    whole.train()
    resumed = make(build("bart"), tmp_path / "resumed", **same)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.log_z.state_dict() == resumed.log_z.state_dict()
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='shared'"):
        make(build("t5"), tmp_path, layout="shared")
    model = build("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        make(model, tmp_path)
    odd = build("t5")
    own = odd.forward

    def doubled(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    odd.forward = doubled
    with pytest.raises(ValueError, match="own forward"):
        make(odd, tmp_path)
    with pytest.raises(ValueError, match="context of 32"):
        trainer = make(build("bart"), tmp_path, max_steps=1)
        trainer.prompt_ids_of(["a " * 40])
    assert make(build("bart"), tmp_path).prompt_ids_of(["a " * (32 - LENGTH + 2)])  # the two do not share positions
