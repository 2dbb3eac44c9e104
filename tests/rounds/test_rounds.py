"""Rounds are given a policy, a pool and a source of feedback, and need no trainer."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from contrastive_align.conditions import resolve_condition
from contrastive_align.pool import Pool
from contrastive_align.rounds.rounds import JudgeFeedback, RewardFeedback, Rounds
from contrastive_align.targets import resolve_feature


WORDS = ["please wait", "wait", "now", "please", "go"]


class Parrot:
    """A policy of five completions, which notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, per_prompt, seeds, *, conditions=None):
        assert len(prompts) == len(seeds)
        self.asked.append((list(prompts), conditions))
        group = [{"ids": [i + 1], "text": WORDS[i], "finished": True} for i in range(per_prompt)]
        return [group for _ in prompts]


def rounds_of(tmp_path, policy, feedback, prompts=("a", "b", "c"), per_round=2, condition="phrases"):
    condition = resolve_condition(condition)
    return Rounds(
        policy=policy,
        feedback=feedback,
        pool=Pool(tmp_path, label=condition.label),
        condition=condition,
        prompts=Dataset.from_dict({"prompt": list(prompts)}),
        prompts_per_round=per_round,
        num_generations=5,
        seed=0,
        describe_feedback=feedback.describe,
    )


def test_rounds_fill_a_pool_and_ask_for_the_best_from_the_second_on(tmp_path):
    policy, feedback = Parrot(), RewardFeedback(resolve_feature({"contains": "please"}))
    rounds = rounds_of(tmp_path, policy, feedback)
    rounds.make(1, step=0)
    rounds.make(2, step=7)
    rounds.make(2, step=7)  # there already
    assert [conditions for _, conditions in policy.asked] == [None, ["Excellent", "Excellent"]]
    assert rounds.pool.steps == {1: 0, 2: 7}
    found = [(s.completion, s.score) for s in rounds.pool.read(range(10), 1)]
    assert sorted(set(found)) == sorted((text, float("please" in text)) for text in WORDS)
    # Three prompts, two a round: every pass has each prompt once, and no round has one twice.
    first, second = (prompts for prompts, _ in policy.asked)
    assert len(set(first)) == len(set(second)) == 2 and set(first) | set(second) == {"a", "b", "c"}


def test_a_judge_is_asked_by_the_main_process_for_all_and_its_words_are_kept(tmp_path):
    asked = []

    def judge(prompts, completions):
        asked.append((prompts, completions))
        return [None if c == "go" else SimpleNamespace(score=float(len(c)), text=f"says {c}") for c in completions]

    condition = {"kind": "phrases", "phrases": ["Good", "Bad"]}
    rounds = rounds_of(tmp_path, Parrot(), JudgeFeedback(judge), condition=condition)
    rounds.make(1, step=0)
    assert len(asked) == 1 and len(asked[0][0]) == 10
    samples = rounds.pool.read(range(10), 1)
    assert {(s.completion, s.score, s.feedback) for s in samples} == {
        (c, None, None) if c == "go" else (c, float(len(c)), f"says {c}") for c in WORDS
    }


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([None] * 5, r"0 of 10 samples are scored.* 2 have fewer than 5 scored completions.*reward functions return"),
        ([1.0, None, 2.0, 3.0, 4.0], r"8 of 10 samples are scored.* 2 have fewer than 5 scored completions"),
        ([1.0] * 5, r"10 of 10 samples are scored.* 2 have completions that all score the same"),
    ],
)
def test_a_first_round_without_signal_is_not_written(scores, said, tmp_path):
    feedback = RewardFeedback(resolve_feature(lambda completions, **_: [scores[WORDS.index(c)] for c in completions]))
    rounds = rounds_of(tmp_path, Parrot(), feedback)
    with pytest.raises(ValueError, match=rf"Round 1 is not written\. {said}".replace(r"\. ", r"\. .*")):
        rounds.make(1, step=0)
    assert rounds.pool.rounds == []


def test_a_later_round_without_signal_is_refused_where_no_earlier_sample_stays(tmp_path):
    flat = []
    feedback = RewardFeedback(
        resolve_feature(lambda completions, **_: [1.0 if flat else float(WORDS.index(c)) for c in completions])
    )
    rounds = rounds_of(tmp_path, Parrot(), feedback)
    rounds.make(1, step=0)
    flat.append(True)
    rounds.make(2, step=7)  # earlier samples are there to learn from
    rounds.pool.drop_factor = 1
    with pytest.raises(ValueError, match="Round 3 is not written"):
        rounds.make(3, step=14)
    assert rounds.pool.rounds == [1, 2]


def test_a_round_whose_predecessors_are_missing_is_refused(tmp_path):
    rounds = rounds_of(tmp_path, Parrot(), RewardFeedback(resolve_feature({"length": "words"})))
    with pytest.raises(ValueError, match=r"goes on with round 2, .* has rounds"):
        rounds.make(2, step=5)
