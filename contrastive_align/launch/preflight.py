"""What is checked before the first step: batches, memory, steps, the reference, the loss, EOS and a sample."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch import nn

from contrastive_align.data.labels import scores_of
from contrastive_align.launch.record import Recorder
from contrastive_align.losses.contrastive import add_first_score_bonus, group_loss, target_labels
from contrastive_align.models.loading import eos_token_ids
from contrastive_align.trainers import ContrastiveTrainer


LOOKED_AT = 4096  # rows of the training data
# Bytes that a layer keeps of a token's hidden state for the backward pass, in 16 bits, with an attention that keeps no
# scores (Korthikanti et al. 2022, arXiv:2205.05198, equation 2 without its last term); with checkpointing its input.
KEPT_PER_LAYER, KEPT_WITH_CHECKPOINTS = 34, 2
OPTIMIZER_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0.1, "sgd": 0}  # of a trained weight; AdamW two of its own


def group_sizes(dataset: Any, layout: str) -> np.ndarray:
    """Return the tokens of each group of (the first rows of) a dataset, as the layout computes them."""
    if not isinstance(dataset, Dataset):
        return np.zeros(0)
    rows = dataset[:LOOKED_AT]
    return np.array(
        [
            len(prompt) * (1 if layout == "shared" else len(completions)) + sum(map(len, completions))
            for prompt, completions in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        ]
    )


def largest_and_mean(sizes: np.ndarray, per_batch: int) -> tuple[int, int] | None:
    """Return the tokens of the longest batch there can be and of the mean one; None where nothing is known.

    >>> largest_and_mean(np.array([1, 5, 3, 3]), 2)
    (8, 6)
    >>> largest_and_mean(np.array([2, 4]), 8)
    (6, 6)
    """
    if not len(sizes):
        return None
    return int(np.sort(sizes)[-per_batch:].sum()), round(float(sizes.mean()) * min(per_batch, len(sizes)))


def steps_in_words(trainer: Any, steps: int | None, tokens: tuple[int, int] | None) -> str:
    """Say how many steps there will be, and what a batch holds."""
    args = trainer.args
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    said = "steps not known of a stream" if steps is None else f"{steps} step{'s' * (steps != 1)}"
    said += f" at {args.learning_rate:g} ({schedule})"
    if tokens is not None:
        said += f", {tokens[1]:,} tokens a batch, {tokens[0]:,} at most"
    return said


def memory_needed(trainer: Any, tokens: int) -> float:
    """Estimate the bytes of weights, gradients, optimizer states and activations on one device."""
    models = trainer.base_models()
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    per_weight = next((size for name, size in OPTIMIZER_BYTES.items() if name in optim), None)
    states = 2 * gradients if per_weight is None else per_weight * sum(p.numel() for p in trained)
    config = models[0].config.get_text_config()
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    wide = 1 if trainer.computes_in_16_bits or models[0].dtype in (torch.bfloat16, torch.float16) else 2
    per_layer = (
        KEPT_WITH_CHECKPOINTS * layers + KEPT_PER_LAYER
        if trainer.args.gradient_checkpointing
        else (KEPT_PER_LAYER * layers)
    )
    return weights + gradients + states + tokens * hidden * per_layer * wide


def memory_in_words(trainer: Any, tokens: int) -> tuple[str, str]:
    """Say what is needed, and what there is."""
    needed = memory_needed(trainer, tokens) / 2**30
    device = trainer.args.device
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0] / 2**30, "free on the device"
    else:
        free, where = psutil.virtual_memory().available / 2**30, "free"
    warning = "" if needed < free else ": TOO MUCH; lower --per_device_train_batch_size or --max_length"
    return f"about {needed:.2g} GiB", f" of {free:.3g} GiB {where}{warning}"


def four_bit_layers(model: nn.Module) -> int:
    """Count the layers whose weights are packed in 4 bits."""
    return sum(getattr(getattr(m, "weight", None), "quant_state", None) is not None for m in model.modules())


def eos_share(dataset: Any, eos: Iterable[int]) -> float | None:
    """Return the share of completions that end in an EOS, from which the model learns to stop."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    ends, eos = [ids[-1:] for group in dataset[:LOOKED_AT]["completion_ids"] for ids in group], set(eos)
    return sum(bool(end) and end[0] in eos for end in ends) / max(1, len(ends))


