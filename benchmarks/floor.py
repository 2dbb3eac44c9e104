"""The FLOP of a training step that pays for each prompt once."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedModel


@dataclass
class Counts:
    """Parameters by what is done with them; ``attention`` is layers x heads x head size."""

    body: int
    head: int
    embedding: int
    adapters: int
    attention: int

    @classmethod
    def of(cls, model: PreTrainedModel, config: LlamaConfig) -> Counts:
        head, embedding = (m.weight.numel() for m in (model.get_output_embeddings(), model.get_input_embeddings()))
        adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        body = sum(p.numel() for p in model.parameters()) - head - embedding - adapters
        return cls(body, head, embedding, adapters, config.num_hidden_layers * config.hidden_size)


def floor_flop(groups: list[dict], k: int, counts: Counts, tuning: str, reference: str) -> float:
    """The FLOP of a step that computes each prompt once, whatever the layout.

    Forward: 2 x body x unique tokens + 2 x head x completion tokens + 4 x attention x (query, key) pairs; a prompt of P
    tokens has P (P + 1) / 2 pairs, each of its completions of C tokens C P + C (C + 1) / 2. A full step does it three
    times (the gradients of inputs and of weights), under LoRA the products with frozen weights only twice; the
    adapters add 6 x adapters x unique tokens. An uncached reference is one more forward: a third again of a full step.

    The last layer's outputs at the prompts are counted, though only its keys and values there are used (of the 56M
    model's FLOP at K = 4 some 1% on synthetic lengths, 7% on qa).
    """
    lengths = [(len(g["prompt_ids"]), [len(c) for c in g["completion_ids"][:k]]) for g in groups]
    completions = sum(sum(row) for _, row in lengths)
    unique = completions + sum(p for p, _ in lengths)
    pairs = sum(p * (p + 1) / 2 + sum(c * p + c * (c + 1) / 2 for c in row) for p, row in lengths)
    products = 2 * counts.body * unique + 2 * counts.head * completions
    attention = 4 * counts.attention * pairs
    forward = products + attention if reference == "uncached" else 0
    return (2 if tuning == "lora" else 3) * products + 3 * attention + 6 * counts.adapters * unique + forward
