"""The command contrastive-align: quick help, flags that are meant, aliases, accelerate, and what a wheel holds."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from trl import DatasetMixtureConfig, ModelConfig

from contrastive_align import demo
from contrastive_align.launch import cli
from contrastive_align.launch.help import GROUPS, SHOWN_AS, WIDTH, read_options
from contrastive_align.launch.usage import MEANT, NO_OPTION, UsageError, nearest


def known(command):
    """The options of a command, as its parser has them, and the class of its run."""
    run = cli._load(*cli.COMMANDS[command].run)
    classes = (run.arguments_class, run.config_class, ModelConfig, DatasetMixtureConfig)
    return {field.name for cls in classes for field in fields(cls)} | set(run.arguments_class.ALIASES), run


# ------------------------------------------------------------------------------------------------------------- help


def test_help_imports_no_torch():
    code = (
        "import sys; from contrastive_align.launch.cli import main; main(['--help']); main(['reward', '--help']);"
        "main(['fdpg', '-h']); sys.exit(bool({'torch', 'trl', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--temperature_alpha" in done.stdout and "reward" in done.stdout and "steps" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command(command, capsys):
    cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    if command == "reward":
        assert len(lines) <= 90
    shown = set(re.findall(r"--(\w+)", "\n".join(lines)))
    names, _ = known(command)
    launching = {"config", "accelerate_config", "num_processes", "help_all", "flag"}
    assert shown - launching <= names


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_says_what_the_classes_say(command):
    """It is read from their source; here from the classes."""
    _, run = known(command)
    options = {n: o for place in cli.COMMANDS[command].options for n, o in read_options(*place).items()}
    grouped = {name for names in GROUPS.values() for name in names.split(", ")}
    for cls in (run.arguments_class, run.config_class):
        own = {
            n for c in cls.__mro__ if c.__module__.startswith("contrastive_align") for n in vars(c)["__annotations__"]
        }
        for field in fields(cls):
            if field.name not in own:
                continue
            option = options.pop(field.name)
            assert SHOWN_AS.get(option.name, option.name) in grouped or option.name.startswith("vllm_"), option.name
            same = option.default is None or option.text == field.metadata.get("help", option.text)
            assert same and option.text, option.name  # of TRL's options the docstring says more
            default = field.default_factory() if field.default is MISSING else field.default
            assert option.default is None or eval(option.default) == default, option.name
    assert not options


def test_an_unknown_command_is_answered(capsys):
    with pytest.raises(UsageError):
        cli.main(["rewards"])
    assert "unknown command 'rewards'. Did you mean 'reward'?" in capsys.readouterr().err
    cli.main(["--version"])
    assert re.match(r"\d+\.\d+", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------- flags that are meant


GUESSES = {
    "reward": (
        "lr=learning_rate learning_rat=learning_rate epochs=num_train_epochs num_epochs=num_train_epochs "
        "batch_size=per_device_train_batch_size micro_batch_size=per_device_train_batch_size "
        "micro_train_batch_size=per_device_train_batch_size grad_accum=gradient_accumulation_steps "
        "model=model_name_or_path base_model=model_name_or_path model_path=model_name_or_path "
        "pretrain=model_name_or_path dataset=dataset_name data_path=dataset_name train_file=dataset_name "
        "data_files=dataset_name cutoff_len=max_length sequence_len=max_length max_seq_length=max_length "
        "prompt_max_len=max_prompt_length lora_rank=lora_r lora_target=lora_target_modules lora=use_peft "
        "finetuning_type=use_peft quantization_bit=load_in_4bit load_4bit=load_in_4bit pref_beta=beta dpo_beta=beta "
        "rl_beta=beta pref_loss=loss_type loss=loss_type dpo_loss=loss_type flash_attn=attn_implementation "
        "flash_attention=attn_implementation optimizer=optim scheduler=lr_scheduler_type "
        "lr_scheduler=lr_scheduler_type "
        "warmup=warmup_steps wd=weight_decay max_samples=max_train_samples val_set_size=test_split_size "
        "output=output_dir save_path=output_dir resume=resume_from_checkpoint wandb=report_to "
        "wandb_run_name=run_name val_steps=eval_steps steps=max_steps gradient_clipping=max_grad_norm "
        "precision=dtype use_bf16=bf16 temperatur_alpha=temperature_alpha tau=temperature_alpha sample_packing=layout "
        "recompute=gradient_checkpointing num_workers=dataset_num_proc LearningRate=learning_rate"
    ),
    "fdpg": (
        "reward_model=reward reward_fn=reward k=num_generations n_samples_per_prompt=num_generations "
        "max_new_tokens=max_completion_length generate_max_len=max_completion_length constraints=features "
        "f_divergence=divergence"
    ),
    "conditional": (
        "rounds=num_rounds epochs=num_train_epochs init_kl_coef=kl_coef kl_coeff=kl_coef "
        "num_return_sequences=num_generations "
        "temp=temperature rewards=reward label_key=score_column ent_coef=entropy_coef quantiles=condition"
    ),
}


def test_the_option_that_is_meant_is_offered():
    guesses = [(command, *pair.split("=")) for command, text in GUESSES.items() for pair in text.split()]
    assert len(guesses) >= 60
    wrong = [g for g in guesses if nearest(g[1], known(g[0])[0], "--") != f". Did you mean '--{g[2]}'?"]
    assert not wrong


def test_what_no_option_does_is_said():
    options = known("reward")[0]
    said = {name: nearest(name, options, "--") for name in ("tokenizer", "chat_template", "tp_size", "min_p")}
    assert all(". " in text and "Did you mean" not in text for text in said.values()), said
    for command in ("fdpg", "reward"):
        assert nearest("num_responses", known(command)[0], "--") == ". Did you mean '--num_generations'?"
    guesses = [guess for guesses in NO_OPTION for guess in guesses.split(", ")]
    assert len(set(guesses)) == len(guesses) and not set(guesses) & options


def test_what_is_offered_exists():
    every = {name for command in cli.COMMANDS for name in known(command)[0]}
    assert set(MEANT) - every <= {"accelerate_config", "config", "help"}


# -------------------------------------------------------------------------------------------------------- aliases


def test_another_name_of_an_option(tmp_path):
    run = known("conditional")[1]
    (tmp_path / "run.yaml").write_text("num_rounds: 3\nreward: contrastive_align.demo:reward\n")
    assert run.parse([f"--config={tmp_path}/run.yaml"]).training.num_train_epochs == 3
    flags = ["--num-rounds", "2", "--reward_funcs=contrastive_align.demo:reward"]
    args = run.parse([f"--config={tmp_path}/run.yaml", *flags])
    assert (args.training.num_train_epochs, args.script.reward) == (2, "contrastive_align.demo:reward")
    assert {"num_train_epochs", "reward"} <= args.given
    assert run.parse(["--num_rounds=2", "--num_train_epochs=2"]).training.num_train_epochs == 2
    for wrong in (["--num_rounds=2", "--num_train_epochs", "3"], ["--num_train_epochs=3", "--num_rounds=2"]):
        with pytest.raises(UsageError) as error:
            run.parse(wrong)
        assert "both '--num_rounds' (2) and '--num_train_epochs' (3) are given" in error.value.message
    (tmp_path / "run.yaml").write_text("num_rounds: 3\nnum_train_epochs: 4\n")
    with pytest.raises(UsageError) as error:
        run.parse([f"--config={tmp_path}/run.yaml"])
    assert "run.yaml: both 'num_rounds' (3) and 'num_train_epochs' (4)" in error.value.message


def test_a_judge_is_a_file_or_its_text(tmp_path):
    run = known("conditional")[1]
    (tmp_path / "judge.yaml").write_text("model: name\nbase_url: http://localhost:1/v1\n")
    for given in (f"--judge={tmp_path}/judge.yaml", "--judge={model: name, base_url: 'http://localhost:1/v1'}"):
        assert run.parse([given]).script.judge == {"model": "name", "base_url": "http://localhost:1/v1"}
    assert run.parse(["--judge", f"{tmp_path}/judge.yaml", "--kl_coef=0"]).script.judge["model"] == "name"
    with pytest.raises(UsageError):
        run.parse(["--judge=missing.yaml"])


# ------------------------------------------------------------------------------------------------- launching, asking


def test_accelerate_launches_this_command(tmp_path, monkeypatch):
    launched, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    flags = ["--accelerate_config", "zero3", "--num_processes=2", "--beta=0.5"]
    cli.main(["reward", "--config=reward_qlora", *flags])
    (args,) = launched
    assert args.config_file.endswith("accelerate_configs/zero3.yaml") and args.num_processes == 2
    assert (args.module, args.training_script) == (True, "contrastive_align")
    assert args.training_script_args == ["reward", "--config=reward_qlora", "--beta=0.5"]
    assert signal.getsignal(signal.SIGTERM) == before
    for wrong, said in (
        (
            ["--accelerate_config=zero4"],
            "Bundled are fsdp2, fsdp2_offload, multi_gpu, multi_node, zero2, zero3, zero3_offload",
        ),
        (["--accelerate_config=zero3", "--num_processes=0"], "--num_processes is 0, expected a whole number of 1 or"),
        (["--accelerate_config=zero3", "--machine_rank=one"], "--machine_rank is 'one', expected a whole number of 0"),
        (["--num_processes=2"], "--num_processes belongs to --accelerate_config"),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--accelerate_config=zero3", "--bta=1"], "Did you mean '--beta'?"),
        (["--features=[]"], "--features is an option of fdpg, not of this command"),
    ):
        with pytest.raises(UsageError) as error:
            cli.main(["reward", *wrong])
        assert said in error.value.message
    assert len(launched) == 1


def test_a_launched_run(tmp_path):
    (tmp_path / "cpu.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n")
    flags = ["--accelerate_config=cpu.yaml", "--max_steps=1", "--max_train_samples=16", "--max_eval_samples=2"]
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_align", "reward", *flags],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "reward" / "summary.json").is_file()


def test_any_model_can_be_asked(capsys):
    samples = cli.main(["ask", f"--model_name_or_path={demo.MODEL_PATH}", "--prompt=Ask Ben.", "--num_generations=2"])
    assert len(samples) == 2 and "has no condition.json" in capsys.readouterr().out
    with pytest.raises(UsageError):
        cli.main(["ask", f"--model_name_or_path={demo.MODEL_PATH}"])


# --------------------------------------------------------------------------------------------------- the lazy package


def test_the_package_imports_its_names_when_they_are_used():
    code = (
        "import sys, contrastive_align as c; assert 'torch' not in sys.modules; assert 'FDPGTrainer' in dir(c);"
        "from contrastive_align import *; assert LOSSES and Target and ContrastiveConfig;"
        "assert c.FDPGConfig.__name__ == 'FDPGConfig'; assert not hasattr(c, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reader_who_has_read_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "contrastive_align", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
