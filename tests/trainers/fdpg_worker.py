"""Trains a tiny policy on one process or two, and writes down what came out. Run by test_fdpg_trainer.py.

python fdpg_worker.py OUT
torchrun --nproc_per_node 2 fdpg_worker.py OUT
"""

import os
import sys
from pathlib import Path

import test_encoder_decoder
import test_fdpg_trainer
import torch
from processes import run_worker
from test_fdpg_trainer import make_tokenizer, moment_target, trained

from contrastive_align import FDPGTrainer


class Tripled(FDPGTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super().compute_loss(model, inputs)


def gradient(build, folder, trainer=FDPGTrainer, *, accumulation=1):
    """Return the gradient of a step over four groups: what SGD with a learning rate of 1 takes off the weights."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = build()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trained(
        make_tokenizer(), folder, moment_target(), model=model, trainer=trainer, max_steps=1, num_generations=16,
        per_device_train_batch_size=64 // processes // accumulation, gradient_accumulation_steps=accumulation,
        optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
    )  # fmt: skip
    return start - torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def main():
    out, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    samples = 64 // processes  # two groups a step over all processes
    kept = {"proposal": "kept", "proposal_window": 2, "baseline": "window", "seed": 2}  # by which one is replaced
    saving = {"save_strategy": "steps", "save_steps": 3}
    ways = {"plain": {}, "kept": {**kept, **saving}, "resumed": {**kept, "resume": "checkpoint-3"}}
    found = {}
    for way, options in ways.items():
        folder = out.with_suffix("")
        if "resume" in options:
            options["resume"] = str(folder / options["resume"])
        trainer = trained(
            make_tokenizer(), folder, moment_target(), max_steps=6, per_device_train_batch_size=samples,
            **options,
        )  # fmt: skip
        weights = {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}
        history = [entry["kl_target"] for entry in trainer.state.log_history if "kl_target" in entry]
        found[way] = {"weights": weights, "log_z": trainer.log_z.state_dict(), "kl_target": history}
        if way != "plain":
            found[way]["replacements"] = trainer.adaptive_proposal.replacements
            found[way]["baseline"] = trainer.baseline.value
    builds = {"decoder_only": test_fdpg_trainer.build, "encoder_decoder": test_encoder_decoder.build}
    found["gradients"] = {
        name: {
            "plain": gradient(build, out.with_suffix("")),
            "tripled": gradient(build, out.with_suffix(""), Tripled),
            "tripled_accumulated": gradient(build, out.with_suffix(""), Tripled, accumulation=2),
        }
        for name, build in builds.items()
    }
    if trainer.accelerator.is_main_process:
        torch.save(found, out)


if __name__ == "__main__":
    run_worker(main)
