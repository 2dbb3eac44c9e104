"""Batches by tokens: every group once, within the budget, similar lengths together, the same on all ranks."""

import random

import pytest
from datasets import Dataset

from contrastive_align.data.batching import TokenBatchSampler, group_sizes


def some_groups(n=300, seed=0):
    """Log-normal lengths, 2 to 6 rows each."""
    rng = random.Random(seed)
    lengths = [min(2000, max(16, round(rng.lognormvariate(5.5, 0.7)))) for _ in range(n)]
    return lengths, [rng.randint(2, 6) for _ in range(n)]


def sampler(layout="padded", n=300, max_tokens=6000, max_groups=16, epoch=0, **kwargs):
    lengths, rows = some_groups(n)
    if layout == "shared":
        lengths, rows = [length * k for length, k in zip(lengths, rows, strict=True)], None
    made = TokenBatchSampler(lengths, rows, max_tokens=max_tokens, max_groups=max_groups, **kwargs)
    made.set_epoch(epoch)
    return made


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize(("max_tokens", "max_groups"), [(6000, 16), (6000, 3), (900, 16), (10**9, 16), (10**9, 10**9)])
def test_every_group_once_and_the_budget_kept(layout, max_tokens, max_groups):
    for epoch in range(8):
        made = sampler(layout, max_tokens=max_tokens, max_groups=max_groups, epoch=epoch)
        batches = list(made)
        assert sorted(flat(batches)) == list(range(300))
        assert len(batches) == len(made) > 0  # Trainer counts its steps by it, whatever the epoch
        assert all(len(batch) <= max_groups for batch in batches)
        assert all(made.tokens(batch) <= max_tokens for batch in batches if len(batch) > 1)
        alone = {batch[0] for batch in batches if made.tokens(batch) > max_tokens}
        assert alone == set(made.above_budget)


def test_tokens_are_what_the_layout_computes():
    padded = TokenBatchSampler([10, 30], [2, 3], max_tokens=100, max_groups=4)
    assert padded.tokens([0, 1]) == (2 + 3) * 30 and padded.above_budget == []
    shared = TokenBatchSampler([10, 30], max_tokens=100, max_groups=4)
    assert shared.tokens([0, 1]) == 10 + 30
    assert [len(s) for s in (padded, shared)] == [2, 1]


def test_sizes_of_groups():
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [[4], [5, 6], [7]], "scores": [1.0, 0.0, 0.5]},
        {"prompt_ids": [3, 3, 3], "completion_ids": [[8], [9, 9, 9, 9]], "scores": [0.0, 2.0]},
    ] * 700
    dataset = Dataset.from_list(rows).select(range(1, 1399))  # more than one piece, and an index between
    assert group_sizes(dataset, padded=False) == ([8, 6] * 699, None)
    assert group_sizes(dataset, padded=True) == ([7, 4] * 699, [2, 3] * 699)
    assert group_sizes(dataset, padded=True, pad_to_multiple_of=4) == ([8, 4] * 699, [2, 3] * 699)


def test_similar_lengths_share_a_batch():
    made = sampler()
    padded = sum(made.tokens(batch) for batch in made)
    order = list(range(300))
    random.Random(1).shuffle(order)
    sizes = [len(batch) for batch in made]
    at_random = sum(made.tokens([order.pop() for _ in range(size)]) for size in sizes)
    lengths, rows = some_groups()
    real = sum(length * k for length, k in zip(lengths, rows, strict=True))
    assert padded < 1.15 * real and at_random > 1.7 * real
    assert padded > 0.8 * 6000 * len(made)  # and the budget is used


def test_seeded_and_another_order_every_epoch():
    orders = {(seed, epoch): list(sampler(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert orders[0, 1] == list(sampler(seed=0, epoch=1))
    for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))):
        # Not the same batches in another order either: neighbours change.
        same = {frozenset(batch) for batch in orders[a]} & {frozenset(batch) for batch in orders[b]}
        assert len(same) < 0.3 * len(orders[a])


def test_batches_are_not_in_the_order_of_length():
    made = sampler(max_groups=4)
    means = [sum(made.lengths[i] for i in batch) / len(batch) for batch in made]
    half = len(means) // 2
    assert sum(means[:half]) / half == pytest.approx(sum(means[half:]) / (len(means) - half), rel=0.35)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [300, 37, 5, 1])
def test_ranks_have_as_many_batches_and_share_the_groups(ranks, n):
    for epoch in range(3):
        on = [sampler(n=n, ranks=ranks, rank=rank, accumulation=2, epoch=epoch) for rank in range(ranks)]
        batches = [list(made) for made in on]
        assert {len(b) for b in batches} == {len(made) for made in on} and len(set(map(len, on))) == 1
        counted = [b[:-1] if made.last_is_repeated else b for made, b in zip(on, batches, strict=True)]
        assert sorted(i for b in counted for i in flat(b)) == list(range(n))
        repeated = sum(made.last_is_repeated for made in on)
        assert repeated < ranks and (repeated == 0 or n < 2 * ranks)


@pytest.mark.parametrize("n", [300, 37, 5])
def test_a_step_holds_the_same_groups_however_it_is_spread(n):
    """8 batches a step as 1 rank x 8, 2 x 4, 4 x 2, 8 x 1."""
    told = []
    for ranks in (1, 2, 4, 8):
        on = [sampler(n=n, ranks=ranks, rank=rank, accumulation=8 // ranks, epoch=1) for rank in range(ranks)]
        batches = [list(made) for made in on]
        steps = range(0, len(on[0]), 8 // ranks)
        told.append([{i for b in batches for i in flat(b[start : start + 8 // ranks])} for start in steps])
    assert told[0] == told[1] == told[2] == told[3]


def test_within_a_step_ranks_work_on_similar_batches():
    on = [sampler(ranks=2, rank=rank, accumulation=4, max_groups=4) for rank in range(2)]
    gaps, spread = 0, 0
    for a, b in zip(*on, strict=True):
        gaps += abs(on[0].tokens(a) - on[0].tokens(b))
    whole = [made.tokens(batch) for made in on for batch in made]
    spread = sum(abs(x - y) for x, y in zip(whole[::2], whole[1::2], strict=True))
    assert gaps < spread


def test_equal_lengths_mix_freely():
    first, second = (TokenBatchSampler([50] * 64, max_tokens=200, max_groups=8, seed=seed) for seed in (0, 1))
    assert len(first) == len(second) == 16
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}
