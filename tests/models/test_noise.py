"""The same completions in other batches: the same log-probs, up to rounding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from contrastive_align.data import GroupCollator
from contrastive_align.models.layout import set_layout
from contrastive_align.models.logps import completion_logps
from contrastive_align.models.noise import WIDER, gap_per_token, measure_noise, other_batches
from contrastive_align.trl_seam import add_fused_lm_head


GROUPS = [
    {"prompt_ids": [3, 4, 5], "completion_ids": [[6, 7, 8, 9], [10], [11, 12]], "scores": [0.0] * 3},
    {"prompt_ids": [7], "completion_ids": [[8, 3, 5], [13]], "scores": [0.0] * 2},
]


def test_errors_of_a_sum_grow_as_the_square_root_of_its_tokens():
    lengths = torch.randint(1, 200, (4000,), generator=torch.Generator().manual_seed(0))
    errors = torch.stack(
        [torch.randn(int(n), generator=torch.Generator().manual_seed(i)).sum() for i, n in enumerate(lengths)]
    )
    of_short, of_long = (
        gap_per_token(errors[some], torch.zeros(()), lengths[some]) for some in (lengths < 20, lengths > 150)
    )
    assert of_short == pytest.approx(1, abs=0.1) and of_long == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("wanted", ["padded", "shared"])
def test_other_batches_have_the_same_completions(tiny_llama, wanted):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama()).double()
    add_fused_lm_head(model)
    layout = set_layout([model], wanted)
    batch, sizes = GroupCollator(0)(GROUPS), []

    def score(batch):
        found = completion_logps(model, batch, layout=layout, token_stats=False)
        sizes.append(tuple(batch["input_ids"].shape))
        return found.logps[batch["valid"]], found.lengths[batch["valid"]]

    with torch.no_grad():
        logps, lengths = score(batch)
        ways = other_batches(batch, rows=4)
        assert measure_noise(logps, lengths, score, ways) < 1e-12
        assert sizes == [(5, 7), (1, 7), (1, 4), (1, 5), (1, 4), (10, 7 + WIDER)]
        shift = torch.tensor(
            [0.0, 0.0, 0.0, 0.0, 0.3]
        )  # the last completion is not among those alone, but twice in the wide batch
        assert measure_noise(logps + shift, lengths, score, ways[:1]) < 1e-12
        assert measure_noise(logps + shift, lengths, score, ways) == pytest.approx(0.3 / 5**0.5)


@pytest.mark.parametrize(("room", "width"), [(0, 7), (-3, 7), (2, 9), (1000, 7 + WIDER)])
def test_more_padding_within_the_room_there_is(room, width):
    (twice,) = other_batches(GroupCollator(0)(GROUPS), rows=4, room=room)[1]
    assert {tuple(twice[name].shape) for name in ("input_ids", "attention_mask", "completion_mask")} == {(10, width)}
