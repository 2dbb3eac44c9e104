"""ContrastiveTrainer against TRL, against itself under other batchings, and its promises about the reference."""

import json
import logging
import math
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from distributed_worker import unpadded, watch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

import contrastive_align.trainers.contrastive as module
from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.losses import LOSSES, label_entropy, target_labels, temperature_for_entropy
from contrastive_align.models.shared_prompt import pack
from contrastive_align.trainers.reference import REFERENCE_FILE, ReferenceMismatch


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "beta": 0.5,
}


@pytest.fixture(scope="module")
def groups():
    return demo.load_reward_dataset()["train"].select(range(26))


@pytest.fixture(scope="module")
def pairs():
    return demo.load_preference_dataset()["train"].select(range(8))


@pytest.fixture
def make(tiny_llama, tmp_path, groups):
    """A trainer on a tiny random Llama; keywords of the config, or of the trainer where they are its own."""
    path = tiny_llama()

    def build(trainer=ContrastiveTrainer, config=ContrastiveConfig, **kwargs):
        own = ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config", "callbacks", "data_collator")
        mine = {k: kwargs.pop(k) for k in own if k in kwargs}
        mine = {"model": path, "train_dataset": groups, **mine}
        return trainer(args=config(**{"output_dir": str(tmp_path / "out"), **COMMON, **kwargs}), **mine)

    return build


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_gap(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ------------------------------------------------------------------------------------------------------- against TRL


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "DPO"), ("nca_pair", "NCA"), ("bco_pair", "biasedNCA")])
def test_pairs_equal_trl(make, pairs, theirs, ours):
    """Loss and every gradient of one step, and the weights after several, through the two trainers."""
    seen = []
    for trainer, config, name in ((DPOTrainer, DPOConfig, theirs), (ContrastiveTrainer, ContrastiveConfig, ours)):
        t = make(trainer, config, loss_type=[name], train_dataset=pairs, max_steps=4, gradient_accumulation_steps=2)
        t.model.train()
        with torch.no_grad():  # away from policy = reference, where many losses look alike
            for p in t.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        batch = t.data_collator([t.train_dataset[i] for i in range(4)])
        loss = t.compute_loss(t.model, t._prepare_inputs(batch))
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in t.model.named_parameters()}
        t.model.zero_grad()
        t.train = lambda t=t: None
        seen.append((loss.item(), gradients))
        fresh = make(trainer, config, loss_type=[name], train_dataset=pairs, max_steps=4, gradient_accumulation_steps=2)
        fresh.train()
        seen[-1] += (weights(fresh), fresh.state.log_history)
    (loss_a, grad_a, weights_a, log_a), (loss_b, grad_b, weights_b, log_b) = seen
    assert loss_a == pytest.approx(loss_b, abs=1e-5)
    assert largest_gap(grad_a, grad_b) < 1e-5
    assert largest_gap(weights_a, weights_b) < 1e-5
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert [e[name] for e in log_a if name in e] == pytest.approx([e[name] for e in log_b if name in e], abs=1e-4)


def test_our_loss_is_the_one_that_ran(make, monkeypatch):
    monkeypatch.setitem(LOSSES, "nca", lambda log_ratios, scores, **_: 0 * log_ratios.sum(-1) + 42.0)
    trainer = make(max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == [42.0]


# --------------------------------------------------------------------------------------------- batching and processes


@pytest.mark.parametrize("loss_type", [["nca"], ["info_nca", "sft"], ["dpo"], ["plackett_luce"]])
def test_ragged_batch_equals_one_group_at_a_time(make, loss_type):
    trainer = make(loss_type=loss_type, temperature_alpha=0.3)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.1)
    rows = [trainer.train_dataset[i] for i in range(8)]
    assert len({len(row["scores"]) for row in rows}) > 2

    def gradients(batches):
        trainer.model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(batch)))
            (loss * len(batch) / len(rows)).backward()
            total += loss.item() * len(batch) / len(rows)
        return total, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}

    together, alone = gradients([rows]), gradients([[row] for row in rows])
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    assert largest_gap(together[1], alone[1]) < 1e-5


