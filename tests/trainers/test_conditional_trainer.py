"""ConditionalTrainer: the loss it computes, its rounds, and what a run that was stopped leaves behind."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTTrainer

from contrastive_align import (
    ConditionalConfig,
    ConditionalTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
    FDPGConfig,
    FDPGTrainer,
)
from contrastive_align.conditions import Condition, Phrases, QuantileTokens
from contrastive_align.demo import MODEL_PATH, reward
from contrastive_align.demo.task import all_prompts
from contrastive_align.trainers.base import newest_whole_checkpoint


PROMPTS = all_prompts()[::97][:8]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def build(
    model, folder, *, rows=None, reward_funcs=length, condition="quantile_tokens", more=None,
    trainer=ConditionalTrainer, **options,
):  # fmt: skip
    options = {
        "num_train_epochs": 2,
        "prompts_per_round": 4,
        "num_generations": 5,
        "max_completion_length": 6,
        "per_device_train_batch_size": 10,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    if rows is None:
        rows = Dataset.from_dict({"prompt": PROMPTS, "place": list(range(len(PROMPTS)))})
    return trainer(
        model,
        ConditionalConfig(str(folder), **options),
        train_dataset=rows,
        reward_funcs=reward_funcs,
        condition=condition,
        **(more or {}),
    )


def few(prompts, completions, place, **columns):
    """The first prompt's completions all score the same."""
    return [0.0 if p == 0 else float(i % 3) for i, p in enumerate(place)]


def test_prompts_whose_completions_all_score_the_same_are_counted_and_said(tiny_llama, tmp_path, caplog):
    options = {"num_train_epochs": 1, "prompts_per_round": len(PROMPTS)}
    logs = build(tiny_llama(), tmp_path / "a", reward_funcs=few, **options)
    logs.train()
    (round_,) = [entry for entry in logs.state.log_history if "round/number" in entry]
    assert round_["round/no_signal"] == pytest.approx(1 / len(PROMPTS))
    assert f"of 1 of {len(PROMPTS)} prompts ([0] first) have the same score" in caplog.text
    assert round_["round/left_out"] == round_["round/samples"] / len(PROMPTS)
    assert round_["round/reward_q10"] <= round_["round/reward_q50"] <= round_["round/reward_q90"]
    for per_prompt in (True, False):
        same = build(tiny_llama(), tmp_path / str(per_prompt), condition={"kind": "phrases", "per_prompt": per_prompt},
                     reward_funcs=lambda completions, **_: [1.0] * len(completions), **options)  # fmt: skip
        with pytest.raises(ValueError, match=r"nothing to learn from: .* have completions that all score the same"):
            same.train()


def test_quantised_rows_of_tokens_train_in_full_precision(tmp_path):
    trainer = build(
        MODEL_PATH, tmp_path, num_train_epochs=1,
        more={"peft_config": LoraConfig(r=4, target_modules=["q_proj"]),
              "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)},
    )  # fmt: skip
    saved = [m for m in trainer.model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert saved and all(p.dtype == torch.float32 for m in saved for p in m.modules_to_save.parameters())
    assert all(torch.equal(m.modules_to_save["default"].weight, m.original_module.weight) for m in saved)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    assert trainer.state.global_step > 0


def test_the_best_model_is_by_a_metric_that_there_is():
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    with pytest.raises(ValueError, match=r"follows the metric 'loss', .*reward_given/<quantile_0>"):
        ConditionalConfig("unused", bf16=False, **options)
    for metric, greater in (
        ("eval_reward_given/Good", True),
        ("eval_nll/Good", False),
        ("nll/Good", False),
        ("new_nll/a", False),
    ):
        config = ConditionalConfig("unused", bf16=False, metric_for_best_model=metric, **options)
        assert config.greater_is_better is greater


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def samples(trainer, per_round=20):
    return [s for n in trainer.pool.rounds for s in trainer.pool._rounds[n - 1].read(np.arange(per_round))]


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_loss_is_that_of_full_logits(tiny_llama, tmp_path, direction, layout):
    trainer = build(
        tiny_llama(), tmp_path, kl_direction=direction, layout=layout, kl_coef=0.3, entropy_coef=0.2, more={}
    )
    trainer.begin_round(1)
    rows = [trainer.rows[i] for i in range(6)]
    with torch.no_grad():  # off the reference, so that there is a KL
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)

    policy = AutoModelForCausalLM.from_config(trainer.model.config).double().eval()
    policy.load_state_dict(trainer.model.state_dict())
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float64).eval()
    total, tokens = 0.0, 0
    for row in rows:
        y = torch.tensor(row["completion_ids"])
        z = policy(torch.tensor([row["prompt_ids"] + row["completion_ids"]])).logits[0, -len(y) - 1 : -1]
        r = reference(torch.tensor([row["unconditioned_ids"] + row["completion_ids"]])).logits[0, -len(y) - 1 : -1]
        known = r.size(1)
        assert len(set(range(z.size(1))) - set(range(known))) == 5 == len(trainer.condition_ids)
        p, q = z[:, :known].softmax(-1), r.softmax(-1)
        kl = (p * (p / q).log()).sum(-1) if direction == "reverse" else (q * (q / p).log()).sum(-1)
        whole = z.softmax(-1)
        nll = -whole.log().gather(1, y[:, None])[:, 0]
        total = total + (nll + 0.3 * kl + 0.2 * (whole * whole.log()).sum(-1)).sum()
        tokens += len(y)
    assert torch.allclose(loss.double(), total / tokens, rtol=1e-5)

    loss.backward()
    (total / tokens).backward()
    wanted = dict(policy.named_parameters())
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(p.grad.double(), wanted[name].grad, atol=1e-5 * wanted[name].grad.abs().max() + 1e-8), (
            name
        )


