"""Is a run stopped whose reference is its start, and is one stopped whose reference is another model?

    python benchmarks/reference_check.py [--configurations 100] [--first 0]

Each configuration is a random Llama of some depth and width, in bfloat16 or under bfloat16 autocast, with LoRA; a batch
size, another for the reference's log-probs where these are computed beforehand, a layout, and completions of some
length. Its first batch is looked at as it is, where log-probs were computed beforehand a second time with those of
the cache, whose batches are not known, and with a reference whose weights are moved by 1e-3 of their norm.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.trainers.reference import ReferenceMismatch


MOVE = 1e-3  # of a weight's norm


@dataclass(frozen=True)
class Configuration:
    seed: int
    layers: int
    width: int
    autocast: bool
    head: float  # times the scale at which logits have a spread of 1
    layout: str
    cached: bool
    batch: int
    reference_batch: int
    completions: int
    tokens: tuple[int, int]

    @classmethod
    def drawn(cls, seed: int) -> Configuration:
        draw = random.Random(seed)
        return cls(
            seed,
            layers=draw.choice([2, 4, 8, 12, 16, 24, 32]),
            width=draw.choice([64, 128, 256]),
            autocast=draw.random() < 0.5,
            head=draw.choice([1.0, 3.0]),
            layout=draw.choice(["padded", "shared"]),
            cached=draw.random() < 0.5,
            batch=draw.choice([1, 2, 4, 8]),
            reference_batch=draw.choice([1, 2, 4, 8]),
            completions=draw.choice([2, 4]),
            tokens=draw.choice([(1, 2), (1, 8), (40, 40), (10, 60), (128, 128)]),
        )

    def model(self, vocabulary: int) -> LlamaForCausalLM:
        """Return a random model in which signals neither die out nor grow, whatever its depth."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * self.width,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=p.size(-1) ** -0.5)
            model.lm_head.weight.mul_(self.head)
        return model if self.autocast else model.bfloat16()

    def rows(self, vocabulary: int) -> Dataset:
        draw = random.Random(self.seed)

        def ids(n: int) -> list[int]:
            return [draw.randrange(3, vocabulary) for _ in range(n)]

        def row() -> dict:
            completions = [ids(draw.randint(*self.tokens)) for _ in range(self.completions)]
            scores = [float(i) for i in range(self.completions)]
            return {"prompt_ids": ids(draw.randint(20, 60)), "completion_ids": completions, "scores": scores}

        return Dataset.from_list([row() for _ in range(max(self.batch, self.reference_batch))])


class Proven(Exception):
    """The reference was found to be the start."""


class FirstLook(ContrastiveTrainer):
    """Stops where the reference is proven."""

    def prove_reference(self, *args, **kwargs):
        super().prove_reference(*args, **kwargs)
        raise Proven


class MovedReference(FirstLook):
    """The weights are moved while the reference's log-probs are computed."""

    def compute_ref_log_probs(self, model, inputs):
        with moved(self.model):
            return super().compute_ref_log_probs(model, inputs)

    @property
    def reference_hash(self):
        return f"{super().reference_hash}, moved"


@contextlib.contextmanager
def moved(model: torch.nn.Module, by: float = MOVE) -> Iterator[None]:
    weights = [p for name, p in model.named_parameters() if "lora_" not in name]
    kept = [p.detach().clone() for p in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in weights:
            noise = torch.randn(p.shape, generator=generator)
            p.add_((noise * (by * p.float().norm() / noise.norm())).to(p.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)


def stopped(configuration: Configuration, *, move: bool) -> str | None:
    """Return what the first step says of the reference, or None."""
    c, tokenizer = configuration, AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveConfig(
            output_dir=folder,
            loss_type="nca",
            bf16=c.autocast,
            layout=c.layout,
            precompute_ref_log_probs=c.cached,
            precompute_ref_batch_size=c.reference_batch,
            per_device_train_batch_size=c.batch,
            max_steps=1,
            max_length=None,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = (MovedReference if move else FirstLook)(
            c.model(len(tokenizer)),
            args=args,
            train_dataset=c.rows(len(tokenizer)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        try:
            trainer.train()
        except Proven:
            return None
        except ReferenceMismatch as error:
            return str(error)
    raise AssertionError("the reference was not looked at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp())
    logging.set_verbosity_error()
    disable_progress_bars()
    wrongly, missed = [], []
    for seed in range(options.first, options.first + options.configurations):
        configuration = Configuration.drawn(seed)
        for _ in range(1 + configuration.cached):  # computed here, then read from the cache
            if (said := stopped(configuration, move=False)) is not None:
                wrongly.append(configuration)
                print(f"STOPPED: {configuration}\n  {said}", flush=True)
        if stopped(configuration, move=True) is None:
            missed.append(configuration)
            print(f"NOT STOPPED: {configuration}", flush=True)
    print(
        f"| configurations | stopped, untouched | not stopped, moved by {MOVE:g} |\n"
        f"|---|---|---|\n| {options.configurations} | {len(wrongly)} | {len(missed)} |"
    )


if __name__ == "__main__":
    main()
