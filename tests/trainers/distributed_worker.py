"""Trains and evaluates in one process or several, and writes down what came out. Run by test_distributed.py.

python distributed_worker.py MODEL OUT
torchrun --nproc_per_node 2 distributed_worker.py MODEL OUT [OUT of one process]
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from processes import run_worker

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.files import read_files


# 8 groups a step over all processes; 26 groups: the last step has 2, so that with 2 processes one has none of its own.
CASES = {
    "plain": {},
    "accumulated": {"accumulation": 4},
    "cached": {"precompute_ref_log_probs": True},
    "lora": {"lora": True},
    # Three times the loss at a third of the learning rate is the same training.
    "tripled": {"accumulation": 4, "tripled": True, "like": "plain"},
    "resumed": {"resume": 2, "like": "plain"},
    "auto_temperature": {"temperature_alpha": "auto"},
    "split_batches": {"split_batches": True},
    "streams": {"stream": True},
    "shards": {"shards": True, "workers": 2, "resume": 2, "accumulation": 2},
    # Two processes go on where one has stopped.
    "shards_resumed": {"shards": True, "resume": 2, "from": "shards", "like": "shards"},
    # 4 batches a step, of at most 4 groups; the last step has fewer.
    "tokens": {"max_tokens": 170, "steps": 6},
    "tokens_resumed": {"max_tokens": 170, "steps": 6, "resume": 4, "like": "tokens"},  # in the second pass
    # Every group is a batch of its own, and the last step has three for two processes.
    "tokens_alone": {"max_tokens": 1, "groups": 23, "steps": 12},
}


class Tripled(ContrastiveTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super().compute_loss(model, inputs)


def unpadded(batch):
    """The token ids of a batch's rows."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in pairs]


def watch(trainer):
    """Every group that goes through the trainer's training loss: [step, number of the group, weight, loss]."""
    seen, compute_loss = [], trainer.compute_loss
    numbers = {str([r["prompt_ids"] + c for c in r["completion_ids"]]): i for i, r in enumerate(trainer.train_dataset)}

    def watched(model, inputs, return_outputs=False, **kwargs):
        loss, outputs = compute_loss(model, inputs, return_outputs=True, **kwargs)
        if trainer.model.training:
            rows = unpadded(inputs)
            weights, losses = inputs["group_weights"].tolist(), outputs["losses"].tolist()
            for k, weight, value in zip(inputs["valid"].sum(1).tolist(), weights, losses, strict=True):
                seen.append([trainer.state.global_step, numbers[str([rows.pop(0) for _ in range(k)])], weight, value])
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = watched
    return seen


def shards(groups: Dataset, out: str) -> IterableDataset:
    """The groups in three files, the same for every process."""
    folder = Path(out) / "files"
    folder.mkdir(exist_ok=True)
    for i, (begin, end) in enumerate(((0, 9), (9, 10), (10, 26))):
        with atomic_write(folder / f"{i}.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in groups.select(range(begin, end)).to_list()).encode())
    PartialState().wait_for_everyone()
    return read_files(sorted(folder.glob("*.jsonl")), streaming=True)


def main(model: str, out: str, out_of_one: str = "") -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    groups = demo.load_reward_dataset()["train"].select(range(26))
    results = {}
    for name, case in CASES.items():
        accumulation, split = case.get("accumulation", 1), case.get("split_batches", False)
        size = 8 // accumulation // (1 if split else processes)
        if "max_tokens" in case:
            size, accumulation = 4, 4 // processes
        args = ContrastiveConfig(
            output_dir=f"{out}/{name}",
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="steps" if case.get("resume") else "no",
            save_steps=2,
            disable_tqdm=True,
            max_grad_norm=0.0,
            logging_steps=1,
            learning_rate=1e-2 / (3 if case.get("tripled") else 1),
            lr_scheduler_type="constant",
            optim="sgd",
            beta=0.1,
            temperature_alpha=case.get("temperature_alpha", 1e-4),
            num_train_epochs=2,
            max_steps=8 if case.get("stream") else -1,
            per_device_train_batch_size=size,
            max_tokens_per_batch=case.get("max_tokens"),
            dataloader_num_workers=case.get("workers", 0),
            accelerator_config={"split_batches": split},
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=4 if split else 3,
            precompute_ref_log_probs=case.get("precompute_ref_log_probs", False),
        )
        rows = case.get("groups", len(groups))
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        held_out = Dataset.from_list(groups.to_list()[:7])

        train = groups.to_iterable_dataset() if case.get("stream") else groups.select(range(rows))
        if case.get("shards"):
            train = shards(groups, out)

        told = {
            "model": model,
            "args": args,
            "train_dataset": train,
            "eval_dataset": held_out.to_iterable_dataset() if case.get("stream") else held_out,
            "peft_config": lora if case.get("lora") else None,
        }
        trainer = (Tripled if case.get("tripled") else ContrastiveTrainer)(**told)
        seen = watch(trainer) if "max_tokens" in case else []
        if "from" not in case:
            trainer.train()
        if case.get("resume"):  # from the middle of a pass: the end must be the one of the whole run
            trainer = ContrastiveTrainer(**told)
            place = f"{out_of_one or out}/{case['from']}" if "from" in case else f"{out}/{name}"
            trainer.train(resume_from_checkpoint=f"{place}/checkpoint-{case['resume']}")
        metrics = trainer.evaluate()
        results[name] = {
            "log": [e for e in trainer.state.log_history if "loss" in e],
            "seen": gather_object(seen),
            "temperatures": gather_object([trainer.temperature_alpha]),
            "eval": {k: v for k, v in metrics.items() if "/" in k or k == "eval_loss"},
        }
        if trainer.is_world_process_zero():
            parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
            torch.save(parameters, f"{out}/{name}.pt")
    if int(os.environ.get("RANK", 0)) == 0:
        with open(f"{out}/results.json", "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    run_worker(main, *sys.argv[1:])