def test_without_a_kl_there_is_no_reference(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path, kl_coef=0.0)
    assert trainer.reference is None
    trainer.train()
    history = trainer.state.log_history
    assert not any("kl" in entry or "round/reference_perplexity" in entry for entry in history)
    assert any("nll" in entry for entry in history)


# ---------------------------------------------------------------------------------------------------------- the rounds


def test_rounds_fill_the_pool_and_train_on_balanced_draws(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path, num_train_epochs=3, drop_factor=0.0)
    trainer.train()
    assert trainer.pool.rounds == [1, 2, 3] and trainer.pool.steps == {1: 0, 2: 2, 3: 4}
    assert trainer.state.global_step == 6
    found = samples(trainer)
    assert len({(s.round, s.prompt_index, s.sample_index) for s in found}) == len(found) == 60
    # Two rounds see each of the eight prompts once, the third begins anew.
    seen = [{s.prompt_index for s in found if s.round == n} for n in (1, 2, 3)]
    assert [len(s) for s in seen] == [4, 4, 4] and seen[0] | seen[1] == set(range(8))
    for s in found:
        assert s.prompt == PROMPTS[s.prompt_index] and s.score == len(s.completion)
        assert (s.completion_ids[-1] in trainer.eos_token_ids) == s.finished
        assert not set(s.completion_ids) & set(trainer.condition_ids)
    labels = np.asarray(trainer.rows._labels)
    assert (np.bincount(labels) == 4).all()
    assert {entry["round/number"] for entry in trainer.state.log_history if "round/number" in entry} == {1, 2, 3}
    assert [p.name for p in sorted((tmp_path / "rounds").iterdir())] == [f"round-00{n}.png" for n in (1, 2, 3)]


