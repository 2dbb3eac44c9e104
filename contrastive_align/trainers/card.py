"""What a model card says beside TRL's template: how the model was trained here, and how it is asked."""

from __future__ import annotations

import json
from pathlib import Path


BEFORE = "## Training procedure"  # of TRL's template


def add_section(output_dir: str | Path, section: str, *, instead_of: str | None = None) -> None:
    """Put a section of Markdown into the ``README.md`` of a folder, before the one about the training.

    Args:
        instead_of: a heading whose section it replaces, where the card has that.
    """
    path = Path(output_dir) / "README.md"
    if not path.is_file():
        return  # written by the main process alone
    card = path.read_text(encoding="utf-8")
    at = card.find(BEFORE)
    at = len(card) if at < 0 else at
    start = card.find(instead_of) if instead_of else -1
    start = start if 0 <= start < at else at
    path.write_text(f"{card[:start]}{section.strip()}\n\n{card[at:]}", encoding="utf-8")


def how_to_ask(kind: str, best: str, *, adapter: bool, tokens: bool, base: str) -> str:
    """The section of a model that was trained under a condition."""
    if adapter and tokens:
        load = [
            "from transformers import AutoModelForCausalLM",
            "from contrastive_align.feedback.tokens import load_with_condition_tokens",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            "model, tokenizer = load_with_condition_tokens(base, folder)",
        ]
    else:
        auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
        load = [
            f"from {'peft' if adapter else 'transformers'} import {auto}",
            "from transformers import AutoTokenizer",
            "",
        ]
        load += [f"model = {auto}.from_pretrained(folder)", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    code = "\n".join(
        [
            'folder = "."  # of this model',
            "from contrastive_align.feedback import Condition",
            *load,
            'prompt = Condition.load(folder).apply_best("Why is the sky blue?")  # or a list of messages',
        ]
    )
    return (
        "## Asking for the best\n\n"
        f"This model was trained on completions of every quality, each under a condition (`{kind}`, in "
        "`condition.json`) that says how good it is; without one it writes them all. The best is asked for with: "
        f"`{best}`\n\n"
        f"```python\n{code}\n```"
    )
