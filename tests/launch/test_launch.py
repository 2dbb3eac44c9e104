"""The scripts from the command line to summary.json, in one process and as a user starts them."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from contrastive_align import demo
from contrastive_align.launch import cli
from contrastive_align.launch.usage import UsageError
from contrastive_align.trainers import ContrastiveTrainer


ROOT = Path(__file__).parents[2]


def command(name, argv):
    return cli.main([name, *argv])


FDPG, CONDITIONAL = partial(command, "fdpg"), partial(command, "conditional")


def main(argv, preference=False):
    return command("preference" if preference else "reward", argv)


SMALL = ["--max_train_samples=32", "--max_eval_samples=8", "--disable_tqdm=true"]


@pytest.mark.parametrize("preference", [False, True], ids=["reward", "preference"])
def test_the_embedded_default(tmp_path, capsys, preference):
    summary = main(["--loss_type=NCA", f"--output_dir={tmp_path}", *SMALL], preference=preference)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["method"]["loss_type"] == ["nca"] and written["model"]["name_or_path"] == demo.MODEL_PATH
    assert written["data"]["train"]["conversational"] is True  # a template that adds a line end, as prompts
    assert written["data"]["train"]["groups"] == 32 and sum(written["data"]["train"]["groups_by_k"].values()) == 32
    reward, best = written["metrics"]["mean_reward"], written["metrics"]["logps/best"]
    assert {"before", "after", "se", "n"} <= reward.keys() and reward["n"] == best["n"] == 8
    assert 0.4 < reward["before"] < 0.8 and reward["se"] > 0
    assert best["after"] == pytest.approx(summary.metrics["logps/best"].after)
    shown = capsys.readouterr().out
    assert "the bundled demo model" in shown and "32 groups (" in shown and "no accelerator found" in shown
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}")' in shown
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_own_model_and_data_with_lora_and_yaml(tiny_llama, tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "completions": [" a", " b", " c"], "scores": [i, 1, 0]} for i in range(12)]
    rows.append({"prompt": "bad", "completions": ["x"], "scores": [1]})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_llama()}\ntorch_dtype: float32\nuse_peft: true\nlora_target_modules: [q_proj]\n"
        f"dataset_name: {data}\ntest_split_size: 0.25\nevaluation_strategy: steps\neval_steps: 1\nmax_steps: 2\n"
        "on_bad_row: drop\nper_device_train_batch_size: 2\nlearning_rate: 1.0e-2\ndisable_tqdm: true\nbeta: 0.5\n"
    )
    out = tmp_path / "out"
    summary = main([str(config), f"--output_dir={out}", "--beta=0.25", "--loss_type", "info_nca", "sft"])
    assert summary.method["beta"] == 0.25 and summary.method["loss_type"] == ["info_nca", "sft"]
    shown = capsys.readouterr().out
    assert "'torch_dtype' is now 'dtype'" in shown and "'evaluation_strategy' is now 'eval_strategy'" in shown
    assert "1 of" in shown and "rows dropped" in shown
    assert summary.model["peft"] and "adapter off" in summary.reference
    AutoPeftModelForCausalLM.from_pretrained(out)
    own_data = [f"--dataset_name={data}", "--on_bad_row=drop", "--max_steps=1", "--disable_tqdm=true"]
    cached = ["--precompute_ref_log_probs", f"--output_dir={tmp_path / 'full'}"]
    full = main([f"--model_name_or_path={tiny_llama()}", *own_data, *cached])
    assert "cached" in full.reference and full.metrics["logps/best"].n == 12
    again = main([f"--model_name_or_path={out}", *own_data, f"--output_dir={tmp_path / 'again'}"])
    assert "merged into" in again.reference
    assert again.metrics["logps/best"].n == 12


def test_qlora_from_the_command_line(tiny_llama, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    qlora = ["--load_in_4bit", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--optim=paged_adamw_32bit"]
    summary = main([f"--model_name_or_path={model}", *qlora, f"--output_dir={tmp_path}", "--max_steps=2", *SMALL])
    assert summary.model["quantisation"] == "4-bit" and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--loss_typ=NCA"], "unknown flag '--loss_typ'. Did you mean '--loss_type'?"),
        (["--loss_type=hinge"], "Unknown loss_type 'hinge'"),
        (["--dataset_name=./nothing.jsonl"], "no file './nothing.jsonl'"),
        (["--model_name_or_path=./nothing"], "No folder './nothing'"),
        (["nothing.yaml"], "no YAML file 'nothing.yaml'"),
        (["--beta=abc"], "beta"),
        (["--ld_alpha=0.5"], "ld_alpha=0.5 is not supported"),
    ],
)
def test_wrong_input_is_a_message_and_exit_2(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        main(flags)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


FAULTS = {
    "one completion": ({"completions": ["a"], "scores": [1]}, "'completions' has 1 completion"),
    "wrong number of scores": ({"scores": [1]}, "'scores' has 1 numbers for 2 completions"),
    "a NaN score": ({"scores": [1, float("nan")]}, "'scores'[1] is nan"),
    "an infinite score": ({"scores": [1, float("inf")]}, "'scores'[1] is inf"),
    "a missing score": ({"scores": [1, None]}, "'scores'[1] is missing"),
    "a score that is text": ({"scores": [1, "good"]}, "'scores'[1] is 'good'"),
    "no scores": ({"scores": None}, "'scores' is missing"),
    "an empty completion": ({"completions": ["a", " "]}, "'completions'[1] is empty"),
    "an empty prompt": ({"prompt": ""}, "'prompt' is empty"),
    "roles out of order": (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "['user', 'user'], expected user and assistant in turn",
    ),
}


def test_a_stream_is_counted_once_it_is_read(tmp_path, capsys):
    good = {"prompt": "Say.", "completions": ["a", "b"], "scores": [1, 0]}
    rows = [{**good, "prompt": f"Say {n}."} for n in range(6)]
    rows[2]["completions"] = ["a", ""]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--dataset_name={file}", f"--output_dir={tmp_path / 'out'}", "--dataset_streaming", "--on_bad_row=drop"]
    flags += ["--max_steps=3", "--per_device_train_batch_size=2", "--temperature_alpha=1", "--disable_tqdm=true"]
    data = main(flags).data["train"]
    assert (data["groups"], data["rows"], data["dropped"], data["streamed"]) == (5, 6, 1, True)
    before, after = (" ".join(part.split()) for part in capsys.readouterr().out.split("train data: "))
    assert "1 groups (1 of K = 2) of the first 1 rows of a stream" in before
    assert "5 groups (5 of K = 2) of the first 6 rows of a stream" in after and "1 of 6 rows dropped" in after


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("drop", [False, True])
def test_faulty_rows_of_a_file(fault, drop, tmp_path, capsys):
    change, said = FAULTS[fault]
    good = {"prompt": "Say.", "completions": ["a", "b"], "scores": [1, 0]}
    if isinstance(change.get("prompt"), list):
        good = {**good, "prompt": [{"role": "user", "content": "Say."}]}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [good, good, {**good, **change}, good]))
    flags = [f"--dataset_name={file}", f"--output_dir={tmp_path / 'out'}", "--max_steps=1", "--disable_tqdm=true"]
    if drop:
        summary = main([*flags, "--on_bad_row=drop"])
        assert summary.data["train"]["groups"] == 3
        assert "dropped" in capsys.readouterr().out
    else:
        with pytest.raises(UsageError):
            main(flags)
        error = capsys.readouterr().err
        assert "row 2" in error and said in error, error


def test_the_auto_temperature_is_printed_and_in_the_summary(tmp_path, capsys):
    flags = ["--loss_type=InfoNCA", "--temperature_alpha=auto", f"--output_dir={tmp_path}", *SMALL]
    flags += ["--save_strategy=steps", "--save_steps=1", "--per_device_train_batch_size=16"]
    found = main([*flags, "--max_steps=1"]).method["temperature_alpha"]
    written = json.loads((tmp_path / "summary.json").read_text())["method"]
    shown = f"info_nca, beta=0.1, temperature_alpha={found:.4g} (auto)"
    assert 0.01 < found < 1 and written["temperature_alpha"] == found and written["line"] == shown
    assert shown in capsys.readouterr().out

    state = tmp_path / "checkpoint-1" / "contrastive_state.json"
    state.write_text(json.dumps({"temperature_alpha": 0.25}))
    main([*flags, "--max_steps=2", "--resume_from_checkpoint=true"])
    written = json.loads((tmp_path / "summary.json").read_text())["method"]
    assert written["temperature_alpha"] == 0.25 and "temperature_alpha=0.25 (auto)" in written["line"]
    assert f"- temperature_alpha: `{0.25}`" in (tmp_path / "README.md").read_text()


def test_preferences_want_pairs(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}))
    with pytest.raises(UsageError):
        main([f"--dataset_name={file}", f"--output_dir={tmp_path}"], preference=True)
    assert "contrastive-align reward" in capsys.readouterr().err


def test_resuming_from_the_command_line(tmp_path):
    flags = ["--loss_type=NCA", "--save_strategy=steps", "--save_steps=1", "--per_device_train_batch_size=8", *SMALL]
    main([*flags, f"--output_dir={tmp_path / 'whole'}", "--max_steps=4"])
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    main([*flags, f"--output_dir={tmp_path / 'resumed'}", "--max_steps=4", f"--resume_from_checkpoint={checkpoint}"])
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "resumed"))
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


REFUSED = {
    "reward": (main, ["--ld_alpha=0.5"]),
    "reward, in train()": (main, ["--resume_from_checkpoint={empty}"]),
    "fdpg": (FDPG, ["--features=[{{contains: please}}]"]),
    "fdpg, in train()": (
        FDPG,
        ["--features=[{{contains: zebra, moment: 1.0}}]", "--fit_samples=256"],
    ),
    "conditional": (CONDITIONAL, ["--num_generations=4"]),
    "conditional, in train()": (
        CONDITIONAL,
        ["--resume_from_checkpoint={empty}", "--eval_prompts=0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_start_removes_nothing(case, tmp_path):
    main, flags = REFUSED[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "summary.json").write_text("an earlier run's")
    flags = [flag.format(empty=tmp_path / "empty") for flag in flags]
    with pytest.raises(UsageError) as error:
        main([*flags, "--max_train_samples=8", "--disable_tqdm=true", f"--output_dir={tmp_path}"])
    assert error.value.code == 2 and (tmp_path / "summary.json").read_text() == "an earlier run's"


def test_a_run_that_fails_in_training_leaves_no_summary_of_another(tmp_path, monkeypatch, capsys):
    def stop(self, *args, **kwargs):
        assert not (tmp_path / "summary.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(ContrastiveTrainer, "training_step", stop)
    (tmp_path / "summary.json").write_text("an earlier run's")
    with pytest.raises(KeyboardInterrupt):
        main([f"--output_dir={tmp_path}", *SMALL])
    assert f"note: {tmp_path} holds an earlier run, which this one replaces" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("given", ["true", "True", "false", "none", "folder"])
def test_what_train_is_given_to_resume_from(given, tmp_path, monkeypatch):
    seen = []

    def stop(self, resume_from_checkpoint=None):
        seen.append(resume_from_checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(ContrastiveTrainer, "train", stop)
    given = str(tmp_path) if given == "folder" else given
    with pytest.raises(KeyboardInterrupt):
        main([f"--resume_from_checkpoint={given}", f"--output_dir={tmp_path / 'out'}", *SMALL])
    assert seen == [{"true": True, "false": None, "none": None}.get(given.lower(), given)]


@pytest.mark.parametrize("command", [["run_reward.py"], ["-m", "contrastive_align.demo"]], ids=["script", "module"])
def test_as_a_user_starts_it(command, tmp_path):
    if command[0].endswith(".py"):
        command = [str(ROOT / command[0])]
    done = subprocess.run(
        [sys.executable, *command, "--loss_type=NCA", "--max_steps=1", *SMALL],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "reward" / "summary.json").is_file()
    assert "mean_reward" in done.stdout