@pytest.mark.parametrize("size", [1, 3, 5, 7, 8])
def test_no_round_has_a_prompt_twice_and_every_pass_has_each_once(tiny_llama, tmp_path, size):
    trainer = build(tiny_llama(), tmp_path, prompts_per_round=size)
    rounds = [trainer.rounds.prompts_of(number).tolist() for number in range(1, 33)]
    assert all(len(set(places)) == size for places in rounds)
    places = np.concatenate(rounds)
    passes = places[: len(places) // 8 * 8].reshape(-1, 8)
    assert (np.sort(passes) == np.arange(8)).all() and len({tuple(p) for p in passes}) > 1


def test_coefficients_adapt_once_a_step_however_it_is_divided(tiny_llama, tmp_path):
    options = {"optim": "sgd", "kl_target": 0.02, "entropy_target": 3.0, "coef_horizon": 20}
    whole = build(tiny_llama(), tmp_path / "whole", per_device_train_batch_size=10, **options)
    parts = build(
        tiny_llama(), tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=5, **options
    )
    whole.train()
    parts.train()
    assert whole.state.global_step == parts.state.global_step == 4
    assert whole.kl_coef.value > 0.05 and whole.entropy_coef.value < 0.06
    assert parts.kl_coef.value == pytest.approx(whole.kl_coef.value, rel=1e-6)
    assert parts.entropy_coef.value == pytest.approx(whole.entropy_coef.value, rel=1e-6)
    for name, p in weights(whole).items():
        assert torch.allclose(p, weights(parts)[name], atol=1e-5), name


def test_the_first_round_is_unconditioned_and_later_ones_ask_for_the_best(tiny_llama, tmp_path, monkeypatch):
    seen = []
    generate = ConditionalTrainer.generate

    def watched(self, prompts, per_prompt, seeds, *, conditions=None):
        seen.append(conditions)
        return generate(self, prompts, per_prompt, seeds, conditions=conditions)

    monkeypatch.setattr(ConditionalTrainer, "generate", watched)
    build(tiny_llama(), tmp_path).train()
    assert seen == [None, ["<quantile_0>"] * 4]


def test_completions_are_drawn_as_the_options_say(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path, top_k=1)
    (group,) = trainer.generate(["the cat"], 5, [3])
    assert all(sample["ids"] == group[0]["ids"] for sample in group)


def test_a_round_trains_on_the_condition_of_its_quantile(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path, condition=Phrases())
    trainer.begin_round(1)
    table, tokenizer = trainer.pool.table(1), trainer.processing_class
    for i, (place, label) in enumerate(zip(trainer.rows._draws, trainer.rows._labels, strict=True)):
        row, sample = trainer.rows[i], trainer.pool.read([place], 1)[0]
        assert table.label[place] == label
        prompt = f"{Phrases().names()[label]}. input: {sample.prompt}"
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert row["unconditioned_ids"] == tokenizer(sample.prompt)["input_ids"]
        assert row["completion_ids"] == sample.completion_ids


class Stop(TrainerCallback):
    """A process that dies in this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tiny_llama, tmp_path, step):
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "kl_target": 0.02, "coef_horizon": 50}
    whole = build(tiny_llama(), tmp_path / "whole", **options)
    whole.train()
    stopped = build(tiny_llama(), tmp_path / "stopped", **options, more={"callbacks": [Stop(step)]})
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = build(tiny_llama(), tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert samples(resumed) == samples(whole)
    assert resumed.kl_coef.value == pytest.approx(whole.kl_coef.value)
    for name, p in weights(whole).items():
        assert torch.allclose(p, weights(resumed)[name], atol=1e-6), name


def test_a_checkpoint_goes_on_in_another_folder_with_its_rounds(tiny_llama, tmp_path):
    whole = build(tiny_llama(), tmp_path / "whole", num_train_epochs=3, save_strategy="steps", save_steps=3)
    whole.train()
    other = build(tiny_llama(), tmp_path / "other", num_train_epochs=3)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert samples(other) == samples(whole)
    assert all(torch.allclose(p, weights(other)[name], atol=1e-6) for name, p in weights(whole).items())


def test_training_ends_well_where_nothing_tells_samples_apart_any_more(tiny_llama, tmp_path, caplog):
    def until_round_2(completions, trainer_state, **columns):
        return [1.0] * len(completions) if trainer_state.global_step else length(completions)

    trainer = build(tiny_llama(), tmp_path, reward_funcs=until_round_2, drop_factor=1.0)
    trainer.train()
    assert trainer.pool.rounds == [1] and trainer.state.global_step == trainer.steps_per_round
    assert "Training ends here, after round 1." in caplog.text


def test_a_checkpoint_that_was_cut_off_is_skipped(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-4"
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-3"
    state.unlink()
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-3"
    again = build(tiny_llama(), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert samples(again) == samples(trainer)


def test_an_earlier_run_is_not_overwritten(tiny_llama, tmp_path):
    build(tiny_llama(), tmp_path).train()
    before = {p: p.read_bytes() for p in (tmp_path / "pool").iterdir()}
    with pytest.raises(ValueError, match="samples of an earlier run"):
        build(tiny_llama(), tmp_path).train()
    assert {p: p.read_bytes() for p in (tmp_path / "pool").iterdir()} == before


def test_a_pool_that_lacks_the_rounds_before_cannot_go_on(tiny_llama, tmp_path):
    build(tiny_llama(), tmp_path, save_strategy="epoch").train()
    shutil.rmtree(tmp_path / "pool")
    with pytest.raises(ValueError, match=r"goes on with round 3, and .*pool has rounds \[\]"):
        build(tiny_llama(), tmp_path, num_train_epochs=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:-1], "from 8 prompts, and this run has 7"),
        (PROMPTS[::-1], r"this run has 8, expected the same .*; row \d was .* and is .*another\s+output_dir"),
        ([*PROMPTS, "Tell Ben to wait.\n"], "this run has 9"),
    ],
)
def test_a_pool_of_other_prompts_cannot_go_on(tiny_llama, tmp_path, prompts, message):
    build(tiny_llama(), tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    other = Dataset.from_dict({"prompt": prompts, "place": list(range(len(prompts)))})
    with pytest.raises(ValueError, match=message):
        build(tiny_llama(), tmp_path, rows=other).train(resume_from_checkpoint=True)


def test_a_pool_goes_on_elsewhere_and_without_a_word_about_its_prompts(tiny_llama, tmp_path, caplog):
    build(tiny_llama(), tmp_path / "here", num_train_epochs=1, save_strategy="epoch").train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    rows = Dataset.from_dict({"prompt": PROMPTS})  # without a column that no reward asks for
    build(tiny_llama(), tmp_path / "there", rows=rows).train(resume_from_checkpoint=True)
    assert "has no prompts.json" not in caplog.text
    (tmp_path / "there" / "pool" / "prompts.json").unlink()
    trainer = build(tiny_llama(), tmp_path / "there", num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert "assumed to be the 8 of this run" in caplog.text
    assert trainer.pool.rounds == [1, 2, 3] and (tmp_path / "there" / "pool" / "prompts.json").is_file()


def test_a_folder_that_takes_no_round_is_said_before_anything_is_sampled(tiny_llama, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = build(tiny_llama(), tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(trainer, "generate", None)
    with pytest.raises(OSError, match=r"pool takes no new round: Read-only file system\. .*pool_dir"):
        trainer.train()


def test_a_disk_that_fills_up_costs_one_round(tiny_llama, tmp_path, monkeypatch):
    whole = build(tiny_llama(), tmp_path / "whole", num_train_epochs=3)
    whole.train()
    stopped = build(tiny_llama(), tmp_path / "stopped", num_train_epochs=3, save_strategy="epoch")
    begin = stopped.begin_round

    def fills_up(number):
        if number == 2:
            monkeypatch.setattr(os, "fsync", full)
        begin(number)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stopped, "begin_round", fills_up)
    with pytest.raises(OSError, match=r"round-00002\.arrow was not written: No space left.*resume_from_checkpoint"):
        stopped.train()
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "stopped" / "pool").iterdir()) == ["prompts.json", "round-00001.arrow"]
    resumed = build(tiny_llama(), tmp_path / "stopped", num_train_epochs=3)
    resumed.train(resume_from_checkpoint=True)
    assert samples(resumed) == samples(whole)


@pytest.mark.parametrize("size", [5, 20])
def test_a_round_of_another_length_cannot_go_on(tiny_llama, tmp_path, size):
    build(tiny_llama(), tmp_path, save_strategy="epoch").train()
    other = build(tiny_llama(), tmp_path, num_train_epochs=3, per_device_train_batch_size=size)
    with pytest.raises(ValueError, match=f"A round had 2 optimiser steps in .* has {20 // size} now"):
        other.train(resume_from_checkpoint=True)
    same = build(
        tiny_llama(), tmp_path, num_train_epochs=3, per_device_train_batch_size=5, gradient_accumulation_steps=2
    )
    same.train(resume_from_checkpoint=True)
    assert same.pool.steps == {1: 0, 2: 2, 3: 4}


def test_a_checkpoint_that_is_written_again_is_not_whole_before_its_end(tiny_llama, tmp_path, monkeypatch):
    trainer = build(tiny_llama(), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, None)
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-2"


def test_another_condition_cannot_go_on(tiny_llama, tmp_path):
    build(tiny_llama(), tmp_path, save_strategy="epoch").train()
    with pytest.raises(ValueError, match="was trained under"):
        build(tiny_llama(), tmp_path, condition="phrases").train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------- feedback and models


def test_lora_has_one_copy_and_its_reference_is_the_base(tiny_llama, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(tiny_llama(), tmp_path, more={"peft_config": lora}, kl_coef=0.5)
    assert trainer.reference is None and trainer.has_reference
    trainer.train()
    ids = torch.tensor([trainer.encode(PROMPTS[0])])
    with trainer.sampling_from(reference=True) as reference:
        found = reference(ids).logits[..., :512]
    wanted = AutoModelForCausalLM.from_pretrained(tiny_llama())(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    with trainer.sampling_from() as policy:
        assert not torch.allclose(policy(ids).logits[..., :512], wanted, atol=1e-2)
    trainer.save_model()
    prompt = Condition.load(tmp_path).apply_best(PROMPTS[0])
    assert prompt == "<quantile_0>" + PROMPTS[0]

    from contrastive_align.conditions.tokens import load_with_condition_tokens

    base = AutoModelForCausalLM.from_pretrained(tiny_llama())
    loaded, tokenizer = load_with_condition_tokens(base, tmp_path, tokens=QuantileTokens().tokens)
    assert isinstance(loaded, PeftModel)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        found, wanted = loaded(ids).logits, trainer.model.eval()(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["contrastive", "fdpg", "conditional"])
def test_trl_still_refuses_an_adapter_on_the_head(tiny_llama, tmp_path, name):
    """The fused head multiplies with the head's own weight, and would leave the adapter out without a word."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    shared = {"use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        if name == "contrastive":
            rows = Dataset.from_list([{"prompt": "a", "completions": [" b", " c"], "scores": [1.0, 0.0]}])
            args = ContrastiveConfig(str(tmp_path), **shared)
            ContrastiveTrainer(tiny_llama(), args=args, train_dataset=rows, peft_config=lora)
        elif name == "conditional":
            build(tiny_llama(), tmp_path, more={"peft_config": lora})
        else:
            rows = Dataset.from_dict({"prompt": PROMPTS * 4})
            args = FDPGConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=4, **shared)
            FDPGTrainer(tiny_llama(), reward, args, train_dataset=rows, peft_config=lora)


