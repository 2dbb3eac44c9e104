"""A promise that one trainer makes, all make: each test is a promise, each column keeps it or refuses it by name."""

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.modeling_utils
import transformers.trainer
from accelerate.state import AcceleratorState
from folder_holder import held_by_another
from peft import PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_trainers import COLUMNS, OWN_SAMPLES
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from contrastive_align.data import GroupCollator
from contrastive_align.data.folder_lock import LOCK_FILE, FolderInUse
from contrastive_align.models.cpu import freed_memory
from contrastive_align.models.logps import completion_logps
from contrastive_align.models.noise import ROUNDING
from contrastive_align.rounds import measures
from contrastive_align.trainers import base
from contrastive_align.trainers.base import FUNCTIONS_FILE
from contrastive_align.trainers.contrastive import STATE_FILE
from contrastive_align.trainers.encoder_decoder import encoder_decoder_logps
from contrastive_align.trainers.processes import end_with_parent
from contrastive_align.trainers.reference import REFERENCE_FILE, ReferenceMismatch


OWN_FILES = {
    "contrastive": {REFERENCE_FILE, FUNCTIONS_FILE, STATE_FILE},
    "contrastive-online": {REFERENCE_FILE, FUNCTIONS_FILE, STATE_FILE},
    "fdpg": {REFERENCE_FILE, FUNCTIONS_FILE, "target.json", "fdpg_state_0.pt"},
    "fdpg-encoder-decoder": {REFERENCE_FILE, FUNCTIONS_FILE, "target.json", "fdpg_state_0.pt"},
    "conditional": {REFERENCE_FILE, FUNCTIONS_FILE, "conditional_state.json"},
}
ONE_BATCH = {"per_device_train_batch_size": 8}
FOUR_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
NOT_NEEDED = {REFERENCE_FILE, FUNCTIONS_FILE}  # checkpoints of older versions lack them
NOT_NEEDED_OF_FILES = {*NOT_NEEDED, STATE_FILE}  # of the contrastive trainer on scored rows


def not_needed(column):
    return NOT_NEEDED_OF_FILES if column.is_contrastive else NOT_NEEDED


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "draw_round", lambda *_: None)  # a second for each round
        yield


@pytest.fixture(params=[*COLUMNS, OWN_SAMPLES], ids=str, scope="module")
def column(request):
    return request.param


@dataclass
class Run:
    """Two steps of training, with a checkpoint after each."""

    trainer: Any
    folder: Path
    at_rotation: dict[str, set[str]]  # checkpoint -> the files it has when Trainer may remove older ones

    def copied(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to))


