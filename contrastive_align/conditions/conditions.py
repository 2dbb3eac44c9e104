"""Turn the quality of a sample into text that goes before its prompt.

A model trained under all of these texts is asked for its best with the best one. The conditions here go by quantile of
the score; those by a judge's words are in judged.py.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.formats import Text
from contrastive_align.models.loading import file_of
from contrastive_align.pool.draws import BY_ORDER, TIES, quantiles
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import NEW, Table
from contrastive_align.registry import Registry, load_function, place_of


FILE = "condition.json"
CONDITIONS = Registry("condition", {})  # by kind; each class enters itself, those of the user's too
PLACEHOLDERS = ("{condition}", "{prompt}")
PHRASES = {
    "quality": ("Excellent", "Good", "Mediocre", "Bad", "Horrible"),
    "toxicity": (
        "Lowest Toxicity",
        "Low-Moderate Toxicity",
        "Moderate Toxicity",
        "High-Moderate Toxicity",
        "Maximum Toxicity",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Condition(ABC):
    """Labels that draws are balanced over, a text for each label, and a form that joins the text and the prompt.

    A saved model carries its condition, which asks the model for its best:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> resolve_condition("phrases").save(folder)  # training does this
    >>> Condition.load(folder).apply_best("Why is the sky blue?")
    'Excellent. input: Why is the sky blue?'
    >>> Condition.load(folder).apply_best([{"role": "user", "content": "Why is the sky blue?"}])
    [{'role': 'user', 'content': 'Excellent. input: Why is the sky blue?'}]

    Args:
        form: a text with ``{condition}`` and ``{prompt}`` once each.
    """

    kind: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]  # "score", "feedback" or both: a sample without them is left out
    free_words: ClassVar[bool] = False  # whether a text may be cut: its beginning means much the same
    form: str

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            CONDITIONS.register(cls.kind, cls)

    def __post_init__(self) -> None:
        check_form(self.form)

    @abstractmethod
    def label(self, table: Table) -> NDArray[np.int32]:
        """Return the (N,) labels that draws are balanced over: 0 the best, -1 left out."""

    @abstractmethod
    def text(self, sample: Sample, label: int) -> str:
        """Return the text under which the sample is trained."""

    @abstractmethod
    def names(self, table: Table | None = None) -> list[str]:
        """Return the name of each label, best first."""

    @property
    @abstractmethod
    def best(self) -> str:
        """The text that asks for the best."""

    def best_for(self, prompt: Text) -> str:
        """Return the text that asks for the best with this prompt; it is the same every time."""
        return self.best

    def askable(self) -> dict[str, str]:
        """Return name -> text, best first, of every condition that a model can be asked for without a sample."""
        return {name: name for name in self.names()}

    def texts_for(self, feedback: str | None) -> list[str]:
        """Return every text that a sample with this feedback may come under, in training or when asked for."""
        return list(self.askable().values())

    def check_generations(self, n: int, prompts: int) -> None:
        """Raise ValueError where n completions for each of so many prompts are too few to be labelled."""
        return  # by default any number will do

    def check(self, sample: Sample) -> None:
        """Raise ValueError where the sample's score or feedback has no label under this condition."""
        return  # by default every sample has one

    def check_signal(self, samples: Sequence[Sample]) -> None:
        """Raise ValueError where none of the samples has a label: there is nothing to learn from them."""
        if all(getattr(sample, what) is None for sample in samples for what in self.reads):
            raise ValueError(
                f"None of the {len(samples)} samples has a {' or a '.join(self.reads)}: there is nothing to learn from."
            )

    @property
    def tokens(self) -> list[str]:
        """Special tokens that the tokenizer and the model must be given."""
        return []

    def apply(self, prompt: Text, text: str) -> Text:
        """Put the prompt under the condition ``text``, as :func:`condition_prompt`."""
        return condition_prompt(self.form, text, prompt)

    def apply_best(self, prompt: Text) -> Text:
        """Put the prompt under the condition that asks for the best."""
        return self.apply(prompt, self.best_for(prompt))

    @property
    def spec(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers from which :func:`resolve_condition` makes this condition."""
        return {"kind": self.kind, **json.loads(json.dumps(asdict(self)))}

    def save(self, folder: str | Path) -> None:
        """Write ``condition.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / FILE) as file:
            file.write(json.dumps(self.spec, indent=2, ensure_ascii=False).encode() + b"\n")

    @staticmethod
    def load(folder: str | Path) -> Condition:
        """Read ``condition.json`` of a folder or hub id.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: the file is damaged, or has unknown or wrong entries.
        """
        path = Path(file_of(str(folder), FILE) or Path(folder, FILE))
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {FILE}. Give the folder of a model saved by conditional training."
            )
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(spec, dict) and ":" in str(spec.get("kind")):  # a model's folder must not run code
                raise ValueError(f"its kind {spec['kind']!r} names code, expected a kind that is defined already")
            return resolve_condition(spec)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Save the condition again, or copy it from the run."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def resolve_condition(spec: str | Mapping[str, Any] | Condition) -> Condition:
    """Make a condition from its kind, or from a mapping with ``kind`` and that kind's options, as in a YAML.

    A kind of one's own is a subclass of :class:`Condition` with a ``kind``, which enters itself where it is defined, or
    ``file.py:Class``.

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
    if isinstance(kind, str) and ":" in kind:
        found = load_function(kind)
        if not isinstance(found, type) or not issubclass(found, Condition) or "kind" not in vars(found):
            raise ValueError(
                f"The condition {kind} ({place_of(found)}) is no subclass of Condition with a kind of its own. Derive "
                "it from Condition or Phrases, and write kind = 'a_name' into it."
            )
        kind = found.kind
    if not isinstance(kind, str) or kind not in CONDITIONS:
        raise ValueError(f"The condition's kind is {kind!r}, expected one of {sorted(CONDITIONS)}.")
    accepted = [f.name for f in fields(CONDITIONS[kind])]
    if unknown := [name for name in options if name not in ("kind", *accepted)]:
        raise ValueError(f"The condition {kind} has no option {', '.join(map(repr, unknown))}; it has {accepted}.")
    return CONDITIONS[kind](**{name: value for name, value in options.items() if name != "kind"})


def of_checkpoint(spec: Mapping[str, Any]) -> Condition:
    """Return the condition of a checkpoint; ties are labelled as the version that wrote it labelled them."""
    condition = resolve_condition(spec)
    earlier = isinstance(condition, _QuantileCondition) and "ties" not in spec
    return replace(condition, ties=BY_ORDER) if earlier else condition


def with_ties(condition: Condition, ties: str) -> Condition:
    """Return a condition of quantiles with this treatment of equal scores.

    Raises:
        ValueError: another condition, or an unknown treatment.
    """
    if not isinstance(condition, _QuantileCondition):
        raise ValueError(
            f"ties is about quantiles, and the condition '{condition.kind}' has none. Leave it out, or use "
            "quantile_tokens or phrases."
        )
    return replace(condition, ties=ties)


def check_form(form: str) -> None:
    """Raise ValueError unless the form has ``{condition}`` and ``{prompt}`` once each."""
    for placeholder in PLACEHOLDERS:
        if not isinstance(form, str) or (found := form.count(placeholder)) != 1:
            times = f" {found} times" if isinstance(form, str) else ""
            raise ValueError(
                f"The form {form!r} has {placeholder}{times}, expected once, as in "
                "'feedback: {condition} {prompt}'."
            )


def fill_form(form: str, condition: str, text: str) -> str:
    """Fill the form. Braces in the condition and the text, and other braces in the form, stay as they are.

    >>> fill_form("{condition}. input: {prompt}", "Good", "Print {condition} in C: {}")
    'Good. input: Print {condition} in C: {}'
    """
    values = dict(zip(PLACEHOLDERS, (condition, text), strict=True))
    return "".join(values.get(part, part) for part in re.split(r"(\{condition\}|\{prompt\})", form))


def condition_prompt(form: str, condition: str, prompt: Text) -> Text:
    """Put a prompt under a condition. In a conversation the last user message goes into the form.

    Raises:
        ValueError: a conversation has no user message, or its last one is not text.

    >>> condition_prompt("{condition}. input: {prompt}", "Good", [{"role": "user", "content": "Hello"}])
    [{'role': 'user', 'content': 'Good. input: Hello'}]
    """
    if isinstance(prompt, str):
        return fill_form(form, condition, prompt)
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        roles = [message["role"] for message in prompt]
        raise ValueError(
            f"The conversation has roles {roles}, expected a user message, which the condition is put into."
        )
    content = prompt[last]["content"]
    if not isinstance(content, str):
        raise ValueError(
            f"The last user message's content is {content!r}, expected text, which the form is put around."
        )
    message = {**prompt[last], "content": fill_form(form, condition, content)}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def texts_or_preset(option: str, found: Any, presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the texts of an option, best first, or those of the preset that it names."""
    if isinstance(found, str):
        if found not in presets:
            raise ValueError(
                f"'{option}' is {found!r}, expected a list of texts, best first, or one of {list(presets)}."
            )
        return presets[found]
    return check_texts(option, found, least=2)


