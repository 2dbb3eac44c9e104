"""contrastive-align conditional from the command line to summary.json, the pictures and --best."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from judge_server import JudgeServer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from contrastive_align import ConditionalTrainer, demo
from contrastive_align.conditions import Condition, resolve_condition
from contrastive_align.launch import cli
from contrastive_align.launch.conditional_measure import words_on
from contrastive_align.launch.feedback_flags import build_judge
from contrastive_align.launch.usage import UsageError
from contrastive_align.report import Change, plot_rewards, plot_round
from contrastive_align.trainers.processes import Stopped


def main(argv):
    return cli.main(["conditional", *argv])


ROOT = Path(__file__).parents[2]
TRAINING = [
    "--per_device_train_batch_size=16",
    "--draws_per_round=32",
    "--max_completion_length=24",
    "--disable_tqdm=true",
]
SMALL = [*TRAINING, "--num_generations=5", "--prompts_per_round=4", "--num_train_epochs=2", "--eval_prompts=3"]
REWARD = "--reward=contrastive_align.demo:reward"
TOKENS = [f"<quantile_{i}>" for i in range(5)]


def written(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_embedded_default(tmp_path, capsys, monkeypatch):
    main([*SMALL, f"--output_dir={tmp_path}"])
    found = written(tmp_path)
    assert found["model"]["name_or_path"] == demo.MODEL_PATH and found["method"]["online"]
    assert found["method"]["condition"]["kind"] == "quantile_tokens" and found["training"]["steps"] == 4
    assert found["data"]["train"]["rows"] == 1200 and found["data"]["test"]["rows"] == 200
    assert set(found["metrics"]) == {"mean_reward", *(f"reward_given/{c}" for c in [*TOKENS, "nothing"])}
    best, nothing = found["metrics"]["mean_reward"], found["metrics"]["reward_given/nothing"]
    assert best == found["metrics"]["reward_given/<quantile_0>"] != found["metrics"]["reward_given/<quantile_4>"]
    assert best["before"] == nothing["before"] and best["n"] == 3 and best["se"] > 0
    assert found["metrics_on"].startswith("3 held-out prompts, 5 samples each")
    assert [r["round/number"] for r in found["training"]["rounds"]] == [1, 2]
    assert [r["round/samples"] for r in found["training"]["rounds"]] == [20, 20]
    shown = " ".join(capsys.readouterr().out.split())  # long lines are wrapped
    assert "quantile_tokens by reward, KL 0.05 (reverse), entropy 0.06; 2 rounds of 4 prompts x 5 samples" in shown
    assert "reward_given/<quantile_4>" in shown and "the reward given the best condition" in shown
    for picture in ("rewards.png", "rounds/round-001.png", "rounds/round-002.png"):
        assert (tmp_path / picture).stat().st_size > 5_000
    AutoModelForCausalLM.from_pretrained(tmp_path)

    earlier = [*SMALL, f"--output_dir={tmp_path}"]
    with pytest.raises(UsageError) as error:  # an output_dir of one's own keeps its samples
        main(earlier)
    assert "has the samples of an earlier run (rounds [1, 2])" in error.value.message
    assert written(tmp_path) == found
    main([*earlier, "--resume_from_checkpoint=true"])  # no checkpoint: trained anew, on the samples that are there
    again = written(tmp_path)
    assert again["training"]["rounds"][1]["round/mean_reward"] == found["training"]["rounds"][1]["round/mean_reward"]
    assert again["metrics"] == found["metrics"]

    capsys.readouterr()
    ask = [f"--model_name_or_path={tmp_path}", "--best=Ask Ben to feed the cat.\n", "--num_generations=3"]
    samples = main(ask)
    shown = capsys.readouterr().out
    assert r"asked    '<quantile_0>Ask Ben to feed the cat.\n'" in shown and shown.count("sampled  ") == 3
    assert len(set(samples)) > 1 and not any(token in text for text in samples for token in TOKENS)
    ask[1] = ask[1].replace("--best", "--prompt")
    assert samples == cli.main(["ask", *ask])


def test_the_default_folder_is_replaced_without_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL[:-2], "--num_train_epochs=1", "--eval_prompts=0"]
    main(flags)
    (tmp_path / "runs/conditional/pool/note").touch()
    main(flags)
    pool = tmp_path / "runs/conditional/pool"
    assert sorted(p.name for p in pool.iterdir()) == ["prompts.json", "round-00001.arrow"]
    assert written(tmp_path / "runs/conditional")["metrics"] == {}


def test_before_is_the_start_given_nothing(tmp_path):
    flags = ["--condition=phrases", "--learning_rate=0", *SMALL[:-2], "--num_train_epochs=1", "--eval_prompts=3"]
    summary = main([*flags, f"--output_dir={tmp_path}"])
    nothing, best = summary.metrics["reward_given/nothing"], summary.metrics["mean_reward"]
    assert (nothing.after, nothing.se) == (nothing.before, 0) and best.before == nothing.before != best.after


def test_lora_with_tokens_a_function_and_a_text_file(tmp_path, capsys):
    code = tmp_path / "rewards.py"
    code.write_text("def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ask Anna to close the door.\n\nAsk Ben to feed the cat.\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"use_peft: true\nlora_target_modules: [q_proj]\ndataset_name: {prompts}\nreward: '{code}:short'\n"
        "condition: {kind: quantile_tokens, quantiles: 2}\nkl_direction: forward\n"
    )
    out = tmp_path / "out"
    summary = main([str(config), *TRAINING, "--num_generations=4", "--num_train_epochs=1", f"--output_dir={out}"])
    assert summary.model["peft"] and "adapter off" in summary.reference and summary.method["kl_direction"] == "forward"
    assert summary.data["train"]["rows"] == 2 and summary.metrics_on.startswith("2 training prompts")
    assert list(summary.metrics) == [
        "mean_reward", "reward_given/<quantile_0>", "reward_given/<quantile_1>", "reward_given/nothing"
    ]  # fmt: skip
    assert Condition.load(out).apply_best("Say.") == "<quantile_0>Say."
    assert (out / "adapter_model.safetensors").is_file()
    (said,) = main([f"--model_name_or_path={out}", "--best=Ask Anna to close the door."])
    assert "'<quantile_0>Ask Anna to close the door.'" in capsys.readouterr().out and said


@pytest.mark.parametrize("kl", [False, True])
def test_an_adapter_is_merged_and_described(tmp_path, capsys, kl):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    flags = ["--score_column=scores", "--max_train_samples=20", *TRAINING, "--num_train_epochs=1", "--eval_prompts=1"]
    flags += [
        "--condition={kind: phrases, per_prompt: false}",
        f"--kl_coef={0.1 * kl}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    main([f"--model_name_or_path={tmp_path / 'adapter'}", "--max_steps=1", *flags])
    merged = f" + adapter {tmp_path / 'adapter'}, merged into {tmp_path / 'out' / 'merged_base'}"
    start = demo.MODEL_PATH + merged
    found, shown = written(tmp_path / "out"), " ".join(capsys.readouterr().out.split())
    assert found["model"]["start"] == start and f"{start} (" in shown
    assert found["reference"] == (f"{start}, a frozen copy" if kl else "none (kl_coef=0)")
    assert found["reference"] in shown


def test_scored_completions_of_the_demo_are_measured_by_its_reward(tmp_path):
    flags = ["--score_column=scores", "--max_train_samples=20", *TRAINING, "--num_train_epochs=1"]
    summary = main([*flags, "--num_generations=2", "--eval_prompts=3", f"--output_dir={tmp_path}"])
    assert not summary.method["online"] and summary.method["condition"]["per_prompt"] is False
    assert set(summary.metrics) == {"mean_reward", *(f"reward_given/{c}" for c in [*TOKENS, "nothing"])}
    assert summary.data["train"]["completions"] > 40 and "passes over" in summary.method["line"]


def test_rows_to_measure_on_are_whole_prompts(tmp_path):
    rows = [{"prompt": f"Ask {n}.\n", "completion": f"{n} {i}", "score": i} for i in range(5) for n in "abc"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--dataset_name={file}", "--num_train_epochs=1", "--eval_prompts=2", *TRAINING]
    summary = main([*flags, f"--output_dir={tmp_path / 'out'}"])
    assert summary.metrics_on.startswith("10 training rows;") and "nll/<quantile_4>" in summary.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_signal_ends_the_run_after_the_step(number, saving, tmp_path, capsys):
    code = tmp_path / "rewards.py"
    code.write_text(
        "import os\ndef stopped(prompts, completions, **columns):\n"
        f"    os.kill(os.getpid(), {int(number)})\n    return [float(len(c)) for c in completions]\n"
    )
    flags = [*SMALL[:-2], "--num_train_epochs=2", "--eval_prompts=0", "--report_prompts=0", f"--reward={code}:stopped"]
    flags += [f"--output_dir={tmp_path / 'out'}", f"--save_strategy={saving}", "--save_steps=1000"]
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        main(flags)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    said = capsys.readouterr().out
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert said.count("Stopped by") == 1 and f"Stopped by {by}. The samples of round 1 are in {tmp_path}" in said
    if saving == "no":
        assert said.rstrip().endswith("No checkpoints are kept (--save_strategy=no): the same command begins anew.")
    else:
        assert "checkpoint-1 is whole, and the same command with --resume_from_checkpoint=true goes on" in said
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"] * (saving == "steps")


def test_a_signal_in_the_last_step_ends_the_run_once_the_model_is_saved(tmp_path, capsys, monkeypatch):
    def step(self, *args, _of=ConditionalTrainer.training_step, **kwargs):
        if self.state.global_step == self.state.max_steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return _of(self, *args, **kwargs)

    monkeypatch.setattr(ConditionalTrainer, "training_step", step)
    with pytest.raises(Stopped):
        main(
            [*SMALL[:-2], "--num_train_epochs=1", "--eval_prompts=0", f"--output_dir={tmp_path}", "--save_strategy=no"]
        )
    said = capsys.readouterr().out
    assert f"Stopped by SIGTERM: the trained model is in {tmp_path}; it was not measured to the end." in said
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "summary.json").exists()


def test_nothing_to_go_on_with_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("contrastive_align"), "propagate", True)
    flags = [
        *SMALL[:-2],
        "--num_train_epochs=1",
        "--eval_prompts=0",
        f"--output_dir={tmp_path}",
        "--save_strategy=epoch",
    ]
    (tmp_path / "checkpoint-1").mkdir()  # was not written to its end
    main([*flags, "--resume_from_checkpoint=true"])
    said = f"{tmp_path} holds no checkpoint that is whole: training begins anew."
    assert said in caplog.messages
    caplog.clear()
    main([*flags, "--resume_from_checkpoint=true"])
    assert said not in caplog.messages


def test_scored_completions_where_less_is_better(tmp_path):
    rows = [{"prompt": f"Ask {n}.", "response": f"{n} {i}", "toxicity": i / 10} for n in "ab" for i in range(5)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--dataset_name={file}", "--score_column=toxicity", "--negate_score", "--num_train_epochs=1", *TRAINING]
    condition = "--condition={kind: phrases, phrases: toxicity, per_prompt: false}"
    summary = main([*flags, condition, f"--output_dir={tmp_path / 'out'}"])
    (round_,) = summary.training["rounds"]
    assert round_["round/reward/Lowest Toxicity"] == 0
    assert round_["round/reward/Maximum Toxicity"] == pytest.approx(-0.4)
    assert "nll/Lowest Toxicity_given/Maximum Toxicity" in summary.metrics and "likelihood" in summary.metrics_on


def test_a_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    answers = ["Harmless and very helpful", "Harmful"]
    with JudgeServer(lambda text: json.dumps({"category": answers["now" in text]})) as server:
        judge = f"--judge={{model: local, base_url: '{server.url}', concurrency: 4}}"
        flags = ["--condition=categories", *SMALL[:-1], "--eval_prompts=2", f"--output_dir={tmp_path}"]
        summary = main([judge, *flags])
    assert summary.method["judge"]["answers"][0] == answers[0] and summary.training["judge"]["answered"] > 40
    assert "reward_given/Harmless and very helpful" in summary.metrics
    assert (tmp_path / "judge").is_dir() and "measuring on 2 prompts asks the judge" in capsys.readouterr().out


SCORED, POOLED = "--dataset_name=scored.jsonl", ["--condition={kind: phrases, per_prompt: false}"]
CODE = """
def raises(prompts, completions, **columns):
    return [1 / 0]
