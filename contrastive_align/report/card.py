"""The model card: what the model is, a program that asks it, its objective and its results, before TRL's template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from contrastive_align.data.atomic import atomic_write


DATA_SUFFIXES = {
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".gz",
    ".zst",
    ".zip",
    ".arrow",
    ".xlsx",
    ".yaml",
}
DEMO_MODEL = "the demo model of contrastive-align"
DEMO_DATA = "the demo data of contrastive-align"
PLAIN_WORDS = (DEMO_MODEL, DEMO_DATA)
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


def _place(card: str, line: str) -> int:
    found = re.search(f"^{line}", card, re.MULTILINE)
    return len(card) if found is None else found.start()


def results_section(summary: Mapping[str, Any]) -> str:
    r"""Write the table of ``summary.json`` in Markdown, with what it was measured on and what it says in words.

    >>> print(results_section({"table": [["", "after"], ["KL(p||pi)", "0.1"]], "metrics_on": "8 prompts", "state": ""}))
    ## Results
    <BLANKLINE>
    Measured on 8 prompts.
    <BLANKLINE>
    |  | after |
    |---|---|
    | KL(p\|\|pi) | 0.1 |
    """
    rows = [[as_text(cell) for cell in row] for row in summary["table"]]
    lines = ["## Results", "", f"Measured on {as_text(summary['metrics_on'])}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(5, f"|{'---|' * len(rows[0])}")
    words = [*summary["state"].splitlines(), *summary.get("verdict", ())]
    return "\n".join([*lines, *(f"\n{as_text(line)}" for line in words)])


def as_text(value: Any) -> str:
    r"""Escape a value for one line of Markdown, in which nothing of it is markup.

    >>> print(as_text("a_b <x>\n# [c]"), as_text("---"), as_text("1. x"), as_text("-0.5"))
    a\_b \<x\> \# \[c\] \--- 1\. x -0.5
    """
    text = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(str(value).split()))
    text = re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+=.)])(?=[-+=\s]|$)", r"\1\\\2", text)  # a list, a rule, a heading of the line above


@dataclass(frozen=True)
class Card:
    """What a card says of a model beside its objective and results.

    Attributes:
        title: the model's name.
        folder: the hub id to load the model by, or "." for the folder of the card.
        base: the hub id or folder of the model that training began from, without the adapter it may have had.
        base_licence: entries of the base's own card: ``license``, and ``license_name`` and ``license_link`` with it.
        data: the names of the data, hub ids or local files.
        adapter: "LoRA" or another kind, of a model that is saved as an adapter.
        start_adapter: the adapter that training began from; of one that is trained further, ``continued``.
        merged_base: a folder beside the adapter, which holds the base with that adapter merged into it.
        quantisation: of the base, as the arguments of ``BitsAndBytesConfig``.
        condition: kind of the condition, and the text that stands for the best label.
        condition_tokens: whether the condition has tokens of its own.
        chat: whether prompts are messages.
        tokenizer_options: further arguments of the tokenizer, as code.
    """

    title: str
    folder: str
    base: str
    base_licence: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[str] = ()
    adapter: str | None = None
    start_adapter: str | None = None
    continued: bool = False
    merged_base: str | None = None
    quantisation: Mapping[str, Any] | None = None
    condition: tuple[str, str] | None = None
    condition_tokens: bool = False
    encoder_decoder: bool = False
    chat: bool = False
    tokenizer_options: str = ""

    def metadata(self) -> dict[str, Any]:
        """Return the entries of the card's head; None removes one."""
        data = [name for name in self.data if not is_local(name)]
        return {
            **{"license": None, "license_name": None, "license_link": None, "licence": None, **self.base_licence},
            "base_model": None if is_local(self.base) else self.base,
            "datasets": data or None,
            "library_name": "peft" if self.adapter else "transformers",
            "pipeline_tag": None if self.encoder_decoder else "text-generation",
        }

    def introduction(self) -> str:
        """Say what the model is, what it was trained from and on."""
        what = f"a {self.adapter} adapter of" if self.adapter else "a fine-tuned version of"
        begun = ""
        if self.start_adapter:
            how = "was trained further" if self.continued else "was merged into it before training"
            begun = f" The adapter {named(self.start_adapter)} {how}."
        data = f" on {', '.join(named(name, 'datasets/') for name in self.data)}" if self.data else ""
        return (
            f"# {as_text(self.title)}\n\n"
            f"This model is {what} {named(self.base)}, trained{data} with [TRL](https://github.com/huggingface/trl) "
            f"and contrastive-align.{begun}"
        )

    def usage(self) -> str:
        """Write the section with a program that loads the model and samples an answer."""
        heading, text = "## Quick start", ""
        if self.condition is not None:
            kind, best = self.condition
            heading = "## Asking for the best"
            text = (
                f"This model was trained on completions of every quality, each under a condition ({code_span(kind)}, "
                "in `condition.json`) that says how good it is; without one it writes them all. The best is asked for "
                f"with: {code_span(best)}\n\n"
            )
        where = "  # the folder of this model" if self.folder == "." else ""
        code = [f"folder = {json.dumps(self.folder)}{where}", *self._loading(), *self._asking()]
        imports: dict[str, list[str]] = {}
        for _, module, _, name in sorted(line.split() for line in code if line.startswith("from ")):
            imports.setdefault(module, []).append(name)
        code = [
            *(f"from {module} import {', '.join(names)}" for module, names in imports.items()),
            "",
            *(line for line in code if not line.startswith("from ")),
        ]
        return f"{heading}\n\n{text}```python\n" + "\n".join(code) + "\n```"

    def _loading(self) -> list[str]:
        kind = "Seq2SeqLM" if self.encoder_decoder else "CausalLM"
        options, lines = "", ["from transformers import AutoTokenizer"]
        if self.quantisation:
            given = ", ".join(f"{name}={json.dumps(value)}" for name, value in self.quantisation.items())
            lines += ["from transformers import BitsAndBytesConfig"]
            lines += [f"quantisation = BitsAndBytesConfig({given.replace('true', 'True').replace('false', 'False')})"]
            options = ", quantization_config=quantisation"
        if not self.adapter or self.merged_base or self.condition_tokens:
            auto = f"AutoModelFor{kind}.from_pretrained"
            lines += [f"from transformers import AutoModelFor{kind}"]
        if not self.adapter:
            lines += [f"model = {auto}(folder)"]
        elif not (self.merged_base or self.condition_tokens):
            lines += [f"from peft import AutoPeftModelFor{kind}"]
            lines += [f"model = AutoPeftModelFor{kind}.from_pretrained(folder{options})"]
        else:
            if self.merged_base:
                lines += ["from pathlib import Path", "from huggingface_hub import snapshot_download"]
                lines += ["path = folder if Path(folder).is_dir() else snapshot_download(folder)"]
                base = f'f"{{path}}/{self.merged_base}"'
            else:
                lines += ["from peft import PeftConfig"]
                base = "PeftConfig.from_pretrained(folder).base_model_name_or_path"
            lines += [f"base = {auto}({base}{options})"]
            if self.condition_tokens:
                lines += ["from contrastive_align.conditions.tokens import load_with_condition_tokens"]
                return [*lines, "model, tokenizer = load_with_condition_tokens(base, folder)"]
            lines += ["from peft import PeftModel", "model = PeftModel.from_pretrained(base, folder)"]
        return [*lines, "tokenizer = AutoTokenizer.from_pretrained(folder)"]

    def _asking(self) -> list[str]:
        question = '"Why is the sky blue?"'
        lines = [f'prompt = [{{"role": "user", "content": {question}}}]' if self.chat else f"prompt = {question}"]
        if self.condition is not None:
            lines += ["from contrastive_align.conditions import Condition"]
            lines += ["prompt = Condition.load(folder).apply_best(prompt)"]
        options = self.tokenizer_options
        if self.chat:
            lines += ["prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)"]
            options += ", add_special_tokens=False"
        lines += [f'inputs = tokenizer(prompt, return_tensors="pt"{options}).to(model.device)']
        lines += ["output = model.generate(**inputs, max_new_tokens=128)[0]"]
        answer = "output" if self.encoder_decoder else 'output[inputs["input_ids"].size(1) :]'
        return [*lines, f"print(tokenizer.decode({answer}, skip_special_tokens=True))"]