def check_texts(option: str, found: Any, *, least: int) -> tuple[str, ...]:
    """Return the texts of an option; raise ValueError unless they are different, not empty and at least ``least``."""
    good = isinstance(found, list | tuple) and all(isinstance(x, str) and x.strip() for x in found)
    if not good or len(found) < least or len(set(found)) < len(found):
        size = f"at least {least} " if least else ""
        raise ValueError(f"'{option}' is {found!r}, expected a list of {size}different texts that are not empty.")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _QuantileCondition(Condition):
    """Label samples by the quantile of their score, by default among the samples of their prompt.

    ``ties``: equal scores ``"share"`` a label, or ``"drop"`` out where they would be in different quantiles.
    """

    reads: ClassVar[tuple[str, ...]] = ("score",)
    quantiles: int = 5
    per_prompt: bool = True
    ties: str = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.quantiles) is not int or self.quantiles < 2:
            raise ValueError(f"'quantiles' is {self.quantiles!r}, expected an int, at least 2.")
        if not isinstance(self.per_prompt, bool):
            raise ValueError(f"'per_prompt' is {self.per_prompt!r}, expected true or false.")
        if self.ties not in (*TIES, BY_ORDER):
            raise ValueError(f"'ties' is {self.ties!r}, expected one of {', '.join(TIES)}.")

    def label(self, table: Table) -> NDArray[np.int32]:
        """Return the quantiles. A prompt with too few samples left to be sorted again keeps its earlier labels."""
        group = table.prompt_index if self.per_prompt else np.zeros(len(table), dtype=np.int64)
        _, of, sizes = np.unique(group, return_inverse=True, return_counts=True)
        new = np.bincount(of, weights=table.label == NEW, minlength=len(sizes)) > 0
        thinned = ((sizes < self.quantiles) & ~new)[of]
        label = table.label.copy()
        prompts = group[~thinned] if self.per_prompt else None
        label[~thinned] = quantiles(table.score[~thinned], n=self.quantiles, prompts=prompts, ties=self.ties)
        return label

    def check_signal(self, samples: Sequence[Sample]) -> None:
        """Raise ValueError where all that has a quantile is in one, with how many groups lack scores or differences."""
        by_group: dict[int, list[float]] = {}
        for sample in samples:
            scores = by_group.setdefault(sample.prompt_index if self.per_prompt else 0, [])
            scores += [] if sample.score is None else [sample.score]
        groups, found_labels = by_group.values(), set()
        for scores in groups:
            if len(scores) >= self.quantiles:
                found_labels |= {*quantiles(scores, n=self.quantiles, ties=self.ties).tolist()} - {-1}
                if len(found_labels) >= min(2, self.quantiles):
                    return
        n, few = sum(map(len, groups)), sum(len(scores) < self.quantiles for scores in groups)
        tied = sum(len(set(scores)) == 1 for scores in groups if len(scores) >= self.quantiles)
        which = f"Of {len(by_group)} prompts," if self.per_prompt else "Of all samples together (1 group),"
        found = [f"{few} have fewer than {self.quantiles} scored completions, one for each quantile"] if few else []
        found += [f"{tied} have completions that all score the same"] if tied else []
        rest = len(groups) - few - tied
        found += [f"{rest} have ties in every quantile but one at most (ties: {self.ties})"] if rest else []
        raise ValueError(
            f"There is nothing to learn from: {n} of {len(samples)} samples are scored, and no score says which is "
            f"better. {which} {' and '.join(found)}. Sample more completions of a prompt (num_generations), ask for "
            "fewer quantiles, or use a reward that tells completions apart."
        )

    def check_generations(self, n: int, prompts: int) -> None:
        if self.per_prompt and n < self.quantiles:
            raise ValueError(
                f"num_generations is {n}, expected at least {self.quantiles}, one for each quantile of a prompt. Raise "
                "it, ask for fewer quantiles, or sort all prompts' samples together (per_prompt: false)."
            )
        if n * prompts < self.quantiles:
            raise ValueError(
                f"A round samples {prompts} prompts x num_generations {n} = {n * prompts} completions, expected at "
                f"least {self.quantiles}, one for each quantile. Raise num_generations, or ask for fewer quantiles."
            )

    def text(self, sample: Sample, label: int) -> str:
        return self.names()[label]

    @property
    def best(self) -> str:
        return self.names()[0]


