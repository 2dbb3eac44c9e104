"""Checkpoints and models of earlier versions (fixtures/older/checkpoints, by commit fab731b) go on as they would have.

The fixtures were made with the code of that commit on PYTHONPATH, in a folder with the bases: random Llamas of
`torch.manual_seed(0)` with one layer, `initializer_range=0.5` and the bundled tokenizer, `base` with hidden size 8 and
tied embeddings, `untied` with hidden size 4. Then, for each kind:

    trainer = build(kind, kind, base="base")
    trainer.train()
    expected[kind] = {"weights": entries(trainer.model)}  # conditional: also the completions of the pool

Kept is the checkpoint of step `WHOLE[kind]`, without tokenizer, card, `training_args.bin` and (but for one)
`rng_state.pth`, and of the pool what there was at this step. `tokens` is what `save_model` wrote after
`build("conditional", "tokens", base="untied", condition="quantile_tokens")`; `expected.json` has its log-probs of a
text.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrastive_align import (
    ConditionalConfig,
    ConditionalTrainer,
    Constraint,
    ContrastiveConfig,
    ContrastiveTrainer,
    FDPGConfig,
    FDPGTrainer,
    Target,
    demo,
)
from contrastive_align.demo.task import all_prompts
from contrastive_align.sampling import decode


OLDER = Path(__file__).parents[1] / "fixtures" / "older" / "checkpoints"
EXPECTED = json.loads((OLDER / "expected.json").read_text(encoding="utf-8"))
WHOLE = {"contrastive": 2, "fdpg": 3, "fdpg_kept": 3, "conditional": 1}
LAST = {"contrastive": 4, "fdpg": 6, "fdpg_kept": 6, "conditional": 4}
PROMPTS = Dataset.from_dict({"prompt": all_prompts()[::97][:8]})
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "optim": "sgd",
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def build(kind, folder, *, base=OLDER / "base", condition="phrases"):
    given = {"processing_class": AutoTokenizer.from_pretrained(demo.MODEL_PATH)}
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if kind == "contrastive":
        options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "beta": 0.1, "learning_rate": 0.3}
        options["temperature_alpha"] = 1e-4  # the default of that time
        groups = demo.load_reward_dataset()["train"].select(range(12))
        args = ContrastiveConfig(str(folder), **options, **PLAIN)
        return ContrastiveTrainer(str(base), args=args, train_dataset=groups, **given)
    if kind == "conditional":
        options = {
            "num_train_epochs": 2,
            "save_steps": 1,
            "prompts_per_round": 4,
            "num_generations": 5,
            "max_completion_length": 6,
            "per_device_train_batch_size": 10,
            "learning_rate": 0.3,
        }
        args = ConditionalConfig(str(folder), **options, **PLAIN)
        given |= {"train_dataset": PROMPTS, "reward_funcs": length, "condition": condition, "peft_config": lora}
        return ConditionalTrainer(str(base), args, **given)
    options = {
        "max_steps": 6,
        "save_steps": 3,
        "steps_per_generation": 2,  # so that a checkpoint of an odd step has samples that are drawn and not trained on
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 6,
        "fit_samples": 512,
        "learning_rate": 1.0,
    }
    if kind == "fdpg_kept":
        options |= {"proposal": "kept", "proposal_window": 1, "baseline": "window"}
    given |= {"target": Target([Constraint({"contains": "e"}, moment=0.8)])}
    given |= {"peft_config": lora if kind == "fdpg" else None}
    args = FDPGConfig(str(folder), **options, **PLAIN)
    return FDPGTrainer(str(base), args=args, train_dataset=PROMPTS, **given)


def entries(model):
    """Eight entries of every trained weight."""
    trained = ((name, p.detach().flatten().double()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p[:: -(-len(p) // 8)].tolist() for name, p in trained}


def gap(found, expected):
    assert found.keys() == expected.keys()
    return max(abs(a - b) for name in found for a, b in zip(found[name], expected[name], strict=True))


class NoiseOfThatTime:
    """A generator for each row, seeded by it: what was drawn before noise was a function of seed, step and token."""

    def __init__(self):
        self.generators = {}

    def __call__(self, seeds, step, vocabulary):
        rows = []
        for seed in seeds.tolist():
            if step == 0:
                self.generators[seed] = torch.Generator().manual_seed(seed)
            bits = torch.empty(vocabulary, dtype=torch.int64)
            rows.append(bits.random_(1, None, generator=self.generators[seed]))
        return torch.stack(rows).float().mul_(2.0**-63).neg_().log1p_().neg_()


@pytest.mark.parametrize("kind", WHOLE)
def test_an_older_checkpoint_is_resumed_and_ends_with_the_same_weights(kind, tmp_path, caplog, monkeypatch):
    """With the noise of that time: a run that goes on now draws other samples from the same distribution."""
    monkeypatch.setattr(decode, "exponential_noise", NoiseOfThatTime())
    folder = tmp_path / kind
    shutil.copytree(OLDER / kind, folder)
    trainer = build(kind, folder)
    assert gap(entries(trainer.model), EXPECTED[kind]["weights"]) > 1e-2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from == folder / f"checkpoint-{WHOLE[kind]}"
    assert trainer.state.global_step == LAST[kind]
    assert gap(entries(trainer.model), EXPECTED[kind]["weights"]) < 1e-6
    unchecked = f"checkpoint-{WHOLE[kind]} has no reference.json: that its reference is this one cannot be checked"
    assert (unchecked in caplog.text) == (kind != "contrastive")
    newest = json.loads((folder / f"checkpoint-{LAST[kind]}" / "reference.json").read_text())
    assert newest["logps"] and newest["group"]["completion_ids"]  # the next resume is checked
    if kind == "conditional":
        assert [sample.completion for sample in trainer.pool] == EXPECTED[kind]["samples"]
        assert trainer.pool.rounds == [1, 2]
    if kind == "fdpg_kept":
        assert trainer.adaptive_proposal.replacements == 1 and not trainer.adaptive_proposal.is_base


def test_an_older_reference_note_is_compared(tmp_path):
    from contrastive_align.trainers.reference import ReferenceMismatch

    shutil.copytree(OLDER / "contrastive", tmp_path / "run")
    shutil.copytree(OLDER / "base", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ReferenceMismatch, match=r"reference of .*checkpoint-2 \(base\) and the one of this run .* differ"
    ):
        build("contrastive", tmp_path / "run", base=tmp_path / "other").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("former", [False, True], ids=["conditions.tokens", "feedback.tokens"])
def test_an_older_adapter_with_condition_tokens_loads(former, tmp_path):
    from contrastive_align.conditions import Condition

    expected = EXPECTED["tokens"]
    base = AutoModelForCausalLM.from_pretrained(OLDER / "untied")
    if former:
        sys.modules.pop("contrastive_align.feedback.tokens", None)  # as in a fresh process
        with pytest.warns(FutureWarning, match=r"Use contrastive_align\.conditions\.tokens instead"):
            from contrastive_align.feedback.tokens import load_with_condition_tokens as load
    else:
        from contrastive_align.conditions.tokens import load_with_condition_tokens as load
    model, tokenizer = load(base, OLDER / "tokens")
    assert Condition.load(OLDER / "tokens").apply_best(PROMPTS[0]["prompt"]) == expected["best"]
    ids = tokenizer(f"{expected['best']}Could you please", return_tensors="pt").input_ids
    assert ids[0].tolist() == expected["ids"]
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert logps.tolist() == pytest.approx(expected["logps"], abs=1e-6)