@pytest.fixture(scope="module")
def run(column, tmp_path_factory):
    folder, at_rotation = tmp_path_factory.mktemp(column.name) / "run", {}
    rotate = transformers.trainer.rotate_checkpoints

    def watched(*args, **kwargs):
        newest = max(folder.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
        at_rotation[newest.name] = {file.name for file in newest.iterdir()}
        return rotate(*args, **kwargs)

    trainer = column.make(folder, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "rotate_checkpoints", watched)
        trainer.train()
    return Run(trainer, folder, at_rotation)


def flat(trainer):
    parts = [p.detach().flatten() for _, p in sorted(trainer.model.named_parameters()) if p.requires_grad]
    return torch.cat(parts).clone()


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------------------------------------- options and arguments

REFUSED = {
    "neftune_noise_alpha": (5.0, "leave it out"),
    "label_smoothing_factor": (0.1, "leave it out"),
    "use_liger_kernel": (True, "use_kernels"),
    "auto_find_batch_size": (True, "lower per_device_train_batch_size"),
    "ignore_data_skip": (True, "leave it out"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_without_a_meaning_are_refused(column, tmp_path, option):
    value, way_out = REFUSED[option]
    message = rf"{option}={value} is not supported by {column.trainer.__name__}: .*Way out: .*{way_out}"
    with pytest.raises(ValueError, match=message):
        column.arguments(tmp_path, **{option: value})


NUMBERS = {
    "learning_rate": (math.inf, "a finite number of 0 or more"),
    "weight_decay": (math.nan, "a finite number of 0 or more"),
    "adam_beta1": (2, "a finite number of 0 or more, below 1"),
    "adam_epsilon": (0, "a finite number above 0"),
    "num_train_epochs": ("3", "a finite number above 0"),
    "max_steps": (0, "a whole number of 1 or more, or -1"),
    "gradient_accumulation_steps": (-1, "a whole number of 1 or more"),
    "save_total_limit": (1.5, "a whole number of 1 or more"),
    "logging_steps": (True, "a finite number above 0 (below 1: a share of all steps)"),
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_outside_its_range_is_refused(column, tmp_path, option):
    """When the options are made, and where they were changed since, before a model is looked for."""
    value, expected = NUMBERS[option]
    said = re.escape(f"{option} is {value!r}, expected {expected}.")
    with pytest.raises(ValueError, match=said):
        column.arguments(tmp_path, **{option: value})
    args = column.arguments(tmp_path)
    setattr(args, option, value)
    with pytest.raises(ValueError, match=said):
        column.make(tmp_path, told={"args": args, "model": "no/such"})


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a finite number above 0"),
        ({"lora_dropout": math.nan}, "lora_dropout is nan, expected a finite number of 0 or more, below 1"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] is -1, expected a finite number above 0"),
    ],
)
def test_so_is_a_number_of_an_adapter(column, tmp_path, numbers, said):
    with pytest.raises(ValueError, match=said):
        column.make(tmp_path, told={"peft_config": column.lora(**numbers), "model": "no/such"})


CANNOT_BE_USED = {
    "a schedule's option": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
        r"lr_scheduler_type is 'cosine' with lr_scheduler_kwargs \{'cycles': 2\}, which cannot be built: .*'cycles'",
    ),
    "a schedule without options": (
        {"lr_scheduler_kwargs": {"cycles": 2}},
        "'constant' with .*, and that schedule takes",
    ),
    "a schedule that ends in NaN": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": math.nan}},
        r"lr_scheduler_kwargs\['num_cycles'\] is nan, expected a finite number",
    ),
    "a schedule that divides by 0": (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
        "'inverse_sqrt' with lr_scheduler_kwargs {'timescale': 0}, which cannot be built: .*zero",
    ),
    "an option that the optimiser does not read": (
        {"optim_args": "momentum=0.9, foo=1"},
        "optim='sgd' reads no 'foo'",
    ),
    "an optimiser's value": ({"optim_args": "momentum=much"}, "optim is 'sgd' with optim_args 'momentum=much'"),
    "an optimiser whose package is missing": ({"optim": "galore_adamw"}, "optim is 'galore_adamw'.*galore"),
    "a report": ({"report_to": "wandbb"}, r"report_to is \['wandbb'\]"),
    "a report whose package is missing": ({"report_to": "neptune"}, "report_to is 'neptune', and its package"),
    "the best of no evaluation": ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    "fp16 on a CPU": ({"fp16": True}, "fp16 is true on a CPU"),
    "checkpointing": ({"activation_checkpointing_kwargs": {"reentrant": True}}, "has the key 'reentrant', expected"),
    "accelerate": ({"accelerator_config": {"split": True}}, "accelerator_config has the key 'split', expected keys"),
    "a file of DeepSpeed": ({"deepspeed": "nothing.json"}, "deepspeed is 'nothing.json', which cannot be read"),
    "a former name": (
        {"model_init_kwargs": {"torch_dtype": "float32"}},
        "'torch_dtype', which TRL does not read. Name it",
    ),
    "a stage of DeepSpeed": ({"deepspeed": {"zero_optimization": {"stage": 5}}}, "expected a mapping with a stage of"),
    "DeepSpeed": ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "pip install deepspeed"),
    "FSDP's options": ({"fsdp_config": {"version": 2}}, "fsdp_config is given without fsdp"),
}


@pytest.mark.parametrize("case", CANNOT_BE_USED)
def test_what_cannot_be_used_is_known_before_a_model_is_loaded(column, tmp_path, case):
    options, said = CANNOT_BE_USED[case]
    with pytest.raises(ValueError, match=said):
        column.make(tmp_path, told={"model": "no/such", "args": column.arguments(tmp_path, **options)})