"""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--conditon=phrases"], "unknown flag '--conditon'. Did you mean '--condition'?"),
        (["--condition=phrase"], "The condition's kind is 'phrase', expected one of"),
        (["--condition={kind: phrases, form: '{prompt}'}"], "{condition}"),
        (["--condition={kind: phrases"], "which is not YAML"),
        (["--kl_direction=sideways"], "kl_direction"),
        (["--prompt=Say."], "nothing says how good a completion is"),
        (["--dataset_name=prompts.txt"], "nothing says how good a completion is"),
        (["--dataset_name=rows.jsonl"], "Expected 'prompt' and 'completion' with 'score' or 'feedback'"),
        (
            ["--dataset_name=rows.jsonl", "--score_column=points"],
            "score_column is 'points', and the columns are 'prompt' (text), 'comp",
        ),
        (["--dataset_name=rows.jsonl", "--negate_score"], "the data has no scores"),
        (["--prompt=a", "--dataset_name=b", REWARD], "both a prompt and a dataset"),
        ([REWARD, "--judge={model: a}"], "both reward and judge"),
        ([REWARD, "--score_column=scores"], "score_column is of completions that are there"),
        ([REWARD, "--eval_reward=contrastive_align.demo:reward"], "eval_reward is for scored completions"),
        ([REWARD, "--condition=categories"], "The condition 'categories' is made of words"),
        (["--reward=contrastive_align.demo:rewrd"], "no function 'rewrd'"),
        (["--reward=rewards.py:raises", "--eval_prompts=1"], "raised ZeroDivisionError"),
        (["--judge={model: a}", "--condition=attributes"], "needs numbers that a judge does not give"),
        (["--judge={model: a, answers: text}", "--condition=categories"], "The judge answers 'text'"),
        (["--judge={modl: a}"], "judge: unknown key 'modl'"),
        (["--judge=gpt"], "judge is 'gpt', expected a mapping"),
        (["--sampler={base_url: 'http://127.0.0.1:1/v1'}"], "expected a mapping with base_url and model"),
        (["--sampler={base_url: 'http://127.0.0.1:1/v1', model: a}"], "Train LoRA (peft_config)"),
        (["--score_column=scores", "--drop_factor=1"], "--drop_factor belongs to sampling"),
        (["--num_generations=4"], "num_generations is 4, expected at least 5"),
        ([*POOLED, "--prompts_per_round=2", "--num_generations=2"], "2 prompts x num_generations 2 = 4 completions"),
        (["--num_train_epochs=1.5"], "num_train_epochs is 1.5, expected a whole number of rounds"),
        (["--reward=rewards.py"], "found 'rewards.py', a Python file. Name the function"),
        (["--reward={sum: [[1, {classifier: ./none, label: bad}]]}"], "classifier: there is no folder './none'"),
        (["--reward={not: {reward_model: empty}}"], "No reward model 'empty'"),
        (["--judge={model: a}", "--condition=categories"], "No key for the judge"),
        (["--model_name_or_path=prompts.txt"], "'prompts.txt' is a file, expected a folder"),
        (["--model_name_or_path=empty"], "'empty' holds no model: neither config.json"),
        (
            ["--dataset_name=prompts.txt", REWARD, "--dataset_streaming"],
            "belongs to a data set with splits, and prompts.txt",
        ),
        (["--dataset_name=prompts.txt", REWARD, "--eval_strategy=epoch"], "--eval_strategy=epoch is given, but there"),
        ([SCORED, "--score_column=completion"], "No answers were found of which 'completion' is the score"),
        (
            [SCORED, "--condition=categories"],
            "'completion', 'none', 'prompt', 'score']. Name the one that has it, --feedback_column=NAME",
        ),
        (
            [SCORED, "--condition={kind: attributes, attributes: {harm: 0}}"],
            "no column for ['harm'], only ['comp",
        ),
        ([SCORED, "--score_column=none"], "None of the 10 completions has a score, from which"),
        ([SCORED, *POOLED, "--eval_prompts=3"], "The 3 completions to evaluate on cannot be sorted"),
        (["--eval_prompts=-1"], "eval_prompts is -1"),
        (["--best=Hello"], "a trained model is asked: give its folder"),
        (["--best=Hello", f"--model_name_or_path={demo.MODEL_PATH}", "--kl_coef=0"], "--kl_coef means nothing here"),
        (["--best=Hello", "--model_name_or_path=saved"], "'saved' holds no model"),
        (["--best=Hello", "--model_name_or_path=moved"], "No folder '/of/old'"),
    ],
)
def test_wrong_input_is_a_message_and_exit_2(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(CODE)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("prompts.txt").write_text("Say.\n")
    for folder in ("empty", "saved", "moved"):
        Path(folder).mkdir()
    for folder in ("saved", "moved"):
        resolve_condition("phrases").save(folder)
    Path("moved/adapter_config.json").write_text('{"base_model_name_or_path": "/of/old"}')
    scored = [{"prompt": "Say.\n", "completion": "No.", "score": i, "none": None} for i in range(10)]
    Path("scored.jsonl").write_text("\n".join(map(json.dumps, scored)))
    Path("rows.jsonl").write_text('{"prompt": "Say.", "completion": "No."}\n')
    given = {flag.partition("=")[0] for flag in flags}
    more = [] if "--best" in given else [flag for flag in TRAINING if flag.partition("=")[0] not in given]
    with pytest.raises(UsageError) as error:
        main([*flags, *more])
    assert error.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("runs/conditional/summary.json").exists()


def test_a_judge_is_asked_for_what_the_condition_needs(tmp_path):
    words = build_judge({"model": "a"}, resolve_condition("text"), str(tmp_path)).spec
    assert (words["answers"], words["prompt"], words["cache"]) == ("text", "feedback", str(tmp_path / "judge"))
    own = resolve_condition({"kind": "categories", "categories": ["Yes", "No"]})
    assert build_judge({"model": "a"}, own, str(tmp_path)).spec["answers"] == ["Yes", "No"]


def test_words_say_when_the_order_is_wrong():
    change, wrong = Change(0.5, 0.3, 0.01, 50), "from best to worst it does NOT always fall."
    for values in ([[0.2, 0.4], [0.3, 0.4]], [[0.5, 0.4], [0.1, 0.1], [0.3, 0.4]]):
        given = {f"{i}": np.array(pair) for i, pair in enumerate(values)}
        said = words_on(given, change, held_out=True)
        assert said.startswith("In words, with 95% intervals: the reward given the best condition fell by 0.2000")
        assert said.endswith(wrong)
    assert "on training data alone" in words_on(given, change, held_out=False)


def test_the_picture_needs_scores(tmp_path):
    with pytest.raises(ValueError, match="No round has scores"):
        plot_rewards([{"round/number": 1}], {}, tmp_path / "a.png")
    path = plot_rewards([{"round/number": 1, "round/mean_reward": 0.5}], {}, tmp_path / "b" / "a.svg")
    assert path.read_text().startswith("<?xml")


def test_the_picture_of_a_round_shows_whole_names_and_few_of_many(tmp_path):
    names = [f"helpfulness:{i},correctness:{i}" for i in range(25)]
    label, length = np.repeat(np.arange(25, dtype=np.int32), 2), np.arange(50)
    none = np.full(50, np.nan)
    shown = plot_round(label, none, length, names=names, path=tmp_path / "a.svg", title="All").read_text()
    assert "(13 in the middle are not shown)" in shown and "reward" not in shown  # SVG has each text in a comment
    assert "helpfulness:24," in shown and "correctness:24" in shown and "correctness:6 " not in shown
    few = plot_round(label[:4], length[:4] / 3, length[:4], names=names, path=tmp_path / "b.svg").read_text()
    assert "reward (line: mean)" in few and "not shown" not in few
    given = {"Harmless and not helpful": (0.5, 0.1)}
    text = plot_rewards([{"round/number": 1, "round/mean_reward": 0.5}], given, tmp_path / "c.svg").read_text()
    assert "Harmless and not" in text and "helpful -->" in text


def test_as_a_user_starts_it(tmp_path):
    flags = ["--num_train_epochs=1", "--num_generations=5", "--prompts_per_round=4", "--eval_prompts=0", *TRAINING]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_conditional.py"), *flags],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "conditional" / "summary.json").is_file()
    assert "conditional training" in done.stdout
