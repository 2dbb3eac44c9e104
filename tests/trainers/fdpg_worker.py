"""Trains a tiny policy on one process or two, and writes down what came out. Run by test_fdpg_trainer.py.

python fdpg_worker.py OUT
torchrun --nproc_per_node 2 fdpg_worker.py OUT
"""

import os
import sys
from pathlib import Path

import torch
from test_fdpg_trainer import make_tokenizer, moment_target, trained


if __name__ == "__main__":
    out, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    samples = 64 // processes  # two groups a step over all processes
    ways = {"plain": {}, "kept": {"proposal": "kept", "proposal_window": 2, "baseline": "window"}}
    found = {}
    for way, options in ways.items():
        trainer = trained(
            make_tokenizer(), out.with_suffix(""), moment_target(), max_steps=6, per_device_train_batch_size=samples,
            **options,
        )  # fmt: skip
        weights = {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}
        history = [entry["kl_target"] for entry in trainer.state.log_history if "kl_target" in entry]
        found[way] = {"weights": weights, "log_z": trainer.log_z.state_dict(), "kl_target": history}
        if way == "kept":
            found[way]["replacements"] = trainer.kept_proposal.replacements
            found[way]["baseline"] = trainer.baseline.value
    if trainer.accelerator.is_main_process:
        torch.save(found, out)