def test_an_attention_is_tried_before_weights_are_loaded(column, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for attention in ("flash_attention_2", "flush"):
        with pytest.raises(ValueError, match=f"attn_implementation is '{attention}', which cannot be used: "):
            column.make(tmp_path, model_init_kwargs={"attn_implementation": attention})


def test_a_folder_that_takes_no_files_is_known_at_the_start(column, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir is .*file/out', where nothing can be written: Not a directory"):
        column.make(tmp_path / "file" / "out", told={"model": "no/such"})
    with pytest.raises(OSError, match="no/such"):
        column.make(tmp_path / "new" / "out", told={"model": "no/such"})
    assert not (tmp_path / "new").exists()


def test_dataloader_drop_last_has_an_effect_or_is_refused(column, tmp_path):
    if not column.is_contrastive:
        with pytest.raises(ValueError, match=r"dataloader_drop_last=True is not supported .*Way out: leave it out"):
            column.arguments(tmp_path, dataloader_drop_last=True)
        return
    steps = {}
    for drop in (False, True):
        options = {"dataloader_drop_last": drop, "per_device_train_batch_size": 2, "max_steps": -1}
        trainer = column.make(tmp_path, told={"train_dataset": column.rows(7)}, num_train_epochs=1, **options)
        trainer.train()
        steps[drop] = trainer.state.global_step
    assert steps == {False: 4, True: 3}


def test_prompt_tuning_is_refused(column, tmp_path):
    task = "SEQ_2_SEQ_LM" if column.encoder_decoder else "CAUSAL_LM"
    virtual = PromptTuningConfig(task_type=task, num_virtual_tokens=2)
    for told in ({"peft_config": virtual}, {"model": get_peft_model(column.load_model(), virtual)}):
        with pytest.raises(ValueError, match=r"PromptTuningConfig puts virtual tokens before the prompt.*Use LoRA"):
            column.make(tmp_path, told=told)


def test_options_of_trls_class_are_refused(column, tmp_path):
    theirs = column.arguments(tmp_path, column.trl_config)
    expected = rf"args is a {column.trl_config.__name__}, expected a {column.config.__name__}"
    with pytest.raises(TypeError, match=expected):
        column.make(tmp_path, told={"args": theirs})


def test_max_tokens_per_batch_makes_batches_or_is_unknown(column, tmp_path):
    if not column.is_contrastive:
        with pytest.raises((TypeError, ValueError), match="max_tokens_per_batch"):
            column.arguments(tmp_path, max_tokens_per_batch=20)
        return
    trainer = column.make(tmp_path, max_tokens_per_batch=20)
    sizes = [len(batch["scores"]) for batch in trainer.get_train_dataloader()]
    assert sum(sizes) == 8 and 1 < len(sizes) and max(sizes) < 8
    trainer.train()
    assert trainer.state.global_step == 1


def test_predict_is_refused(column, run):
    with pytest.raises(NotImplementedError, match=r"which .* never builds\. trainer\.evaluate\(dataset\)"):
        run.trainer.predict(column.rows())


class CountsSteps(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_callbacks_are_called(column, tmp_path):
    callback = CountsSteps()
    column.make(tmp_path, told={"callbacks": [callback]}, max_steps=2).train()
    assert callback.steps == 2


def test_workers_of_a_run_end_with_it(column, tmp_path):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            self.begins_with = train_dataloader.worker_init_fn.func

    trainer, look = column.make(tmp_path, dataloader_num_workers=1), Look()
    trainer.add_callback(look)
    trainer.train()
    assert look.begins_with is end_with_parent


def test_a_collator_of_ones_own_is_used_or_refused(column, tmp_path):
    batches = []

    def collate(examples):
        batches.append(len(examples))
        return GroupCollator(0)(examples)

    if column.is_contrastive or column.draws_own_samples:
        trainer = column.make(tmp_path, told={"data_collator": collate})
        assert trainer.layout == "padded"
        trainer.train()
        assert batches == [8]
        return
    refusals = {"conditional": (ValueError, r"data_collator is not supported by ConditionalTrainer: .*Leave it out")}
    error, message = refusals.get(column.name, (TypeError, "unexpected keyword argument 'data_collator'"))
    with pytest.raises(error, match=message):
        column.make(tmp_path, told={"data_collator": collate})


def test_streams_train_or_are_refused(column, tmp_path):
    stream = column.rows().to_iterable_dataset()
    if column.makes_rounds:
        with pytest.raises(
            TypeError, match=r"train_dataset is a IterableDataset, expected a datasets.Dataset: a round"
        ):
            column.make(tmp_path, told={"train_dataset": stream})
        return
    weights = []
    for dataset in (column.rows(), stream):
        options = {"shuffle_dataset": False} if column.is_fdpg else {"temperature_alpha": 0.1}
        trainer = column.make(tmp_path, told={"train_dataset": dataset}, max_steps=3, **options)
        start = flat(trainer)
        trainer.train()  # the contrastive trainer's steps have all rows, in whatever order
        weights.append(flat(trainer))
        assert trainer.state.global_step == 3 and not torch.equal(start, weights[-1])
    assert torch.allclose(*weights, atol=1e-6)


# ------------------------------------------------------------------------------------ engines, precision, the reference

ENGINES = {  # is_fsdp_enabled, ZeRO stage -> uses_engine, is_sharded
    (False, None): (False, False),
    (False, 2): (True, False),
    (False, 3): (True, True),
    (True, None): (True, True),
}


@pytest.mark.parametrize(("fsdp", "stage"), ENGINES)
def test_engines_are_told_apart_alike(run, monkeypatch, fsdp, stage):
    monkeypatch.setattr(run.trainer, "is_fsdp_enabled", fsdp)
    monkeypatch.setattr(run.trainer, "is_deepspeed_enabled", stage is not None)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", stage and SimpleNamespace(zero_stage=stage))
    assert (run.trainer.uses_engine, run.trainer.is_sharded) == ENGINES[fsdp, stage]


@pytest.mark.parametrize("launched_with", ["no", "bf16"])
def test_the_precision_is_the_accelerators(column, tmp_path, monkeypatch, launched_with):
    """Not that of args.bf16, which a launcher may overrule: what rounding moves is measured in it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    trainer = column.make(tmp_path)
    assert not trainer.args.bf16 and trainer.computes_in_16_bits == (launched_with == "bf16")
    trainer.train()
    assert trainer.reference_is_proven
    batch = trainer.batch_of(trainer.reference_group())
    seen = set()
    for module in trainer.base_models()[0].modules():
        module.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    logps, lengths = trainer.policy_logps_of(batch)
    assert seen == {launched_with == "bf16"}
    assert trainer.rounding_on(batch, 1.0, (logps + 0.5, lengths)) > 0.1  # computed again
    monkeypatch.setattr(trainer, "policy_logps_of", lambda batch: pytest.fail("computed again"))
    assert trainer.rounding_on(batch, ROUNDING) == ROUNDING


@pytest.mark.parametrize("change", ["changed weights", "an adapter that is not zero", "one that is nearly zero"])
def test_a_policy_that_is_not_the_reference_stops_at_the_first_batch(column, tmp_path, change):
    if change == "changed weights":
        trainer = column.make(tmp_path)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    elif change == "an adapter that is not zero":
        trainer = column.make(tmp_path, told={"peft_config": column.lora(init_lora_weights=False)})
    else:  # by a thousandth of the weights, under bfloat16, of which it is less than the rounding
        trainer = column.make(tmp_path, told={"peft_config": column.lora()}, bf16=True)
        generator = torch.Generator().manual_seed(0)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=2e-3, generator=generator)
    with pytest.raises(ReferenceMismatch, match="Before the first step policy and reference differ"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_of_modules_that_are_not_there(column, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match=r"modules_to_save names 'haed', and .* has no such module"):
        column.make(tmp_path, told={"peft_config": column.lora(modules_to_save=["haed"])})
    adapter = column.lora()
    adapter.target_modules.add("q_prj")
    column.make(tmp_path, told={"peft_config": adapter}).train()
    assert caplog.text.count("target_modules names 'q_prj': ") == 1


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_an_adapter_starts_as_the_reference(column, tmp_path, options):
    """DoRA's multiplies by numbers that are 1 to rounding."""
    trainer = column.make(tmp_path, told={"peft_config": column.lora(**options)}, bf16=True)
    trainer.train()
    assert trainer.reference_is_proven and trainer.state.global_step == 1


@pytest.mark.parametrize("same", [True, False])
def test_a_resumed_run_has_the_reference_of_its_checkpoint(column, run, tmp_path, same):
    folder = run.copied(tmp_path / "run")
    trainer = column.make(folder, told={"model": column.model_path(seed=0 if same else 1)}, max_steps=2)
    refused = pytest.raises(ReferenceMismatch, match=r"The reference of .*checkpoint-1")
    with contextlib.nullcontext() if same else refused:
        trainer.train(resume_from_checkpoint=folder / "checkpoint-1")
    if same:
        assert trainer.reference_is_proven and torch.allclose(flat(trainer), flat(run.trainer), atol=1e-6)


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.is_fdpg], ids=str)  # the others draw for one step
def test_so_has_one_that_is_resumed_between_two_draws(column, tmp_path):
    options = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": False}
    column.make(tmp_path, **options).train()
    again = column.make(tmp_path, **options, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.reference_is_proven and (tmp_path / "checkpoint-2" / REFERENCE_FILE).is_file()
    other = column.make(tmp_path, told={"model": column.model_path(seed=1)}, **options, max_steps=2)
    with pytest.raises(ReferenceMismatch, match=r"The reference of .*checkpoint-1"):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_one_process_alone_may_save(column, run, tmp_path, monkeypatch):
    """As in TRL under DDP: nothing is asked of the others, which would wait."""
    monkeypatch.setattr(base, "gather_object", lambda *_: pytest.fail("asked the other processes"))
    run.trainer.save_model(tmp_path / "saved")
    assert any(tmp_path.joinpath("saved").glob("*.safetensors"))


def test_a_loop_of_ones_own_needs_no_train(column, tmp_path):
    trainer = column.make(tmp_path)
    if column.makes_rounds:
        trainer.begin_round(1)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.isfinite(trainer.training_step(trainer.model.train(), batch, None))


# -------------------------------------------------------------------------------------------------- the first step


def with_nan(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "norm" in name)[0] = math.nan
    return model


def test_a_weight_that_is_nan_is_told_before_anything_is_computed(column, tmp_path):
    said = r"norm.*' of .* has NaN or infinite entries \(1 such weights\), expected numbers: its file is damaged"
    tokenizer = column.make(tmp_path).processing_class
    told = {"model": with_nan(column.load_model()), "processing_class": tokenizer}
    for more in ({}, {"peft_config": column.lora()}):
        with pytest.raises(ValueError, match=said):
            column.make(tmp_path, told=told | more)
    trainer = column.make(tmp_path)
    with_nan(trainer.model)
    with pytest.raises(ValueError, match=said):
        trainer.train()


def loss_of(column, change):
    class Changed(column.trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return change(super().compute_loss(model, inputs), model)

    return Changed


def infinite_gradient(loss, model):
    weight = next(p for p in model.parameters() if p.requires_grad).sum()
    return loss + (weight - weight.detach()).abs().sqrt()


NOT_FINITE = {
    "loss": (
        lambda loss, _: loss * math.nan,
        "The loss .*Weights, batch and activations are finite, so it is the loss",
    ),
    "gradient": (infinite_gradient, "The gradient .*The loss is .*, and the gradient of '.*' is not finite"),
}


@pytest.mark.parametrize("what", NOT_FINITE)
@pytest.mark.parametrize("parts", [ONE_BATCH, FOUR_BATCHES], ids=["whole", "parts"])
def test_a_first_step_that_is_not_finite_stops_the_run(column, tmp_path, what, parts):
    change, said = NOT_FINITE[what]
    trainer = column.make(tmp_path, trainer=loss_of(column, change), max_steps=3, **parts)
    start = flat(trainer)
    with pytest.raises(
        ValueError, match=rf"{said}.*Look at .*{'loss' if column.name.startswith('contrastive') else ''}"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and torch.equal(flat(trainer), start)


def test_an_activation_that_overflows_is_named(column, tmp_path):
    trainer = column.make(tmp_path)
    name, module = next((n, m) for n, m in trainer.model.named_modules() if n.endswith(("mlp", "DenseReluDense")))
    module.register_forward_hook(lambda module, _, output: output * math.inf if module.training else output)
    with pytest.raises(
        ValueError, match=f"The loss of the first step .*'{name}' computes NaN or infinite values in float32"
    ):
        trainer.train()


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.is_contrastive], ids=str)  # the others read no scores
def test_so_are_scores_that_a_collator_makes_infinite(column, tmp_path):
    def collate(examples):
        batch = GroupCollator(0)(examples)
        batch["scores"][:, 0] = math.inf
        return batch

    trainer = column.make(tmp_path, told={"data_collator": collate}, loss_type="info_nca", temperature_alpha=1.0)
    with pytest.raises(
        ValueError, match=r"The loss of the first step .*'scores' of the batch has NaN or infinite entries"
    ):
        trainer.train()


def test_training_that_diverges_stops(column, tmp_path):
    trainer = column.make(tmp_path, learning_rate=1e38, max_steps=20, num_train_epochs=20)
    with pytest.raises(ValueError, match=r"training diverged.*[Ll]ower learning_rate"):
        trainer.train()
    assert 0 < trainer.state.global_step < 5


def test_a_run_without_a_step_is_no_success(column, tmp_path, monkeypatch):
    trainer = column.make(tmp_path)
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: DataLoader([]))
    with pytest.raises(ValueError, match=r"No step was made \(of 1\): the training data fill no batch"):
        trainer.train()


def test_a_run_that_was_finished_says_so(column, run, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folder = run.copied(tmp_path / "run")
    trainer = column.make(folder, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert f"{folder / 'checkpoint-2'} is the end of its run: step 2 of 2. Nothing was trained" in caplog.text
    assert torch.allclose(flat(trainer), flat(run.trainer))


def test_a_warm_up_that_does_not_end_is_told(column, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    column.make(tmp_path, warmup_steps=10, lr_scheduler_type="linear").train()
    assert "warmup_steps=10 is 10 of the 1 steps: the learning rate never reaches 0.01" in caplog.text


# ------------------------------------------------------------------------------------------------ checkpoints, saving


def test_a_checkpoint_has_its_state_before_older_ones_may_go(column, run):
    needed = {TRAINER_STATE_NAME, *OWN_FILES[column.name]}
    assert OWN_FILES[column.name] - not_needed(column) == set(run.trainer.state_files)
    assert run.at_rotation.keys() == {"checkpoint-1", "checkpoint-2"}
    for name, files in run.at_rotation.items():
        assert needed <= files, name
        assert base.problem_with_checkpoint(run.folder / name, run.trainer.state_files) is None


def test_state_files_are_written_whole_or_not_at_all(column, run, tmp_path, monkeypatch):
    """Where the n-th file cannot be renamed into its place, n - 1 files are there, and no part of another."""
    own, replace = OWN_FILES[column.name], os.replace
    for n in range(len(own)):
        renamed = []

        def fails(source, target, *, n=n, renamed=renamed):
            if len(renamed) == n:
                raise OSError("the disk is full")
            renamed.append(Path(target).name)
            replace(source, target)

        folder = tmp_path / f"checkpoint-{n + 1}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fails)
            with pytest.raises(OSError, match="the disk is full"):
                run.trainer.save_state(folder)
        assert {file.name for file in folder.iterdir()} == set(renamed)
    assert base.newest_whole_checkpoint(tmp_path, run.trainer.state_files) is None
    run.trainer.save_state(folder)
    assert {file.name for file in folder.iterdir()} == own


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damaged(column, run, folder):
    """A folder with one whole checkpoint and newer ones, each with one fault: name -> what is said of it."""
    run.copied(folder)
    whole, newest = folder / "checkpoint-1", folder / "checkpoint-2"
    faults = {
        "checkpoint-3": (REFERENCE_FILE, cut, f"{REFERENCE_FILE} cannot be read"),
        "checkpoint-4": (TRAINER_STATE_NAME, Path.unlink, f"it has no {TRAINER_STATE_NAME}"),
        "checkpoint-5": ("optimizer.pt", cut, "optimizer.pt is cut off"),
        "checkpoint-6": ("model.safetensors", cut, "model.safetensors cannot be read"),
    }
    for i, name in enumerate(sorted(OWN_FILES[column.name] - {REFERENCE_FILE})):
        said = f"{name} is cut off" if name.endswith(".pt") else f"{name} cannot be read"
        faults[f"checkpoint-{7 + 2 * i}"] = (name, cut, said)
        if name not in not_needed(column):
            faults[f"checkpoint-{8 + 2 * i}"] = (name, Path.unlink, f"it has no {name}")
    for name, (file, damage, _) in faults.items():
        shutil.copytree(newest, folder / name)
        damage(folder / name / file)
    shutil.rmtree(newest)
    return whole, {name: said for name, (_, _, said) in faults.items()}


def test_a_checkpoint_that_is_not_whole_is_not_resumed(column, run, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    whole, faults = damaged(column, run, tmp_path / "run")
    trainer = column.make(tmp_path / "run", max_steps=2)
    for name, said in faults.items():
        with pytest.raises(ValueError) as refused:
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / name))
        assert said in str(refused.value) and f"The newest whole one is {whole}." in str(refused.value)
    caplog.clear()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from == whole and trainer.state.global_step == 2
    for name, said in faults.items():
        assert f"{tmp_path / 'run' / name} was not written to its end and is skipped: {said}" in caplog.text


def test_without_a_whole_checkpoint_training_begins_anew(column, run, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    whole, faults = damaged(column, run, tmp_path / "run")
    shutil.rmtree(whole)
    trainer = column.make(tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="has no whole one"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / next(iter(faults))))
    caplog.clear()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from is None and trainer.state.global_step == 1
    assert f"{tmp_path / 'run'} holds no checkpoint that is whole: training begins anew" in caplog.text


def test_a_model_that_diverged_is_not_saved(run, tmp_path):
    name, weight = next((name, p) for name, p in run.trainer.model.named_parameters() if p.requires_grad)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(ValueError, match=f"'{name}' has NaN or infinite entries: training diverged"):
            run.trainer.save_model(str(tmp_path / "out"))
    finally:
        weight.data.copy_(kept)
    assert not (tmp_path / "out").exists()


def test_what_was_saved_is_read_back(run, tmp_path, monkeypatch):
    def loses_one(tensors, *args, **kwargs):
        name = next(iter(tensors))
        save_file({**tensors, name: torch.empty(0)}, *args, **kwargs)

    run.trainer.save_model(str(tmp_path / "whole"))
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", loses_one)
    with pytest.raises(ValueError, match=r"model.safetensors: '.*' is empty, expected weights"):
        run.trainer.save_model(str(tmp_path / "lost"))


def test_the_card_names_the_objective(column, run):
    run.trainer.create_model_card(model_name="mine")
    card = (run.folder / "README.md").read_text()
    section = card.split("## Objective\n\n")[1].split("\n\n## ")[0]
    assert section.splitlines() == [f"- {name}: `{value}`" for name, value in run.trainer.objective().items()]
    decides = {"contrastive": "loss", "contrastive-online": "own samples", "conditional": "kl_coef"}.get(
        column.name, "divergence"
    )
    assert decides in run.trainer.objective() and "## Training procedure" in card


def test_a_folder_that_another_run_writes_into_is_refused(column, run, tmp_path):
    """Before anything is read or written; a lock that a killed run left holds nothing."""
    trainer = column.make(tmp_path / "out", max_steps=1)
    with held_by_another(tmp_path / "out") as holder, pytest.raises(FolderInUse, match=f"by process {holder.pid} on"):
        trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {LOCK_FILE, "pool"}
    trainer.train()
    assert trainer.state.global_step == 1 and not (tmp_path / "out" / LOCK_FILE).exists()


@pytest.mark.parametrize("saving", ["no", "steps"])
def test_sigterm_ends_training_after_the_step_with_a_checkpoint(column, tmp_path, saving):
    """``enable_jit_checkpoint`` is Trainer's option for it: it saves whatever ``save_strategy`` says."""

    class Terminated(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before, told = signal.getsignal(signal.SIGTERM), {"callbacks": [Terminated()]}
    options = {"max_steps": 4, "save_strategy": saving, "save_steps": 100, "enable_jit_checkpoint": True}
    trainer = column.make(tmp_path / "out", told=told, **options)
    trainer.train()
    assert trainer.args.enable_jit_checkpoint and signal.getsignal(signal.SIGTERM) == before
    assert trainer.state.global_step == 2
    assert base.problem_with_checkpoint(tmp_path / "out" / "checkpoint-2", trainer.state_files) is None

    whole = column.make(tmp_path / "whole", max_steps=4, save_strategy=saving, save_steps=100)
    whole.train()
    resumed = column.make(tmp_path / "out", max_steps=4, save_strategy=saving, save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and torch.equal(flat(resumed), flat(whole))


@pytest.mark.parametrize("file", ["own state", "weights", "tokenizer", "optimizer.pt"])
def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(column, run, tmp_path, monkeypatch, file):
    folder = run.copied(tmp_path / "run")
    full = {
        "own state": (base, "atomic_write", OSError(errno.ENOSPC, "No space left on device")),
        "weights": (PreTrainedModel, "save_pretrained", SafetensorError("I/O error: ... (os error 28)")),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained", Exception("No space left on device (os error 28)")),
        "optimizer.pt": (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5")),
    }
    place, name, error = full[file]
    trainer = column.make(folder, max_steps=3, save_strategy="steps", save_steps=1)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, name, fails)
    with pytest.raises(OSError, match=r"No space left on device; .* MB of .* MB are free") as raised:
        trainer.train(resume_from_checkpoint=True)
    assert raised.value.errno == errno.ENOSPC
    said = str(raised.value)
    assert f"{folder}/checkpoint-3 was not written" in said
    assert f"Make room, then go on from {folder}/checkpoint-2 with resume_from_checkpoint=True" in said
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    again = column.make(folder, max_steps=3, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_checkpoint_takes_the_place_of_one_that_a_killed_run_left(column, run, tmp_path):
    folder = run.copied(tmp_path / "run")
    (folder / "checkpoint-2" / TRAINER_STATE_NAME).unlink()
    (folder / "checkpoint-2" / "model-00001-of-00002.safetensors").touch()
    trainer = column.make(folder, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert {file.name for file in (folder / "checkpoint-2").iterdir()} == {
        file.name for file in (run.folder / "checkpoint-2").iterdir()
    }


def test_saved_weights_have_the_mode_of_other_files(run, tmp_path):
    run.trainer.save_model(str(tmp_path))
    modes = {file.stat().st_mode for file in tmp_path.glob("*.json")}
    assert {file.stat().st_mode for file in tmp_path.glob("*.safetensors")} == modes


# ------------------------------------------------------------------------------------------------- the loss, overridden


def tripled(column):
    class Tripled(column.trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 3 * super().compute_loss(model, inputs)

    return Tripled


def own_mean(column):
    """A loss of one's own: the mean over rows of their log-probs, or log-ratios."""

    class OwnMean(column.trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if column.is_contrastive or column.draws_own_samples:
                _, outputs = super().compute_loss(model, inputs, return_outputs=True)
                return outputs["log_ratios"].masked_fill(~outputs["valid"], 0.0).sum(1).mean()
            if column.encoder_decoder:
                return encoder_decoder_logps(model, inputs).mean()
            return completion_logps(model, inputs, layout=self.layout, token_stats=False).logps.mean()

    return OwnMean


def gradient(column, folder, trainer=None, rows=8, **options):
    """The gradient of a step of plain SGD, which is what the step takes off the weights."""
    told = {"train_dataset": column.rows(rows)}
    made = column.make(folder, trainer=trainer, told=told, learning_rate=1.0, **options)
    start = flat(made)
    made.train()
    assert made.state.global_step == 1
    return start - flat(made)


def near(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()


def test_an_override_keeps_its_scale(column, tmp_path):
    plain, whole, parts = (
        gradient(column, tmp_path / str(i), trainer, **options)
        for i, (trainer, options) in enumerate(
            [(None, ONE_BATCH), (tripled(column), ONE_BATCH), (tripled(column), FOUR_BATCHES)]
        )
    )
    assert plain.norm() > 1e-3
    assert near(whole, 3 * plain) and near(parts, 3 * plain)


def test_a_mean_of_ones_own_is_the_same_however_a_step_is_divided(column, tmp_path):
    whole = gradient(column, tmp_path / "whole", own_mean(column), **ONE_BATCH)
    parts = gradient(column, tmp_path / "parts", own_mean(column), **FOUR_BATCHES)
    assert whole.norm() > 1e-3 and near(parts, whole)


def test_micro_batches_that_differ_in_size_are_one_large_batch(column, tmp_path):
    """In groups or in completion tokens. f-DPG's are equal: prompts that do not fill a step are left out."""
    if column.is_fdpg:
        seen = []

        class Watched(column.trainer):
            def compute_loss(self, model, inputs, **kwargs):
                seen.append(len(inputs["log_z"]))
                return super().compute_loss(model, inputs, **kwargs)

        options = {"max_steps": -1, "num_train_epochs": 1, **FOUR_BATCHES}
        trainer = column.make(tmp_path, trainer=Watched, told={"train_dataset": column.rows(7)}, **options)
        trainer.train()
        assert trainer.state.global_step == 1 and seen == [1] * 4
        return
    sizes = []

    class Watched(column.trainer):
        def compute_loss(self, model, inputs, **kwargs):
            sizes.append(len(inputs["valid"]) if column.is_contrastive else int(inputs["completion_mask"].sum()))
            return super().compute_loss(model, inputs, **kwargs)

    rows = 7 if column.is_contrastive else 8
    whole = gradient(column, tmp_path / "whole", Watched, rows, **ONE_BATCH)
    parts = gradient(column, tmp_path / "parts", Watched, rows, **FOUR_BATCHES)
    assert len(sizes) == 5 and sum(sizes[1:]) == sizes[0] and len(set(sizes[1:])) > 1
    assert near(parts, whole)


def test_outside_training_the_loss_is_the_batchs_mean(column, tmp_path):
    """The mean over its groups, or over its completion tokens, of the losses of each row alone."""
    trainer = column.make(tmp_path)
    if column.is_conditional:
        trainer.begin_round(1)
        examples = [trainer.rows[i] for i in range(8)]
        batch, alone = trainer.data_collator(examples), [trainer.data_collator([e]) for e in examples]
        weights = [float(part["completion_mask"].sum()) for part in alone]
    elif column.is_contrastive or column.draws_own_samples:
        rows = trainer.train_dataset
        if column.draws_own_samples:
            trainer.begin_round(1)
            rows = trainer.rows
        with torch.no_grad():  # away from the reference, where all groups have one loss
            for p in trainer.model.parameters():
                p.mul_(1.1)
        examples = [rows[i] for i in range(8)]
        batch, alone = trainer.data_collator(examples), [trainer.data_collator([e]) for e in examples]
        weights = [1.0] * 8
    else:
        trainer.model.eval()
        prompts = [row for row in column.rows(4).to_list() for _ in range(2)]
        (batch,) = trainer.draw_groups(prompts, training=False)
        more = ("proposal_logps", "target_log_scores", "log_z")
        completions = iter(completions_of(batch, column))
        alone = []
        for i, ids in enumerate(trainer.prompt_ids_of(column.rows(4)["prompt"])):
            group = {"prompt_ids": ids, "completion_ids": [next(completions) for _ in range(2)], "scores": [0.0] * 2}
            alone.append(trainer.collate([group]) | {name: batch[name][i : i + 1] for name in more})
        weights = [1.0] * 4
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model.eval(), batch).item()
        apart = [trainer.compute_loss(trainer.model, part).item() for part in alone]
    mean = sum(w * loss for w, loss in zip(weights, apart, strict=True)) / sum(weights)
    assert len(set(apart)) > 1 and together == pytest.approx(mean, rel=1e-4, abs=1e-6)


def completions_of(batch, column):
    if column.encoder_decoder:
        return [[t for t in row if t != -100] for row in batch["labels"].tolist()]
    pairs = zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def test_gradient_checkpointing_changes_nothing(column, tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = column.make(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        found.append((logged(trainer, "loss"), flat(trainer)))
    (loss_a, weights_a), (loss_b, weights_b) = found
    assert loss_a == pytest.approx(loss_b, rel=1e-5) and torch.allclose(weights_a, weights_b, atol=1e-6)


def test_an_evaluation_on_cpu_keeps_the_memory_it_freed(column, run, monkeypatch):
    told = []
    monkeypatch.setattr(freed_memory, "_requests", 0)  # a launch script that ran in this process leaves one
    monkeypatch.setattr(freed_memory, "_set_malloc_options", lambda options: told.append(options) or True)
    run.trainer.evaluate(column.rows(4))
    assert told == [freed_memory._KEEP, freed_memory._RESTORE]


@pytest.mark.parametrize("column", [*COLUMNS, OWN_SAMPLES], ids=str)
def test_training_data_without_a_row_is_refused(column, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has no rows, expected at least one"):
        column.make(tmp_path, told={"train_dataset": column.rows().select([])})
