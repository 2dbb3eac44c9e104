"""What a model card says beside TRL's template: how the model was trained here, and how it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


BEFORE = "## Training procedure"  # of TRL's template


class CardMixin:
    """For a trainer: TRL's card, and on it the objective of this run, which the class's name and paper leave open."""

    def objective(self) -> dict[str, Any]:
        """What decides the objective: name -> value."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL, with a section on the objective."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(self.args.output_dir, objective_section(self.objective()))


def objective_section(objective: Mapping[str, Any]) -> str:
    """A section of Markdown.

    >>> print(objective_section({"loss": "nca", "beta": 0.1}))
    ## Objective
    <BLANKLINE>
    - loss: `nca`
    - beta: `0.1`
    """
    return "\n".join(["## Objective", "", *(f"- {name}: `{value}`" for name, value in objective.items())])


def add_section(output_dir: str | Path, section: str, *, instead_of: str | None = None) -> None:
    """Put a section of Markdown into the ``README.md`` of a folder, before the one about the training.

    Args:
        instead_of: the heading of a section that it replaces, where the card has that.
    """
    path = Path(output_dir) / "README.md"
    if not path.is_file():
        return  # written by the main process alone
    card = path.read_text(encoding="utf-8")
    start = end = _place(card, BEFORE)
    if instead_of and instead_of in card:
        start = _place(card, instead_of)
        end = start + 1 + _place(card[start + 1 :], "\n## ")
    path.write_text(f"{card[:start].rstrip()}\n\n{section.strip()}\n\n{card[end:].lstrip()}", encoding="utf-8")


def _place(card: str, heading: str) -> int:
    at = card.find(heading)
    return len(card) if at < 0 else at


def how_to_ask(kind: str, best: str, *, adapter: bool, tokens: bool, base: str) -> str:
    """The section of a model that was trained under a condition."""
    if adapter and tokens:
        load = [
            "from transformers import AutoModelForCausalLM",
            "from contrastive_align.conditions.tokens import load_with_condition_tokens",
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
            "from contrastive_align.conditions import Condition",
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
