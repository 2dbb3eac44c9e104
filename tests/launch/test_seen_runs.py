"""A run can be seen: its console is short, its page is there, preflight stops before the first step."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrastive_align import demo
from contrastive_align.data.published import published_copy
from contrastive_align.launch import cli
from contrastive_align.launch.common import command_line
from contrastive_align.launch.merge import origin, proof_rows
from contrastive_align.launch.record import MovedGroups, Recorder
from contrastive_align.models.loading import hash_of_adapter
from contrastive_align.report.history import read_history
from contrastive_align.trainers.engines import HoldsWeights


FEW = ["--max_train_samples=32", "--max_eval_samples=8", "--max_steps=4", "--logging_steps=1", "--report_prompts=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run in a process of its own, with its console."""
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = [*FEW, "--use_peft", "--lora_target_modules=all-linear", "--eval_strategy=steps", "--eval_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_align", "reward", *flags, f"--output_dir={folder}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return folder, done.stdout + done.stderr


def test_the_console_is_quiet(run):
    lines = run[1].splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120 + len(str(run[0]))
    assert "Warning" not in run[1] and "warn" not in run[1] and "{'loss'" not in run[1]
    for said in ("policy = reference", "closed form", "step 1/4", "left", "(learning_rate_low)", "look at"):
        assert said in run[1], said


def test_the_run_leaves_log_samples_and_page(run):
    folder, _ = run
    summary, history = json.loads((folder / "summary.json").read_text()), read_history(folder)
    assert history["loss"].n == 4 and history["eval_loss"].n == 3 and history["samples/length"].n == 3
    samples = json.loads((folder / "samples.json").read_text())
    assert [stage["name"] for stage in samples["stages"]] == ["before", "step 2", "after"]
    assert len(samples["prompts"]) == 4 and all(isinstance(r, float) for r in samples["stages"][0]["rewards"])
    assert set(samples["moved"]) == {"Most improved", "Least improved, or worse"}
    page = (folder / "report.html").read_text()
    for said in ("Verdict", "Before and after", "Implied rewards by rank", "Most improved", "contrastive-align reward"):
        assert said in page, said
    assert summary["samples"]["length"]["n"] == 4 and summary["verdict"] and summary["preflight"]["sample"]


def test_the_card_has_results_in_its_head(run):
    data = ModelCard.load(run[0] / "README.md").data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["loss"] == json.loads((run[0] / "summary.json").read_text())["metrics"]["loss"]["after"]
    assert data.to_dict()["model-index"][0]["name"] == "out"


def test_what_is_published_names_no_place(run):
    copy = published_copy(run[0])
    assert str(run[0].parent) in (run[0] / "report.html").read_text()
    assert str(run[0].parent) not in (copy / "report.html").read_text()


def test_merge_proves_itself_and_reloads(run, tmp_path, capsys):
    lineage = cli.main(["merge", str(run[0]), f"--output_dir={tmp_path / 'whole'}"])
    assert lineage["parity"]["max_nats_per_token"] < 1e-5 and lineage["parity"]["tokens"] > 50
    assert lineage["parity"]["computed_in"] == "float64"
    assert json.loads((tmp_path / "whole" / "lineage.json").read_text()) == lineage
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert "AutoModelForCausalLM.from_pretrained" in card.text and "Peft" not in card.text
    assert card.data.library_name == "transformers" and card.data.eval_results
    said = " ".join(capsys.readouterr().out.split())
    assert "on average" in said and "(computed in float64)" in said
    with pytest.raises(SystemExit):
        cli.main(["merge", str(run[0]), f"--output_dir={tmp_path / 'whole'}"])


def test_a_merge_is_compared_in_float32_where_memory_does_not_hold_the_weights_twice(run, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    lineage = cli.main(["merge", str(run[0]), f"--output_dir={tmp_path / 'whole'}"])
    assert lineage["parity"]["computed_in"] == "float32" and lineage["parity"]["max_nats_per_token"] < 1e-4


@pytest.mark.parametrize(
    ("flags", "dtype", "most", "said"),
    [
        (["--dtype=bfloat16"], "bfloat16", 0.03, "(bfloat16 rounds the merged weights; --dtype=float32 does not)"),
        (["--load_in_4bit", "--dtype=float32"], "float32", 0.03, "the base computed in 4 bits"),
    ],
)
def test_what_a_merge_moves_in_fewer_bits_is_said(run, tmp_path, capsys, flags, dtype, most, said):
    lineage = cli.main(["merge", str(run[0]), f"--output_dir={tmp_path / 'whole'}", *flags])
    assert said in " ".join(capsys.readouterr().out.split())
    assert lineage["dtype"] == dtype and 0 < lineage["parity"]["mean_nats_per_token"] < most
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert str(whole.dtype) == f"torch.{dtype}" and not hasattr(whole.config, "quantization_config")


def test_a_merge_is_proven_on_bundled_sentences_where_the_run_sampled_nothing(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    (tmp_path / "samples.json").write_text(json.dumps({"prompts": [], "stages": []}))
    assert len(proof_rows(str(tmp_path), None, tokenizer)) > 10
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "generations": [""]}) + "\n")
    with pytest.raises(SystemExit):
        proof_rows(str(tmp_path), str(file), tokenizer)
    assert "--rows: " in (said := capsys.readouterr().err) and "no generation with a token" in said


