"""Token ids -> GroupBatch: ragged groups, masks, types."""

import pytest
import torch

from contrastive_align.data import GroupCollator


def example(prompt: list[int], completions: list[list[int]], scores: list[float], **more) -> dict:
    return {"prompt_ids": prompt, "completion_ids": completions, "scores": scores, **more}


RAGGED = [
    example([1, 2, 3], [[4], [5, 6]], [0.5, 2.0]),
    example([7], [[8, 9], [10], [11, 12, 13], [14]], [0.0, -1.0, 3.0, 1.0]),
    example([15, 16], [[17], [18], [19]], [1.0, 1.0, 1.0]),
]


def test_rows_are_the_valid_entries_in_row_major_order():
    batch = GroupCollator(pad_token_id=0)(RAGGED)
    assert batch["valid"].tolist() == [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["completion_mask"].shape == (9, 5)
    rows = [(g, k) for g in range(3) for k in range(4) if batch["valid"][g, k]]
    for n, (g, k) in enumerate(rows):
        prompt, completion = RAGGED[g]["prompt_ids"], RAGGED[g]["completion_ids"][k]
        kept = batch["attention_mask"][n].bool()
        assert batch["input_ids"][n][kept].tolist() == prompt + completion
        assert batch["input_ids"][n][batch["completion_mask"][n].bool()].tolist() == completion
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # padded on the right
        assert batch["scores"][g, k] == RAGGED[g]["scores"][k]
    assert batch["scores"][~batch["valid"]].eq(0).all()


def test_padding_differs_from_the_mask_where_pad_is_eos():
    """With pad = EOS, the EOS of a completion still counts, and padding never does."""
    batch = GroupCollator(pad_token_id=2)([example([5], [[6, 2], [7, 8, 2]], [1, 0])])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2], [5, 7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_integer_scores_become_floats():
    batch = GroupCollator(pad_token_id=0)([example([1], [[2], [3]], [1, 0])])
    assert batch["scores"].dtype == torch.float64
    assert batch["valid"].dtype == torch.bool
    assert batch["input_ids"].dtype == batch["completion_mask"].dtype == torch.long


def test_a_zero_score_is_valid():
    batch = GroupCollator(pad_token_id=0)([example([1], [[2], [3]], [0.0, 0.0]), example([1], [[2]] * 3, [0, 0, 1])])
    assert batch["valid"].tolist() == [[True, True, False], [True, True, True]]


def test_reference_log_probs_are_carried_along():
    examples = [{**e, "ref_logps": [-float(i + 1) for i in range(len(e["scores"]))]} for e in RAGGED]
    batch = GroupCollator(pad_token_id=0)(examples)
    assert batch["ref_logps"].tolist() == [[-1, -2, 0, 0], [-1, -2, -3, -4], [-1, -2, -3, 0]]
    assert batch["ref_logps"].dtype == torch.float32
    assert "ref_logps" not in GroupCollator(pad_token_id=0)(RAGGED)


@pytest.mark.parametrize("multiple, length", [(None, 5), (1, 5), (4, 8), (5, 5), (8, 8)])
def test_pad_to_multiple_of(multiple, length):
    batch = GroupCollator(pad_token_id=0, pad_to_multiple_of=multiple)(RAGGED)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert batch[name].shape == (9, length)
    assert batch["attention_mask"].sum() == sum(
        len(e["prompt_ids"]) + len(c) for e in RAGGED for c in e["completion_ids"]
    )


def test_neighbours_change_nothing_but_the_padding():
    together = GroupCollator(pad_token_id=0)(RAGGED)
    alone = [GroupCollator(pad_token_id=0)([e]) for e in RAGGED]
    row = 0
    for g, batch in enumerate(alone):
        n, length = batch["input_ids"].shape
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert torch.equal(together[name][row : row + n, :length], batch[name])
            assert together[name][row : row + n, length:].eq(0).all()
        assert torch.equal(together["scores"][g][together["valid"][g]], batch["scores"][0])
        row += n
