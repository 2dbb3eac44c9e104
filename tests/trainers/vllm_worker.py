"""Trains a tiny policy on what a stand-in for a vLLM server draws, in two processes. Run by its test.

torchrun --nproc_per_node 2 vllm_worker.py MODEL OUT FOLDER
"""

import json
import sys
from dataclasses import asdict

import vllm_stand_in
from accelerate.utils import gather_object
from datasets import Dataset
from processes import run_worker
from test_conditional_trainer import PROMPTS, build, samples


def run(model, folder, processes):
    """Five prompts a round, and one that is measured: neither is shared evenly."""
    trainer = build(
        model,
        folder,
        condition="phrases",
        prompts_per_round=5,
        per_device_train_batch_size=10 // processes,
        optim="sgd",
        learning_rate=0.1,
        use_vllm=True,
        vllm_mode="server",
    )
    trainer.train()
    given = trainer.rewards_given(Dataset.from_dict({"prompt": PROMPTS[:1]}))
    return trainer, {
        "samples": [asdict(s) for s in samples(trainer, 25)],
        "given": {name: values.tolist() for name, values in given.items()},
    }


def main():
    model, out, folder = sys.argv[1:]
    engine = vllm_stand_in.install(model)
    trainer, found = run(model, folder, 2)
    found["generated"] = gather_object([sum(entry == "generate" for entry in engine.history)])
    found["asked"] = [len(prompts) for prompts, _, _ in engine.calls]
    pools = gather_object([found["samples"]])
    assert pools[0] == pools[1]
    if trainer.accelerator.is_main_process:
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    run_worker(main)
