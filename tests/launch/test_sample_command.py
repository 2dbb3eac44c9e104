"""``contrastive-align sample``: the commands of docs/sampling.md, and accepted samples of every reward and model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from contrastive_align import demo
from contrastive_align.launch import cli
from contrastive_align.launch.accepted import AcceptedAnswers
from contrastive_align.launch.usage import UsageError
from contrastive_align.targets import Target


DOCUMENT = Path(__file__).parents[2] / "docs" / "sampling.md"
PROMPTS = ["Ask Grace to mow the lawn.\n", "Ask Paul to print the map.\n", "Tell Emma to buy the milk.\n"]
SMALL = {
    "fdpg": [
        "--max_steps=1", "--fit_samples=256", "--fit_tolerance=0.5", "--fit_min_ess=2", "--eval_samples=200",
        "--eval_prompts=4", "--num_generations=8", "--per_device_train_batch_size=8", "--max_completion_length=24",
        "--report_prompts=0", "--use_cpu=true",
    ],
    "sample": ["--max_completion_length=24"],
}  # fmt: skip


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    return sorted(lines, key=lambda argv: argv[0] != "fdpg")  # trained once, at first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the document's run was made."""
    path = tmp_path_factory.mktemp("document")
    (path / "prompts.txt").write_text("\n".join(prompt.strip() for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        (trained,) = [argv for argv in commands() if argv[0] == "fdpg"]
        cli.main([*trained, *SMALL["fdpg"]])
    return path


def rows_of(path):
    text = path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("argv", [argv for argv in commands() if argv[0] == "sample"], ids=lambda argv: argv[3])
def test_the_documents_commands_run(argv, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    cli.main([*argv, *SMALL["sample"], "--overwrite"])
    (output,) = [word.partition("=")[2] for word in argv if word.startswith("--output=")]
    rows, said = rows_of(folder / output), capsys.readouterr().out
    assert len(rows) == 3
    if any(word.startswith("--qrs=") for word in argv):
        accepted, proposed, rate = re.search(r"accepted (\d+) of (\d+) proposals \((.*?)\); beta ", said).groups()
        assert float(rate) == pytest.approx(int(accepted) / int(proposed), abs=1e-3)
        assert "alpaca_eval" in str(argv) or all(0 < row["acceptance_rate"] <= 1 for row in rows)


def test_the_chosen_beta_is_in_the_runs_table_and_is_the_default(folder):
    summary = json.loads((folder / "runs/fdpg/summary.json").read_text())
    beta = summary["distributions"]["tuned+QRS"]["beta"]["value"]
    assert any(row[0] == f"acceptance, beta {beta:.4f}" for row in summary["table"])
    assert AcceptedAnswers(str(folder / "runs/fdpg")).beta == beta
    assert AcceptedAnswers(str(folder / "runs/fdpg"), acceptance=0.3).beta is None


def saved_run(tmp_path, model, tokenizer, features, **target_options):
    """The folder that f-DPG leaves, of a run without a step."""
    start, run = tmp_path / "start", tmp_path / "run"
    for place in (start, run):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    target = Target.from_reward(features, **target_options) if target_options else Target(features)
    target.save(run / "target.json")
    model_record = {"start": str(start), "adapter": None}
    record = {"model": model_record, "method": {"max_completion_length": 4}, "data": {"train": {}}}
    (run / "summary.json").write_text(json.dumps(record))
    return run


def test_accepted_samples_of_an_encoder_decoder_follow_the_target(tmp_path, capsys):
    """One token of four: beta above every ratio accepts samples of base * exp(reward)."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    ids = {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": tokenizer.eos_token_id}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ids))
    run = saved_run(tmp_path, model, tokenizer, {"length": "characters"}, beta=4.0)
    argv = [
        "sample",
        f"--qrs={run}",
        "--prompt=a",
        "--num_generations=400",
        "--qrs_beta=10",
        "--max_completion_length=1",
    ]
    (row,) = cli.main(argv)
    assert len(row["generations"]) == 400 and "QRS accepted" in capsys.readouterr().out
    with torch.no_grad():
        loaded = AutoModelForSeq2SeqLM.from_pretrained(run)
        inputs = tokenizer("a", return_tensors="pt")["input_ids"]
        p = loaded(input_ids=inputs, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1)
    lengths = torch.tensor([len(tokenizer.decode([i], skip_special_tokens=True)) for i in range(len(p))]).double()
    target = (p + lengths / 4.0).softmax(-1)
    wanted, spread = float(target @ lengths), float((target @ lengths**2 - (target @ lengths) ** 2) ** 0.5)
    found = sum(map(len, row["generations"])) / 400
    assert abs(found - wanted) < 4 * spread / 400**0.5
    assert abs(found - float(p.exp() @ lengths)) > 4 * spread / 400**0.5
    (beams,) = cli.main(["sample", f"--model={run}", "--prompt=a", "--num_beams=3", "--num_generations=2"])
    assert len(beams["generations"]) == 2


def test_a_completion_leaves_the_prompt_room_in_a_short_context(capsys):
    cli.main(["sample", f"--model={demo.MODEL_PATH}", "--prompt=Ask Ben to feed the cat."])
    assert "sampled" in capsys.readouterr().out


def test_what_contradicts_is_refused(tmp_path):
    for argv, found in {
        (): "--model_name_or_path=MODEL and --qrs",
        ("--model=a", "--acceptance=0.5"): "--acceptance belongs to --qrs",
        ("--qrs=a", "--acceptance=0.5", "--tv=0.1"): "both decide beta",
        ("--model=a", "--num_beams=2", "--temperature=0.5"): "--temperature has no meaning",
        ("--model=a", "--num_beams=2", "--num_generations=3"): "at least --num_generations=3",
        (f"--qrs={tmp_path}",): "has no target.json: --qrs takes the output_dir",
    }.items():
        with pytest.raises(UsageError) as error:
            cli.main(["sample", "--prompt=a", *argv])
        assert found in error.value.message