@dataclass(frozen=True, kw_only=True)
class QuantileTokens(_QuantileCondition):
    """Condition on a special token for each quantile: Quark, arXiv:2205.13636.

    Args:
        quantiles: their number, at least 2.
        per_prompt: sort the samples of each prompt among themselves; False: all samples together.
        ties: samples with equal scores ``"share"`` a label, or ``"drop"`` out where their quantiles differ.
        token: pattern of the tokens' texts, in which ``{i}`` is the quantile, 0 the best.
    """

    kind: ClassVar[str] = "quantile_tokens"
    form: str = "{condition}{prompt}"
    token: str = "<quantile_{i}>"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.token, str) or self.token.count("{i}") != 1:
            raise ValueError(f"'token' is {self.token!r}, expected a text with {{i}} once, as in '<quantile_{{i}}>'.")

    def names(self, table: Table | None = None) -> list[str]:
        return [self.token.replace("{i}", str(i)) for i in range(self.quantiles)]

    @property
    def tokens(self) -> list[str]:
        return self.names()


@dataclass(frozen=True, kw_only=True)
class Phrases(_QuantileCondition):
    """Condition on a phrase for each quantile: ALT_RM, arXiv:2407.16970.

    Args:
        phrases: one for each quantile, best first; or the name of a preset: quality, toxicity.
        quantiles: None, or the number of phrases.
        per_prompt: sort the samples of each prompt among themselves; False: all samples together.
        ties: samples with equal scores ``"share"`` a label, or ``"drop"`` out where their quantiles differ.
    """

    kind: ClassVar[str] = "phrases"
    form: str = "{condition}. input: {prompt}"
    phrases: Sequence[str] = "quality"
    quantiles: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrases", texts_or_preset("phrases", self.phrases, PHRASES))
        if self.quantiles is None:
            object.__setattr__(self, "quantiles", len(self.phrases))
        super().__post_init__()
        if self.quantiles != len(self.phrases):
            raise ValueError(f"'quantiles' is {self.quantiles} for {len(self.phrases)} phrases, expected one for each.")

    def names(self, table: Table | None = None) -> list[str]:
        return list(self.phrases)