@torch.no_grad()
def first_loss(trainer: ContrastiveTrainer) -> tuple[float, float] | None:
    """Return the loss of a batch before training, and its closed form: the same losses where all log-ratios are 0."""
    if trainer.uses_engine or not isinstance(trainer.train_dataset, Dataset) or "sft" in trainer.loss_types:
        return None
    n = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    batch = trainer.to_device(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with trainer.compute_loss_context_manager():
            found = trainer.compute_loss(trainer.model, batch).item()
    finally:
        trainer.model.train(was_training)
    valid = batch["valid"]
    scores = add_first_score_bonus(batch["scores"], valid, trainer.args.first_score_bonus)
    nothing = torch.zeros_like(scores, dtype=torch.float64)
    given = {"log_ratios": nothing, "scores": scores, "valid": valid, "lengths": valid.long()}
    given |= {"policy_logps": nothing, "ref_logps": nothing}
    given |= {"beta": trainer.args.beta, "temperature_alpha": trainer.temperature_alpha}
    terms = zip(trainer.loss_types, trainer.loss_weights, strict=True)
    expected = sum(weight * group_loss(name, **given).mean().item() for name, weight in terms)
    return found, expected


def start_in_words(recorder: Recorder) -> str:
    """Say whether policy and reference agree on the first samples; nothing where none were drawn yet."""
    gap = recorder.first.gap if recorder.first is not None else None
    if gap is None:
        return ""
    agree = f"policy = reference ({gap:.1e} nats per token)"
    return agree if gap < 0.05 else f"policy is {gap:.2g} nats per token away from the reference"


def checks_in_words(trainer: Any, recorder: Recorder) -> str:
    """Say whether policy and reference agree, whether the loss has its closed form, and what learns to stop."""
    said = [start] if (start := start_in_words(recorder)) else []
    if isinstance(trainer, ContrastiveTrainer) and not trainer.online:  # whose groups are not drawn yet
        loss = first_loss(trainer)
        if loss is not None:
            agree = math.isclose(*loss, rel_tol=0.02, abs_tol=0.01)
            said.append(f"loss {loss[0]:.4f} {'=' if agree else 'is NOT'} closed form {loss[1]:.4f}")
        ends = eos_share(trainer.train_dataset, eos_token_ids(trainer.model, trainer.processing_class))
        if ends is not None:
            said.append(f"{ends:.0%} of the completions end in EOS" if ends < 1 else "all completions end in EOS")
    if count := four_bit_layers(trainer.model):
        said.append(f"{count} layers in 4 bits")
    return "; ".join(said)


def sample_in_words(recorder: Recorder, most: int = 100) -> str:
    """Show a prompt and what the start makes of it, in one line."""
    if recorder.first is None:
        return ""
    prompt, text = (" ".join(part.split()) for part in (recorder.held_out.texts[0], recorder.first.texts[0][0]))
    half = most // 2
    prompt = prompt if len(prompt) <= half else f"...{prompt[-half:]}"
    return f"{prompt!r} -> {text[:half] + '...' if len(text) > half else text!r}"


def hash_of_rows(dataset: Any) -> str | None:
    """Hash the first rows of a data set with their number, so that two runs can be told apart; None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256(str(len(dataset)).encode())
    for row in dataset.select(range(min(len(dataset), LOOKED_AT))):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def data_facts(dataset: Any, trainer: ContrastiveTrainer) -> dict[str, Any]:
    """Return what the doctor reads of training groups: grades, label entropy, length of the best, score by length."""
    facts: dict[str, Any] = {"reads_labels": trainer.reads_labels, "reference_moves": bool(trainer.args.sync_ref_model)}
    if not isinstance(dataset, Dataset) or not len(dataset):
        return facts
    rows = dataset[:LOOKED_AT]
    scores, lengths = rows["scores"], [[len(ids) for ids in group] for group in rows["completion_ids"]]
    signal = [(s, n) for s, n in zip(scores, lengths, strict=True) if min(s) < max(s)]
    facts["graded_groups"] = sum(len(set(s)) > 2 for s, _ in signal) / len(scores)
    if trainer.reads_labels and signal:
        table, valid = scores_of(dataset, LOOKED_AT)
        for name, alpha in (("", trainer.temperature_alpha), ("least_", 1e-12), ("largest_", 1e12)):
            labels = target_labels(table, temperature_alpha=alpha, valid=valid)
            facts[f"{name}label_entropy"] = torch.special.entr(labels).sum(-1).mean().item()
    if signal:
        facts["best_length"] = sum(n[int(np.argmax(s))] for s, n in signal) / len(signal)
        found = [c for s, n in signal if (c := rank_correlation(s, n)) is not None]
        facts["score_length_correlation"] = sum(found) / len(found) if found else None
    return facts


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Kendall's tau-a over the pairs that differ in both; None where none does.

    >>> rank_correlation([1, 2, 3], [10, 20, 30]), rank_correlation([1, 2], [5, 5])
    (1.0, None)
    """
    signs = [np.sign(one[i] - one[j]) * np.sign(other[i] - other[j]) for i in range(len(one)) for j in range(i)]
    differ = [sign for sign in signs if sign]
    return float(np.mean(differ)) if differ else None