def test_a_seed_of_answers_in_the_formats_of_evaluations(run, tmp_path, capsys):
    questions = [
        {
            "question_id": 1,
            "category": "math",
            "turns": ["Ask Grace to mow the lawn.\n", "Ask Paul to print the map.\n"],
        },
        {
            "question_id": 2,
            "category": "stem",
            "turns": ["Ask Zoe to set the table.\n", "Tell Emma to buy the milk.\n"],
        },
    ]
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    flags = [f"--model={run[0]}", f"--prompts={file}", "--max_completion_length=8"]
    cli.main(["sample", *flags, "--format=mt_bench", f"--output={out}"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [1, 2] and len({row["answer_id"] for row in rows}) == 2
    assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)
    again = cli.main(["sample", *flags, "--format=mt_bench"])
    assert again[0]["choices"] == rows[0]["choices"]  # greedy, and seeded
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "Ask Zoe to set the table.\n", "dataset": "koala"}])
    )
    argv = [f"--model={run[0]}", f"--prompts={tmp_path / 'alpaca.json'}", "--max_completion_length=8"]
    cli.main(["sample", *argv, "--format=alpaca_eval", f"--output={tmp_path / 'o.json'}", "--generator=mine"])
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert row["generator"] == "mine" and row["dataset"] == "koala" and isinstance(row["output"], str)
    cli.main(["sample", *argv, f"--compare={demo.MODEL_PATH}"])
    assert " | " in capsys.readouterr().out


def test_chat_shows_before_and_after(run, monkeypatch, capsys):
    said = iter(["Ask Grace to mow the lawn.", "/reset", "", "Ask Zoe to set the table."])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said, "/quit"))
    assert cli.main(["chat", f"--model={run[0]}", "--max_completion_length=8"]) == 2
    assert capsys.readouterr().out.count("before") == 2


@pytest.mark.parametrize("command", ["reward", "fdpg", "conditional"])
def test_preflight_stops_before_the_first_step(command, tmp_path, capsys):
    small = ["--max_train_samples=8", "--report_prompts=2"]
    small += [] if command == "reward" else ["--per_device_train_batch_size=8", "--max_completion_length=8"]
    small += ["--num_generations=4"] if command == "fdpg" else []
    small += (
        ["--prompts_per_round=4", "--num_generations=5", "--draws_per_round=16"] if command == "conditional" else []
    )
    summary = cli.main([command, *small, "--preflight_only", f"--output_dir={tmp_path / 'out'}"])
    assert not summary.training and not (tmp_path / "out" / "summary.json").exists()
    assert {"first step", "memory", "checks", "sample"} <= set(summary.preflight)
    assert "policy = reference" in capsys.readouterr().out


def test_preflight_changes_no_file_of_an_earlier_run(tmp_path, capsys):
    argv = ["reward", *FEW, f"--output_dir={tmp_path}"]
    cli.main(argv)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    cli.main([*argv, "--preflight_only"])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files
    assert "replaces" not in capsys.readouterr().out


