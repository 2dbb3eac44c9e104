"""A trainer on shards: trains like the data set in memory, resumes, and reads the log-probs that a job has written."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import Sampler

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.data import BadRow
from contrastive_align.data.files import read_files, read_folder
from contrastive_align.launch import cli


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "temperature_alpha": 0.1,
    "max_length": 64,
}
SIZES = (9, 1, 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = demo.load_reward_dataset()["train"].select(range(26)).to_list()
    folder = tmp_path / "data"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        write(folder / f"part-{i}.jsonl", [rows.pop(0) for _ in range(size)])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Logging(ContrastiveTrainer):
    """Notes the rows of every step, and the reference's log-probs."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            numbers = inputs["row"].tolist() if "row" in inputs else [0] * len(inputs["scores"])
            rows = [row if weight else None for row, weight in zip(numbers, inputs["group_weights"], strict=True)]
            self.seen = [*getattr(self, "seen", []), (self.state.global_step, rows)]
            self.ref_logps = [*getattr(self, "ref_logps", []), outputs["ref_logps"].detach()]
        return (loss, outputs) if return_outputs else loss


@pytest.fixture
def make(tiny_llama, folder, tmp_path):
    def build(dataset=None, *, trainer=Logging, peft_config=None, **options):
        told = {"output_dir": str(tmp_path / "out"), **COMMON, **options}
        rows = read_folder(folder, streaming=True)["train"] if dataset is None else dataset
        return trainer(tiny_llama(), args=ContrastiveConfig(**told), train_dataset=rows, peft_config=peft_config)

    return build


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gap(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_shards_train_like_the_dataset_in_their_order(make, folder):
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in map(json.loads, file.read_text().splitlines())]
    trained = []
    for dataset in (None, Dataset.from_list(rows)):
        trainer = make(dataset, gradient_accumulation_steps=2)
        if trained:
            trainer._get_train_sampler = EachTime([row for _, batch in trained[0].seen for row in batch])
        trainer.train()
        assert trainer.state.global_step == 8  # two passes of 26 groups, without max_steps
        trained.append(trainer)
    assert gap(*map(weights, trained)) < 1e-6


class EachTime(Sampler):
    """A function that gives a sampler of these numbers, 26 in a pass."""

    def __init__(self, order):
        self.passes = iter([order[:26], order[26:]])

    def __call__(self, dataset):
        return self

    def __len__(self):
        return 26

    def __iter__(self):
        return iter(next(self.passes))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_group_once_an_epoch_and_a_resumed_run_goes_on(make, tmp_path, workers):
    options = {"dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": 5}
    whole = make(**options)
    whole.train()
    rows = [row for _, batch in whole.seen for row in batch]
    assert sorted(rows[:26]) == sorted(rows[26:]) == list(range(26)) and rows[:26] != rows[26:]
    assert (whole.data_reports["train"].rows, whole.data_reports["train"].groups) == (26, 26)
    for step, size, accumulation in ((5, 4, 1), (10, 2, 2)):  # in the first and in the second pass
        resumed = make(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        left = [row for at, batch in whole.seen if at >= step for row in batch]
        assert [row for _, batch in resumed.seen for row in batch if row is not None] == left
        assert gap(weights(whole), weights(resumed)) < 1e-6


def test_another_place_in_the_stream_is_refused(make, folder, tmp_path):
    make(save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for options, match in (
        ({"per_device_train_batch_size": 2}, r"4 rows of the stream in a step .* Set gradient_accumulation_steps=2\."),
        ({"per_device_train_batch_size": 3}, "their product is the same"),
        ({"data_seed": 1}, r"data_seed=42 \(by default the seed\), and this run has 1: .* Set data_seed=42"),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options).train(resume_from_checkpoint=checkpoint)
    (folder / "part-1.jsonl").unlink()
    with pytest.raises(ValueError, match=r"other shards than these: 'part-1\.jsonl' is not there in both"):
        make().train(resume_from_checkpoint=checkpoint)


def test_rows_that_are_dropped_leave_batches_that_weigh_less(make, folder):
    rows = [json.loads(line) for line in (folder / "part-2.jsonl").read_text().splitlines()]
    for row in rows[4:8]:
        row["scores"] = []
    write(folder / "part-2.jsonl", rows)
    trainer = make(on_bad_row="drop", per_device_train_batch_size=1, num_train_epochs=1)
    trainer.train()
    assert trainer.data_reports["train"].dropped == 4 and len(trainer.seen) == 26
    found = [row for _, [row] in trainer.seen if row is not None]
    assert sorted(found) == [row for row in range(26) if row not in range(14, 18)]
    with pytest.raises(BadRow, match=r"^train, part-2\.jsonl, row [4-7]: 'scores'"):
        make(dataloader_num_workers=1).train()


def test_a_stream_is_evaluated_like_the_dataset(make, folder, tiny_llama):
    trainer = make(per_device_eval_batch_size=4, num_train_epochs=1)
    stream = read_files(sorted(folder.glob("*.jsonl")), streaming=True)
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in map(json.loads, file.read_text().splitlines())]
    found = [trainer.evaluate(dataset) for dataset in (stream, Dataset.from_list(rows))]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)
    assert trainer.last_evaluation["loss"].n == 26


