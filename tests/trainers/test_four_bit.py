"""QLoRA: one measurement. The closing table, the run's own evaluations and plain transformers give the same numbers."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from small_trainers import COLUMNS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from contrastive_align.launch.contrastive import RewardRun


@pytest.fixture(scope="module")
def model_path(tiny_llama):
    return tiny_llama(hidden_size=64, intermediate_size=128)


def quantised(dtype):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def plain(model_path, adapter, dtype):
    """The saved adapter on the same 4-bit base, without this package, computing in the compute dtype."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, quantization_config=quantised(dtype))
    model = PeftModel.from_pretrained(base, adapter).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # this kernel rounds to bfloat16, whatever the compute dtype
    return model


@torch.no_grad()
def logps(model, prompt_ids, completion_ids):
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    log_probs = model(ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(1, torch.tensor(completion_ids)[:, None]).sum().item()


def best(model, dataset):
    """The log-prob of the best completion of each group."""
    found = []
    for row in dataset:
        _, completion = max(zip(row["scores"], row["completion_ids"], strict=True), key=lambda pair: pair[0])
        found.append(logps(model, row["prompt_ids"], completion))
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_closing_table_is_the_evaluation_is_plain_transformers(model_path, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    run = RewardRun(RewardRun.parse([
        f"--model_name_or_path={model_path}", f"--dtype={name}", f"--bf16={dtype == torch.bfloat16}",
        f"--output_dir={tmp_path}", "--load_in_4bit", "--use_peft", "--lora_dropout=0.1", "--lora_target_modules",
        "q_proj", "down_proj", "--max_train_samples=24", "--max_eval_samples=8", "--eval_strategy=steps",
        "--eval_steps=1", "--max_steps=3", "--per_device_train_batch_size=8", "--learning_rate=1e-2",
        "--warmup_steps=0", "--disable_tqdm=true",
    ]))  # fmt: skip
    closing = run.execute().metrics["logps/best"]
    log = [row for row in run.trainer.state.log_history if row.get("step") == 3]
    in_training = next(row["eval_logps/best"] for row in log if "eval_logps/best" in row)
    assert run.trainer.evaluate()["eval_logps/best"] == closing.after == in_training
    assert abs(closing.after - closing.before) > 0.5  # training moved it by more than the tolerance

    model = plain(model_path, tmp_path, dtype)
    after = best(model, run.trainer.eval_dataset)
    with model.disable_adapter():
        before = best(model, run.trainer.eval_dataset)
    tolerance = 1e-3
    if dtype == torch.bfloat16:  # what rounding alone does to the same weights
        exact = plain(model_path, tmp_path, torch.float32)
        tolerance = (after - best(exact, run.trainer.eval_dataset)).abs().mean().item()
    assert closing.after == pytest.approx(after.mean().item(), abs=tolerance)
    assert closing.before == pytest.approx(before.mean().item(), abs=tolerance)


@pytest.mark.parametrize("column", [c for c in COLUMNS if not c.encoder_decoder], ids=str)
def test_evaluation_changes_neither_the_gradient_nor_the_weights(column, model_path, tmp_path):
    """Also of the gradient that goes through the 4-bit layers to an adapter below them."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights="gaussian")
    told = {"model": model_path, "peft_config": lora, "quantization_config": quantised(torch.float32)}
    told["train_dataset"] = Dataset.from_list([{**row, "prompt": "how many?"} for row in column.rows()])
    trainer = column.make(tmp_path, told=told, bf16=False)
    layers = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    ids = torch.arange(3, 40)[None]

    def measure(training):
        trainer.model.train(training)
        trainer.model.zero_grad()
        logits = trainer.model(input_ids=ids).logits
        logits.square().mean().backward()
        return [p.grad.clone() for n, p in trainer.model.named_parameters() if "lora_B" in n], logits.detach()

    kept = [(m.weight.data.clone(), copy.deepcopy(m.weight.quant_state.absmax)) for m in layers]
    (before, logits), (_, evaluated) = measure(True), measure(False)
    with trainer.sampling_from() as model:
        sampled_from = model(input_ids=ids).logits
    trainer.save_model()
    after, again = measure(True)
    assert torch.equal(logits, again) and torch.allclose(logits, evaluated, atol=1e-5)
    assert torch.allclose(logits, sampled_from, atol=1e-5)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(before, after, strict=True))
    for module, (weight, absmax) in zip(layers, kept, strict=True):
        assert torch.equal(module.weight.data, weight) and torch.equal(module.weight.quant_state.absmax, absmax)