def test_the_reference_of_an_adapter_is_the_adapter(tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    trainer = build(model, tmp_path, condition="phrases", more={"processing_class": tokenizer})
    ids = torch.tensor([trainer.encode(PROMPTS[0])])

    def logits():
        with trainer.sampling_from(reference=True) as reference:
            return reference(ids).logits

    with torch.no_grad():
        start, bare = trainer.model.eval()(ids).logits, base.eval()(ids).logits
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(ids).logits, start, atol=1e-2)
    assert torch.allclose(logits(), start, atol=1e-6) and torch.equal(bare, start)
    trainer.train()
    assert torch.allclose(logits(), start, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(trainer.model.eval()(ids).logits, start, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_adapter_with_tokens_is_a_start(tiny_llama, tmp_path, tied):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    start = tiny_llama(tie_word_embeddings=tied)
    first = build(start, tmp_path / "first", more={"peft_config": lora})
    first.train()
    first.save_model()
    second = build(str(tmp_path / "first"), tmp_path / "second")
    ids = torch.tensor([second.encode("<quantile_0>" + PROMPTS[0])])
    assert ids[0, 0] == first.condition_ids[0]
    with torch.no_grad(), second.sampling_from() as model:
        assert torch.allclose(model(ids).logits, first.model.eval()(ids).logits, atol=1e-4)
    second.train()


def test_zero3_takes_no_new_tokens_and_says_so_before_the_model_is_loaded(tiny_llama, tmp_path, monkeypatch):
    from contrastive_align.trainers import conditional

    monkeypatch.setattr(conditional, "is_deepspeed_zero3_enabled", lambda: True)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = tiny_llama()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for more in ({}, {"peft_config": lora}):
        with pytest.raises(ValueError, match=r"ZeRO-3 keeps a part of the embedding.*condition='phrases'"):
            build(model, tmp_path / "run", condition=QuantileTokens(token="<new_{i}>"), more=more)


def test_a_saved_model_loads_with_its_tokens_and_condition(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path)
    trainer.train()
    trainer.save_model()
    model, tokenizer = (cls.from_pretrained(tmp_path) for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer(Condition.load(tmp_path).apply_best(PROMPTS[0]))["input_ids"]])
    assert ids[0, 0] == trainer.condition_ids[0]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("condition", "lora"), [("quantile_tokens", True), ("quantile_tokens", False), ("phrases", True)]
)
def test_the_card_says_how_to_ask_for_the_best_and_its_lines_run(tiny_llama, tmp_path, monkeypatch, condition, lora):
    peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    trainer = build(tiny_llama(), tmp_path, condition=condition, more=peft)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    best = trainer.condition.best
    assert f"asked for with: `{best}`" in card and "Quick start" not in card and "2205.13636" in card
    assert card.index("## Asking for the best") < card.index("## Objective") < card.index("## Training procedure")
    assert "- kl_coef: `0.05`\n- kl_direction: `reverse`" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert best in found["prompt"]
    ids = torch.tensor([found["tokenizer"](found["prompt"])["input_ids"]])
    assert torch.allclose(found["model"].eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)


