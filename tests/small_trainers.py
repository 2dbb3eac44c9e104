"""The trainers, each with a model of one layer and a vocabulary of six words, behind one interface: COLUMNS."""

import functools
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from contrastive_align import (
    ConditionalConfig,
    ConditionalTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
    FDPGConfig,
    FDPGTrainer,
)


WORDS = ["<pad>", "<bos>", "<eos>", "a", "b", "c"]
TEXTS = ("a b", "c", "b b c", "a", "c a", "b", "c c", "a c")
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 1, "save_strategy": "no",
    "optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "logging_steps": 1, "max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "gradient_checkpointing": False,
}  # fmt: skip


def reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


@functools.cache
def saved_model(encoder_decoder: bool = False, seed: int = 0) -> str:
    """The folder of a random model and its tokenizer."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(seed)
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 2}
    if encoder_decoder:
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(**tokens, **shape, decoder_start_token_id=0))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {"max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(**tokens, **shape))
    folder = tempfile.mkdtemp(dir=os.environ["HF_HOME"])  # removed with the tests' cache
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Column:
    """One trainer as a column of a table: how it is built, and the TRL classes beside it."""

    name: str
    trainer: type
    config: type
    trl_trainer: type
    trl_config: type
    encoder_decoder: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def is_contrastive(self) -> bool:
        return self.name == "contrastive"

    @property
    def is_fdpg(self) -> bool:
        return self.name.startswith("fdpg")

    @property
    def is_conditional(self) -> bool:
        return self.name == "conditional"

    @property
    def draws_own_samples(self) -> bool:
        """Whether the contrastive trainer makes its groups itself, online."""
        return self.name == "contrastive-online"

    @property
    def makes_rounds(self) -> bool:
        return self.is_conditional or self.draws_own_samples

    def model_path(self, seed: int = 0) -> str:
        return saved_model(self.encoder_decoder, seed)

    def load_model(self) -> Any:
        auto = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(self.model_path())

    def lora(self, **options: Any) -> LoraConfig:
        task = "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"
        return LoraConfig(
            r=2, target_modules=["q", "v"] if self.encoder_decoder else ["q_proj", "v_proj"], task_type=task, **options
        )

    def rows(self, n: int = 8) -> Dataset:
        """``n`` rows to train on; of the contrastive trainer with two to four completions."""
        rows = [{"prompt": TEXTS[i % len(TEXTS)]} for i in range(n)]
        if self.is_contrastive:
            for i, row in enumerate(rows):
                k = 2 + i % 3
                row |= {"completions": [f" {TEXTS[(i + j + 1) % len(TEXTS)]}" for j in range(k)], "scores": [*range(k)]}
        return Dataset.from_list(rows)

    def arguments(self, folder: Any, config: type | None = None, **changes: Any) -> Any:
        """The options, of which ``changes`` are replaced."""
        own = {
            "contrastive": {"beta": 0.5, "max_length": 64},
            "conditional": {
                "prompts_per_round": 4, "num_generations": 5, "draws_per_round": 8, "max_completion_length": 4,
                "kl_coef": 0.5,
            },
            "contrastive-online": {
                "online": True, "beta": 0.5, "max_length": 64, "prompts_per_round": 8, "num_generations": 5,
                "max_completion_length": 4, "num_rounds": 20, "reference": "start",
            },
        }.get(self.name, {"num_generations": 2, "max_completion_length": 4, "beta": 5.0})  # fmt: skip
        if config is not None:
            own = {}
        return (config or self.config)(**{"output_dir": str(folder), **COMMON, **own, **changes})

    def make(self, folder: Any, *, trainer: type | None = None, told: dict[str, Any] | None = None, **changes: Any):
        """The trainer.

        Args:
            folder: output_dir.
            trainer: a subclass to build in place of the trainer.
            told: arguments of the trainer beside, or in place of, those that it has by default.
            changes: options.
        """
        given = {"model": self.model_path(), "train_dataset": self.rows(), **(told or {})}
        if "args" not in given:
            given["args"] = self.arguments(folder, **changes)
        if not self.is_contrastive:
            given.setdefault("reward_funcs", reward)
        return (trainer or self.trainer)(**given)


FDPG = FDPGTrainer, FDPGConfig, RLOOTrainer, RLOOConfig
COLUMNS = (
    Column("contrastive", ContrastiveTrainer, ContrastiveConfig, DPOTrainer, DPOConfig),
    Column("fdpg", *FDPG),
    Column("fdpg-encoder-decoder", *FDPG, encoder_decoder=True),
    Column("conditional", ConditionalTrainer, ConditionalConfig, SFTTrainer, SFTConfig),
)
OWN_SAMPLES = Column("contrastive-online", ContrastiveTrainer, ContrastiveConfig, DPOTrainer, DPOConfig)
