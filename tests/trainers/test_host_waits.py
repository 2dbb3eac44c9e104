"""How often a training step makes the host wait for the device: on a GPU each such operation is a synchronisation."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small_trainers import COLUMNS, COMMON
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from contrastive_align.sampling import decode


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def waits(monkeypatch):
    """Counts of operations of which the host must read a value, or the shape of the result."""
    monkeypatch.syspath_prepend(FOLDER)
    from host_waits import Waits

    yield Waits()
    sys.modules.pop("host_waits")


def waits_of_the_last_step(trainer, waits, monkeypatch):
    """The waits of the second step, of which the first one's checks are no part."""
    step = trainer.training_step

    def watched(*args):
        waits.found.clear()
        with waits:
            return step(*args)

    monkeypatch.setattr(trainer, "training_step", watched)
    trainer.train()
    return waits.found.copy()


def model_of(column, layers, folder):
    config = AutoConfig.from_pretrained(column.model_path())
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(column.model_path()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("column", [c for c in COLUMNS if c.is_contrastive or c.is_conditional], ids=str)
def test_waits_do_not_grow_with_completions_or_layers(column, tmp_path, monkeypatch, waits, layout):
    found = []
    for k, layers in ((2, 1), (6, 3)):
        told = {"model": model_of(column, layers, tmp_path / f"{layers} layers")}
        if column.is_contrastive:
            row = {
                "prompt": "a b",
                "completions": [" c a", " b", " c", " a b", " a a c", " b b"][:k],
                "scores": [*range(k)],
            }
            told["train_dataset"] = Dataset.from_list([row] * 8)
        trainer = column.make(tmp_path / str(k), told=told, layout=layout, max_steps=2, per_device_train_batch_size=4)
        assert trainer.layout == layout
        found.append(waits_of_the_last_step(trainer, waits, monkeypatch))
    assert found[0].total() == found[1].total() <= waits_of_trl(column, tmp_path, waits, monkeypatch), found


def test_drawing_waits_once_in_eight_tokens(tmp_path, monkeypatch, waits):
    """Transformers itself asks once a token whether a padding mask masks anything; that is not counted."""
    model = LlamaForCausalLM.from_pretrained(model_of(COLUMNS[0], 2, tmp_path))
    monkeypatch.delitem(decode.LOOK_EVERY, "cpu")
    found = []
    for tokens in (8, 24):
        waits.found.clear()
        with waits:
            drawn = decode.draw(
                model,
                [[3, 4], [5]],
                per_prompt=4,
                seeds=[0, 1],
                max_new_tokens=tokens,
                eos_token_ids=[],
                pad_token_id=0,
            )
        assert all(len(ids) == tokens for group in drawn.completion_ids for ids in group)
        found.append(sum(n for line, n in waits.found.items() if "contrastive_align/" in line))
    assert found[1] - found[0] == 2, waits.found


def waits_of_trl(column, folder, waits, monkeypatch):
    rows = Dataset.from_list([{"prompt": "a b", "chosen": " c a", "rejected": " b"}] * 8)
    args = DPOConfig(output_dir=str(folder / "trl"), **COMMON | {"max_steps": 2, "per_device_train_batch_size": 4})
    trainer = DPOTrainer(model_of(column, 1, folder / "one layer"), args=args, train_dataset=rows)
    return waits_of_the_last_step(trainer, waits, monkeypatch).total()
