"""The command line and the YAML: strict, and kind to what people already have."""

import math
import os
import re

import pytest

from contrastive_align.launch import arguments
from contrastive_align.launch.arguments import UsageError, parse
from contrastive_align.losses import LOSSES, canonical_loss_name


# Every key of the published run's YAML.
PUBLISHED_YAML = """
model_name_or_path: HuggingFaceH4/mistral-7b-sft-beta
torch_dtype: auto
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
dataset_mixer:
  ChenDRAG/ultrafeedback_reward: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: true
beta: 0.01
temperature_alpha: 0.0001
do_eval: true
evaluation_strategy: steps
eval_steps: 200
loss_type: NCA
gradient_accumulation_steps: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: zephyr-7b-nca
learning_rate: 5.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: paged_adamw_32bit
output_dir: data/zephyr-7b-nca
per_device_train_batch_size: 1
per_device_eval_batch_size: 2
push_to_hub: false
save_strategy: "steps"
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def from_yaml(text: str, *flags: str, **options):
    with open("run.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return parse(["run.yaml", *flags], prog="run.py", **options)


def refused(capsys, act, *parts: str) -> None:
    """A usage error: exit status 2, one line on stderr that says every part."""
    with pytest.raises(UsageError) as caught:
        act()
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {caught.value.message}\n"
    for part in parts:
        assert part in printed, printed


# ----------------------------------------------------------------------------------------------- order of precedence


@pytest.mark.parametrize(
    "argv",
    [
        ["a.yaml", "--beta=0.5"],
        ["--beta=0.5", "a.yaml"],
        ["--config", "a.yaml", "--beta", "0.5"],
        ["--beta", "0.5", "--config=a.yaml"],
        ["--output_dir", "b.yaml", "a.yaml", "--beta=0.5"],  # the value of a flag is no YAML
    ],
)
def test_flags_go_before_yaml_wherever_it_stands(argv, tmp_path):
    (tmp_path / "a.yaml").write_text("beta: 0.25\nlearning_rate: 3e-5\n")
    args = parse(argv, prog="run.py")
    assert (args.training.beta, args.training.learning_rate) == (0.5, 3e-5)
    assert args.given >= {"beta", "learning_rate"}


def test_defaults_are_for_what_was_not_given():
    defaults = {"beta": 0.7, "learning_rate": 0.1, "seed": 5, "save_strategy": "no", "model_name_or_path": "m"}
    args = from_yaml("learning_rate: 0.2\n", "--seed=6", defaults=defaults)
    assert (args.training.beta, args.training.learning_rate, args.training.seed) == (0.7, 0.2, 6)
    assert args.training.save_strategy == "no" and args.model.model_name_or_path == "m"
    assert "beta" not in args.given


def test_nothing_at_all_is_a_command_line():
    args = parse([], prog="run.py")
    assert args.training.temperature_alpha == "auto"
    assert args.script.dataset_name is None and args.model.model_name_or_path is None and args.given == set()


def test_types_reach_the_config():
    args = from_yaml(
        "learning_rate: 5e-6\nloss_type: [NCA, sft]\nloss_weights: [1, 0.5]\nsave_strategy: no\nmax_length: null\n"
        "lora_target_modules: [q_proj, v_proj]\nreport_to: [none]\ngradient_checkpointing: false\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nhub_model_id: größe/modell\n"
        "model_init_kwargs: {attn_implementation: eager}\nlr_scheduler_kwargs: {num_cycles: 2}\n",
        "--max-train-samples=7",
    )
    training = args.training
    assert training.learning_rate == 5e-6 and training.save_strategy == "no" and training.max_length is None
    assert training.loss_type == ["nca", "sft"] and training.loss_weights == [1.0, 0.5]
    assert training.gradient_checkpointing is False
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and training.hub_model_id == "größe/modell"
    assert training.model_init_kwargs == {"attn_implementation": "eager"}
    assert args.model.lora_target_modules == ["q_proj", "v_proj"] and args.script.max_train_samples == 7


def test_env_of_the_yaml_is_set(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_ALIGN_TRIAL", "before")
    from_yaml("env: {CONTRASTIVE_ALIGN_TRIAL: 3}\nbeta: 0.2\n")
    assert os.environ["CONTRASTIVE_ALIGN_TRIAL"] == "3"
    assert from_yaml("env:\nbeta: 0.2\n").training.beta == 0.2


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0.5", 0.5), ("1e-4", 1e-4), ("1.0e-4", 1e-4)])
def test_the_temperature_is_a_number_or_auto(text, value):
    assert parse([f"--temperature_alpha={text}"], prog="run_reward.py").training.temperature_alpha == value
    assert from_yaml(f"temperature_alpha: {text}\n").training.temperature_alpha == value
    assert from_yaml("temperature_alpha: 3\n", f"--temperature_alpha={text}").training.temperature_alpha == value


@pytest.mark.parametrize(("text", "found"), [("warm", "'warm'"), ("0", "0.0"), ("nan", "nan"), ("", "'None'")])
def test_another_temperature_is_refused(text, found):
    with pytest.raises(UsageError) as error:
        from_yaml(f"temperature_alpha: {text}\n")
    expected = f"run.yaml: temperature_alpha is {found}, expected a finite number above 0, or 'auto'."
    assert error.value.message == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("+3", 3), ("1e2", 100.0), ("1.", 1.0), (".5", 0.5), ("1E-3", 1e-3), ("-.inf", -math.inf)],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    (found,) = arguments.load_yaml(f"[{text}]", "it")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1:30", "2020-01-01", "0x10", "1_000", "1.2.3", "e5"])
def test_what_is_no_number_there_is_text(text):
    assert arguments.load_yaml(f"[{text}]", "it") == [text]


def test_yaml_anchors():
    assert from_yaml("beta: &value 0.2\ntemperature_alpha: *value\n").training.temperature_alpha == 0.2
    shared = "gradient_checkpointing_kwargs: &k {use_reentrant: false}\nlr_scheduler_kwargs: {<<: *k, num_cycles: 2}\n"
    assert from_yaml(shared).training.lr_scheduler_kwargs == {"use_reentrant": False, "num_cycles": 2}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "an alias stands inside what it is an alias of"),
        ("a: &a {b: {c: *a}}", "an alias stands inside what it is an alias of"),
        (BOMB, "its aliases unfold to too many values"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!binary eA==", "could not determine a constructor"),
    ],
    ids=["itself", "inside", "bomb", "set", "binary"],
)
def test_yaml_that_is_no_json_is_refused(text, said):
    with pytest.raises(ValueError, match=f"it is not YAML: {said}"):
        arguments.load_yaml(text, "it")


@pytest.mark.parametrize(
    "env", ["{5: x}", "{FOO: }", "{'A=B': x}", "{'A B': x}", "{FOO: [1]}", "{2A: x}", '{A: "x\\0y"}']
)
def test_a_variable_of_the_environment_has_a_name_and_a_text(env, monkeypatch):
    before = dict(os.environ)
    with pytest.raises(UsageError) as error:
        from_yaml(f"env: {env}\n")
    assert "expected a variable's name (letters, digits, _) and its text" in error.value.message
    assert dict(os.environ) == before


@pytest.mark.parametrize("value", ["2", "1", "-0.1", "nan", "some"])
def test_a_warm_up_ratio_is_a_share(value):
    said = f"warmup_ratio is {value}, expected a number of 0 or more, below 1"
    for act in (
        lambda: parse([f"--warmup_ratio={value}"], prog="run.py"),
        lambda: parse(["--warmup_ratio", value], prog="run.py"),
        lambda: from_yaml(f"warmup_ratio: {value}\n"),
    ):
        with pytest.raises(UsageError) as error:
            act()
        assert said in error.value.message


def test_a_number_is_named_as_it_was_given():
    with pytest.raises(UsageError) as error:
        from_yaml("lora_alpha: 0\nuse_peft: true\n")
    assert error.value.message == "run.yaml: lora_alpha is 0, expected a finite number above 0."
    with pytest.raises(UsageError) as error:
        from_yaml("lora_alpha: 8\n", "--lora-alpha", "0")
    assert error.value.message == "--lora_alpha is 0, expected a finite number above 0."


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("--loss_type=nca,sft", "--loss_type is 'nca,sft', expected spaces between: --loss_type nca sft"),
        ("--lora-target-modules=[q_proj, v_proj]", "expected spaces between: --lora_target_modules q_proj v_proj"),
        ("--loss_weights=1,2", "--loss_weights is '1,2', expected spaces between: --loss_weights 1 2"),
    ],
)
def test_values_with_commas_between_are_refused(token, said):
    for argv in ([token], token.split("=")):
        with pytest.raises(UsageError) as error:
            parse(argv, prog="run.py")
        assert said in error.value.message


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--save_strategy=step", "is 'step', expected one of no, steps, epoch, best. Did you mean 'steps'?"),
        ("--dtype=fp16", "expected one of auto, bfloat16, float16, float32. Did you mean 'float16'?"),
        ("--bf16=perhaps", "--bf16 is 'perhaps', expected true or false."),
        ("--max_steps=1.5", "--max_steps is '1.5', expected a whole number of 1 or more, or -1."),
    ],
)
def test_a_value_of_another_kind_is_said_in_the_same_words(flag, said):
    with pytest.raises(UsageError) as error:
        parse([flag], prog="run.py")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss_type: NCA, DPO", "run.yaml: loss_type is 'NCA, DPO', expected a list: [NCA, DPO]"),
        ("seed: yes", "run.yaml: seed is 'True', expected a whole number of 0 or more"),
        ("save_strategy: step", "run.yaml: save_strategy is 'step', expected one of no, steps, epoch, best. Did you"),
    ],
)
def test_a_value_of_a_yaml_is_named_with_its_file(text, said):
    with pytest.raises(UsageError) as error:
        from_yaml(text)
    assert error.value.message.startswith(said) and "--" not in error.value.message


def test_what_has_no_effect_is_noted():
    notes = parse(["--eval_steps=5", "--save_steps=5", "--save_strategy=no"], prog="run.py").notes
    assert {"eval_steps has no effect: eval_strategy is no", "save_steps has no effect: save_strategy is no"} < {*notes}


def test_one_training_row_is_noted():
    assert parse(["--max_train_samples=1"], prog="run.py").notes[-1] == "max_train_samples=1: one row is trained on"


# ------------------------------------------------------------------------------------------------ unknown and wrong


@pytest.mark.parametrize(
    "text, parts",
    [
        ("betta: 1", ["run.yaml: unknown key 'betta'. Did you mean 'beta'?"]),
        ("max-length: 5", ["unknown key 'max-length'. Did you mean 'max_length'?"]),
        ("zzqqxx: 1", ["unknown key 'zzqqxx'. See --help for all."]),
        ("on: 1", ["unknown key 'True'"]),
        ("7: 1", ["unknown key '7'"]),
        ("beta: abc", ["run.yaml: beta is 'abc', expected a finite number above 0."]),
        ("seed: 1.5", ["run.yaml: seed is '1.5', expected a whole number of 0 or more"]),
        ("bf16: maybe", ["run.yaml: bf16 is 'maybe', expected true or false."]),
        ("on_bad_row: ignore", ["run.yaml: on_bad_row is 'ignore', expected one of raise, drop."]),
        ("beta:", ["run.yaml: 'beta' is empty, expected float"]),
        ("beta: [0.1, 0.2]", ["'beta' is [0.1, 0.2], a list, expected float"]),
        ("learning_rate: {a: 1}", ["'learning_rate' is {'a': 1}, a dict, expected float"]),
        ("beta: -1", ["beta is -1.0, expected a finite number above 0"]),
        ("beta: .nan", ["beta is nan"]),
        ("loss_type: hinge", ["Unknown loss_type 'hinge'", "nca, info_nca", "trl.DPOTrainer"]),
        ("loss_type: [nca, NCA]", ["names a loss twice"]),
        ("loss_type: [nca, sft]\nloss_weights: [1]", ["loss_weights has 1 numbers for the 2 losses"]),
        ("beta: 1\nseed: 2\nbeta: 2", ["run.yaml", "the key ['beta'] is given twice"]),
        ("gradient_checkpointing_kwargs:\n  a: 1\n  a: 2", ["the key ['a'] is given twice (line 2 on)"]),
        ("torch_dtype: auto\ndtype: auto", ["both 'torch_dtype' and 'dtype' are given", "Keep 'dtype'"]),
        ("- a\n- b", ["run.yaml holds a list, expected 'key: value' lines"]),
        ("", ["run.yaml is empty"]),
        ("a: [", ["run.yaml is not YAML"]),
        ("!!python/object/apply:os.getcwd []", ["run.yaml is not YAML"]),
        ("env: [A]", ["run.yaml: 'env' is a list, expected 'NAME: value' lines"]),
        ("datasets:\n- pth: a", ["pth"]),
        ("max_length: 100\nmax_prompt_length: 100", ["max_prompt_length is 100 with max_length 100"]),
        ("label_smoothing: 0.1", ["label_smoothing=0.1 is not supported", "Way out: "]),
    ],
)
def test_a_wrong_yaml_is_a_clean_error(capsys, text, parts):
    refused(capsys, lambda: from_yaml(text), *parts)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--betaa=1"], ["unknown flag '--betaa'. Did you mean '--beta'?"]),
        (["--bet", "1"], ["unknown flag '--bet'. Did you mean '--beta'?"]),  # no abbreviations
        (["--no_betaa"], ["unknown flag '--no_betaa'"]),
        (["--beta=abc"], ["--beta is 'abc', expected a finite number above 0."]),
        (["--loss_type", "nca", "sft", "--loss_weights", "1", "-inf"], ["--loss_weights[1] is -inf, expected"]),
        (["--beta", "-1e-3"], ["--beta is -0.001, expected a finite number above 0."]),
        (["--beta"], ["--beta", "needs a value: --beta=VALUE"]),
        (["--loss_type=foo"], ["Unknown loss_type 'foo'", "nca_pair"]),
        (["stray"], ["'stray' is neither a flag nor a .yaml file"]),
        (["--beta=1", "stray"], ["'stray' belongs to no flag"]),
        (["-x"], ["'-x' belongs to no flag"]),
        (["a.yaml", "--config=b.yaml"], ["2 YAML files are given (a.yaml, b.yaml)", "at most one"]),
        (["--config"], ["--config needs the path of a YAML file"]),
        (["missing.yaml"], ["no YAML file 'missing.yaml' (looked in "]),
        (["--overwrite_output_dir"], ["'--overwrite_output_dir' is gone", "always written into"]),
    ],
)
def test_a_wrong_command_line_is_a_clean_error(capsys, argv, parts):
    refused(capsys, lambda: parse(argv, prog="run.py"), *parts)


def test_a_file_that_is_no_text_is_a_clean_error(capsys, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"beta: \xff\xfe\x00")
    refused(capsys, lambda: parse(["run.yaml"], prog="run.py"), "run.yaml is not YAML")


def test_help_prints_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], prog="run.py")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--temperature_alpha", "--on_bad_row", "--max_train_samples", "--dtype"))


# ------------------------------------------------------------------------------------------- what older YAMLs say


def test_the_published_yaml_parses_and_every_old_key_has_its_line():
    args = from_yaml(PUBLISHED_YAML)
    training = args.training
    assert args.script.dataset_name == "ChenDRAG/ultrafeedback_reward"
    assert (args.script.dataset_train_split, args.script.dataset_test_split) == ("train_prefs", "test_prefs")
    assert args.model.dtype == "auto" and args.model.load_in_4bit and args.model.use_peft
    assert (args.model.lora_r, args.model.lora_alpha, args.model.lora_dropout) == (16, 16, 0.05)
    assert len(args.model.lora_target_modules) == 7
    assert training.loss_type == ["nca"] and training.beta == 0.01 and training.temperature_alpha == 1e-4
    assert (training.max_length, training.max_prompt_length) == (1024, 512)
    assert training.eval_strategy == "steps" and training.eval_steps == 200 and training.dataset_num_proc == 12
    assert training.warmup_steps == 0.1 and training.get_warmup_steps(1000) == 100
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.learning_rate == 5e-6 and training.optim == "paged_adamw_32bit" and training.bf16 is True
    for old, new in {
        "torch_dtype": "dtype",
        "evaluation_strategy": "eval_strategy",
        "preprocessing_num_workers": "dataset_num_proc",
        "warmup_ratio": "warmup_steps",
        "dataset_mixer": "datasets",
        "dataset_splits": "dataset_",
    }.items():
        lines = [note for note in args.notes if f"'{old}'" in note]
        assert len(lines) == 1 and new in lines[0].split(" now ")[1]


def test_the_published_command_lines_parse():
    flags = ["--gradient_accumulation_steps=4", "--beta=0.02", "--loss_type=InfoNCA", "--output_dir=data/test_run"]
    args = from_yaml(PUBLISHED_YAML, *flags)
    assert (args.training.beta, args.training.loss_type, args.training.output_dir) == (
        0.02,
        ["info_nca"],
        "data/test_run",
    )


def test_old_flags_are_renamed_with_a_line():
    args = parse(["--torch-dtype", "bfloat16", "--evaluation_strategy=no"], prog="run.py")
    assert args.model.dtype == "bfloat16" and args.training.eval_strategy == "no"
    assert args.given == {"dtype", "eval_strategy"}
    assert "'--torch_dtype' is now '--dtype'" in args.notes


def test_a_bare_no_in_yaml_is_no():
    args = from_yaml("evaluation_strategy: no\nsave_strategy: no\n")
    assert args.training.eval_strategy == "no" and args.training.save_strategy == "no"


def test_keys_that_are_gone_say_why():
    args = from_yaml("overwrite_output_dir: true\nuse_flash_attention_2: true\n")
    assert args.model.attn_implementation == "flash_attention_2"
    assert any("'overwrite_output_dir' is gone: " in note for note in args.notes)


def test_a_mixer_of_several_parts_becomes_a_mixture():
    args = from_yaml("dataset_mixer: {a/b: 0.25, c/d: 1.0}\ndataset_splits: [train_prefs, test_prefs]\n")
    assert args.script.dataset_name is None
    parts = [(d.path, d.split) for d in args.datasets.datasets]
    assert parts == [("a/b", "train_prefs[:25%]"), ("c/d", "train_prefs[:100%]")]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("dataset_mixer: [a]", ["'dataset_mixer' is ['a'], expected {name: fraction}"]),
        ("dataset_mixer: {}", ["expected {name: fraction}"]),
        ("dataset_mixer: {a: half}", ["expected {name: fraction}"]),
        ("dataset_mixer: {a: 2.0}", ["fractions [2.0]", "(0, 1]"]),
        ("dataset_mixer: {a: 0.005}", ["fractions [0.005]", "whole hundredths", "max_train_samples"]),
        ("dataset_mixer: {a: 1.0}\ndataset_splits: train", ["'dataset_splits' is 'train'"]),
        ("dataset_mixer: {a: 1.0}\ndataset_name: b", ["both 'dataset_mixer' and 'dataset_name'"]),
        ("dataset_splits: [a, b]", ["unknown key 'dataset_splits'"]),
    ],
)
def test_a_wrong_mixer_is_a_clean_error(capsys, text, parts):
    refused(capsys, lambda: from_yaml(text), *parts)


# ------------------------------------------------------------------------------------------------ accelerator or not


@pytest.mark.parametrize(
    "flags, use_cpu, bf16, said",
    [
        ([], True, False, "no accelerator found: use_cpu=True, bf16=False"),
        (["--bf16=True"], True, True, "no accelerator found: use_cpu=True"),
        (["--use_cpu=True"], True, False, "no accelerator found: bf16=False"),
        (["--use_cpu=True", "--bf16=False"], True, False, None),
    ],
)
def test_without_an_accelerator_it_is_chosen_and_said(monkeypatch, flags, use_cpu, bf16, said):
    monkeypatch.setattr(arguments, "_accelerator_available", lambda: False)
    args = parse(flags, prog="run.py")
    assert (args.training.use_cpu, args.training.bf16) == (use_cpu, bf16)
    assert [n for n in args.notes if "accelerator" in n] == ([said] if said else [])


def test_yaml_keeps_its_word_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(arguments, "_accelerator_available", lambda: False)
    args = from_yaml("bf16: true\n")
    assert args.training.bf16 is True and args.training.use_cpu is True


def test_with_an_accelerator_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(arguments, "_accelerator_available", lambda: True)
    args = parse(["--bf16=False"], prog="run.py")
    assert args.training.use_cpu is False and args.notes == []


# -------------------------------------------------------------------------------------------------------- loss names


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("NCA", "nca"),
        ("InfoNCA", "info_nca"),
        ("info_nca", "info_nca"),
        ("Info-NCA", "info_nca"),
        ("biasedNCA", "biased_nca"),
        ("DPO", "dpo"),
        ("sigmoid", "dpo"),
        ("nca_pair", "nca"),
        ("NCA-Pair", "nca"),
        ("bco_pair", "biased_nca"),
        ("Plackett-Luce", "plackett_luce"),
    ],
)
def test_loss_names_are_free_of_case_and_punctuation(spelling, name):
    assert canonical_loss_name(spelling) == name
    assert parse([f"--loss_type={spelling}"], prog="run.py").training.loss_type == [name]


def test_every_loss_is_known_by_its_own_name():
    for name in LOSSES:
        assert canonical_loss_name(name) == name
    with pytest.raises(ValueError, match=re.escape("Unknown loss_type 'ipo'")):
        canonical_loss_name("ipo")