class Judged:
    """Words and a score 0..3, of which every fourth is missing."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions):
        self.asked += zip(prompts, completions, strict=True)
        words = ["bad", "so so", "fine", None, "excellent"]
        return [
            SimpleNamespace(text=words[i % 5], score=float(min(i % 5, 3))) if i % 5 != 3 else None
            for i in range(len(prompts))
        ]


def test_a_judges_words_condition_and_its_missing_answers_are_left_out(tiny_llama, tmp_path):
    judge = Judged()
    trainer = build(tiny_llama(), tmp_path / "run", reward_funcs=None, condition="text", more={"judge": judge})
    trainer.train()
    found = samples(trainer)
    assert len(judge.asked) == 40
    assert sum(s.feedback is None for s in found) == 8
    assert trainer.best_condition().exemplars == ("excellent",)
    trainer.save_model()
    assert Condition.load(tmp_path / "run").apply_best("Hi") == "feedback: excellent input: Hi"


def test_a_judges_words_that_leave_no_room_lose_their_end(tiny_llama, tmp_path, caplog):
    long = " ".join(["good"] * 200)

    def judge(prompts, completions):
        return [SimpleNamespace(text=long if i % 2 else "good", score=3.0) for i in range(len(prompts))]

    rows = Dataset.from_dict({"prompt": [*PROMPTS[:2], "Tell Ben to make the tea. " * 3]})
    options = {"prompts_per_round": 3, "max_length": 70, "condition": "text", "reward_funcs": None}
    trainer = build(tiny_llama(), tmp_path, rows=rows, **options, more={"judge": judge})
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "round/words_cut" in entry]
    assert [(entry["round/words_cut"], entry["round/asked_cut"]) for entry in logged[:1]] == [(7, 0)]
    assert len(logged) == 2 and logged[1]["round/words_cut"] == 7
    assert caplog.text.count("lose their end") == 1
    seen = set()
    for sample in samples(trainer, 15):
        row = trainer.rows.row(sample, 0)
        assert len(row["prompt_ids"]) <= 64 and row["completion_ids"] == sample.completion_ids  # 6 are the completion's
        text = trainer.processing_class.decode(row["prompt_ids"])
        words = text.split("feedback: ")[1].split(" input:")[0].split()
        assert set(words) == {"good"} and text.endswith(sample.prompt)
        if sample.feedback == long:
            seen.add(len(words))
            more = trainer.condition.apply(sample.prompt, " ".join(["good"] * (len(words) + 1)))
            assert len(trainer.encode(more)) > 64  # not a word too few
    assert len(seen) > 1  # by the prompt's length

    best = trainer.best_condition().with_exemplars([long])
    trainer.best_condition = lambda through=None: best
    caplog.clear()
    assert trainer.evaluate(rows)["eval_reward_given/exemplar 0"] == 3.0
    assert "left out" not in caplog.text


@pytest.mark.parametrize("condition", ["quantile_tokens", "phrases"])
def test_scored_data_needs_no_sampling(tiny_llama, tmp_path, condition, caplog):
    rows = Dataset.from_list(
        [
            {"prompt": p, "completion": f" {i} blue.", "score": None if i == 3 else float(i % 7)}
            for i, p in enumerate(PROMPTS * 4)
        ]
    )
    with caplog.at_level(logging.WARNING, "contrastive_align"):
        trainer = build(
            tiny_llama(), tmp_path, rows=rows, reward_funcs=None, condition={"kind": condition, "per_prompt": False},
            num_train_epochs=2,
        )  # fmt: skip
    assert trainer.data_report["no_score"] == trainer.data_report["left_out"] == 1
    assert len(trainer.rows) == 40  # 31 draws, whole steps of 10
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.pool.rounds == [1]
    metrics, (best, *_, worst) = trainer.evaluate(rows), trainer.condition.names()
    for name in (best, f"{best}_given/{best}", f"{best}_given/{worst}", f"{worst}_given/{best}"):
        assert metrics[f"eval_nll/{name}"] > 0
    assert metrics[f"eval_nll/{best}"] == metrics[f"eval_nll/{best}_given/{best}"]


def test_rows_with_the_same_prompt_are_one_prompt(tiny_llama, tmp_path):
    rows = [{"prompt": p, "completion": f" {i} blue.", "score": float(i)} for i in range(5) for p in PROMPTS[:3]]
    trainer = build(tiny_llama(), tmp_path, rows=Dataset.from_list(rows), reward_funcs=None)
    table = trainer.pool.table()
    found = trainer.pool.read(np.arange(15), 1)
    assert [(s.prompt_index, s.sample_index) for s in found] == [(j, i) for i in range(5) for j in range(3)]
    assert table.label.tolist() == [4 - i for i in range(5) for _ in range(3)]
    trainer.train()


@pytest.mark.parametrize("condition", ["phrases", "text"])
def test_scored_data_fits_with_its_conditions(tiny_llama, tmp_path, condition):
    rows = [
        {
            "prompt": "hi there " * (1 + i // 2), "completion": " a b c d", "score": float(i % 4),
            "feedback": "far too long for anyone who reads" if i % 2 else "good",
        }
        for i in range(24)
    ]  # fmt: skip
    spec = {"kind": condition, "per_prompt": False} if condition == "phrases" else condition
    limits = {"max_length": 60, "max_completion_length": 4}
    rows = Dataset.from_list(rows)
    trainer = build(tiny_llama(), tmp_path, rows=rows, reward_funcs=None, condition=spec, **limits)
    report = trainer.data_report
    assert report["dropped"] > 0 and report["cut"] > 0 and report["completions"] == 24 - report["dropped"]
    table = trainer.pool.table()
    for sample, label in zip(trainer.pool.read(np.arange(len(table)), 1), table.label, strict=True):
        row = trainer.rows.row(sample, int(label))
        assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= 60
        assert row["completion_ids"] == sample.completion_ids
    seen = []
    trainer.nll_given = lambda samples, texts: (
        seen.extend(
            len(trainer.encode(s.prompt if t is None else trainer.condition.apply(s.prompt, t)) + s.completion_ids)
            for s, t in zip(samples, texts, strict=True)
        ),
        (np.ones(len(samples)), np.ones(len(samples))),
    )[1]
    trainer.evaluate(rows)
    assert max(seen) <= 60


def test_completions_as_long_as_the_context_leave_room_for_prompts(tiny_llama, tmp_path, caplog):
    model = tiny_llama()
    context = AutoConfig.from_pretrained(model).max_position_embeddings
    with caplog.at_level(logging.WARNING, "contrastive_align"):
        trainer = build(model, tmp_path, max_completion_length=context)
    assert f"max_completion_length={context} leaves no token of the model's context" in caplog.text
    assert trainer.args.max_completion_length == context // 2 and len(trainer.prompts) == len(PROMPTS)


def test_prompts_that_are_too_long_to_be_evaluated_are_left_out(tiny_llama, tmp_path, caplog):
    trainer = build(tiny_llama(), tmp_path)
    with caplog.at_level(logging.WARNING, "contrastive_align"):
        found = trainer.rewards_given(Dataset.from_dict({"prompt": [PROMPTS[0], "hi there " * 300, PROMPTS[1]]}))
    assert "1 of 3 prompts of eval_dataset are longer than" in caplog.text
    assert all(np.isnan(rewards).tolist() == [False, True, False] for rewards in found.values())
    with pytest.raises(ValueError, match=r"eval_dataset has the columns \['text'\], expected 'prompt'"):
        trainer.evaluate(Dataset.from_dict({"text": PROMPTS[:1]}))


def test_evaluation_rewards_under_each_condition(tiny_llama, tmp_path):
    trainer = build(tiny_llama(), tmp_path)
    data = Dataset.from_dict({"prompt": PROMPTS[:3]})
    metrics = trainer.evaluate(data)
    for name in ["nothing", *QuantileTokens().names()]:
        assert metrics[f"eval_reward_given/{name}"] >= 0 and metrics[f"eval_reward_given/{name}/se"] >= 0
    assert trainer.evaluate(data)["eval_reward_given/nothing"] == metrics["eval_reward_given/nothing"]


def test_evaluating_while_training_changes_nothing_in_it(tiny_llama, tmp_path):
    options = {"logging_steps": 3, "num_train_epochs": 3, "disable_dropout": False}
    plain = build(tiny_llama(), tmp_path / "plain", **options)
    more = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})}
    evaluated = build(
        tiny_llama(), tmp_path / "evaluated", eval_strategy="steps", eval_steps=1, eval_on_start=True, more=more,
        **options,
    )  # fmt: skip
    plain.train()
    evaluated.train()
    for name, p in weights(plain).items():
        assert torch.equal(p, weights(evaluated)[name]), name
    logged = [[entry for entry in t.state.log_history if "nll" in entry] for t in (plain, evaluated)]
    assert [entry["step"] for entry in logged[0]] == [3, 6]  # the second round begins in between
    terms = ("nll", "kl", "entropy", "loss")
    assert [[e[k] for k in terms] for e in logged[0]] == [[e[k] for k in terms] for e in logged[1]]


def test_lower_layers_freeze(tiny_llama, tmp_path):
    trainer = build(tiny_llama(num_hidden_layers=4), tmp_path, unfrozen_layers_ratio=0.25)
    trainable = [all(p.requires_grad for p in layer.parameters()) for layer in trainer.model.model.layers]
    assert trainable == [False, False, False, True]
    before = weights(trainer)
    trainer.train()
    moved = [not torch.equal(before[n], p) for n, p in weights(trainer).items() if "layers.0." in n or "layers.3." in n]
    assert moved == [False] * (len(moved) // 2) + [True] * (len(moved) // 2)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 3}, "at least 5, one for each quantile"),
        ({"prompts_per_round": 9}, "the dataset has 8 prompts"),
        ({"more": {"judge": Judged()}}, "Both reward_funcs and judge"),
        ({"reward_funcs": None}, "Expected 'prompt' and 'completion'"),
        ({"condition": "quantiles"}, "kind is 'quantiles'"),
        ({"more": {"formatting_func": str}}, "formatting_func is not supported"),
        ({"packing": True}, "packing=True is not supported"),
        ({"save_only_model": True, "save_strategy": "steps"}, "no run can go on from"),
        ({"max_completion_length": 510}, "No prompt of train_dataset is short enough"),
        ({"kl_coef": 0.0, "kl_target": 0.1}, "would stay so"),
        ({"rows": Dataset.from_dict({"prompt": ["Hi", None]})}, "train_dataset, row 1: 'prompt' is None"),
        (
            {"rows": Dataset.from_dict({"prompt": [[{"role": "system", "content": "Hi"}]]})},
            "train_dataset, row 0: The conversation has roles",
        ),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1"),
    ],
)
def test_what_is_refused(tiny_llama, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_llama(), tmp_path, **options)


@pytest.mark.parametrize("by_judge", [False, True])
def test_a_first_round_without_any_answer_is_not_kept(tiny_llama, tmp_path, by_judge):
    def silent(prompts, completions, **columns):
        return [None] * len(prompts)

    options = {"reward_funcs": None if by_judge else silent, "more": {"judge": silent} if by_judge else {}}
    with pytest.raises(ValueError, match="Round 1 is not written"):
        build(tiny_llama(), tmp_path, **options).train()
    assert list((tmp_path / "pool").iterdir()) == []
    build(tiny_llama(), tmp_path).train()  # once the reward answers


@pytest.mark.parametrize(
    ("condition", "text", "score", "message"),
    [
        ("categories", "Fine", 1.0, "the feedback is 'Fine', expected one of .*'Harmful'"),
        ("text", "fine", 7.0, "the score is 7, expected one of 0, 1, .., 3"),
        ("attributes", '{"helpful": 1}', 1.0, '.*expected {"harmful": number, "helpful": number}'),
    ],
)
def test_an_answer_that_the_condition_does_not_know_is_refused_before_the_round_is_written(
    tiny_llama, tmp_path, condition, text, score, message
):
    good = {"categories": "Harmful", "text": "fine", "attributes": '{"harmful": 0, "helpful": 1}'}[condition]

    def judge(prompts, completions):
        answers = [SimpleNamespace(text=good, score=1.0) for _ in prompts]
        return [*answers[:7], SimpleNamespace(text=text, score=score), *answers[8:]]

    trainer = build(tiny_llama(), tmp_path, reward_funcs=None, condition=condition, more={"judge": judge})
    with pytest.raises(ValueError, match=rf"round 1, prompt \d, completion 2: {message}"):
        trainer.train()
    assert list((tmp_path / "pool").iterdir()) == []

    rows = {
        "prompt": PROMPTS[:1],
        "completions": [["Yes.", "No."]],
        "feedbacks": [[good, text]],
        "scores": [[1, score]],
    }
    with pytest.raises(ValueError, match=rf"round 1, prompt 0, completion 1: {message}|completion 1: attributes"):
        build(tiny_llama(), tmp_path / "offline", rows=Dataset.from_dict(rows), reward_funcs=None, condition=condition)
    assert not list(tmp_path.glob("offline/pool*"))


def test_a_broken_reward_leaves_no_half_round(tiny_llama, tmp_path):
    def broken(prompts, completions, **columns):
        raise RuntimeError("the scorer is down")

    trainer = build(tiny_llama(), tmp_path, reward_funcs=broken)
    with pytest.raises(Exception, match="the scorer is down"):
        trainer.train()
    assert list((tmp_path / "pool").iterdir()) == []


# --------------------------------------------------------------------------------------------------------- processes


def test_two_processes_equal_one(tmp_path):
    """Conditional training, and rounds of groups."""
    found = []
    for n, launch in enumerate(([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        out = tmp_path / f"{n}.pt"
        worker = Path(__file__).with_name("conditional_worker.py")
        done = subprocess.run(
            [sys.executable, *launch, str(worker), str(out), str(tmp_path / f"run{n}")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert json.loads(one["samples"]) == json.loads(two["samples"])
    for name, p in one["weights"].items():
        for other in (two["weights"], one["tripled"], two["tripled"]):
            assert torch.allclose(p, other[name], atol=2e-6), name
    assert one["reward_given"] == pytest.approx(two["reward_given"])
    assert json.loads(one["group_samples"]) == json.loads(two["group_samples"])
    for name, p in one["group_weights"].items():
        assert torch.allclose(p, two["group_weights"][name], atol=1e-5), name