def is_local(name: str) -> bool:
    """Return whether a name of a model or of data is no hub id but a file or folder, or plain words.

    >>> is_local("org/model"), is_local("gpt2"), is_local("./a.jsonl"), is_local("a.jsonl"), is_local("the demo data")
    (False, False, True, True, True)
    """
    is_id = re.fullmatch(r"(?!.*(\.\.|--))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", name, re.ASCII)
    return not is_id or Path(name).exists() or Path(name).suffix.lower() in DATA_SUFFIXES


def named(name: str, kind: str = "") -> str:
    """Write the name of a model or of data: a link to the hub, or the last part of a local path.

    >>> named("org/data", "datasets/"), named("/home/me/rows.jsonl"), named(DEMO_DATA)
    ('[org/data](https://huggingface.co/datasets/org/data)', '`rows.jsonl`', 'the demo data of contrastive-align')
    """
    if not is_local(name):
        return f"[{as_text(name)}](https://huggingface.co/{kind}{name})"
    return name if name in PLAIN_WORDS else code_span(re.split(r"[/\\]+", name.rstrip(r"\/"))[-1])


def licence_of(card: str | None) -> dict[str, str]:
    r"""Read the licence that a model's card names in its head; nothing where it names none.

    >>> licence_of("---\nlicense: mit\n---\n"), licence_of("---\nlicence: license\n---\n"), licence_of(None)
    ({'license': 'mit'}, {}, {})
    """
    if not card or not card.startswith("---"):
        return {}
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, AttributeError):
        return {}
    licence = data.get("license")
    if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        return {}
    further = {name: data.get(f"license_{name}") for name in ("name", "link")} if licence == "other" else {}
    return {"license": licence} | {f"license_{name}": x for name, x in further.items() if isinstance(x, str)}


