"""Adapters in, adapters out: which model is start and reference, and that what was saved loads again."""

import json
import os
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.models import resolve_start, verify_saved
from contrastive_align.trainers.reference import ReferenceMismatch


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 5e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "beta": 0.1,
}


@pytest.fixture(scope="module")
def groups():
    return demo.load_reward_dataset()["train"].select(range(12))


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """A LoRA adapter far from zero, saved by plain peft."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama()), LoraConfig(**LORA, init_lora_weights=False)
    )
    path = tmp_path / "adapter"
    model.save_pretrained(path)
    return str(path)


def trained(model, groups, tmp_path, **kwargs):
    config = {k: kwargs.pop(k) for k in list(kwargs) if k not in ("peft_config", "quantization_config")}
    args = ContrastiveConfig(output_dir=str(tmp_path / "out"), **{**COMMON, **config})
    trainer = ContrastiveTrainer(model, args=args, train_dataset=groups, **kwargs)
    trainer.train()
    trainer.save_model()
    return trainer


@torch.no_grad()
def logps(model, groups):
    """Log-probs by plain transformers, without anything of this package."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    ids = tokenizer(groups[0]["prompt"] + groups[0]["completions"][0], return_tensors="pt")["input_ids"]
    model.train()  # no dropout here; in evaluation mode 4-bit layers may take a coarser kernel on CPU
    return torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]


def first_loss(trainer):
    return trainer.state.log_history[0]["loss"]


TWO_LN_2 = 2 * torch.log(torch.tensor(2.0)).item()


# ----------------------------------------------------------------------------------------------- full precision bases


def test_lora_on_a_model_loads_with_plain_peft(tiny_llama, groups, tmp_path):
    trainer = trained(tiny_llama(), groups, tmp_path, peft_config=LoraConfig(**LORA))
    assert first_loss(trainer) == pytest.approx(TWO_LN_2, abs=1e-5)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logps(loaded, groups), logps(trainer.model, groups), atol=1e-5)


