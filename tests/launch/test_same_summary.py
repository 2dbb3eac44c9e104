"""Two runs of one command have the same summary.json, save for the fields that are times."""

import json
import random

import numpy as np
import pytest
import torch
from judge_server import JudgeServer, scored

from contrastive_align.launch import cli
from contrastive_align.report.summary import TIMES


FEW = ["--max_train_samples=8", "--disable_tqdm=true"]
SAMPLED = ["--per_device_train_batch_size=8", "--max_completion_length=8"]
FDPG = ["--fit_samples=64", "--num_generations=4", "--eval_samples=50", "--eval_prompts=2"]
ROUNDS = ["--draws_per_round=16", "--num_generations=5", "--prompts_per_round=4", "--eval_prompts=3"]
CONDITIONAL = [*SAMPLED, *ROUNDS, "--num_train_epochs=2"]
COMMANDS = {
    "reward": ["--max_steps=2", "--max_eval_samples=4", "--use_peft", "--lora_dropout=0.1", "--loss_type=info_nca"],
    "preference": ["--max_steps=2", "--max_eval_samples=4", "--gradient_accumulation_steps=2"],
    "fdpg": ["--max_steps=2", *SAMPLED, *FDPG],
    "conditional": CONDITIONAL,
}


def twice(tmp_path, command, *flags):
    """The summaries of the same command run twice, and their times, with other random numbers drawn in between."""
    folder, found, times = tmp_path / "out", [], []
    for number in range(2):
        cli.main([command, *FEW, *flags, f"--output_dir={folder}"])
        found.append(json.loads((folder / "summary.json").read_text()))
        times.append({name: found[-1]["training"].pop(name, None) for name in TIMES})
        folder.rename(tmp_path / f"run {number}")
        for draw in (random.random, np.random.rand, lambda: torch.rand(7)):
            draw()
    return found, times


@pytest.mark.parametrize("command", COMMANDS)
def test_equal_seeds_give_equal_summaries(tmp_path, command):
    (first, second), times = twice(tmp_path, command, *COMMANDS[command])
    assert first == second and first["training"]["steps"] > 0 and first["metrics"]
    assert all(seen["seconds"] is not None for seen in times)


def test_a_judge_is_asked_the_same(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with JudgeServer(scored) as server:
        judge = f"--judge={{model: m, base_url: '{server.url}', max_retries: 0}}"
        (first, second), _ = twice(
            tmp_path, "conditional", *CONDITIONAL, "--num_train_epochs=1", "--condition=text", judge
        )
        asked = [json.dumps(body, sort_keys=True) for _, body in server.calls]
    assert first == second and first["training"]["judge"]["unparsable"] == 0
    assert sorted(asked[: len(asked) // 2]) == sorted(asked[len(asked) // 2 :])