def test_accumulation_and_uneven_last_batch(make):
    """26 groups, 8 a step: 1 x 8 = 8 x 1 = 4 x 2 = 3 x ... over an epoch whose last step has 2."""
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (4, 2)):
        trainer = make(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_train_epochs=2, beta=0.1
        )
        trainer.train()
        runs.append((weights(trainer), trainer.state.log_history))
    for other, log in runs[1:]:
        assert largest_gap(runs[0][0], other) < 1e-6
        for name in ("loss", "rewards/rank_0", "rewards/kendall_tau", "entropy", "logps/best", "groups/no_signal"):
            assert [e[name] for e in log if name in e] == pytest.approx(
                [e[name] for e in runs[0][1] if name in e], rel=1e-4, abs=1e-6
            ), name


def test_evaluation_is_the_mean_over_groups_whatever_the_batches(make, groups):
    results = []
    for size in (1, 3, 7, 26):
        trainer = make(per_device_eval_batch_size=size, eval_dataset=groups)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.1)
        results.append({k: v for k, v in trainer.evaluate().items() if "/" in k or k == "eval_loss"})
        assert trainer.last_evaluation["loss"].n == len(groups)
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=1e-6)


def test_a_stream_trains_like_the_dataset(make, groups):
    stream = IterableDataset.from_generator(lambda: iter(groups.to_list()))
    runs = []
    for dataset in (groups, stream):
        trainer = make(train_dataset=dataset, max_steps=5, train_sampling_strategy="random", temperature_alpha=0.1)
        if dataset is groups:  # a stream comes in order
            trainer._get_train_sampler = torch.utils.data.SequentialSampler
        trainer.train()
        runs.append(weights(trainer))
    assert largest_gap(*runs) < 1e-6