@pytest.mark.parametrize("new_lora", [True, False], ids=["new_lora", "full_fine_tuning"])
def test_start_from_an_adapter(tiny_llama, adapter, groups, tmp_path, new_lora):
    """Merged base = start = reference; the result loads again with plain peft or transformers, also when moved."""
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama()), adapter)
    trainer = trained(adapter, groups, tmp_path, peft_config=LoraConfig(**LORA) if new_lora else None)
    assert first_loss(trainer) == pytest.approx(TWO_LN_2, abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_base")
    assert torch.allclose(logps(merged, groups), logps(start, groups), atol=1e-4)
    assert not torch.allclose(logps(trainer.model, groups), logps(merged, groups), atol=1e-3)  # it was trained
    auto = AutoPeftModelForCausalLM if new_lora else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out")
    assert torch.allclose(logps(loaded, groups), logps(trainer.model, groups), atol=1e-5)
    if not new_lora:
        assert torch.allclose(logps(trainer.ref_model, groups), logps(merged, groups), atol=1e-6)
    else:  # and as the start of a further run, from another place
        shutil.move(tmp_path / "out", tmp_path / "elsewhere")
        again = trained(str(tmp_path / "elsewhere"), groups, tmp_path, peft_config=LoraConfig(**LORA))
        assert first_loss(again) == pytest.approx(TWO_LN_2, abs=1e-5)
        assert torch.allclose(
            logps(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_base"), groups),
            logps(loaded, groups),
            atol=1e-4,
        )


def test_resuming_finds_its_merged_base_and_another_adapter_does_not(adapter, groups, tmp_path):
    kwargs = {"peft_config": LoraConfig(**LORA), "save_strategy": "steps", "save_steps": 2}
    trained(adapter, groups, tmp_path, **kwargs)
    written = os.path.getmtime(tmp_path / "out" / "merged_base" / "model.safetensors")
    args = ContrastiveConfig(output_dir=str(tmp_path / "out"), **{**COMMON, "save_strategy": "steps", "save_steps": 2})
    again = ContrastiveTrainer(adapter, args=args, train_dataset=groups, peft_config=LoraConfig(**LORA))
    again.train(resume_from_checkpoint=True)
    assert os.path.getmtime(tmp_path / "out" / "merged_base" / "model.safetensors") == written
    weights = load_file(f"{adapter}/adapter_model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, f"{adapter}/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another merged base"):
        ContrastiveTrainer(adapter, args=args, train_dataset=groups)


def test_a_merged_base_that_does_not_fit_on_the_disk(adapter, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(
        OSError, match=r"merged_base was not written: No space left on device; .* MB are free. Make room"
    ):
        resolve_start(adapter, output_dir=str(tmp_path / "out"))
    assert not any((tmp_path / "out").glob("*"))


def test_lora_initialised_away_from_zero_stops_at_step_0(tiny_llama, groups, tmp_path):
    """PiSSA moves the base: without the adapter the model is not the start, so it cannot be the reference."""
    with pytest.raises(ReferenceMismatch, match="PiSSA"):
        trained(tiny_llama(), groups, tmp_path, peft_config=LoraConfig(**LORA, init_lora_weights="pissa"))


def test_a_pickle_is_refused_unless_asked_for(tiny_llama, adapter, groups, tmp_path):
    weights = load_file(f"{adapter}/adapter_model.safetensors")
    os.remove(f"{adapter}/adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="not saved whole"):
        resolve_start(adapter, output_dir=str(tmp_path / "a"))
    torch.save(weights, f"{adapter}/adapter_model.bin")
    with pytest.raises(ValueError, match="allow_pickled_adapter=True"):
        trained(adapter, groups, tmp_path)
    assert not (tmp_path / "out" / "merged_base").exists()
    trainer = trained(adapter, groups, tmp_path, allow_pickled_adapter=True)
    assert first_loss(trainer) == pytest.approx(TWO_LN_2, abs=1e-5)


def test_a_merge_that_would_change_the_model_is_refused(tiny_llama, tmp_path):
    """LoRA on one side of tied embeddings moves both when it is merged."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(tie_word_embeddings=True))
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"moves log-probs by .* tied embeddings"):
        resolve_start(str(tmp_path / "adapter"), output_dir=str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


def test_prompt_tuning_is_no_start(tiny_llama, tmp_path):
    from peft import PromptTuningConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter"):
        resolve_start(str(tmp_path / "adapter"), output_dir=str(tmp_path / "out"))


@pytest.fixture
def hub_cache(tiny_llama, adapter, monkeypatch, tmp_path):
    """A cache as huggingface_hub lays it out, with a model me/base and an adapter me/adapter."""
    import huggingface_hub.constants

    for name, source in (("base", tiny_llama()), ("adapter", adapter)):
        repo = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(source, repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_ids(hub_cache, groups, tmp_path):
    trainer = trained("me/base", groups, tmp_path)
    assert trainer.start_description == "me/base"
    start = resolve_start("me/adapter", output_dir=str(tmp_path / "merged"))
    assert start.description.startswith("/") and "+ adapter me/adapter, merged into" in start.description
    with pytest.raises(OSError, match="couldn't find"):
        trained("me/nothing", groups, tmp_path)


def test_an_output_dir_with_weights_of_the_other_kind_is_refused(tiny_llama, groups, tmp_path):
    trained(tiny_llama(), groups, tmp_path, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="holds an adapter"):
        trained(tiny_llama(), groups, tmp_path)
    shutil.rmtree(tmp_path / "out")
    trained(tiny_llama(), groups, tmp_path)
    with pytest.raises(ValueError, match="holds a whole model"):
        trained(tiny_llama(), groups, tmp_path, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("kind", ["modules_to_save", "tied", "dora", "checkpoint"])
def test_other_adapters_load_with_plain_peft_too(tiny_llama, groups, tmp_path, kind):
    extra = {"modules_to_save": {"modules_to_save": ["lm_head"]}, "dora": {"use_dora": True}}.get(kind, {})
    if kind == "modules_to_save":
        extra = {"modules_to_save": ["input_layernorm"]}
    model = tiny_llama(tie_word_embeddings=True) if kind == "tied" else tiny_llama()
    saving = {"save_strategy": "steps", "save_steps": 3} if kind == "checkpoint" else {}
    trainer = trained(model, groups, tmp_path, peft_config=LoraConfig(**LORA, **extra), **saving)
    folder = tmp_path / "out" / "checkpoint-3" if kind == "checkpoint" else tmp_path / "out"
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logps(loaded, groups), logps(trainer.model, groups), atol=1e-5)


def test_a_pickle_that_runs_code_does_not(adapter, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it_ran"),))

    os.remove(f"{adapter}/adapter_model.safetensors")
    torch.save({"x": Bomb()}, f"{adapter}/adapter_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        resolve_start(adapter, output_dir=str(tmp_path / "a"), allow_pickled_adapter=True)
    assert not (tmp_path / "it_ran").exists()


def test_paths_and_manifests_that_are_wrong(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder"):
        resolve_start("./nowhere", output_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No folder"):
        resolve_start(str(tmp_path / "nowhere"), output_dir=str(tmp_path))
    config = json.loads(open(f"{adapter}/adapter_config.json").read())
    for base, error in ((None, "names no base model"), (str(tmp_path / "gone"), "No folder")):
        config["base_model_name_or_path"] = base
        open(f"{adapter}/adapter_config.json", "w").write(json.dumps(config))
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            resolve_start(adapter, output_dir=str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_kill_while_merging_leaves_nothing_half_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("contrastive_align.models.loading.Path.write_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resolve_start(adapter, output_dir=str(tmp_path / "a"))
    assert not (tmp_path / "a" / "merged_base").exists()
    monkeypatch.undo()
    start = resolve_start(adapter, output_dir=str(tmp_path / "a"))
    AutoModelForCausalLM.from_pretrained(start.model)


@pytest.mark.parametrize(
    ("tensor", "message"), [(torch.empty(0), "empty"), (torch.tensor([1.0, float("nan")]), "NaN or infinite")]
)
def test_what_was_saved_is_read_back(tmp_path, tensor, message):
    with pytest.raises(ValueError, match="Nothing was saved"):
        verify_saved(tmp_path)
    save_file({"lora": tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        verify_saved(tmp_path)


# ------------------------------------------------------------------------------------------------------------- QLoRA


@pytest.fixture
def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def wide(tiny_llama):
    return tiny_llama(hidden_size=64, intermediate_size=128)


def four_bit_layers(model):
    import bitsandbytes as bnb

    return {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def test_qlora_trains_the_lora_and_not_the_four_bits(wide, groups, tmp_path, nf4):
    args = ContrastiveConfig(output_dir=str(tmp_path / "out"), optim="paged_adamw_32bit", **COMMON)
    trainer = ContrastiveTrainer(
        wide, args=args, train_dataset=groups, quantization_config=nf4, peft_config=LoraConfig(**LORA)
    )
    before = four_bit_layers(trainer.model)
    lora = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(before) == 2 * 7 and all(w.dtype == torch.uint8 for w in before.values())
    assert lora and all("lora_" in n for n in lora)
    trainer.train()
    trainer.save_model()
    assert first_loss(trainer) == pytest.approx(TWO_LN_2, abs=1e-3)
    after = four_bit_layers(trainer.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    moved = {n: not torch.equal(p, lora[n]) for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(moved.values()), [n for n, m in moved.items() if not m]
    base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=nf4, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.allclose(logps(loaded, groups), logps(trainer.model, groups), atol=1e-5)


def test_an_adapter_on_a_four_bit_base_is_kept_and_copied_as_reference(wide, groups, tmp_path, nf4):
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(wide), LoraConfig(**LORA, init_lora_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    trainer = trained(
        str(tmp_path / "adapter"), groups, tmp_path, quantization_config=nf4, peft_config=LoraConfig(**LORA)
    )
    assert first_loss(trainer) == pytest.approx(TWO_LN_2, abs=1e-3)
    assert not (tmp_path / "out" / "merged_base").exists()
    assert four_bit_layers(trainer.model)
    assert "quantised, + adapter" in trainer.start_description
    assert set(trainer.model.peft_config) == {"default", "ref"}
    base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=nf4, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.allclose(logps(loaded, groups), logps(trainer.model, groups), atol=1e-5)
