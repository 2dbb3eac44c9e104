"""Sections of the model card beside TRL's template: the objective of the training, and how to ask the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


BEFORE = "## Training procedure"  # the heading in TRL's template that new sections precede


def objective_section(objective: Mapping[str, Any]) -> str:
    """Write the section on the objective, name -> value, in Markdown.

    >>> print(objective_section({"loss": "nca", "beta": 0.1}))
    ## Objective
    <BLANKLINE>
    - loss: `nca`
    - beta: `0.1`
    """
    return "\n".join(["## Objective", "", *(f"- {name}: {code_span(value)}" for name, value in objective.items())])


def code_span(value: Any) -> str:
    r"""Write a value as inline code, in which nothing is markup: no backtick ends it, and no line begins in it.

    White space becomes one space, and a character that nobody sees, such as one that steers a terminal, a mark.

    >>> print(code_span(0.1), code_span("a `b` <script>\n# c"))
    `0.1` ``a `b` <script> # c``
    """
    text = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(str(value).split()))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def add_section(output_dir: str | Path, section: str, *, instead_of: str | None = None) -> None:
    """Add a section of Markdown to the ``README.md`` of a folder, before the section on the training procedure.

    Without a ``README.md`` nothing is written: the main process alone writes the card. ``instead_of`` is the heading of
    a section to replace, if the card has it.
    """
    path = Path(output_dir) / "README.md"
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    start = end = _place(card, re.escape(BEFORE))
    if instead_of and (found := _place(card, re.escape(instead_of))) < len(card):
        start, end = found, found + 1 + _place(card[found + 1 :], "## ")
    path.write_text(f"{card[:start].rstrip()}\n\n{section.strip()}\n\n{card[end:].lstrip()}", encoding="utf-8")


def _place(card: str, line: str) -> int:
    found = re.search(f"^{line}", card, re.MULTILINE)
    return len(card) if found is None else found.start()


def how_to_ask(kind: str, best: str, *, adapter: bool, tokens: bool, base: str) -> str:
    """Write the section on how to ask a conditional model for its best completions.

    ``kind`` is that of ``condition.json``, ``best`` the text that stands for the best label, ``tokens`` whether the
    condition has tokens of its own. With an ``adapter``, ``base`` is the id of the model under it.
    """
    if adapter and tokens:
        load = f"""from transformers import AutoModelForCausalLM
from contrastive_align.conditions.tokens import load_with_condition_tokens

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
model, tokenizer = load_with_condition_tokens(base, folder)"""
    else:
        auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
        load = f"""from {"peft" if adapter else "transformers"} import {auto}
from transformers import AutoTokenizer

model = {auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
    code = f"""folder = "."  # of this model
from contrastive_align.conditions import Condition
{load}
prompt = Condition.load(folder).apply_best("Why is the sky blue?")  # or a list of messages"""
    return (
        "## Asking for the best\n\n"
        f"This model was trained on completions of every quality, each under a condition ({code_span(kind)}, in "
        "`condition.json`) that says how good it is; without one it writes them all. The best is asked for with: "
        f"{code_span(best)}\n\n"
        f"```python\n{code}\n```"
    )