# ------------------------------------------------------------------------------------------------- cached log-probs


def job(tiny_llama, folder, *flags):
    told = ["--use_cpu=true", "--bf16=false", "--max_length=64", "--disable_tqdm=true", *flags]
    return cli.main(["reference", f"--model_name_or_path={tiny_llama()}", f"--dataset_name={folder}", *told])


def test_log_probs_of_a_job_equal_live_ones_for_any_loss_and_adapter(make, folder, tiny_llama, capsys):
    counts = job(tiny_llama, folder)
    assert (counts["written"], counts["groups"]) == (3, 26) and "3 shards written (26 groups" in capsys.readouterr().out
    assert Path(counts["folder"]).parent == folder / ".reference"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for options in ({}, {"beta": 0.5, "loss_type": "dpo", "num_train_epochs": 1}, {"peft_config": lora}):
        live, cached = (make(precompute_ref_log_probs=cached, **options) for cached in (False, True))
        for trainer in (live, cached):
            trainer.train()
        assert live.seen == cached.seen
        for a, b in zip(live.ref_logps, cached.ref_logps, strict=True):
            assert torch.allclose(a, b, rtol=5e-7, atol=0)  # four steps of a float32
        assert gap(weights(live), weights(cached)) < 1e-6


def test_jobs_share_the_work_and_do_again_what_has_changed(folder, tiny_llama, tmp_path):
    other = tmp_path / "elsewhere"
    first = job(tiny_llama, folder, f"--output={other}")
    assert first["written"] == 3 and not (folder / ".reference").exists()
    again = job(tiny_llama, folder, f"--output={other}")
    assert (again["written"], again["there"]) == (0, 3)
    rows = (folder / "part-0.jsonl").read_text()
    (folder / "part-0.jsonl").write_text(rows)  # as it was, but newer
    assert job(tiny_llama, folder, f"--output={other}")["written"] == 0
    (folder / "part-0.jsonl").write_text(rows.replace("e", "a", 1))  # of the same size
    found = job(tiny_llama, folder, f"--output={other}")
    assert (found["written"], found["there"], found["folder"]) == (1, 2, first["folder"])


def test_missing_and_stale_log_probs_are_sentences(make, folder, tiny_llama):
    def refused(match, **options):
        with pytest.raises((ValueError, BadRow), match=match):
            make(precompute_ref_log_probs=True, **options).train()

    refused(r"log-probs of 3 of the 3 shards of the train dataset are missing, .* contrastive-align reference --model")
    written = Path(job(tiny_llama, folder)["folder"])
    refused(r"Those in .* are computed in another precision", model_init_kwargs={"dtype": "bfloat16"})
    refused(r"row 0: its tokens are not those that .* has reference log-probs of", max_length=20)
    (written / "part-1.jsonl.parquet").unlink()
    refused(r"1 of the 3 shards .* the first: .*part-1\.jsonl\.parquet")
    job(tiny_llama, folder)
    with (folder / "part-2.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]}) + "\n")
    refused(r"part-2\.jsonl\.parquet are stale")
    (written / "part-2.jsonl.parquet").write_bytes(b"no table")
    refused(r"part-2\.jsonl\.parquet are stale")
    with pytest.raises(ValueError, match="ref_log_probs_folder is given without precompute_ref_log_probs"):
        make(ref_log_probs_folder=str(written.parent))
    whole = Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]}])
    with pytest.raises(ValueError, match="ref_log_probs_folder holds the log-probs of shards that are streamed"):
        make(whole, precompute_ref_log_probs=True, ref_log_probs_folder=str(written.parent))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "no shards are named"),
        (["--dataset_name=x.jsonl"], "no reference is named"),
        (
            ["--dataset_name=x.jsonl", "--model_name_or_path=m", "--precompute_ref_log_probs=true"],
            "belongs to training",
        ),
    ],
)
def test_what_a_job_cannot_use_is_refused(flags, match, capsys):
    with pytest.raises(SystemExit):
        cli.main(["reference", *flags])
    assert match in capsys.readouterr().err
