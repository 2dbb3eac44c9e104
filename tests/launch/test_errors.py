"""Errors become sentences in one place: whose they are, where they come from, what to report, what debug shows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from contrastive_align import demo
from contrastive_align.launch import cli, step_commands
from contrastive_align.launch.errors import Fault, in_sentences
from contrastive_align.launch.usage import UsageError
from contrastive_align.openai_client import CallError
from contrastive_align.targets import InfeasibleMoment
from contrastive_align.trainers import ContrastiveTrainer
from contrastive_align.trainers.reference import ReferenceMismatch


LIBRARY, PACKAGE = torch.__file__, demo.__file__
SMALL = ["--max_train_samples=8", "--max_eval_samples=2", "--max_steps=1", "--disable_tqdm=true"]


def raising(error: Exception, file: str) -> Callable[[], None]:
    """A function that raises an error and seems to be written in a file."""

    def function():
        raise error

    function.__code__ = function.__code__.replace(co_filename=file)
    return function


def answer(error, file=LIBRARY, argv=("reward", "--beta=0.1"), expected=UsageError):
    with pytest.raises(expected) as raised, in_sentences(argv):
        raising(error, file)()
    return raised.value


@pytest.mark.parametrize(
    "kind",
    [
        *(ValueError, OSError, ImportError, NotImplementedError, SafetensorError),
        *(CallError, ReferenceMismatch, InfeasibleMoment),
    ],
)
def test_what_a_user_can_cause_is_a_sentence(kind, capsys):
    raised = answer(kind("Said."))
    assert (raised.code, raised.message) == (2, "Said.\n(--log_level=debug shows where)")
    assert capsys.readouterr().err == "error: Said.\n(--log_level=debug shows where)\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("beta is 0, expected more"), "--beta is 0, expected more"),
        (ValueError("gamma is 0, expected more"), "gamma is 0, expected more"),
        (ValueError("beta.json is cut"), "beta.json is cut"),
        (OSError(20, "Not a directory", "a/b"), "Not a directory: 'a/b'"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"),
            "out of memory: CUDA out of memory. Tried 2",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPUAllocator"),
        (KeyError("The `metric_for_best_model` is 'x'."), "The `metric_for_best_model` is 'x'."),
        (
            RuntimeError("Failed to import trl.x because\nNo module named 'y'"),
            "Failed to import trl.x because\nNo module",
        ),
        (ValueError(""), "ValueError"),
    ],
    ids=str,
)
def test_how_it_is_said(error, said):
    assert answer(error).message.startswith(said)


@pytest.mark.parametrize("argv", [["--log_level=debug"], ["--log-level", "debug"]])
def test_debug_shows_the_traceback_beside_the_sentence(argv, capsys):
    assert answer(ValueError("Said."), argv=["reward", *argv]).message == "Said."
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed and printed.endswith("error: Said.\n")


@pytest.mark.parametrize(
    ("error", "file", "where"),
    [
        (KeyError("x"), LIBRARY, "KeyError: 'x', in torch"),
        (RuntimeError("x"), PACKAGE, "RuntimeError: x, in __init__.py, line "),
    ],
    ids=["library", "package"],
)
def test_a_failure_of_the_package_says_what_to_report(error, file, where, capsys):
    argv = ["reward", "--hub_token=secret", "--hub_token", "secret", "--run_name=a b"]
    assert answer(error, file, argv, expected=Fault).code == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    said = printed[printed.index("error:") :]
    assert where in said and "Please report the traceback above" in said and f"torch {torch.__version__}" in said
    assert "contrastive-align reward --hub_token=... --hub_token ... '--run_name=a b'" in said and "secret" not in said


def test_a_value_error_of_the_package_that_nothing_raises_is_a_slip(capsys):
    def slips():
        return int("many")

    slips.__code__ = slips.__code__.replace(co_filename=PACKAGE)
    with pytest.raises(Fault), in_sentences([]):
        slips()
    assert "ValueError: invalid literal for int()" in capsys.readouterr().err
    assert answer(ValueError("not enough values"), PACKAGE).message.startswith("not enough values")


@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError])
def test_the_users_own_code_is_named(kind, tmp_path):
    (tmp_path / "mine.py").write_text("def reward():\n    pass\n")
    raised = answer(kind("x"), str(tmp_path / "mine.py"))
    assert raised.message.startswith("mine.py, line ") and f"raised {kind.__name__}: " in raised.message


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    def from_pretrained(pretrained_model_name_or_path, error):
        raising(error, LIBRARY)()

    def said(error):
        with pytest.raises(UsageError) as raised, in_sentences([]):
            from_pretrained("my/model", error)
        return raised.value.message

    monkeypatch.chdir(tmp_path)
    assert said(RuntimeError("sizes differ\nmuch more")).startswith("'my/model' cannot be loaded: sizes differ\n(--log")
    misspelled = (
        f"'my/model' (no such folder in {tmp_path}) cannot be loaded: No connection. Give the folder of a model"
    )
    assert said(OSError("No connection.\nmuch more")).startswith(misspelled)
    for command in (["chat", "--model=my/model"], ["merge", "my/model", "--output_dir=m"]):
        with pytest.raises(UsageError) as raised:
            cli.main(command)
        assert raised.value.message.startswith(misspelled.partition(" cannot")[0]) and "Give " in raised.value.message


def test_commands_answer_so(tmp_path, monkeypatch, capsys):
    """From the command to the sentence: in training, in a step, where options are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ContrastiveTrainer, "training_step", lambda *_: raising(KeyError("x"), LIBRARY)())
    with pytest.raises(Fault):
        cli.main(["reward", *SMALL])
    assert "command line: contrastive-align reward --max_train_samples=8" in capsys.readouterr().err
    with pytest.raises(UsageError):
        cli.main(["reward", "--learning_rate=nan", "--log_level=debug"])
    printed = capsys.readouterr().err
    assert "error: --learning_rate is nan, expected a finite number of 0 or more." in printed and "Traceback" in printed
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "generations": ["b"], "rewards": [1]}))
    with pytest.raises(SystemExit):
        cli.main(["data", "rows.jsonl", "--columns=prompt=nothing", "--log_level=debug"])
    assert capsys.readouterr().err.count("Traceback") == 1
    with pytest.raises(UsageError):
        cli.main(["steps", "train", "--input=rows.jsonl", "--output_dir=out", "--seed=-1", "--log_level=debug"])
    assert capsys.readouterr().err.count("Traceback") == 1
    step = ["score", "--input=rows.jsonl", "--output=out.jsonl", "--reward=contrastive_align.demo:reward"]
    monkeypatch.setattr(step_commands, "call_feature", raising(KeyError("x"), LIBRARY))
    with pytest.raises(Fault):
        step_commands.main(step)
    assert "command line: contrastive-align steps score --input=rows.jsonl" in capsys.readouterr().err


def test_a_four_bit_base_of_weights_that_bring_their_dtype(tiny_llama, tmp_path):
    """The published YAML has both."""
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    qlora = ["--load_in_4bit", "--use_peft", "--lora_target_modules=q_proj", "--dtype=auto"]
    summary = cli.main(["reward", f"--model_name_or_path={model}", *qlora, f"--output_dir={tmp_path}", *SMALL])
    assert summary.model["quantisation"] == "4-bit"


def test_an_exception_of_the_calling_programs_own_is_handed_on():
    class Seen(Exception):
        pass

    with pytest.raises(Seen), in_sentences([]):
        raise Seen
    Seen.__module__ = "rewards_of_an_option"  # imported by the command, not by its caller
    with pytest.raises(UsageError, match="2"), in_sentences([]):
        raise Seen
