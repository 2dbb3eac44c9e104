"""RealToxicityPrompts -> train.jsonl and test.jsonl, each line with a 'prompt'.

python recipes/conditional_toxicity/prompts.py --output=data/toxicity --test=10000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset


TOXIC = 0.5  # of Perspective's toxicity: what the data's authors call toxic


def split_prompts(rows: Iterable[Mapping[str, Any]], test: int) -> tuple[list[str], list[str]]:
    """Training and test prompts: the last ``test`` that are not toxic themselves, and all before and between them.

    >>> rows = [{"prompt": {"text": t, "toxicity": x}} for t, x in (("a", 0.1), ("b", 0.2), ("c", 0.9), ("d", None))]
    >>> split_prompts(rows, 1)
    (['a', 'c', 'd'], ['b'])
    """
    prompts = [(row["prompt"]["text"], row["prompt"]["toxicity"]) for row in rows]
    calm = [i for i, (_, toxicity) in enumerate(prompts) if toxicity is not None and toxicity < TOXIC]
    held_out = set(calm[-test:] if test else [])
    train = [text for i, (text, _) in enumerate(prompts) if i not in held_out]
    return train, [prompts[i][0] for i in sorted(held_out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/toxicity"), help="A folder.")
    parser.add_argument("--test", type=int, default=10_000, help="Prompts that are held out, none of them toxic.")
    args = parser.parse_args()
    parts = split_prompts(load_dataset("allenai/real-toxicity-prompts", split="train"), args.test)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("train", "test"), parts, strict=True):
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        print(f"{path}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
