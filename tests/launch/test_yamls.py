"""The YAMLs say what they claim to say: published settings, strict keys, a comment each, loadable by accelerate."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from contrastive_align.conditions import resolve_condition
from contrastive_align.launch import fdpg
from contrastive_align.launch.arguments import parse
from contrastive_align.launch.bundled import FORMER_NAMES, bundled, find_yaml
from contrastive_align.launch.conditional import ConditionalRun
from contrastive_align.launch.contrastive import RewardRun
from contrastive_align.launch.fdpg import FDPGRun
from contrastive_align.launch.feedback_flags import build_judge
from contrastive_align.launch.flags import RENAMED
from contrastive_align.launch.usage import UsageError


ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
ACCELERATE = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "zero3_offload": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
    "fsdp2_offload": DistributedType.FSDP,
    "multi_node": DistributedType.MULTI_GPU,
}
PUBLISHED = {
    "reward_qlora": ("ChenDRAG/ultrafeedback_reward", "run_reward.py"),
    "preference_qlora": ("ChenDRAG/ultrafeedback_preference", "run_preference.py"),
}
FDPG = ("fdpg", "fdpg_tiny", "fdpg_rlhf", "fdpg_encoder_decoder", "fdpg_gdc")
CONDITIONAL = {
    "quark": "quantile_tokens",
    "alt_rm": "phrases",
    "alt_lmc": "categories",
    "alt_lmu": "text",
    "steerlm": "attributes",
}
KEY = re.compile(r"^\s*(?:- )?[A-Za-z_][\w.]*:(\s|$)")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a YAML is read without the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def yaml_path(name: str) -> str:
    return str(ROOT / "yamls" / f"{name}.yaml")


def parse_yaml(path: str | Path, *flags: str):
    """As the script that the YAML is for."""
    stem = Path(path).stem
    run = FDPGRun if stem.startswith("fdpg") else ConditionalRun if stem in CONDITIONAL else RewardRun
    return parse([str(path), *flags], prog="test", script=run.arguments_class, training=run.config_class)


def accelerate_path(name: str) -> str:
    return find_yaml(name, "accelerate_configs")


def test_the_files_are_there():
    assert {p.stem for p in YAMLS} >= {*PUBLISHED, *FDPG, *CONDITIONAL, "reward_tiny"}
    assert set(bundled("accelerate_configs")) == set(ACCELERATE)
    folder = ROOT / "recipes" / "accelerate_configs"  # the former names lead to the same files
    assert {FORMER_NAMES.get(p.stem, p.stem): p.resolve() for p in folder.glob("*.yaml")} == bundled(
        "accelerate_configs"
    )


@pytest.mark.parametrize("name", ["reward_qlora", "reward_qlora.yaml", "yamls/reward_qlora.yaml"])
def test_a_bundled_yaml_is_found_by_name_from_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RewardRun.parse([f"--config={name}"]).script.dataset_name == "ChenDRAG/ultrafeedback_reward"
    (tmp_path / "reward_qlora").write_text("beta: 0.7")  # a file that is there comes first
    assert RewardRun.parse(["--config=reward_qlora"]).training.beta == 0.7
    for wrong in ("reward_qlor", "elsewhere/reward_qlora.yaml"):
        with pytest.raises(UsageError) as error:
            RewardRun.parse([f"--config={wrong}"])
        assert "Bundled are" in error.value.message


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_yaml_parses_strictly_and_in_todays_keys(path):
    args = parse_yaml(path)
    written = yaml.safe_load(path.read_text())
    assert args.given == set(written)
    assert not set(written) & set(RENAMED)
    assert not [note for note in args.notes if "no accelerator" not in note]
    assert args.training.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_a_misspelt_key_is_refused(path, tmp_path):
    key = next(iter(yaml.safe_load(path.read_text())))
    wrong = tmp_path / path.name
    wrong.write_text(re.sub(rf"(?m)^{key}:", f"{key}x:", path.read_text(), count=1))
    with pytest.raises(UsageError) as error:
        parse_yaml(wrong)
    assert f"unknown key '{key}x'. Did you mean '{key}'?" in error.value.message


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if KEY.match(line)]
    assert len(keys) >= len(yaml.safe_load(path.read_text()))
    bare = [lines[i] for i in keys if " #" not in lines[i] and not (i and lines[i - 1].lstrip().startswith("#"))]
    assert not bare, f"{path.name}: no comment above or beside {bare}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    args = parse([yaml_path(name)], prog="test")
    model, training, script = args.model, args.training, args.script
    dataset, _ = PUBLISHED[name]

    assert model.model_name_or_path == "HuggingFaceH4/mistral-7B-SFT-beta"
    assert (model.dtype, model.use_peft, model.load_in_4bit) == ("bfloat16", True, True)
    assert (model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == ("nf4", False)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 16, 0.05)
    assert model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    assert script.dataset_name == dataset
    assert (script.dataset_train_split, script.dataset_test_split) == ("train_prefs", "test_prefs")
    assert (training.max_length, training.max_prompt_length) == (1024, 512)

    assert training.loss_type == ["nca"]
    assert (training.beta, training.temperature_alpha, training.first_score_bonus) == (0.01, 1e-4, 0.0)

    assert (training.learning_rate, training.lr_scheduler_type, training.num_train_epochs) == (5e-6, "cosine", 1)
    assert training.optim == "paged_adamw_32bit"
    assert training.bf16 and not training.fp16
    assert training.gradient_checkpointing and training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.seed == 42

    assert (training.eval_strategy, training.eval_steps, training.logging_steps) == ("steps", 200, 10)
    assert training.save_strategy == "epoch"


@pytest.mark.parametrize("name", PUBLISHED)
def test_global_batch_is_32_on_the_processes_of_multi_gpu(name):
    training = parse([yaml_path(name)], prog="test").training
    processes = load_config_from_file(accelerate_path("multi_gpu")).num_processes
    assert processes == 8
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * processes == 32


@pytest.mark.parametrize("name", PUBLISHED)
def test_warm_up_is_a_tenth_of_the_steps(name):
    assert parse([yaml_path(name)], prog="test").training.get_warmup_steps(1000) == 100


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_go_before_the_yaml(name):
    args = parse([yaml_path(name), "--loss_type=InfoNCA", "--first_score_bonus=0.01"], prog="test")
    assert (args.training.loss_type, args.training.first_score_bonus) == (["info_nca"], 0.01)
    assert args.training.beta == 0.01


def test_the_two_published_yamls_differ_in_data_and_output_only():
    reward, preference = (yaml.safe_load(Path(yaml_path(name)).read_text()) for name in PUBLISHED)
    assert {k for k in reward.keys() | preference.keys() if reward.get(k) != preference.get(k)} == {
        "dataset_name",
        "output_dir",
    }


def test_tiny_is_the_bundled_default_run_spelt_out():
    spelt_out = RewardRun.parse([yaml_path("reward_tiny")])
    default = RewardRun.parse([])
    assert spelt_out.script == default.script
    assert spelt_out.model == default.model
    assert spelt_out.datasets == default.datasets
    assert spelt_out.training.to_dict() == default.training.to_dict()


def test_fdpg_tiny_is_the_bundled_default_run_spelt_out():
    spelt_out, default = FDPGRun.parse([yaml_path("fdpg_tiny")]), FDPGRun.parse([])
    assert spelt_out.script == default.script
    assert spelt_out.model == default.model
    assert spelt_out.datasets == default.datasets
    assert spelt_out.training.to_dict() == default.training.to_dict()


@pytest.mark.parametrize("name", FDPG)
def test_targets_of_the_fdpg_yamls(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # features in files are named from there
    args = FDPGRun.parse([yaml_path(name)])
    target = fdpg._build_target(args)
    assert len(target.names) == (5 if name == "fdpg_gdc" else 1)
    assert args.training.per_device_train_batch_size % args.training.num_generations == 0
    assert target.fitted == (name in ("fdpg_rlhf", "fdpg_encoder_decoder"))


def test_published_settings_of_gdc():
    args = FDPGRun.parse([yaml_path("fdpg_gdc")])
    training, features = args.training, args.script.features
    assert {f["name"]: f["moment"] for f in features} == {
        "female": 0.5, "science": 0.4, "art": 0.4, "business": 0.1, "sports": 0.1,
    }  # fmt: skip
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 2048
    assert (training.learning_rate, training.fit_samples) == (1.41e-5, 10_240)
    assert (training.divergence, training.baseline, training.proposal) == ("kl", "none", "kept")


@pytest.mark.parametrize("name", CONDITIONAL)
def test_published_settings_of_conditional_training(name):
    args = ConditionalRun.parse([yaml_path(name)])
    script, training = args.script, args.training
    condition = resolve_condition(script.condition)
    assert condition.kind == CONDITIONAL[name]
    assert (script.reward is None, script.judge is None) == {
        "quark": (False, True),
        "alt_rm": (False, True),
        "steerlm": (True, True),
    }.get(name, (True, False))
    if name == "quark":
        assert (training.learning_rate, training.get_warmup_steps(8000)) == (1e-5, 500)
        assert (training.max_completion_length, training.kl_direction) == (20, "reverse")
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert batch == 128 and training.draws_per_round / batch == 500
        assert condition.quantiles == 5 and not condition.per_prompt
    else:
        assert (training.learning_rate, training.get_warmup_steps(1000)) == (2e-5, 50)
        assert (training.adam_beta1, training.adam_beta2) == (0.8, 0.999)
    if name.startswith("alt"):
        assert (training.prompts_per_round, training.kl_direction, training.drop_factor) == (2048, "forward", 1.0)
        assert training.max_completion_length == (256 if name == "alt_lmc" else 64)
        assert training.unfrozen_layers_ratio == (1.0 if name == "alt_lmc" else 0.3)
    if name != "steerlm":
        assert (training.kl_coef, training.entropy_coef) == (0.05, 0.06)
        condition.check_generations(training.num_generations, training.prompts_per_round or 5)


@pytest.mark.parametrize("name", ["alt_lmc", "alt_lmu"])
def test_judges_of_the_yamls_answer_what_the_condition_needs(name, tmp_path):
    script = ConditionalRun.parse([yaml_path(name)]).script
    spec = script.judge | {"cache": str(tmp_path)}
    assert build_judge(spec, resolve_condition(script.condition), str(tmp_path)).spec["budget"] == 200_000


@pytest.mark.parametrize("recipe", ["fdpg_word", "fdpg_gdc", "fdpg_rlhf", "fdpg_encoder_decoder"])
def test_the_fdpg_recipes_name_files_that_exist(recipe):
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    for path in set(re.findall(r"(?:yamls|recipes)/[\w/]+\.\w+|run_\w+\.py", text)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_loads_its_config(name):
    config = load_config_from_file(accelerate_path(name))
    assert config.distributed_type == ACCELERATE[name]
    assert config.mixed_precision == "bf16"
    assert (config.num_processes, config.num_machines) == ((16, 2) if name == "multi_node" else (8, 1))
    # accelerate checks the outer keys only; an inner one it does not know would be passed over in silence
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.deepspeed_config) | set(config.fsdp_config) <= known
    assert Path(accelerate_path(name)).read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "stage", "device"),
    [("deepspeed_zero2", 2, "none"), ("deepspeed_zero3", 3, "none"), ("deepspeed_zero3_offload", 3, "cpu")],
)
def test_deepspeed_stages(name, stage, device):
    config = load_config_from_file(accelerate_path(name)).deepspeed_config
    assert config["zero_stage"] == stage
    assert (config["offload_optimizer_device"], config["offload_param_device"]) == (device, device)
    assert config.get("zero3_save_16bit_model", False) == (stage == 3)


def test_fsdp_is_version_2_and_saves_whole_weights():
    config = load_config_from_file(accelerate_path("fsdp")).fsdp_config
    assert config["fsdp_version"] == 2
    assert config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert config["fsdp_activation_checkpointing"] is False


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_names_files_that_exist(name):
    recipe = (ROOT / "recipes" / "ultrafeedback_nca" / "README.md").read_text()
    dataset, script = PUBLISHED[name]
    assert dataset in recipe and f"{script} yamls/{name}.yaml" in recipe
    for path in set(re.findall(r"(?:yamls|recipes)/[\w/]+\.yaml|run_\w+\.py", recipe)):
        assert (ROOT / path).is_file(), path
