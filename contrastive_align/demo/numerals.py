"""Numerals as digits: the feature of the recipe for encoder-decoders, and the prompts it is about.

python -m contrastive_align.demo.numerals sentences.jsonl prompts.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


TASK = "translate English to German: "  # the prefix that T5 was trained with
NUMERALS = "two three four five six seven eight nine ten eleven twelve".split()
DIGITS = {word: str(n) for n, word in enumerate(NUMERALS, start=2)}
WORD = re.compile(rf"\b({'|'.join(NUMERALS)})\b", re.IGNORECASE)


def digits(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 where every numeral of the prompt stands in the completion as a number, else 0; a TRL reward function.

    >>> digits(["He has two dogs and ten cats."] * 2, ["Er hat 2 Hunde und 10 Katzen.", "Er hat zwei Hunde."])
    [1.0, 0.0]
    """
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        numbers = set(re.findall(r"\d+", completion))
        values.append(float({DIGITS[word.lower()] for word in WORD.findall(prompt)} <= numbers))
    return values


def main(source: str, to: str) -> None:
    """Write the distinct prompts of a .jsonl that have a numeral, behind the task's prefix."""
    with open(source, encoding="utf-8") as file:
        sentences = dict.fromkeys(json.loads(line)["prompt"] for line in file)
    with open(to, "w", encoding="utf-8") as file:
        for sentence in filter(WORD.search, sentences):
            file.write(json.dumps({"prompt": TASK + sentence}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
