"""Trains a tiny policy in rounds on one process or two, and writes down what came out. Run by its test.

python conditional_worker.py OUT FOLDER
torchrun --nproc_per_node 2 conditional_worker.py OUT FOLDER
"""

import json
import os
import sys
from dataclasses import asdict

import torch
from datasets import Dataset
from processes import end_processes
from test_conditional_trainer import PROMPTS, build

from contrastive_align import ConditionalTrainer
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


def weights(trainer):
    return {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}


def main():
    out, folder = sys.argv[1:]
    trainer = trained(folder)
    given = trainer.rewards_given(Dataset.from_dict({"prompt": PROMPTS[:3]}), conditions=["<quantile_0>"])
    tripled = trained(f"{folder}-tripled", Tripled, scale=3)
    if trainer.accelerator.is_main_process:
        found = [
            asdict(s) for n in trainer.pool.rounds for s in trainer.pool._rounds[n - 1].read(torch.arange(15).numpy())
        ]
        found = {"samples": json.dumps(found), "reward_given": given["<quantile_0>"].tolist()}
        torch.save({**found, "weights": weights(trainer), "tripled": weights(tripled)}, out)


if __name__ == "__main__":
    main()
    end_processes()