def test_under_an_engine_the_start_is_sampled_once_it_has_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HoldsWeights, "uses_engine", True)
    argv = ["reward", *FEW, "--save_strategy=steps", "--save_steps=2", f"--output_dir={tmp_path}"]
    preflight = cli.main(argv).preflight
    said = capsys.readouterr().out
    assert said.index("first step ") < said.index("start   policy = reference") < said.index("step 1/4")
    assert preflight["start"] in said and preflight["sample"] in said
    first = json.loads((tmp_path / "samples.json").read_text())["stages"]
    (tmp_path / "checkpoint-4").rename(tmp_path / "later")
    summary = cli.main([*argv, "--resume_from_checkpoint=true"])
    again = json.loads((tmp_path / "samples.json").read_text())["stages"]
    assert [stage["name"] for stage in again] == ["before", "step 2", "after"] and again == first
    assert "start" not in summary.preflight and not summary.samples  # the start is gone


def test_a_run_that_is_broken_off_keeps_its_page(tmp_path, monkeypatch):
    evaluated = Recorder.on_evaluate

    def break_off(self, args, state, control, **kwargs):
        evaluated(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt  # as if killed: nothing is written after it

    monkeypatch.setattr(Recorder, "on_evaluate", break_off)
    with pytest.raises(KeyboardInterrupt):
        cli.main(
            ["reward", *FEW, "--max_steps=6", "--eval_strategy=steps", "--eval_steps=2", f"--output_dir={tmp_path}"]
        )
    assert not (tmp_path / "summary.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert "The run is at step 4 of 6" in page and "policy = reference" in page and " so far." in page
    assert cli.main(["report", str(tmp_path)]).read_text() == page


def test_a_run_that_diverges_is_not_called_healthy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["reward", *FEW, "--learning_rate=1000", "--max_grad_norm=0", f"--output_dir={tmp_path}"])
    page = (tmp_path / "report.html").read_text()
    assert "The run stopped at step " in page and "<h3>Diverged</h3>" in page and "nothing wrong" not in page
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path)]).read_text() == page
    assert capsys.readouterr().out.startswith("WARNING (diverged): ")


def test_a_finished_run_that_goes_on_has_one_end(tmp_path):
    argv = ["reward", *FEW, "--save_strategy=steps", "--save_steps=4", f"--output_dir={tmp_path}"]
    cli.main(argv)
    assert not (tmp_path / "unfinished.json").exists()
    cli.main([*argv, "--max_steps=6", "--resume_from_checkpoint=true"])
    stages = json.loads((tmp_path / "samples.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["before", "step 2", "step 4", "after"]


def test_secrets_are_not_repeated():
    argv = ["--hub_token", "hf_1", "--hub_token=hf_2", "--judge={api_key: 'sk-3', model: m}", "--seed=1"]
    found = command_line("conditional", argv)
    assert (
        not any(secret in found for secret in ("hf_1", "hf_2", "sk-3")) and "--seed=1" in found and "model: m" in found
    )


def test_moved_groups_keeps_the_ends():
    import torch

    keep = MovedGroups(most=2)
    for margins in ([3.0, 1.0, 9.0], [5.0, -2.0, 0.0, 7.0]):
        n = len(margins)
        batch = {
            "valid": torch.ones(n, 2, dtype=torch.bool),
            "scores": torch.tensor([[0.0, 1.0]] * n),
            "input_ids": torch.arange(2 * n * 3).view(2 * n, 3),
            "attention_mask": torch.ones(2 * n, 3, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1, 1]] * (2 * n)),
        }
        ratios = torch.tensor([[0.0, margin] for margin in margins])
        keep(batch, ratios, torch.ones(n))
    assert [margin for margin, _, _ in keep.found] == [-2.0, 0.0, 7.0, 9.0]
    assert keep.found[-1][2]["prompt"] == [12] and keep.found[-1][2]["completions"][1][2] == [16, 17]


def test_the_lineage_of_an_adapter_on_a_plain_base(run, tmp_path):
    lineage = cli.main(["merge", str(run[0]), f"--output_dir={tmp_path / 'whole'}"])
    assert lineage["base"] == demo.MODEL_PATH and lineage["base_revision"] == "main"
    assert lineage["start_adapter"] is None and not lineage["continued"]
    assert lineage["adapters"] == [{"adapter": str(run[0]), "sha256": hash_of_adapter(str(run[0]), None)}]
    card, of_run = (ModelCard.load(folder / "README.md") for folder in (tmp_path / "whole", run[0]))
    objective = "## Objective\n\n" + of_run.text.split("## Objective\n\n")[1].split("## ")[0]
    assert "loss" in objective and objective in card.text and card.text.count("## Results") == 1


