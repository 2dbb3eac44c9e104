"""contrastive-align fdpg from the command line to summary.json and the picture."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from contrastive_align import Constraint, FDPGConfig, Target, demo
from contrastive_align.launch import cli
from contrastive_align.launch import measure as measuring
from contrastive_align.launch.arguments import parse
from contrastive_align.launch.datasets import load_prompts, repeat
from contrastive_align.launch.fdpg import FDPGArguments
from contrastive_align.launch.measure import missed_moments
from contrastive_align.launch.usage import UsageError
from contrastive_align.report import Number, distribution_rows, plot_steps


def main(argv):
    return cli.main(["fdpg", *argv])


ROOT = Path(__file__).parents[2]
SMALL = [
    "--max_train_samples=8", "--fit_samples=512", "--per_device_train_batch_size=32", "--num_generations=8",
    "--max_completion_length=32", "--eval_samples=200", "--eval_prompts=4", "--disable_tqdm=true",
]  # fmt: skip
PLEASE = "--features=[{contains: please, moment: 0.5}]"


def test_the_embedded_default(tmp_path, capsys):
    summary = main(["--max_steps=2", *SMALL, f"--output_dir={tmp_path}"])
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["method"]["divergence"] == "js" and written["model"]["name_or_path"] == demo.MODEL_PATH
    assert written["data"]["train"]["rows"] == 8 and written["training"]["steps"] == 2
    moment = written["metrics"]["moment/contains:please"]
    assert {"before", "after", "se", "n", "target", "qrs", "qrs_se"} <= moment.keys()
    assert moment["target"] == 0.5 and moment["n"] == 200 and moment["before"] < 0.3 and moment["se"] > 0
    assert moment["qrs"] > moment["before"]
    for name in ("kl_base", "kl_target", "reverse_kl_target", "js_target", "tv_target"):
        assert {"before", "after", "target", "qrs"} <= written["metrics"][name].keys()
    assert written["metrics"]["kl_base"]["before"] == 0 < written["metrics"]["kl_base"]["target"]
    columns = summary.distributions
    assert list(columns) == ["base", "target", "tuned", "tuned+QRS"]
    assert columns["tuned+QRS"]["samples"].value == 200 and 0.3 < columns["tuned+QRS"]["acceptance"].value < 0.7
    assert columns["tuned+QRS"]["KL(p||pi)"].value < columns["tuned"]["KL(p||pi)"].value
    assert columns["target"]["moment/contains:please"].value == pytest.approx(0.5, abs=0.2)
    shown = capsys.readouterr().out
    assert "the bundled demo model" in shown and "tuned+QRS" in shown and "E[contains:please] = 0.5" in shown
    assert (tmp_path / "moments_and_divergences.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "target.json").read_text())["constraints"][0]["lambda"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_own_model_one_prompt_lora_and_a_function(tiny_llama, tmp_path):
    code = tmp_path / "features.py"
    code.write_text("def short(prompts, completions, **columns):\n    return [len(c) < 40 for c in completions]\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_llama()}\nuse_peft: true\nlora_target_modules: [q_proj]\nprompt: Say.\n"
        f"features:\n  - {{function: '{code}:short', moment: 0.6, name: short}}\n  - {{contains: e, moment: 0.5}}\n"
        "max_steps: 2\ndivergence: kl\n"
    )
    out = tmp_path / "out"
    summary = main([str(config), *SMALL[1:], f"--output_dir={out}"])
    assert summary.model["peft"] and summary.method["divergence"] == "kl" and "adapter off" in summary.reference
    assert {"moment/short", "moment/contains:e"} <= summary.metrics.keys()
    assert summary.metrics["moment/short"].target == 0.6 and summary.metrics["moment/short"].prompts == 1
    AutoPeftModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_is_merged_and_described(tiny_llama, tmp_path, capsys, lora):
    base = tiny_llama()
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(tmp_path / "adapter")
    flags = ["--prompt=Say.", "--features=[{contains: e, moment: 0.5}]", "--max_steps=1", "--eval_samples=0"]
    flags += [*SMALL[1:5], f"--output_dir={tmp_path / 'out'}", *["--use_peft"] * lora]
    main([f"--model_name_or_path={tmp_path / 'adapter'}", *flags])
    start = f"{base} + adapter {tmp_path / 'adapter'}, merged into {tmp_path / 'out' / 'merged_base'}"
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["model"]["start"] == start
    assert written["reference"] == start + (", with the new adapter off" if lora else ", a frozen copy")
    assert " ".join(capsys.readouterr().out.split()).count(start) == 2  # the model and the reference


@pytest.mark.parametrize("lora", [False, True])
def test_an_encoder_decoder(tmp_path, lora):
    """Trained, measured with QRS, drawn and saved; loaded again as the summary says."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "initializer_factor": 0.5}
    config = T5Config(vocab_size=len(tokenizer), **shape, **special, decoder_start_token_id=special["pad_token_id"])
    for part in (T5ForConditionalGeneration(config), tokenizer):
        part.save_pretrained(tmp_path / "t5")
    flags = ["--use_peft=true", "--lora_r=2", "--lora_target_modules", "q", "v"] if lora else []
    one = ["--prompt=Say it.", "--max_steps=2", "--features=[{contains: e, moment: 0.6}]", "--eval_samples=1000"]
    out = tmp_path / "out"
    summary = main([f"--model_name_or_path={tmp_path / 't5'}", *SMALL[1:], *one, *flags, f"--output_dir={out}"])
    assert list(summary.distributions) == ["base", "target", "tuned", "tuned+QRS"]
    assert summary.distributions["target"]["moment/contains:e"].value == pytest.approx(0.6, abs=0.2)
    assert (out / "moments_and_divergences.png").is_file()
    package, auto, method = summary.saved["load with"].partition("(")[0].split(".")
    assert auto == ("AutoPeftModelForSeq2SeqLM" if lora else "AutoModelForSeq2SeqLM") and method == "from_pretrained"
    model = getattr(importlib.import_module(package), auto).from_pretrained(out)
    assert model.config.is_encoder_decoder and model.config.d_model == 16


