"""Trains a tiny policy in rounds, conditionally and on groups, on one process or two. Run by their test.

python conditional_worker.py OUT FOLDER
torchrun --nproc_per_node 2 conditional_worker.py OUT FOLDER
"""

import json
import os
import sys
from dataclasses import asdict

import torch
from datasets import Dataset
from processes import run_worker
from test_conditional_trainer import PROMPTS, build

from contrastive_align import ConditionalTrainer, ContrastiveConfig, ContrastiveTrainer
from contrastive_align.demo import MODEL_PATH


class Tripled(ConditionalTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super().compute_loss(model, inputs)


def trained(folder, trainer=ConditionalTrainer, *, scale=1):
    """Train on ``scale`` times the loss at as much smaller a learning rate, which is the same training."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = build(
        MODEL_PATH,
        folder,
        trainer=trainer,
        prompts_per_round=3,
        per_device_train_batch_size=10 // processes,
        optim="sgd",  # Adam would make a whole step of a gradient's last bit
        learning_rate=0.1 / scale,
        max_grad_norm=1.0 * scale,
    )
    trainer.train()
    return trainer


def trained_on_groups(folder):
    """Rounds of groups, the reference following; their log-probs are computed by both processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = ContrastiveConfig(
        folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", online=True,
        num_rounds=2, prompts_per_round=5, num_generations=4, max_completion_length=6, resample=1,
        per_device_train_batch_size=4 // processes, optim="sgd", learning_rate=0.1, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    trainer = ContrastiveTrainer(MODEL_PATH, args=args, train_dataset=prompts, reward_funcs=lengths)
    trainer.train()
    return trainer


def lengths(completion_ids, **columns):
    return [float(len(ids) + ids[0] % 3) for ids in completion_ids]


def samples_of(trainer):
    rounds = [
        trainer.pool._rounds[n - 1].read(torch.arange(len(trainer.pool._rounds[n - 1].lengths())).numpy())
        for n in trainer.pool.rounds
    ]
    return json.dumps([asdict(sample) for samples in rounds for sample in samples])


def weights(trainer):
    return {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}


def main():
    out, folder = sys.argv[1:]
    trainer = trained(folder)
    given = trainer.rewards_given(Dataset.from_dict({"prompt": PROMPTS[:3]}), conditions=["<quantile_0>"])
    tripled = trained(f"{folder}-tripled", Tripled, scale=3)
    groups = trained_on_groups(f"{folder}-groups")
    if trainer.accelerator.is_main_process:
        found = {"samples": samples_of(trainer), "reward_given": given["<quantile_0>"].tolist()}
        found |= {"group_samples": samples_of(groups), "group_weights": weights(groups)}
        torch.save({**found, "weights": weights(trainer), "tripled": weights(tripled)}, out)


if __name__ == "__main__":
    run_worker(main)
