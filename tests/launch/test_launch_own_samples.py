"""``reward --online`` and ``preference --online`` from the command line to summary.json, and what is refused."""

import json

import pytest

from contrastive_align.launch import cli
from contrastive_align.launch.usage import UsageError


SMALL = [
    "--prompts_per_round=6", "--num_generations=4", "--max_completion_length=8", "--num_rounds=2", "--eval_prompts=3",
    "--report_prompts=2", "--per_device_train_batch_size=3", "--disable_tqdm=true", "--logging_steps=1",
]  # fmt: skip
REWARD = "--reward=contrastive_align.demo:reward"


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"Ask Anna to {task}.\n", "note": i} for i, task in enumerate(["wait", "go", "sing"] * 4)]
    pairs = [{"prompt": row["prompt"], "chosen": "Please.", "rejected": "Now."} for row in rows]
    groups = [{"prompt": row["prompt"], "completions": ["Please.", "Now."], "scores": [1, 0]} for row in rows]
    for name, found in {"prompts": rows, "pairs": pairs, "groups": groups}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "prompts.txt").write_text("Ask Anna to wait.\n")
    return tmp_path


def test_the_bundled_run(tmp_path, capsys):
    cli.main(["reward", "--online", *SMALL, f"--output_dir={tmp_path}"])
    found = json.loads((tmp_path / "summary.json").read_text())
    method, rounds = found["method"], found["training"]["rounds"]
    assert method["online"] and method["rounds"] == 2 and method["reward"] == "contrastive_align.demo:reward"
    assert [r["round/number"] for r in rounds] == [1, 2] and all("round/kl_start" in r for r in rounds)
    speeds = found["training"]["tokens_per_second"]
    assert [s["round"] for s in speeds] == [1, 2] and all(s["sampling"] > 0 and s["training"] > 0 for s in speeds)
    change = found["metrics"]["mean_reward"]
    assert change["n"] == 3 and change["before"] != change["after"] and "3 held-out prompts" in found["metrics_on"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "NCA" in shown.upper() and "2 rounds of 6 prompts x 4 samples by" in shown and "mean_reward" in shown
    page = (tmp_path / "report.html").read_text()
    assert "Prompts without signal" in page and "Tokens a second" in page
    assert any("round/best_of_k" in json.loads(line) for line in (tmp_path / "log.jsonl").open())


def test_a_reward_and_prompts_alone_mean_own_samples(data, tmp_path):
    """Beside scored groups of a file, and with the pairs' command."""
    flags = [f"--dataset_name={data}/prompts.jsonl", REWARD, f"--scored_dataset={data}/groups.jsonl", *SMALL]
    cli.main(["preference", *flags, "--loss_type=DPO", "--num_rounds=1", f"--output_dir={tmp_path}/out"])
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["method"]["online"] and found["method"]["loss_type"] == ["dpo"]
    assert found["data"]["train"]["conversational"] is False
    assert found["data"]["train"]["rows"] == 12 and found["data"]["scored"]["groups"] == 12


REFUSED = {
    "scores and no reward": (["--online", "--dataset_name={data}/groups.jsonl"], "what is the reward?"),
    "prompts and no reward": (["--dataset_name={data}/prompts.txt"], "what is the reward?"),
    "scores and a reward": (["--dataset_name={data}/groups.jsonl", REWARD], "which of the two? Add --online"),
    "pairs and a reward": (["--dataset_name={data}/pairs.jsonl", REWARD], "which of the two? Add --online"),
    "a stream": (
        ["--online", "--dataset_name={data}/prompts.jsonl", REWARD, "--dataset_streaming=true"],
        "the prompts are a stream",
    ),
    "a sampler alone": (["--sampler={{base_url: a, model: b}}"], "--sampler belongs to own samples: add --online"),
    "scored groups alone": (["--scored_dataset=a.jsonl"], "--scored_dataset belongs to own samples: add --online"),
    "an option alone": (["--num_generations=3"], "--num_generations belongs to own samples: add --online"),
    "both": (["--online", REWARD, "--judge={{model: a, base_url: b}}"], "both reward and judge are given"),
    "epochs": (["--online", "--num_train_epochs=2"], "num_train_epochs is 2 online"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, data, capsys):
    flags, said = REFUSED[case]
    with pytest.raises(UsageError):
        cli.main(["reward", *(flag.format(data=data) for flag in flags), f"--output_dir={data}/out"])
    assert said in " ".join(capsys.readouterr().err.split())