def test_few_samples_are_measured_on_few_prompts(tmp_path, capsys):
    summary = main(["--max_steps=1", *SMALL, "--eval_samples=110", "--eval_prompts=4", f"--output_dir={tmp_path}"])
    assert summary.metrics["kl_target"].prompts == 2 and summary.metrics["kl_target"].n == 110
    assert "on 2 of 4 prompts" in capsys.readouterr().out and "2 held-out prompts" in summary.metrics_on
    assert summary.metrics["kl_target"].before > 0.2  # 0.41 is exact; of 1 sample a prompt it would be 0


def test_a_text_file_and_a_reward(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ask Anna to close the door.\n\nAsk Ben to feed the cat.\n")
    reward = ["--reward", "contrastive_align.demo:reward", "--beta=0.2", "--divergence=reverse_kl"]
    flags = [f"--dataset_name={prompts}", *SMALL[1:], "--max_steps=1", "--qrs_acceptance=0", f"--output_dir={tmp_path}"]
    summary = main([*reward, *flags])
    assert "base * exp(reward / 0.2)" in summary.method["line"] and summary.data["train"]["rows"] == 2
    change = summary.metrics["moment/reward"]
    assert change.target > change.before and change.qrs is None
    assert "tuned+QRS" not in summary.distributions


def test_resuming(tmp_path):
    flags = [
        *SMALL[1:],
        "--max_train_samples=16",
        "--eval_samples=0",
        "--save_strategy=steps",
        "--save_steps=1",
        "--max_steps=3",
    ]
    main([*flags, f"--output_dir={tmp_path / 'whole'}"])
    resume = f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-2'}"
    main([*flags, f"--output_dir={tmp_path / 'resumed'}", resume])
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "resumed"))
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


