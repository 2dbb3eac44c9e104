"""How good a sample was -> how its prompt is conditioned. Trained on all conditions, a model is asked for the best."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from contrastive_align.conditions.forms import Prompt, check_form, condition_prompt
from contrastive_align.data.atomic import atomic_write
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import Table


FILE = "condition.json"
CONDITIONS: dict[str, type[Condition]] = {}  # by kind; each class enters itself


@dataclass(frozen=True, kw_only=True)
class Condition(ABC):
    """Labels to balance by, the text for a label, and the form that puts the text before a prompt.

    A saved model carries its condition, and is asked for its best with one call:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> resolve_condition("phrases").save(folder)  # training does this
    >>> Condition.load(folder).apply_best("Why is the sky blue?")
    'Excellent. input: Why is the sky blue?'
    >>> Condition.load(folder).apply_best([{"role": "user", "content": "Why is the sky blue?"}])
    [{'role': 'user', 'content': 'Excellent. input: Why is the sky blue?'}]

    Args:
        form: ``{condition}`` and ``{prompt}`` once each.
    """

    kind: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]  # of a sample, "score" or "feedback" or both: without, it is left out
    free_words: ClassVar[bool] = False  # a text without its end means much the same, so that it may be cut
    form: str

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            CONDITIONS[cls.kind] = cls

    def __post_init__(self) -> None:
        check_form(self.form)

    @abstractmethod
    def label(self, table: Table) -> NDArray[np.int32]:
        """(N,) what draws are balanced over: 0 the best, -1 left out."""

    @abstractmethod
    def text(self, sample: Sample, label: int) -> str:
        """The condition under which the sample is trained."""

    @abstractmethod
    def names(self, table: Table | None = None) -> list[str]:
        """What each label is called, best first."""

    @property
    @abstractmethod
    def best(self) -> str:
        """The text that asks for the best."""

    def best_for(self, prompt: Prompt) -> str:
        """The text that asks for the best with this prompt; the same every time."""
        return self.best

    def askable(self) -> dict[str, str]:
        """Name -> text of every condition that a model can be asked for without having seen a sample, best first."""
        return {name: name for name in self.names()}

    def texts_for(self, feedback: str | None) -> list[str]:
        """Every text that a sample with this feedback may be conditioned on, in training or when it is asked for."""
        return list(self.askable().values())

    def check_generations(self, n: int, prompts: int) -> None:
        """Raise ValueError where n completions for each of so many prompts are too few to be labelled."""
        return  # by default any number will do

    def check(self, sample: Sample) -> None:
        """Raise ValueError where the sample's score or feedback is none that this condition can make a label of."""
        return  # by default any will do

    @property
    def tokens(self) -> list[str]:
        """Special tokens that the tokenizer and the model must be given."""
        return []

    def apply(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt under the condition ``text``. Of a conversation the last user message goes through the form."""
        return condition_prompt(self.form, text, prompt)

    def apply_best(self, prompt: Prompt) -> Prompt:
        """The prompt under the condition that asks for the best."""
        return self.apply(prompt, self.best_for(prompt))

    @property
    def spec(self) -> dict[str, Any]:
        """What :func:`resolve_condition` makes this condition from; plain lists, dicts and numbers."""
        return {"kind": self.kind, **json.loads(json.dumps(asdict(self)))}

    def save(self, folder: str | Path) -> None:
        """Write ``condition.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / FILE) as file:
            file.write(json.dumps(self.spec, indent=2, ensure_ascii=False).encode() + b"\n")

    @staticmethod
    def load(folder: str | Path) -> Condition:
        """Read ``condition.json``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or has unknown or wrong entries.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {FILE}. Give the folder of a model saved by conditional training."
            )
        try:
            return resolve_condition(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Save the condition again, or copy it from the run."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def resolve_condition(spec: str | Mapping[str, Any] | Condition) -> Condition:
    """A condition from its kind, or from a mapping with ``kind`` and the options of that kind, as in a YAML.

    Raises:
        ValueError: an unknown kind or option, or a value that the option cannot have.

    >>> resolve_condition({"kind": "quantile_tokens", "quantiles": 3}).tokens
    ['<quantile_0>', '<quantile_1>', '<quantile_2>']
    """
    if isinstance(spec, Condition):
        return spec
    options = {"kind": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping):
        raise ValueError(f"The condition is {spec!r}, expected one of {sorted(CONDITIONS)}, or a mapping with 'kind'.")
    kind = options.get("kind")
    if not isinstance(kind, str) or kind not in CONDITIONS:
        raise ValueError(f"The condition's kind is {kind!r}, expected one of {sorted(CONDITIONS)}.")
    accepted = [f.name for f in fields(CONDITIONS[kind])]
    if unknown := [name for name in options if name not in ("kind", *accepted)]:
        raise ValueError(f"The condition {kind} has no option {', '.join(map(repr, unknown))}; it has {accepted}.")
    return CONDITIONS[kind](**{name: value for name, value in options.items() if name != "kind"})


def ladder(option: str, found: Any, presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The texts of an option, best first, or those of the preset that it names."""
    if isinstance(found, str):
        if found not in presets:
            raise ValueError(
                f"'{option}' is {found!r}, expected a list of texts, best first, or one of {list(presets)}."
            )
        return presets[found]
    return texts(option, found, least=2)


def texts(option: str, found: Any, *, least: int) -> tuple[str, ...]:
    """The texts of an option, checked."""
    good = isinstance(found, list | tuple) and all(isinstance(x, str) and x.strip() for x in found)
    if not good or len(found) < least or len(set(found)) < len(found):
        size = f"at least {least} " if least else ""
        raise ValueError(f"'{option}' is {found!r}, expected a list of {size}different texts that are not empty.")
    return tuple(found)
