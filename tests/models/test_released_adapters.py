"""A LoRA in the form of the released ones, as PEFT 0.7 saved it: it is start and reference of every trainer."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import save_file
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
from contrastive_align.launch import cli
from contrastive_align.launch.usage import UsageError


HUB_ID = "someone/sft-base"
RANK = 16
CONFIG = {  # all keys of PEFT 0.7 and 0.8
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": HUB_ID,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}


@pytest.fixture
def hub(tiny_llama, monkeypatch, tmp_path):
    """An offline cache as huggingface_hub lays it out, which holds the base."""
    repo = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(tiny_llama(), repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    for constants in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def release(folder, base, named):
    """Write an adapter on a base, under the names that PEFT 0.7 gives its tensors."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if name.split(".")[-1] in CONFIG["target_modules"]:
            rows, columns = module.weight.shape
            for which, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = 0.05 * torch.randn(shape, generator=generator)
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": str(named)}))
    return str(folder)


def first_id(completion_ids, **columns):
    """A reward that tells samples of a random model apart."""
    return [float(ids[0]) for ids in completion_ids]


def make(kind, model, folder):
    given = {
        "peft_config": LoraConfig(r=4, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    }
    groups = demo.load_reward_dataset()["train"].select(range(8))
    prompts = Dataset.from_dict({"prompt": groups["prompt"][:]})
    if kind == "contrastive":
        args = ContrastiveConfig(str(folder), max_steps=2, per_device_train_batch_size=4, beta=0.1, **PLAIN)
        return ContrastiveTrainer(model, args=args, train_dataset=groups, **given)
    sampled = {"num_generations": 4, "max_completion_length": 6}
    if kind == "fdpg":
        args = FDPGConfig(str(folder), max_steps=2, per_device_train_batch_size=16, fit_samples=256, **sampled, **PLAIN)
        target = Target([Constraint({"contains": "e"}, moment=0.8)])
        return FDPGTrainer(model, args=args, train_dataset=prompts, target=target, **given)
    args = ConditionalConfig(
        str(folder), num_train_epochs=1, per_device_train_batch_size=20, **{**sampled, "num_generations": 5}, **PLAIN
    )
    return ConditionalTrainer(model, args, train_dataset=prompts, reward_funcs=first_id, condition="phrases", **given)


@torch.no_grad()
def logps(model):
    """Log-probs by plain transformers, without anything of this package."""
    model.eval()
    ids = AutoTokenizer.from_pretrained(demo.MODEL_PATH)("Ask Anna to close the door.\nCould you please?")["input_ids"]
    ids = torch.tensor([ids])
    return model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("place", ["hub id", "folder"])
def test_a_released_adapter_is_start_and_reference_and_what_is_trained_on_it_loads(place, hub, tiny_llama, tmp_path):
    base = tiny_llama()
    adapter = release(tmp_path / "adapter", base, HUB_ID if place == "hub id" else base)
    start = logps(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert gap(start, logps(AutoModelForCausalLM.from_pretrained(base))) > 0.1
    for kind in ("contrastive", "fdpg", "conditional"):
        out = tmp_path / kind
        trainer = make(kind, adapter, out)
        assert gap(logps(trainer.model), start) < 1e-5
        trainer.train()  # stops at the first step where policy and reference differ
        trainer.save_model()
        assert trainer.reference_is_proven
        if kind == "contrastive":
            assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
        trained = logps(trainer.model)
        assert gap(trained, start) > 1e-3
        with trainer.model.disable_adapter():
            assert gap(logps(trainer.model), start) < 1e-5
        assert gap(logps(AutoPeftModelForCausalLM.from_pretrained(out)), trained) < 1e-5
        merged = AutoModelForCausalLM.from_pretrained(out / "merged_base")
        assert gap(logps(merged), start) < 1e-5
        assert gap(logps(PeftModel.from_pretrained(merged, out)), trained) < 1e-5
    flags = [
        "--max_steps=1",
        "--max_train_samples=16",
        "--max_eval_samples=4",
        "--max_length=256",
        "--disable_tqdm=true",
    ]
    summary = cli.main(
        ["reward", f"--model_name_or_path={adapter}", f"--output_dir={tmp_path / 'run'}", "--use_peft", *flags]
    )
    assert f"adapter {adapter}, merged into" in summary.reference
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("left", ["nothing", "only the config"])
def test_a_base_that_is_not_at_hand_is_named(left, hub, tiny_llama, tmp_path, capsys):
    adapter = release(tmp_path / "adapter", tiny_llama(), HUB_ID)
    for file in hub.rglob("*"):
        if file.is_file() and (left == "nothing" or file.suffix == ".safetensors"):
            file.unlink()
    with pytest.raises(OSError, match=r" set base_model_name_or_path in adapter_config\.json .* to a folder") as found:
        make("contrastive", adapter, tmp_path / "out")
    assert f"{adapter} is an adapter, and its base '{HUB_ID}' cannot be loaded: " in str(found.value)
    with pytest.raises(UsageError):
        cli.main(["reward", f"--model_name_or_path={adapter}", f"--output_dir={tmp_path / 'run'}"])
    assert f"error: {found.value}" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("run/*"))


def test_a_model_that_is_not_at_hand_is_named(hub, tmp_path):
    found = r"tokenizer of 'someone/else' \(no such folder in .*\) cannot be loaded: .* couldn't find .* Give a folder"
    with pytest.raises(OSError, match=found):
        make("contrastive", "someone/else", tmp_path / "out")
