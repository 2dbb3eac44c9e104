"""Quantiles, thinning and balanced draws: by hand, and against a plain loop."""

import collections

import numpy as np
import pytest

from contrastive_align.pool import balanced_order, keep, quantiles


def by_loop(scores, n, prompts, ties="share"):
    """The published procedure, prompt by prompt: sort, n equal blocks, the rest to the last; then ties."""
    labels = [-1] * len(scores)
    for prompt in set(prompts):
        ranked = [i for i, p in enumerate(prompts) if p == prompt and not np.isnan(scores[i])]
        ranked.sort(key=lambda i: -scores[i])  # stable
        blocks = [q for q in range(n) for _ in range(len(ranked) // n)]
        blocks += [n - 1] * (len(ranked) - len(blocks))
        for score in {scores[i] for i in ranked}:
            places = [place for place, i in enumerate(ranked) if scores[i] == score]
            label = blocks[places[(len(places) - 1) // 2]]
            if ties == "drop" and blocks[places[0]] != blocks[places[-1]]:
                label = -1
            elif ties == "share" and 0 in places:
                label = 0
            elif ties == "share" and len(ranked) - 1 in places:
                label = n - 1
            for place in places:
                labels[ranked[place]] = -1 if len(places) == len(ranked) else label
    return labels


# ----------------------------------------------------------------------------------------------------------- quantiles


def test_the_published_example():  # 14 samples in 5 quantiles: 2, 2, 2, 2 and the remaining 6
    assert quantiles(-np.arange(14)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]


def test_higher_is_better_and_the_order_of_samples_is_kept():
    assert quantiles([0.2, 0.8, 0.4, 0.6], n=4).tolist() == [3, 0, 2, 1]


def test_equal_scores_have_one_label_whatever_their_order():
    assert quantiles([1.0] * 4 + [2.0] + [1.0] * 5, n=5).tolist() == [4, 4, 4, 4, 0, 4, 4, 4, 4, 4]
    assert quantiles([1, 0, 0, 1, 0], n=5).tolist() == [0, 4, 4, 0, 4]
    assert quantiles([3, 1, 1, 1, 0], n=5).tolist() == [0, 2, 2, 2, 4]
    assert quantiles([3, 1, 1, 1, 0], n=5, ties="drop").tolist() == [0, -1, -1, -1, 4]
    assert quantiles([2, 2, 1, 1], n=2, ties="drop").tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="ties is 'age', expected one of share, drop"):
        quantiles([1, 2], n=2, ties="age")


@pytest.mark.parametrize("ties", ["share", "drop"])
def test_without_any_difference_there_is_no_label(ties):
    assert quantiles(np.zeros(6), n=3, ties=ties).tolist() == [-1] * 6
    assert quantiles([0, 0, 0, 1, 2, 3], n=3, prompts=[0, 0, 0, 1, 1, 1], ties=ties).tolist() == [-1] * 3 + [2, 1, 0]


def test_per_prompt_is_not_pooled():
    scores, prompts = [10, 9, 2, 1], [5, 5, 3, 3]
    assert quantiles(scores, n=2, prompts=prompts).tolist() == [0, 1, 0, 1]
    assert quantiles(scores, n=2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("ties", ["share", "drop"])
@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop(seed, ties):
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.permutation(50)[:12], rng.integers(5, 17, 12))
    prompts = rng.permutation(prompts)
    scores = rng.integers(0, 6, len(prompts)).astype(float)  # many ties
    shuffled = rng.permutation(len(scores))
    found = quantiles(scores, n=5, prompts=prompts, ties=ties)
    assert found.tolist() == by_loop(scores, 5, prompts.tolist(), ties)
    assert found[shuffled].tolist() == quantiles(scores[shuffled], n=5, prompts=prompts[shuffled], ties=ties).tolist()
    assert quantiles(scores, n=7, ties=ties).tolist() == by_loop(scores, 7, [0] * len(scores), ties)


def test_infinite_scores_have_a_rank():
    assert quantiles([-np.inf, 0, np.inf], n=3).tolist() == [2, 1, 0]


@pytest.mark.parametrize("missing", [np.nan, None])
def test_what_is_not_scored_is_left_out_and_does_not_count(missing):
    assert quantiles([3, missing, 1, 2, missing], n=3).tolist() == [0, -1, 2, 1, -1]


def test_a_prompt_with_too_few_scores_is_left_out_as_a_whole():
    labels = quantiles([1, np.nan, np.nan, 3, 1, 2], n=2, prompts=[0, 0, 0, 1, 1, 1])
    assert labels.tolist() == [-1, -1, -1, 0, 1, 1]


def test_fewer_samples_than_quantiles():
    with pytest.raises(
        ValueError, match=r"Prompt 4 has 2 samples, .* each of 3 quantiles.*num_generations.*per_prompt"
    ):
        quantiles([1, 2, 3, 4, 5], n=3, prompts=[1, 1, 1, 4, 4])
    with pytest.raises(ValueError, match="The pool has 2 samples"):
        quantiles([1, 2], n=3)


def test_shapes_and_n():
    with pytest.raises(ValueError, match=r"\(3,\) and prompts \(2,\)"):
        quantiles([1, 2, 3], n=1, prompts=[1, 2])
    with pytest.raises(ValueError, match="n is 0"):
        quantiles([1, 2, 3], n=0)
    assert quantiles([]).tolist() == []
    assert quantiles([3, 1], n=1).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------- keep


@pytest.mark.parametrize(("drop", "expected"), [(0, {0: 10, 1: 5, -1: 4}), (1, {}), (0.7, {0: 3, 1: 2, -1: 1})])
def test_the_share_that_stays_is_that_of_each_label(drop, expected):
    labels = np.array([0] * 10 + [1] * 5 + [-1] * 4)  # 0.3 * 5 = 1.5 -> 2, 0.3 * 4 = 1.2 -> 1
    assert collections.Counter(labels[keep(labels, drop_factor=drop, rng_seed=0)].tolist()) == expected


def test_thinning_is_seeded_and_uniform():
    labels = np.zeros(20, dtype=int)
    stays = np.array([keep(labels, drop_factor=0.75, rng_seed=(3, r)) for r in range(800)])
    assert (stays[5] == keep(labels, drop_factor=0.75, rng_seed=[3, 5])).all()
    assert len({x.tobytes() for x in stays}) > 700
    assert abs(stays.mean(0) - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 800)


def test_one_labels_choice_does_not_depend_on_the_other_labels():
    alone = keep(np.full(30, 2), drop_factor=0.5, rng_seed=1)
    beside = keep(np.r_[np.full(7, 0), np.full(30, 2)], drop_factor=0.5, rng_seed=1)
    assert (beside[7:] == alone).all()
    assert (keep(np.full(30, 1), drop_factor=0.5, rng_seed=1) != alone).any()


@pytest.mark.parametrize("drop", [-0.1, 1.1, float("nan")])
def test_drop_factor_is_a_share(drop):
    with pytest.raises(ValueError, match="drop_factor is"):
        keep([0, 1], drop_factor=drop, rng_seed=0)


# --------------------------------------------------------------------------------------------------------------- draws


def test_labels_take_turns_best_first():
    labels = np.array([4, 2, 2, 0, -1, 4, 0, 0, 2])
    order = balanced_order(labels, np.ones(9, bool), n=11, seed=0)
    assert labels[order].tolist() == [0, 2, 4] * 3 + [0, 2]  # the remainder goes to the best
    assert 4 not in order


def test_none_twice_before_all_once_and_finished_first_in_every_pass():
    labels = np.array([0] * 6 + [1] * 3)
    finished = np.array([True, False, True, False, True, False, False, True, False])
    order = balanced_order(labels, finished, n=30, seed=5)
    best, rest = order[0::2], order[1::2]
    for draws, size, done in ((best, 6, {0, 2, 4}), (rest, 3, {7})):
        for start in range(0, 12, size):
            block = draws[start : start + size].tolist()
            assert len(set(block)) == size
            assert set(block[: len(done)]) == done
    assert best[:6].tolist() != best[6:12].tolist()  # a new order in each pass


def test_draws_are_seeded():
    labels, finished = np.arange(40) % 4, np.ones(40, bool)
    order = balanced_order(labels, finished, n=40, seed=(1, 2))
    assert (order == balanced_order(labels, finished, n=40, seed=[1, 2])).all()
    assert (order != balanced_order(labels, finished, n=40, seed=(1, 3))).any()
    assert (order[:20] == balanced_order(labels, finished, n=20, seed=(1, 2))).all()
    assert sorted(order) == list(range(40))


def test_a_label_is_drawn_uniformly():
    first = [balanced_order(np.zeros(8, int), np.ones(8, bool), n=2, seed=s) for s in range(800)]
    counts = np.bincount(np.concatenate(first), minlength=8)
    assert abs(counts / 800 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 800)


def test_fewer_draws_than_labels_are_the_best():
    labels = np.array([3, 1, 0, 2])
    assert labels[balanced_order(labels, np.ones(4, bool), n=2, seed=0)].tolist() == [0, 1]
    assert balanced_order(labels, np.ones(4, bool), n=0, seed=0).tolist() == []


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="None of the 2 samples has a label"):
        balanced_order([-1, -1], [True, True], n=1, seed=0)
    with pytest.raises(ValueError, match=r"\(2,\) and finished \(1,\)"):
        balanced_order([1, 1], [True], n=1, seed=0)
