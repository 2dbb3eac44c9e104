"""Plain sampling of texts from a model's own distribution, whatever its generation config says."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    per_prompt: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """Sample ``per_prompt`` texts (without special tokens) for each prompt: temperature 1, top_p 1, top_k 0.

    The global random state is left unchanged.
    """
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # generate() fills unset options from the model's own config (repetition penalties and the like): replace that one.
    own, model.generation_config = model.generation_config, plain
    texts = [prompt for prompt in prompts for _ in range(per_prompt)]
    completions: list[str] = []
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type != "cpu" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=model.device.type if devices else "cuda"):
            torch.manual_seed(seed)
            for i in range(0, len(texts), batch_size):
                batch = tokenizer(texts[i : i + batch_size], return_tensors="pt", padding=True, padding_side="left")
                ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
                completions += tokenizer.batch_decode(out[:, ids.size(1) :], skip_special_tokens=True)
    finally:
        model.generation_config = own
        model.train(was_training)
    return [completions[i : i + per_prompt] for i in range(0, len(completions), per_prompt)]