FEATURES = """
def raises(prompts, completions, **columns):
    return [1 / 0]
def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)
def few(prompts, completions, **columns):
    return [0.5]
def text(prompts, completions, **columns):
    return ["yes"] * len(completions)
"""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--divergenc=js"], "unknown flag '--divergenc'. Did you mean '--divergence'?"),
        (["--divergence=hinge"], "hinge"),
        (["--min_p=0.7"], "min_p"),
        ([PLEASE, "--temperature=0"], "temperature is 0"),
        ([PLEASE, "--top_k=5", "--proposal=kept"], "top_k=5 with proposal='kept'"),
        (["--prompt=Say."], "nothing to train towards"),
        ([f"--model_name_or_path={demo.MODEL_PATH}"], "nothing to train towards"),
        (["--features=[{contains: please}]"], "expected a constraint: a feature with its moment"),
        (["--features=[{containz: please, moment: 0.5}]"], "expected exactly one of"),
        (["--features=[{contains: please, moment: 0.5, whole: 1}]"], "unknown key 'whole'"),
        (["--features={contains: please, moment: 0.5}"], "expected a list"),
        ([PLEASE, "--reward=a.py:f"], "both features and reward"),
        ([PLEASE, "--beta=0.1"], "--beta belongs to --reward,"),
        ([PLEASE, "--prompt=a", "--dataset_name=b"], "both a prompt and a dataset"),
        ([PLEASE, "--dataset_name=./nothing.txt"], "no file 'nothing.txt'"),
        ([PLEASE, "--qrs_acceptance=2"], "qrs_acceptance is 2.0"),
        (["--reward_funcs=contrastive_align.demo:rewrd"], "no function 'rewrd'"),
        (["--reward_funcs=no_such_module:f"], "could not be imported, which raised ModuleNotFoundError"),
        (["--features=[{function: 'broken.py:f', moment: 0.5}]"], "could not be imported, which raised SyntaxError"),
        (["--features=[{contains: please, moment: half}]"], "'half', expected a finite number"),
        (["--features=[{contains: zebra, moment: 1.0}]"], "Z = 0"),
        ([PLEASE.replace("}", "}, {contains: please, moment: 0.4}")], "Two constraints are called"),
        ([PLEASE, "--divergence=jsd"], "Unknown divergence 'jsd'. Known: kl"),
        ([PLEASE, "--dataset_name=latin.txt"], "latin.txt is not UTF-8"),
        ([PLEASE, "--dataset_name=empty.txt"], "empty.txt has no rows"),
        ([PLEASE, "--dataset_name=long.txt"], "No prompt of train_dataset is short enough"),
        ([PLEASE, "--model_name_or_path=./nothing"], "No folder './nothing'"),
        ([PLEASE, "--output_dir=features.py"], "'features.py' is a file"),
        ([PLEASE, "--eval_samples=20"], "eval_samples is 20, expected at least 50"),
        (["--features=[{contains: please, moment: 1.5}]"], "'contains:please' is 1.5, expected 0 to 1"),
        (["--features=[{contains: zebra, moment: 0.5}]"], "contains:zebra"),
        (["--features=[{function: 'features.py:raises', moment: 0.5}]"], "raised ZeroDivisionError"),
        (["--features=[{function: 'features.py:nan', moment: 0.5}]"], "expected a finite number"),
        (["--features=[{function: 'features.py:few', moment: 0.5}]"], "returned 1 values"),
        (["--features=[{function: 'features.py:text', moment: 0.5}]"], "is 'yes' (str), expected a number"),
    ],
)
def test_wrong_input_is_a_message_and_exit_2(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("features.py").write_text(FEATURES)
    Path("broken.py").write_text("def f(:\n")
    Path("latin.txt").write_bytes("Un café.\n".encode("latin-1"))
    Path("empty.txt").write_text("\n")
    Path("long.txt").write_text("word " * 600)
    with pytest.raises(UsageError) as error:
        main([*SMALL, "--output_dir=out", *flags])
    assert error.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("out/summary.json").exists()


def test_prompts(tmp_path):
    def load(rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        flags = [f"--dataset_name={file}"]
        return load_prompts(parse(flags, prog="test", script=FDPGArguments, training=FDPGConfig))[0]

    rows = load([{"prompt": "a", "completions": ["b", "c"], "scores": [1, 0], "topic": "x"}])
    assert rows.column_names == ["prompt", "topic"]
    assert len(repeat(rows, 3)) == 3 and len(repeat(rows, 1)) == 1
    chat = [{"role": "user", "content": "a"}]
    assert load([{"prompt": chat}])[0]["prompt"] == chat
    for bad, said in [
        ({"text": "a"}, "no 'prompt'"),
        ({"prompt": [*chat, {"role": "assistant", "content": "b"}]}, "row 0"),
    ]:
        with pytest.raises(UsageError) as error:
            load([bad])
        assert said in error.value.message


def test_the_picture_draws_what_was_logged(tmp_path):
    log = [{"step": s, "kl_base": 0.1 * s, "kl_target": 1 / s, "moment/x": 0.1 * s} for s in (1, 2, 3)]
    log[0]["reverse_kl_target"] = float("inf")
    for wanted in ({"x": 0.5}, {"x": None}):
        svg = plot_steps([*log, {"train_runtime": 1.0}], wanted, tmp_path / "a" / "steps.svg").read_text()
        for text, shown in {
            "wanted: 0.5": wanted["x"], "the same under the target": not wanted["x"], "KL(pi || p): infinite": True,
            "nats": True, "KL(p || pi)": True,
        }.items():  # fmt: skip
            assert (f"<!-- {text} -->" in svg) == bool(shown), text
    with pytest.raises(ValueError, match="logging_steps"):
        plot_steps([{"train_runtime": 1.0}], {"x": 0.5}, tmp_path / "none.png")


def test_the_table_leaves_empty_what_was_not_measured():
    rows = distribution_rows({"tuned": {"x": Number(1.0), "y": Number(float("nan"))}, "base": {"x": Number(0.5, 0.1)}})
    assert rows == [("", "base", "tuned"), ("x", "0.5000 +- 0.1000", "1.0000"), ("y", "", "-")]
    assert [str(Number(-1e-9, 0.0)), str(Number(float("inf"), float("nan")))] == ["0.0000 +- 0.0000", "inf"]


def test_as_a_user_starts_it(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_fdpg.py"), "--max_steps=1", "--qrs_acceptance=0", *SMALL],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "fdpg" / "summary.json").is_file()
    assert "moment/contains:please" in done.stdout


def test_qrs_takes_the_acceptance_that_there_is_and_meets_a_pointwise_constraint(tmp_path, capsys):
    always = "--features=[{contains: please, moment: 1.0, pointwise: true}]"
    flags = ["--max_steps=1", "--fit_samples=256", "--max_completion_length=16", "--eval_samples=200"]
    summary = main([*SMALL, *flags, always, f"--output_dir={tmp_path}"])
    qrs = summary.distributions["tuned+QRS"]
    assert qrs["moment/contains:please"].value == 1 and 0.05 < qrs["acceptance"].value < 0.3
    assert abs(qrs["KL(p||pi)"].value) < 0.05 and qrs["TV"].value < 0.1 and qrs["beta"].value > 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"QRS accepts {qrs['acceptance']} and not the wished 0.5" in said  # as the table has it


def test_a_rare_constraint_costs_qrs_no_more_than_a_multiple_of_the_other_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "FIRST_REPORT", 0.0)
    code = tmp_path / "features.py"
    body = "return ['please' in c and len(c) % 5 == 0 for c in completions]"
    code.write_text(f"def rare(completions, **columns):\n    {body}\n")
    rare = f"--features=[{{function: '{code}:rare', moment: 1.0, pointwise: true}}]"
    flags = ["--max_steps=1", "--fit_samples=512", "--max_completion_length=16", "--eval_samples=400"]
    summary = main([*SMALL, *flags, rare, "--eval_prompts=4", f"--output_dir={tmp_path / 'out'}"])
    qrs, said = summary.distributions["tuned+QRS"], " ".join(capsys.readouterr().out.split())
    assert qrs["acceptance"].value < 0.05 and 0 < qrs["samples"].value < 400
    qrs_proposals = int(re.findall(r"Measuring QRS: ([\d,]+) of at most", said)[-1].replace(",", ""))
    assert qrs_proposals <= 10 * 400
    assert f"QRS accepts {qrs['acceptance']} and not the wished 0.5" in said
    assert re.search(r"QRS stopped at 1000 proposals a prompt: \d of \d prompts have fewer than 100 accepted", said)
    assert f"{qrs['samples']} of " in said and "beta 0.0000" not in said


def test_a_small_beta_has_significant_digits():
    assert [str(measuring.Significant(beta)) for beta in (3.2e-5, 0.012345, 1.5)] == ["3.2e-05", "0.01235", "1.5"]


def test_a_target_that_misses_its_moment_where_it_is_measured_is_named():
    target = Target([Constraint({"contains": "please"}, 0.5), Constraint({"length": "words"}, 4.0)])
    state = target.state_dict()
    state["fit"] = {"moment_se": {"contains:please": 0.02}}
    target.load_state_dict(state)
    measured = {"moment/contains:please": Number(0.56, 0.01), "moment/length:words": Number(4.2, 0.1)}
    assert missed_moments(measured, target) == []  # both errors count
    measured["moment/contains:please"] = Number(0.57, 0.0)
    (line,) = missed_moments(measured, target)
    assert "misses the moment of contains:please: 0.5700 +- 0.0200 where it was measured, 0.5 wanted" in line
    reward = Target.from_reward({"length": "words"}, 1.0)
    assert missed_moments({"moment/length:words": Number(9.0, 0.1)}, reward) == []