def test_the_lineage_of_an_adapter_on_top_of_an_adapter(run, tmp_path):
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    shutil.copytree(run[0], first)
    argv = ["reward", *FEW, "--max_steps=1", "--report_prompts=0", "--use_peft", "--lora_target_modules=all-linear"]
    summary = cli.main([*argv, f"--model_name_or_path={first}", f"--output_dir={second}"])
    assert summary.model["start_base"] == demo.MODEL_PATH and summary.model["start_adapter"] == str(first)
    lineage = cli.main(["merge", str(second), f"--output_dir={whole}"])
    assert lineage["base"] == demo.MODEL_PATH and lineage["base_revision"] == "main"
    hashes = [{"adapter": str(folder), "sha256": hash_of_adapter(str(folder), None)} for folder in (first, second)]
    assert lineage["adapters"] == hashes and lineage["start_adapter"] == hashes[0]
    card, of_run = (ModelCard.load(folder / "README.md") for folder in (whole, second))
    assert "a fine-tuned version of the demo model of contrastive-align" in card.text
    assert "`first` was merged into it before training" in card.text and "merged_base" not in card.text
    assert card.data.license == of_run.data.license and card.data.license
    shutil.rmtree(first)
    note = "its files are no longer there; the hash was taken when it was merged"
    found = origin(str(second), str(second / "merged_base"), "main", summary.contents())
    assert found["adapters"][0] == {**hashes[0], "note": note}
    (second / "merged_base" / "merged_from.json").unlink()
    found = origin(str(second), str(second / "merged_base"), "main", summary.contents())
    note = "its files are no longer there; there is no hash of it"
    assert found["adapters"][0] == {"adapter": str(first), "sha256": None, "note": note}
    assert found["base"] == demo.MODEL_PATH
    continued = origin(str(second), demo.MODEL_PATH, "main", summary.contents())  # on a base in 4 bits
    assert continued["continued"] and [a["adapter"] for a in continued["adapters"]] == [str(second)]
    assert continued["start_adapter"]["adapter"] == str(first)


def test_a_merge_that_cannot_be_made_is_a_sentence(run, tmp_path, capsys):
    file, adapter = tmp_path / "afile", tmp_path / "adapter"
    file.write_text("")
    shutil.copytree(run[0], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/base"}))
    named = (
        f"No folder '/no/base', the base of the adapter {adapter} (base_model_name_or_path in its adapter_config.json)"
    )
    for argv, said in (
        ([str(run[0]), f"--output_dir={file}"], f"--output_dir: '{file}' is a file, expected a folder"),
        ([str(adapter), f"--output_dir={tmp_path / 'whole'}"], named),
    ):
        with pytest.raises(SystemExit):
            cli.main(["merge", *argv])
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["fdpg", "conditional"])
def test_preflight_checks_also_where_the_page_shows_no_samples(command, tmp_path, capsys):
    small = ["--max_train_samples=8", "--per_device_train_batch_size=8", "--max_completion_length=8"]
    own = {
        "fdpg": ["--num_generations=4"],
        "conditional": ["--prompts_per_round=4", "--num_generations=5", "--draws_per_round=16"],
    }
    argv = [command, *small, *own[command], f"--output_dir={tmp_path / 'out'}", "--preflight_only"]
    summary = cli.main([*argv, "--report_prompts=0"])
    assert {"first step", "memory", "checks", "sample"} <= set(summary.preflight)
    assert "tokens a batch" in summary.preflight["first step"] and "policy = reference" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_report_prompts_the_page_and_the_log_have_no_samples(tmp_path):
    argv = ["reward", *FEW[:-1], "--max_steps=1", "--report_prompts=0", f"--output_dir={tmp_path}"]
    assert "policy = reference" in cli.main(argv).preflight["checks"]
    assert "samples/" not in (tmp_path / "log.jsonl").read_text()
    found = json.loads((tmp_path / "samples.json").read_text())
    assert found["prompts"] == found["stages"] == []
