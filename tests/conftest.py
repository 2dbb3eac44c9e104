"""Offline, seeded, small."""

import atexit
import gc
import os
import shutil
import tempfile


CACHE = tempfile.mkdtemp(prefix="contrastive_align_tests_")  # the user's own caches stay as they are
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.update(HF_HOME=CACHE, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CI="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from contrastive_align import demo


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_not_searched_for_garbage():
    """Trainer collects garbage at the end of every train(), which takes longer than a step of a tiny model."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A factory of saved random Llamas with the bundled tokenizer: tiny_llama(seed=0, **config) -> path."""
    made = {}

    def make(seed: int = 0, **config) -> str:
        key = (seed, *sorted(config.items()))
        if key not in made:
            tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
            shape = {
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
                "initializer_range": 0.2,
            }
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
            path = tmp_path_factory.mktemp("llama")
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return make
