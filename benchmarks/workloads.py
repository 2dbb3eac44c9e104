"""What the benchmarks compute on: groups of token ids, the same for every row.

A group is ``{"prompt_ids", "completion_ids", "scores"}`` with 16 completions, of which a row takes the first K. The
first two are the pair that K = 2 and TRL see.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from contrastive_align import demo


MOST = 16  # completions of a group
REAL = {  # name -> (file, what prompts look like to the model)
    "qa": ("qa_feedback_groups.jsonl", "{}\nanswer: "),
    "gsm8k": ("gsm8k_groups.jsonl", "Question: {}\nAnswer: "),
}


def groups_of(
    workload: str, n: int, tokenizer: PreTrainedTokenizerBase, vocabulary: int = 32000, shrink: int = 1
) -> list[dict]:
    """``n`` groups of a workload: ``synthetic``, ``qa``, ``gsm8k`` or ``fixed:PROMPT:SHORTEST:LONGEST`` (tokens).

    Args:
        tokenizer: for real text.
        vocabulary: what made-up ids are drawn from.
        shrink: divides made-up lengths (for trials of the benchmark itself).
    """
    if workload in REAL:
        return real(workload, n, tokenizer)
    if workload == "synthetic":
        return synthetic(n, vocabulary, shrink)
    prompt, shortest, longest = (int(x) // shrink for x in workload.split(":")[1:])
    g = torch.Generator().manual_seed(0)
    lengths = [torch.randint(shortest, longest + 1, (MOST,), generator=g).tolist() for _ in range(n)]
    return [_group(_ids(prompt, g, vocabulary), [_ids(n, g, vocabulary) for n in row]) for row in lengths]


def synthetic(n: int, vocabulary: int = 32000, shrink: int = 1) -> list[dict]:
    """Log-normal lengths: prompts of median 160 (16 to 480 tokens), completions of median 260 (16 to 500); seed 0."""
    g, more = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)

    def completion(generator: torch.Generator) -> list[int]:
        return _ids(log_normal(generator, 260, 0.6, 16, 500) // shrink, generator, vocabulary)

    groups = []
    for _ in range(n):
        prompt = _ids(log_normal(g, 160, 0.8, 16, 480) // shrink, g, vocabulary)
        four = [completion(g) for _ in range(4)]  # those beyond have a seed of their own: K = 4 stays what it was
        groups.append(_group(prompt, four + [completion(more) for _ in range(MOST - 4)]))
    return groups


def real(name: str, n: int, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Groups of a file in the folder ``CONTRASTIVE_ALIGN_DATA``, drawn with seed 0, EOS after every completion.

    The best and the worst completion come first, then the others, then all of them again up to 16. Groups whose
    scores are all equal have no pair, and are left out.
    """
    file, form = REAL[name]
    lines = (Path(os.environ["CONTRASTIVE_ALIGN_DATA"]) / file).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(set(row["scores"])) > 1]
    groups = []
    for row in random.Random(0).sample(rows, n):
        best, *others = sorted(range(len(row["scores"])), key=lambda i, scores=row["scores"]: -scores[i])
        order = [best, others[-1], *others[:-1]]
        order = [order[i % len(order)] for i in range(MOST)]
        completions = [[*tokenizer(row["completions"][i]).input_ids, tokenizer.eos_token_id] for i in order]
        prompt = tokenizer(form.format(row["prompt"])).input_ids
        groups.append(_group(prompt, completions, [float(row["scores"][i]) for i in order]))
    return groups


def load_tokenizer(workload: str, folder: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder`` for real text; the bundled one, of which only the padding counts, for made-up ids."""
    return AutoTokenizer.from_pretrained(folder if workload in REAL else demo.MODEL_PATH)


def find_tokenizer() -> str | None:
    """The one tokenizer in the folder ``CONTRASTIVE_ALIGN_MODELS`` or in one of its folders."""
    folder = Path(os.environ.get("CONTRASTIVE_ALIGN_MODELS", "/nowhere"))
    found = sorted([*folder.glob("tokenizer.json"), *folder.glob("*/tokenizer.json")])
    return str(found[0].parent) if found else None


def log_normal(generator: torch.Generator, median: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, median * math.exp(sigma * torch.randn((), generator=generator).item()))))


def completion_tokens(group: dict, k: int) -> int:
    return sum(map(len, group["completion_ids"][:k]))


def unique_tokens(groups: list[dict], k: int) -> int:
    """Each prompt once and its K completions."""
    return sum(len(g["prompt_ids"]) + completion_tokens(g, k) for g in groups)


def padded_tokens(groups: list[dict], k: int) -> int:
    """What the padded layout computes on."""
    return k * len(groups) * max(len(g["prompt_ids"]) + len(c) for g in groups for c in g["completion_ids"][:k])


def _group(prompt: list[int], completions: list[list[int]], scores: list[float] | None = None) -> dict:
    scores = scores or [float(len(completions) - i) for i in range(len(completions))]
    return {"prompt_ids": prompt, "completion_ids": completions, "scores": scores}


def _ids(length: int, generator: torch.Generator, vocabulary: int) -> list[int]:
    return torch.randint(3, vocabulary, (max(length, 1),), generator=generator).tolist()
