"""Groups of own samples: which are trained on, where the reference is, and that an interrupted run goes on the same."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_trainers import COLUMNS, COMMON, TEXTS, saved_model

from contrastive_align import ContrastiveConfig, ContrastiveTrainer
from contrastive_align.losses import group_loss
from contrastive_align.pool import Pool, Sample
from contrastive_align.rounds.groups import GroupRows, GroupSignal, group_metrics, groups_of, passes
from contrastive_align.trainers import sampled_rounds
from contrastive_align.trainers.contrastive import ContrastiveTrainer as Trainer


CONTRASTIVE = COLUMNS[0]
ONLINE = {
    "online": True, "prompts_per_round": 4, "num_generations": 5, "max_completion_length": 4, "max_steps": -1,
    "num_rounds": 3, "per_device_train_batch_size": 2, "beta": 0.5, "max_length": 64, "learning_rate": 0.3,
}  # fmt: skip
PROMPTS = Dataset.from_list([{"prompt": text} for text in TEXTS])


def reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make(folder, *, told=None, trainer=ContrastiveTrainer, **changes):
    args = ContrastiveConfig(output_dir=str(folder), **{**COMMON, **ONLINE, **changes})
    given = {"model": saved_model(), "train_dataset": PROMPTS, "reward_funcs": reward, **(told or {})}
    return trainer(args=args, **given)


def flat(trainer):
    return torch.cat([p.detach().flatten() for _, p in sorted(trainer.model.named_parameters())]).clone()


def samples(number, scores, first_prompt=0):
    """A round of groups with these scores."""
    return [
        Sample(f"p{i}", [3 + k], "a", score, None, True, i, k, number, number - 1)
        for i, group in enumerate(scores, start=first_prompt)
        for k, score in enumerate(group)
    ]


@pytest.fixture
def pool(tmp_path):
    pool = Pool(tmp_path / "pool", label=GroupSignal().label)
    pool.add(samples(1, [[1.0, 0.0], [1.0, 1.0], [None, 2.0, 3.0]]))
    pool.add(samples(2, [[0.5, 0.5], [0.1, 0.2]]))
    return pool


def test_a_group_can_be_trained_on_where_two_scores_differ(pool):
    table = pool.table()
    assert table.label.tolist() == [0, 0, -1, -1, -1, 0, 0, -1, -1, 0, 0]
    assert [rows.tolist() for rows in groups_of(table, 1)] == [[0, 1], [5, 6], [9, 10]]
    assert [rows.tolist() for rows in groups_of(table, 2)] == [[9, 10]] and groups_of(table, 3) == []


def test_the_numbers_of_a_round_count_the_groups_without_signal(pool):
    found = group_metrics(1, pool.table(1), per_prompt=3)
    assert found["round/no_signal"] == pytest.approx(1 / 3) and found["round/left_out"] == 1
    assert found["round/unscored"] == 1 and found["round/samples"] == 7 and found["round/resampled"] == 0
    assert found["round/mean_reward"] == pytest.approx(8 / 6) and found["round/best_of_k"] == pytest.approx(5 / 3)
    assert found["round/reward_q50"] == 1.0


def test_passes_have_each_thing_once_and_go_on():
    whole = passes(5, 0, 20, [3])
    assert all(sorted(whole[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert whole == passes(5, 0, 7, [3]) + passes(5, 7, 20, [3]) and passes(5, 3, 3, [3]) == []


def test_the_groups_of_a_round_are_drawn_each_once_before_any_twice(pool):
    rows = GroupRows(pool, lambda prompt: [1], length=5, seed=0)
    rows.draw(2, keep=0)
    assert rows.drawn == [(False, 0)] * 5 and rows[0]["scores"] == [0.1, 0.2]
    rows.draw(2, keep=1)
    counts = np.bincount([number for _, number in rows.drawn])
    assert sorted(counts.tolist()) == [1, 2, 2] and rows[0].keys() == {"prompt_ids", "completion_ids", "scores"}


def test_scored_groups_of_files_have_their_share_in_turn(pool):
    scored = Dataset.from_list(
        [{"prompt_ids": [1], "completion_ids": [[i], [4]], "scores": [1.0, 0.0]} for i in range(6)]
    )
    rows, seen = GroupRows(pool, lambda prompt: [1], 4, 0, scored, 0.75), []
    for number in (1, 2):
        rows.draw(number, keep=0)
        of_file = [number for is_of_file, number in rows.drawn if is_of_file]
        assert len(of_file) == 3
        seen += of_file
    assert sorted(seen) == list(range(6))


LOSSES = [["nca"], ["info_nca"], ["dpo"], ["dpo_best_vs_rest"], ["plackett_luce"], ["nca", "sft"]]


@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_every_loss_trains_on_own_samples(losses, tmp_path):
    trainer = make(tmp_path, loss_type=losses, num_rounds=1)
    start = flat(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.equal(start, flat(trainer))
    rounds = [entry for entry in trainer.state.log_history if "round/number" in entry]
    assert [entry["round/samples"] for entry in rounds] == [20]
    assert {"round/kl_start", "round/best_of_k", "round/sampling_tokens_per_second"} <= rounds[0].keys()
    assert any("round/training_tokens_per_second" in entry for entry in trainer.state.log_history)


def test_the_reward_rises(tmp_path):
    """A reward of one token: after some rounds it is drawn more often than before."""
    told = {"reward_funcs": lambda completion_ids, **_: [float(ids[0] == 4) for ids in completion_ids]}
    options = {"num_rounds": 4, "prompts_per_round": 8, "num_generations": 8, "draws_per_round": 16}
    options |= {"optim": "adamw_torch", "beta": 0.2, "learning_rate": 0.02}
    trainer = make(tmp_path, told=told, **options)
    trainer.train()
    rewards = [entry["round/mean_reward"] for entry in trainer.state.log_history if "round/number" in entry]
    assert rewards[-1] > rewards[0] + 0.2


@pytest.mark.parametrize("reference", ["start", "round"])
def test_the_reference_stays_or_follows_each_round(reference, tmp_path):
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            _, outputs = super().compute_loss(model, inputs, return_outputs=True)
            seen.append((self.state.global_step, outputs["log_ratios"].detach().abs().max().item()))
            return super().compute_loss(model, inputs, **kwargs)

    make(tmp_path, trainer=Watched, reference=reference).train()
    first = {step: gap for step, gap in seen if step % 2 == 0}  # of the steps with which rounds begin
    assert first[0] < 1e-5
    assert all((first[step] < 1e-5) == (reference == "round") for step in (2, 4))
    assert all(gap > 1e-4 for step, gap in seen if step % 2)


def test_auto_temperature_is_found_anew_for_each_round(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    found = [e["round/temperature_alpha"] for e in trainer.state.log_history if "round/number" in e]
    assert len(set(found)) == 3 and trainer.temperature_alpha == found[-1]


@pytest.mark.parametrize("changes", [{"reference": "start"}, {"keep": 1}], ids=str)
@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_in_the_middle_of_a_round_with_the_same_weights(step, changes, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1, **changes}
    whole = make(tmp_path / "run", **saving)
    whole.train()
    pool = whole.pool.read(range(len(whole.pool)))
    again = make(tmp_path / "run", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert torch.equal(flat(again), flat(whole)) and again.pool.read(range(len(again.pool))) == pool
    numbers = [e["round/number"] for e in again.state.log_history if "round/number" in e]
    assert numbers == [1, 2, 3] and "was sampled at step" not in caplog.text


def test_the_kl_of_a_round_is_that_of_the_policy_at_temperature_1(tmp_path, monkeypatch):
    drawn, changes = [], {"temperature": 1.5, "num_rounds": 1}
    draw = sampled_rounds.draw
    monkeypatch.setattr(sampled_rounds, "draw", lambda *a, **k: drawn.append(k) or draw(*a, **k))
    make(tmp_path, **changes).train()
    of_round, of_kl = drawn[:2]
    assert (of_round["temperature"], of_kl["temperature"], of_kl["per_prompt"]) == (1.5, 1.0, 1)


def test_a_column_of_the_reward_function_is_named_where_there_is_no_table(tmp_path, caplog):
    def with_column(completion_ids, log_extra, **columns):
        log_extra("lengths", [len(ids) for ids in completion_ids])
        return reward(completion_ids)

    logging.getLogger("contrastive_align").setLevel(logging.WARNING)
    make(tmp_path, told={"reward_funcs": with_column}, num_rounds=1).train()
    assert "log_extra('lengths') is not kept" in caplog.text


def test_the_reference_is_not_exchanged_in_the_middle_of_a_round(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "num_rounds": 2}
    make(tmp_path, **saving, reference="start").train()
    changed = make(tmp_path, **saving, reference="round")
    with pytest.raises(ValueError, match=r"reference was start in .* and is round now, in the middle of a round"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_prompt_without_signal_is_sampled_again_up_to_a_budget(tmp_path):
    """Its samples say how often: they are numbered on."""
    calls = []

    def flat_at_first(completion_ids, prompts, **columns):
        calls.append(len(prompts))
        again = len(calls) > 1
        return [1.0 if p == TEXTS[0] or not again else float(i) for i, p in enumerate(prompts)]

    options = {"num_rounds": 1, "prompts_per_round": 8, "resample": 2}
    trainer = make(tmp_path, told={"reward_funcs": flat_at_first}, **options)
    trainer.train()
    assert calls == [40, 40, 5]  # all, all again, and the one that stays flat
    (found,) = [entry for entry in trainer.state.log_history if "round/number" in entry]
    assert found["round/resampled"] == 9 and found["round/samples"] == 85
    assert found["round/no_signal"] == pytest.approx(1 / 8) and len(trainer.rows.own) == 7


def test_a_round_without_signal_is_refused_and_not_written(tmp_path):
    trainer = make(tmp_path, told={"reward_funcs": lambda completion_ids, **_: [1.0] * len(completion_ids)})
    said = r"Round 1 is not written\. There is nothing to learn from: 20 of 20 samples are scored, and of none of 4"
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert trainer.pool.rounds == []


def test_scored_groups_are_trained_on_beside_own_ones(tmp_path):
    scored = CONTRASTIVE.rows(6)
    trainer = make(tmp_path, told={"scored_dataset": scored}, draws_per_round=8, num_rounds=2)
    trainer.train()
    assert sum(of_file for of_file, _ in trainer.rows.drawn) == 4
    assert trainer.data_reports["scored"].groups == 6


def test_prompts_may_be_conversations_and_scores_beside_them_are_not_read(tmp_path):
    rows = CONTRASTIVE.rows().map(lambda row: {"scores": ["no number"] * len(row["completions"])})
    make(tmp_path, told={"train_dataset": rows}, num_rounds=1).train()


def test_long_prompts_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows = Dataset.from_list([*PROMPTS, {"prompt": "a " * 61}])
    trainer = make(tmp_path, told={"train_dataset": rows})
    assert trainer.data_report == {"rows": 9, "too_long": 1} and len(trainer.prompts) == 8
    assert "1 of 9 prompts of train_dataset are longer than 60 tokens" in caplog.text


def test_a_judge_scores_as_a_reward_does(tmp_path):
    def judge(prompts, completions):
        return [SimpleNamespace(score=float(len(c)), text="") for c in completions]

    trainer = make(tmp_path, told={"reward_funcs": None, "judge": judge}, num_rounds=1)
    trainer.train()
    assert {len(s.completion) for s in trainer.pool.read(range(20))} == {s.score for s in trainer.pool.read(range(20))}


def test_evaluation_samples_the_prompts(tmp_path):
    trainer = make(tmp_path, told={"eval_dataset": PROMPTS}, eval_strategy="epoch", num_rounds=1)
    trainer.train()
    (found,) = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert math.isfinite(found["eval_reward"]) and found["eval_reward/se"] > 0
    assert trainer.evaluate()["eval_reward"] == found["eval_reward"] == np.mean(trainer.rewards_of(PROMPTS))


def test_the_loss_of_a_step_is_that_of_its_groups(tmp_path):
    trainer = make(tmp_path, loss_type=["plackett_luce"], num_rounds=1, per_device_train_batch_size=4)
    trainer.begin_round(1)
    groups = [trainer.rows[i] for i in range(4)]
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(groups)).item()
    zero = torch.zeros(1, 5, dtype=torch.float64)
    given = {"log_ratios": zero, "beta": 0.5, "temperature_alpha": 1.0, "valid": zero == 0}
    given |= {"lengths": zero, "policy_logps": zero, "ref_logps": zero}
    scores = [torch.tensor([group["scores"]], dtype=torch.float64) for group in groups]
    expected = [group_loss("plackett_luce", scores=s, **given).item() for s in scores]
    assert found == pytest.approx(np.mean(expected), rel=1e-6)  # at the start all log-ratios are 0


REFUSED = {
    "no reward": ({"reward_funcs": None}, {}, "what is the reward"),
    "both": ({"judge": print}, {}, "Both reward_funcs and judge"),
    "a stream": ({"train_dataset": PROMPTS.to_iterable_dataset()}, {}, "IterableDataset, expected a datasets.Dataset"),
    "more prompts than there are": ({}, {"prompts_per_round": 9}, "prompts_per_round is 9 and the dataset has 8"),
    "one completion": ({}, {"num_generations": 1}, "num_generations is 1, expected 2 or more"),
    "epochs": ({}, {"num_train_epochs": 2}, "num_train_epochs is 2 online, .* Set num_rounds"),
    "a cached reference": ({}, {"precompute_ref_log_probs": True}, "not supported online: .* before the first round"),
    "a reference that moves": ({}, {"sync_ref_model": True}, "set reference='round'"),
    "batches by tokens": ({}, {"max_tokens_per_batch": 64}, "max_tokens_per_batch=64 is not supported online"),
    "half checkpoints": ({}, {"save_only_model": True, "save_strategy": "steps"}, "save_only_model=True leaves"),
    "another reference": ({}, {"reference": "end"}, "reference is 'end', expected one of round, start"),
    "a share of nothing": ({}, {"scored_share": 0.25}, "scored_share is 0.25, and there are no scored groups"),
    "scores of the data": ({}, {"score_column": "scores"}, "score_column is of completions that are there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_own_samples_cannot_have_is_refused(case, tmp_path):
    told, changes, said = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=said):
        make(tmp_path, told=told, **changes)


def test_what_belongs_to_own_samples_is_refused_without_them(tmp_path):
    for option in ({"reward_weights": [1.0]}, {"num_rounds": 2}, {"use_vllm": True}):
        (name,) = option
        with pytest.raises(ValueError, match=f"{name} is of own samples, and none are drawn"):
            CONTRASTIVE.make(tmp_path, **option)
    with pytest.raises(ValueError, match=r"scored_dataset is of own samples"):
        CONTRASTIVE.make(tmp_path, told={"scored_dataset": CONTRASTIVE.rows()})


def test_a_reward_implies_own_samples(tmp_path):
    trainer = make(tmp_path, online=False, num_rounds=2)
    assert trainer.online and trainer.args.online and trainer.args.num_train_epochs == 2


def test_the_reference_of_a_round_is_of_the_groups_that_are_drawn(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, **saving, num_rounds=1).train()
    file = tmp_path / "pool" / "reference-00001.json"
    assert len(json.loads(file.read_text())["logps"]) == 4
    again = make(tmp_path, **saving, num_rounds=1, draws_per_round=3)  # 2 steps, as before
    with pytest.raises(ValueError, match=r"reference-00001\.json has log-probs of other groups"):
        file.write_text('{"groups": [], "logps": []}')
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_goes_on_in_another_folder_with_its_rounds(tmp_path, caplog):
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    other = make(tmp_path / "other")
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(flat(other), flat(whole)) and other.pool.rounds == whole.pool.rounds
    assert f"The rounds [1, 2] of {tmp_path / 'whole' / 'pool'} are copied to" in caplog.text


def test_training_ends_well_where_nothing_tells_samples_apart_any_more(tmp_path, caplog):
    def until_round_2(completion_ids, trainer_state, **columns):
        return [1.0] * len(completion_ids) if trainer_state.global_step else reward(completion_ids)

    trainer = make(tmp_path, told={"reward_funcs": until_round_2}, save_strategy="epoch")
    trainer.train()
    assert trainer.pool.rounds == [1] and trainer.state.global_step == trainer.steps_per_round
    assert "Round 2 is not written. There is nothing to learn from" in caplog.text
    assert "Training ends here, after round 1." in caplog.text
    trainer.save_model()
