"""torch_compile=True: the layers are compiled, once for batches of all lengths, and the numbers stay what they are."""

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from contrastive_align import (
    ConditionalConfig,
    ConditionalTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
    FDPGConfig,
    FDPGTrainer,
    demo,
)
from contrastive_align.demo import reward
from contrastive_align.demo.task import all_prompts
from contrastive_align.trainers.base import compile_layers, parts_of_layers


STEPS = 4
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}


def first_id(completion_ids, **columns):
    """A reward that tells samples of a random model apart."""
    return [float(ids[0]) for ids in completion_ids]


@pytest.fixture(autouse=True)
def compiled():
    """How many graphs were compiled in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def contrastive(path, folder, *, lora=False, **options):
    rows = demo.load_reward_dataset()["train"].select(range(8))
    args = ContrastiveConfig(folder, per_device_train_batch_size=2, max_steps=STEPS, **OPTIONS, **options)
    peft = LoraConfig(target_modules="all-linear", init_lora_weights="gaussian") if lora else None
    return ContrastiveTrainer(path, args=args, train_dataset=rows, eval_dataset=rows.select(range(4)), peft_config=peft)


def fdpg(path, folder, **options):
    rows = Dataset.from_dict({"prompt": all_prompts()[:4]})
    args = FDPGConfig(
        folder, num_generations=4, per_device_train_batch_size=8, max_completion_length=6, max_steps=STEPS,
        beta=1.0, **OPTIONS, **options,
    )  # fmt: skip
    return FDPGTrainer(path, args=args, train_dataset=rows, reward_funcs=reward)


def conditional(path, folder, **options):
    rows = Dataset.from_dict({"prompt": all_prompts()[:4]})
    args = ConditionalConfig(
        folder, num_train_epochs=2, prompts_per_round=2, num_generations=5, max_completion_length=6,
        per_device_train_batch_size=5, **OPTIONS, **options,
    )  # fmt: skip
    return ConditionalTrainer(path, args, train_dataset=rows, reward_funcs=first_id, condition="quantile_tokens")


def same_training(make, path, tmp_path, compiled, **options):
    plain = make(path, str(tmp_path / "plain"), **options)
    plain.train()
    assert compiled() == 0
    trainer = make(path, str(tmp_path / "compiled"), torch_compile=True, torch_compile_backend="aot_eager", **options)
    trainer.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, trainer)]
    assert len(losses[0]) >= STEPS and losses[0] == pytest.approx(losses[1], abs=1e-4)
    expected, found = plain.model.state_dict(), trainer.model.state_dict()
    assert expected.keys() == found.keys() and type(trainer.model) is type(plain.model)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)
    return trainer


# Layers are checkpointed where nothing else is said.
VARIANTS = [{"layout": "shared"}, {"layout": "padded"}, {"lora": True}, {"gradient_checkpointing": False}]
VARIANTS += [{"gradient_checkpointing_kwargs": {"use_reentrant": True}}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_contrastive(tiny_llama, tmp_path, compiled, options):
    """Every batch has other lengths, and no step after the first compiles anything."""
    seen = []

    def make(*args, **kwargs):
        trainer = contrastive(*args, precompute_ref_log_probs=True, **kwargs)
        trainer.get_train_dataloader()  # the reference's passes are over
        torch._dynamo.reset()
        counters.clear()
        return watch(trainer, seen, compiled)

    trainer = same_training(make, tiny_llama(), tmp_path, compiled, **options)
    ours = seen[STEPS:]
    assert ours[0] > 0 and len(set(ours)) == 1
    trainer.save_model()
    if "lora" not in options:
        AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)


def watch(trainer, seen, compiled):
    """Note how many graphs there are after each step."""
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        seen.append(compiled())
        return loss

    trainer.training_step = training_step
    return trainer


def test_evaluation_and_cached_reference(tiny_llama, tmp_path, compiled):
    made = [
        contrastive(
            tiny_llama(), str(tmp_path / name), precompute_ref_log_probs=True, torch_compile=bool(backend),
            torch_compile_backend=backend,
        )
        for name, backend in (("plain", None), ("compiled", "aot_eager"))
    ]  # fmt: skip
    expected, found = (trainer.evaluate() for trainer in made)
    assert compiled() > 0 and found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("make", [fdpg, conditional])
def test_samplers(tiny_llama, tmp_path, compiled, make):
    """What is drawn token by token compiles nothing: the graphs are those of the training steps."""
    same_training(make, tiny_llama(), tmp_path, compiled)
    # Of each part one with gradients, one without, as the reference is proven in a forward pass; and a few for single
    # rows, by which what rounding does is measured.
    assert 0 < compiled() < 20


def test_attention_that_the_user_compiled(tiny_llama, tmp_path, compiled):
    losses = []
    for compiles in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama())
        for layer in model.model.layers if compiles else []:
            layer.self_attn.compile(backend="aot_eager", dynamic=True)
        trainer = contrastive(model, str(tmp_path), layout="shared")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert compiled() > 0 and losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_accelerates_own_setting_is_heard(tiny_llama, tmp_path, compiled, monkeypatch):
    """``accelerate launch --dynamo_backend``."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    contrastive(tiny_llama(), str(tmp_path)).train()
    assert compiled() > 0


def test_refused_where_it_was_not_tried(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="not supported under DeepSpeed or FSDP"):
        sharded(contrastive)(tiny_llama(), str(tmp_path), torch_compile=True)


def sharded(make):
    class Sharded(ContrastiveTrainer):
        def choose_layout(self, obstacle=None):
            self.is_fsdp_enabled = True
            compile_layers(self, [self.model])

    def build(path, folder, **options):
        rows = demo.load_reward_dataset()["train"].select(range(2))
        return Sharded(path, args=ContrastiveConfig(folder, **OPTIONS, **options), train_dataset=rows)

    return build


def test_what_is_compiled_of_a_list_is_what_is_called():
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    names = [type(part).__name__ for part in parts_of_layers(T5ForConditionalGeneration(config))]
    assert names == ["T5LayerSelfAttention", "T5LayerFF", "T5LayerSelfAttention", "T5LayerCrossAttention", "T5LayerFF"]


def test_nothing_to_compile_is_refused(tmp_path):
    AcceleratorState._reset_state()
    args = TrainingArguments(str(tmp_path), use_cpu=True, torch_compile=True, report_to="none")
    trainer = Trainer(model=torch.nn.Linear(2, 2), args=args)
    with pytest.raises(ValueError, match="Linear has no layers"):
        compile_layers(trainer, [trainer.model])
    assert parts_of_layers(trainer.model) == []
