"""FDPGTrainer with vLLM: TRL's own VLLMGeneration runs, over a stand-in for vLLM's client."""

import copy

import torch
import vllm_stand_in
from peft import LoraConfig
from test_fdpg_trainer import LENGTH, build, make_tokenizer, moment_target, trained

from contrastive_align import FDPGTrainer


def test_it_samples_from_the_current_weights_and_leaves_the_base_alone(tmp_path, monkeypatch):
    """With LoRA on a base in 16 bits, which TRL's way of handing weights over would change a little every time."""
    monkeypatch.setattr(FDPGTrainer, "reference_is_proven", True)  # the adapter below is not zero at the start
    base = build().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")

    def put(place, name, value):
        monkeypatch.setattr(place, name, value, raising=False)

    engine = vllm_stand_in.install(str(tmp_path / "base"), put)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = trained(
        make_tokenizer(), tmp_path, moment_target(), model=base, use_vllm=True, vllm_mode="server", peft_config=lora,
        max_steps=3, steps_per_generation=1, gradient_accumulation_steps=1, bf16=False,
    )  # fmt: skip
    assert trainer.state.global_step == 3
    logs = [entry for entry in trainer.state.log_history if "js_target" in entry]
    assert len(logs) == 3 and all(torch.isfinite(torch.tensor(entry["js_target"])) for entry in logs)
    # Drawn by the engine, from the weights of each step.
    asked = [n for _, n, _ in engine.calls]
    assert asked and set(asked) == {trainer.num_generations}
    assert all(params["max_tokens"] == LENGTH for *_, params in engine.calls)
    assert engine.history.count("weights") == 3
    trainer.vllm_generation.sync_weights()
    policy = copy.deepcopy(trainer.model).merge_and_unload()
    for name, p in policy.named_parameters():
        assert torch.equal(engine.parameters[name], p), name
    moved = 0
    for name, p in trainer.model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in before:
            assert torch.equal(p, before[plain]), name
            moved += not torch.equal(engine.parameters[plain], p)
    assert moved == 2