# --------------------------------------------------------------------------------------------------- batches by tokens


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_without_a_token_budget_the_order_is_trls(make, pairs, layout):
    orders = []
    ours = ContrastiveTrainer, ContrastiveConfig, {"layout": layout}
    for trainer, config, kwargs in ((DPOTrainer, DPOConfig, {}), ours):
        t = make(trainer, config, train_dataset=pairs, per_device_train_batch_size=3, **kwargs)
        loader, order = t.get_train_dataloader(), []
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                rows = unpadded(batch)
                order.append(rows[: len(rows) // 2] if trainer is DPOTrainer else rows[::2])  # the chosen ones
        orders.append(order)
    assert orders[0] == orders[1] and len(orders[0]) == 6


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_step_by_tokens_over_all_groups_is_a_step_of_one_batch(make, layout):
    runs = []
    for kwargs in (
        {"per_device_train_batch_size": 26},
        {"max_tokens_per_batch": 200, "gradient_accumulation_steps": 64},
        {"max_tokens_per_batch": 500, "gradient_accumulation_steps": 64, "per_device_train_batch_size": 7},
    ):
        trainer = make(layout=layout, num_train_epochs=3, beta=0.1, **kwargs)
        trainer.train()
        assert trainer.state.global_step == 3
        runs.append((weights(trainer), logged(trainer, "loss")))
    for other, losses in runs[1:]:
        assert largest_gap(runs[0][0], other) < 1e-6
        assert losses == pytest.approx(runs[0][1], rel=1e-5)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_steps_by_tokens(make, layout):
    """Every group once a pass, budget and counts kept, the loss of a step the mean over its groups."""
    trainer = make(layout=layout, max_tokens_per_batch=200, gradient_accumulation_steps=2, num_train_epochs=3)
    seen = watch(trainer)
    loader = trainer.get_train_dataloader()
    assert {len(batch["scores"]) for batch in loader} == {len(batch) for batch in loader.batch_sampler} != {4}
    tokens = trainer._group_weights.by_tokens.tokens
    for batch, numbers in zip(loader, loader.batch_sampler, strict=True):
        padded, shared = batch["input_ids"].numel(), pack(batch)[0]["input_ids"].numel() + len(numbers)
        assert tokens(numbers) == (padded if layout == "padded" else shared) <= 200
    trainer.train()
    steps = math.ceil(len(loader) / 2)
    assert trainer.state.max_steps == trainer.state.global_step == 3 * steps and trainer.state.epoch == 3
    orders = [[n for step, n, *_ in seen if step // steps == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(26)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for number, loss in enumerate(logged(trainer, "loss")):
        losses = [value for step, _, _, value in seen if step == number]
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert trainer.get_total_train_batch_size(trainer.args) == round(26 / steps)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_by_tokens(make, tmp_path, workers):
    """Inside the second pass, whose order is another than the first's."""
    kwargs = {"max_tokens_per_batch": 200, "gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    kwargs |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = make(output_dir=str(tmp_path / "whole"), **kwargs)
    whole.train()
    steps = whole.state.global_step
    resumed = make(output_dir=str(tmp_path / "resumed"), **kwargs)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{steps - 2}")
    assert steps // 2 < steps - 2
    assert largest_gap(weights(whole), weights(resumed)) < 1e-6
    assert logged(resumed, "logps/best_delta") == pytest.approx(logged(whole, "logps/best_delta"), abs=1e-4)


def test_by_tokens_the_seed_of_the_data_decides(make):
    def order(**seeds):
        loader = make(max_tokens_per_batch=200, **seeds).get_train_dataloader()
        return [batch["input_ids"].tolist() for batch in loader]

    assert order() == order(seed=42) == order(seed=1, data_seed=42) != order(seed=1)


def test_groups_above_the_token_budget_are_reported(make, caplog):
    logging.getLogger("transformers").propagate = True
    for name in ("transformers", "contrastive_align.trainers.batches"):
        logging.getLogger(name).propagate = True
    trainer = make(max_tokens_per_batch=70, max_steps=1)
    sizes = [len(row["prompt_ids"]) + sum(map(len, row["completion_ids"])) for row in trainer.train_dataset]
    above = [i for i, size in enumerate(sizes) if size > 70]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count(f"{len(above)} of 26 groups alone have more than max_tokens_per_batch=70") == 1
    assert f"(up to {max(sizes)})" in caplog.text and f"{above[:5]}" in caplog.text


def test_streams_by_tokens_are_refused(make, groups):
    stream = IterableDataset.from_generator(lambda: iter(groups.to_list()))
    with pytest.raises(ValueError, match="max_tokens_per_batch needs to know the length"):
        make(train_dataset=stream, max_tokens_per_batch=100, max_steps=1)


# ----------------------------------------------------------------------------------------------------- the reference


def test_killed_and_resumed_ends_with_the_same_weights(make, tmp_path):
    kwargs = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch"}
    whole = make(output_dir=str(tmp_path / "whole"), **kwargs)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "killed" / "checkpoint-5")
    resumed = make(output_dir=str(tmp_path / "killed"), **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert largest_gap(weights(whole), weights(resumed)) < 1e-6
    assert logged(resumed, "logps/best_delta") == pytest.approx(logged(whole, "logps/best_delta"), abs=1e-4)


@pytest.mark.parametrize("way", ["lora", "cached", "accumulated"])
def test_killed_and_resumed_in_other_ways(make, tmp_path, way):
    kwargs = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    if way == "lora":
        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if way == "cached":
        kwargs["precompute_ref_log_probs"] = True
    if way == "accumulated":
        kwargs |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    whole = make(output_dir=str(tmp_path / "whole"), **kwargs)
    whole.train()
    resumed = make(output_dir=str(tmp_path / "resumed"), **kwargs)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    assert largest_gap(weights(whole), weights(resumed)) < 1e-6


def test_a_shuffled_stream_resumes(make, groups, tmp_path):
    def stream():
        return IterableDataset.from_generator(lambda: iter(groups.to_list())).shuffle(seed=3, buffer_size=10)

    # A pass has 7 steps.
    kwargs = {"max_steps": 9, "save_strategy": "steps", "save_steps": 7, "temperature_alpha": 0.1}
    make(train_dataset=stream(), **kwargs).train()
    make(train_dataset=stream(), **kwargs).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))


def test_training_twice_goes_on(make):
    trainer = make(max_steps=2)
    trainer.train()
    trainer.train()


def test_resuming_with_another_reference_stops(make, tiny_llama, tmp_path):
    kwargs = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(**kwargs).train()
    assert (tmp_path / "out" / "checkpoint-1" / REFERENCE_FILE).is_file()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for given in (str(checkpoint), checkpoint):
        with pytest.raises(ReferenceMismatch, match="checkpoint-1"):
            make(model=tiny_llama(seed=1), **kwargs).train(resume_from_checkpoint=given)


def test_policy_that_is_not_the_reference_stops_at_step_0(make, tiny_llama):
    changed = AutoModelForCausalLM.from_pretrained(tiny_llama())
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(ReferenceMismatch, match="Before the first step"):
        make(model=changed, max_steps=1).train()
    make(model=changed, ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama()), max_steps=1).train()


@pytest.mark.parametrize("loss", ["nca", "info_nca"])
def test_step_0_loss(make, groups, loss):
    trainer = make(loss_type=[loss], max_steps=1, per_device_train_batch_size=26)
    trainer.train()
    ks = [len(s) for s in groups["scores"]]
    want = 2 * math.log(2) if loss == "nca" else sum(map(math.log, ks)) / len(ks)
    assert logged(trainer, "loss")[0] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_precomputed_reference_trains_alike(make, groups, peft, monkeypatch):
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if peft else None
    runs = []
    for cached in (False, True, True):
        if len(runs) == 2:
            monkeypatch.setattr(
                ContrastiveTrainer, "_reference_logps_of_all", lambda *a: pytest.fail("the cache was not used")
            )
        trainer = make(precompute_ref_log_probs=cached, num_train_epochs=1, peft_config=peft_config)
        assert ("ref_logps" in trainer.train_dataset.column_names) == cached
        trainer.train()
        runs.append(weights(trainer))
    assert largest_gap(runs[0], runs[1]) < 1e-6
    assert largest_gap(runs[1], runs[2]) < 1e-6


def test_the_cache_knows_the_models_config(make, tiny_llama, tmp_path):
    """The same weights under another rope_theta are another reference."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llama(), other)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    (other / "config.json").write_text(json.dumps(config))
    first = make(precompute_ref_log_probs=True)
    second = make(model=str(other), precompute_ref_log_probs=True, max_steps=1)
    assert first.train_dataset["ref_logps"][0] != second.train_dataset["ref_logps"][0]
    second.train()


def test_a_column_of_reference_log_probs_is_not_taken_for_the_reference(make):
    rows = make().train_dataset.to_list()
    trainer = make(train_dataset=Dataset.from_list([{**row, "ref_logps": [0.0] * len(row["scores"])} for row in rows]))
    assert "ref_logps" not in trainer.train_dataset.column_names
    trainer.train()
    assert logged(trainer, "logps/best_delta")[0] == pytest.approx(0, abs=1e-4)


def test_token_ids_are_checked_and_cut_like_text(make):
    rows = make().train_dataset.to_list()
    trainer = make(train_dataset=Dataset.from_list(rows), max_length=20)
    longest = max(len(r["prompt_ids"]) + len(c) for r in trainer.train_dataset for c in r["completion_ids"])
    assert longest == 20
    with pytest.raises(ValueError, match="row 3: 'completion_ids' has 1 completion"):
        rows[3] |= {"completion_ids": rows[3]["completion_ids"][:1], "scores": [1.0]}
        make(train_dataset=Dataset.from_list(rows))


def test_metrics_survive_an_evaluation_at_the_end_of_an_epoch(make, groups):
    trainer = make(
        eval_dataset=groups, eval_strategy="steps", eval_steps=7, logging_strategy="epoch", num_train_epochs=1
    )
    trainer.train()
    assert len(logged(trainer, "rewards/margins")) == 1


def test_bf16_trains_and_checks_the_reference(make, tiny_llama):
    trainer = make(bf16=True, max_steps=2)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(2 * math.log(2), abs=1e-3)


def test_precompute_refuses_a_stream(make, groups):
    stream = IterableDataset.from_generator(lambda: iter(groups.to_list()))
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True needs a dataset with a length, found a stream"):
        make(train_dataset=stream, precompute_ref_log_probs=True, max_steps=1, temperature_alpha=0.1)


def test_trdpo_reference_moves_and_resuming_it_stops(make, tmp_path):
    kwargs = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3, "save_strategy": "steps"}
    trainer = make(**kwargs, save_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.ref_model.named_parameters()}
    trainer.train()
    after = dict(trainer.ref_model.named_parameters())
    assert max((before[n] - after[n]).abs().max().item() for n in before) > 0
    with pytest.raises(ReferenceMismatch, match="sync_ref_model"):
        make(**kwargs, save_steps=2).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# ---------------------------------------------------------------------------------------------------- options, metrics


def test_loss_mixture(make):
    single = {name: make(loss_type=[name], max_steps=1) for name in ("nca", "sft")}
    mixed = make(loss_type=["NCA", "sft"], loss_weights=[1.0, 0.1], max_steps=1)
    for trainer in (*single.values(), mixed):
        trainer.train()
    nca, sft = (logged(single[name], "loss")[0] for name in ("nca", "sft"))
    assert logged(mixed, "loss")[0] == pytest.approx(nca + 0.1 * sft, rel=1e-5)
    assert logged(mixed, "loss/sft")[0] == pytest.approx(sft, rel=1e-5)


def test_every_loss_trains(make, pairs):
    for name in LOSSES:
        trainer = make(loss_type=[name], max_steps=2, train_dataset=pairs)
        start = weights(trainer)
        trainer.train()
        assert largest_gap(start, weights(trainer)) > 0, name


def test_first_score_bonus_decides_ties(make):
    tied = Dataset.from_list([{"prompt": "Say it.", "completions": ["a", "b"], "scores": [1.0, 1.0]}] * 4)
    trainer = make(train_dataset=tied, max_steps=1, first_score_bonus=0.01, temperature_alpha=1e-4)
    trainer.train()
    assert logged(trainer, "labels/entropy")[0] == pytest.approx(0, abs=1e-6)
    trainer = make(train_dataset=tied, max_steps=1)
    trainer.train()
    assert logged(trainer, "labels/entropy")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"f_alpha_divergence_coef": 0.1},
        {"label_smoothing": 0.1},
        {"use_weighting": True},
        {"discopop_tau": 0.1},
        {"padding_free": True},
        {"truncation_mode": "keep_end"},
        {"per_device_train_batch_size": 0},
        {"pad_token": "<pad>"},
        {"loss_type": ["ipo"]},
        {"loss_type": []},
        {"loss_type": ["nca", "NCA"]},
        {"loss_type": ["nca"], "loss_weights": [1.0, 2.0]},
        {"train_sampling_strategy": "group_by_length"},
        {"temperature_alpha": 0.0},
        {"temperature_alpha": "inf"},
        {"temperature_alpha": "warm"},
        {"temperature_alpha": None},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"on_bad_row": "ignore"},
        {"max_prompt_length": 1024},
        {"max_length": 1},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"even_batches": False}},
        {"max_tokens_per_batch": 0},
        {"max_tokens_per_batch": 100, "accelerator_config": {"split_batches": True}},
        {"max_tokens_per_batch": 100, "dataloader_drop_last": True},
    ],
    ids=str,
)
def test_what_is_not_supported_raises(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option)) + "|loss_weights|even_batches|dispatch|Unknown loss_type"):
        ContrastiveConfig(output_dir=str(tmp_path), **{**COMMON, **option})


def test_trainer_arguments_that_are_not_supported_raise(make, groups, tmp_path):
    with pytest.raises(ValueError, match="images"):
        make(train_dataset=groups.add_column("image", [None] * len(groups)))
    with pytest.raises(ValueError, match="compute_metrics"):
        ContrastiveTrainer(
            demo.MODEL_PATH,
            args=ContrastiveConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=groups,
            compute_metrics=lambda p: {},
        )


def test_one_hot_labels_are_reported_with_a_better_temperature(make, caplog):
    logging.getLogger("transformers").propagate = True
    logging.getLogger(module.__name__).propagate = True
    graded = Dataset.from_list([{"prompt": "Say", "completions": ["a", "b", "c"], "scores": [3.0, 2.0, 1.0]}] * 4)
    for kwargs, said in (
        ({"temperature_alpha": 1e-4}, True),
        ({"temperature_alpha": 1.0}, False),
        ({}, False),
        ({"temperature_alpha": 1e-4, "loss_type": ["dpo"]}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make(train_dataset=graded, **kwargs)
        assert ("temperature_alpha='auto' (0.593 here) would use them all" in caplog.text) is said


@pytest.mark.parametrize(
    ("alpha", "labels"), [(1e300, "equal, whatever the scores are"), (1e-45, "one-hot, although 4 of 4")]
)
def test_so_are_labels_of_a_temperature_out_of_all_measure(make, caplog, alpha, labels):
    logging.getLogger("transformers").propagate = True
    graded = Dataset.from_list([{"prompt": "Say", "completions": ["a", "b", "c"], "scores": [3.0, 2.0, 1.0]}] * 4)
    with caplog.at_level(logging.WARNING):
        make(train_dataset=graded, temperature_alpha=alpha)
    assert f"temperature_alpha={alpha:g} makes the labels {labels}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(train_dataset=Dataset.from_list([{"prompt": "Say", "completions": ["a", "b"], "scores": [1.0, 1.0]}] * 4))
    assert "makes the labels" not in caplog.text


# ------------------------------------------------------------------------------------------- temperature_alpha="auto"


def scores_of(dataset):
    rows = [torch.tensor(row, dtype=torch.float64) for row in dataset["scores"]]
    valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), valid


@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_the_auto_temperature_is_the_one_of_the_training_groups(make, groups, bonus):
    scores, valid = scores_of(groups)
    scores[:, 0] += bonus
    same = {"loss_type": "info_nca", "first_score_bonus": bonus, "max_steps": 2, "eval_dataset": groups.select([3, 5])}
    auto = make(**same, temperature_alpha="Auto")
    assert auto.args.temperature_alpha == "auto"
    assert auto.temperature_alpha == temperature_for_entropy(scores, valid=valid)
    given = make(**same, temperature_alpha=auto.temperature_alpha)
    for trainer in (auto, given):
        trainer.train()
    assert largest_gap(weights(auto), weights(given)) == 0
    assert {k: v for k, v in auto.evaluate().items() if "/" in k or k == "eval_loss"} == {
        k: v for k, v in given.evaluate().items() if "/" in k or k == "eval_loss"
    }


def test_evaluation_takes_the_training_groups_temperature(make, groups):
    held_out = Dataset.from_list([{**row, "scores": [2 * s for s in row["scores"]]} for row in groups.select(range(4))])
    trainer = make(temperature_alpha="auto", eval_dataset=held_out)
    scores, valid = scores_of(held_out)
    labels = target_labels(scores, temperature_alpha=trainer.temperature_alpha, valid=valid)
    assert trainer.evaluate()["eval_labels/entropy"] == pytest.approx(label_entropy(labels).mean().item(), abs=1e-6)


def test_a_resumed_run_keeps_the_auto_temperature_of_its_checkpoint(make, groups, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    logging.getLogger(module.__name__).propagate = True
    kwargs = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    whole = make(temperature_alpha="auto", **kwargs)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / module.STATE_FILE).read_text()) == {"temperature_alpha": whole.temperature_alpha}

    scaled = Dataset.from_list([{**row, "scores": [2 * score for score in row["scores"]]} for row in groups])
    for told, expected, said in (
        ({"temperature_alpha": "auto"}, whole.temperature_alpha, ""),
        ({"temperature_alpha": "auto", "train_dataset": scaled}, whole.temperature_alpha, "'auto' remains"),
        ({"temperature_alpha": 0.7, "train_dataset": scaled}, 0.7, ""),
    ):
        caplog.clear()
        resumed = make(output_dir=str(tmp_path / "resumed"), **kwargs, **told)
        with caplog.at_level(logging.WARNING):
            resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.temperature_alpha == resumed.objective()["temperature_alpha"] == expected
        assert ("'auto' remains" in caplog.text) is bool(said)
        if "train_dataset" not in told:
            assert largest_gap(weights(whole), weights(resumed)) < 1e-6

    (checkpoint / module.STATE_FILE).unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(output_dir=str(tmp_path / "resumed"), **kwargs, temperature_alpha="auto").train(str(checkpoint))
    assert "contrastive_state.json, so that its temperature_alpha is not known" in caplog.text


def test_a_stream_needs_a_number_where_labels_are_read(make, groups):
    def stream():
        return IterableDataset.from_generator(lambda: iter(groups.to_list()))

    with pytest.raises(ValueError, match=r"temperature_alpha='auto' is found .* is a stream\. Give a number"):
        make(train_dataset=stream(), max_steps=1, temperature_alpha="auto")
    make(train_dataset=stream(), max_steps=1, temperature_alpha=0.1)
    assert make(train_dataset=stream(), max_steps=1, loss_type="dpo", temperature_alpha="auto").temperature_alpha == 1


def test_pairs_stay_hard_at_the_auto_temperature(make, pairs):
    trainer = make(train_dataset=pairs, eval_dataset=pairs, temperature_alpha="auto")
    assert trainer.temperature_alpha == 1.0  # no label depends on it
    assert trainer.evaluate()["eval_labels/entropy"] == 0


@pytest.mark.parametrize(
    "attribute",
    ["aux_loss_enabled", "loss_types"],
)
def test_trl_still_has_the_attributes_read_here(make, attribute):
    assert hasattr(make(), attribute)


def test_digits_survive_a_trainer_that_casts_floats(make, monkeypatch):
    """DeepSpeed in bf16 casts every float of a batch; scores and reference log-probs must not lose their digits."""
    trainer = make()
    batch = trainer.data_collator([{**trainer.train_dataset[0], "ref_logps": [-1234.567] * 2}])

    def casting(self, data):
        return {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in data.items()}

    monkeypatch.setattr(DPOTrainer, "_prepare_input", casting)
    prepared = trainer._prepare_inputs(batch)
    assert torch.equal(prepared["ref_logps"], batch["ref_logps"]) and torch.equal(prepared["scores"], batch["scores"])


def test_moe_router_loss_is_added(make, tmp_path, tiny_llama):
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path / "moe"
    shutil.copytree(tiny_llama(), path)
    MixtralForCausalLM(config).save_pretrained(path)
    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = make(model=str(path), router_aux_loss_coef=coefficient, max_steps=1)
        trainer.train()
        losses[coefficient] = logged(trainer, "loss")[0]
        aux = logged(trainer, "aux_loss")
    assert losses[0.5] == pytest.approx(losses[0.0] + 0.5 * aux[0], rel=1e-4)


def test_named_evaluation_sets_keep_their_names(make, groups):
    trainer = make(eval_dataset={"a": groups.select(range(5)), "b": groups.select(range(5, 9))})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_a_rewards/margins", "eval_b_logps/best"} <= metrics.keys()


def test_dropout_does_not_reach_the_reference(make):
    peft_config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make(peft_config=peft_config, disable_dropout=False, precompute_ref_log_probs=False)
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    first, second = (trainer.compute_ref_log_probs(trainer.model, batch) for _ in range(2))
    assert torch.equal(first, second) and trainer.model.training


def test_return_outputs(make):
    trainer = make()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(outputs["losses"].mean().item())
    assert outputs["log_ratios"].shape == batch["valid"].shape


def test_model_card_cites_the_paper(make, tmp_path):
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Noise Contrastive Alignment" in card and "2402.05369" in card


@pytest.mark.parametrize(("loss", "labels"), [("info_nca", True), ("dpo", False)])
def test_model_card_names_the_loss(make, loss, labels, tmp_path):
    make(loss_type=loss, beta=0.25, temperature_alpha=1e-4).create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    section = card.split("## Objective\n\n")[1].split("\n\n## ")[0]
    assert (
        section.splitlines() == [f"- loss: `{loss}`", "- beta: `0.25`", "- temperature_alpha: `0.0001`"][: 2 + labels]
    )
    assert "## Quick start" in card and "## Training procedure" in card


def test_default_args_and_peft_model_start(make, tiny_llama, tmp_path):
    """A PeftModel given as the model: TRL keeps a frozen copy of its adapter as the reference."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama())
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    trainer = make(model=model, max_steps=2)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    assert frozen and all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in frozen.items())
    assert json.dumps(logged(trainer, "rewards/rank_0"))