def evaluation_results(summary: Mapping[str, Any], card: Card) -> list[EvalResult]:
    """Return the measured metrics of ``summary.json`` for the head of a card (``model-index``).

    >>> summary = {"metrics": {"loss": {"after": 1.2, "n": 8}}, "data": {"eval": {"name": "org/data"}}}
    >>> evaluation_results(summary, Card("m", ".", "b"))[0].metric_value
    1.2
    """
    data = summary.get("data", {})
    split = next((name for name in ("eval", "test", "train") if name in data), None)
    name = data[split].get("name") if split else None
    known = card.data[0] if card.data else name or "not named"
    shown = {"dataset_name": known if not is_local(known) else re.split(r"[/\\\\]+", known)[-1]}
    shown |= {"dataset_type": known if not is_local(known) else "local", "dataset_split": split}
    task = "text2text-generation" if card.encoder_decoder else "text-generation"
    return [
        EvalResult(task_type=task, metric_type=metric, metric_name=metric, metric_value=change["after"], **shown)
        for metric, change in summary.get("metrics", {}).items()
        if isinstance(change.get("after"), int | float)
    ]


def complete_card(
    path: Path, card: Card, sections: Sequence[str], summary: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Replace what TRL's template says before the section on the training procedure.

    Args:
        path: of the card.
        card: what it says.
        sections: after the program that loads the model.
        summary: of the run, whose metrics go into the head.
    """
    template = ModelCard.load(path)
    for name, value in card.metadata().items():
        setattr(template.data, name, value)
    template.data.model_name = card.title
    template.data.eval_results = evaluation_results(summary, card) or None
    template.data.tags = sorted(template.data.tags or ())
    kept = template.text[_place(template.text, re.escape(BEFORE)) :]
    kept = re.sub(r"\n\s*\n", "\n\n", kept)  # the template's places for badges
    template.text = "\n" + "\n\n".join([card.introduction(), card.usage(), *sections, kept.strip()]) + "\n"
    with atomic_write(path) as file:
        file.write(str(template).encode())
