"""Conditions made of a judge's feedback: a category (ALT_LMC), free text (ALT_LMU), or attributes (SteerLM)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from contrastive_align.conditions.conditions import Condition, check_texts, texts_or_preset
from contrastive_align.data.formats import Text
from contrastive_align.pool.draws import LEFT_OUT
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import Table


CATEGORIES = {
    "harmless_helpful": ("Harmless and very helpful", "Harmless and helpful", "Harmless and not helpful", "Harmful")
}
TOP_SCORE = 3  # the best of 0, 1, 2, 3, which a judge gives with its free text


@dataclass(frozen=True, kw_only=True)
class CategoryCondition(Condition):
    """Condition on the category that a judge chose: ALT_LMC, arXiv:2407.16970.

    A sample without a category is left out.

    Args:
        categories: best first; or the name of a preset: harmless_helpful.
    """

    kind: ClassVar[str] = "categories"
    reads: ClassVar[tuple[str, ...]] = ("feedback",)
    form: str = "feedback: {condition} input: {prompt}"
    categories: Sequence[str] = "harmless_helpful"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "categories", texts_or_preset("categories", self.categories, CATEGORIES))

    def label(self, table: Table) -> NDArray[np.int32]:
        codes = table.feedback_codes
        ranks = {category: i for i, category in enumerate(self.categories)}
        rank = np.array([ranks.get(value, -2) for value in table.feedback_values] + [LEFT_OUT], dtype=np.int32)
        label = rank[codes]
        if len(unknown := np.flatnonzero(label == -2)):
            self._check(table.feedback_values[codes[unknown[0]]], _where(table, unknown[0]))
        return label

    def check(self, sample: Sample) -> None:
        if sample.feedback is not None:
            self._check(sample.feedback, _where_sample(sample))

    def _check(self, feedback: str, where: str) -> None:
        if feedback not in self.categories:
            raise ValueError(
                f"{where}: the feedback is {feedback!r}, expected one of {list(self.categories)}. Let the judge answer "
                "with one of these, or name its own, best first, in the condition's 'categories'."
            )

    def text(self, sample: Sample, label: int) -> str:
        return self.categories[label]

    def names(self, table: Table | None = None) -> list[str]:
        return list(self.categories)

    @property
    def best(self) -> str:
        return self.categories[0]


@dataclass(frozen=True, kw_only=True)
class TextCondition(Condition):
    """Condition on a judge's own words, balanced by the score 0..3 that came with them: ALT_LMU, arXiv:2407.16970.

    The model is asked for its best with words that the judge gave to samples of score 3. A sample without words or
    without a score is left out.

    Args:
        exemplars: such words. Empty: training sets them after the first round, with :meth:`with_exemplars`.
    """

    kind: ClassVar[str] = "text"
    free_words: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("score", "feedback")
    form: str = "feedback: {condition} input: {prompt}"
    exemplars: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exemplars", check_texts("exemplars", self.exemplars, least=0))

    def label(self, table: Table) -> NDArray[np.int32]:
        given = ~np.isnan(table.score) & (table.feedback_codes >= 0)
        if len(wrong := np.flatnonzero(given & ~np.isin(table.score, np.arange(TOP_SCORE + 1)))):
            _check_score(table.score[wrong[0]], _where(table, wrong[0]))
        return np.where(given, TOP_SCORE - np.nan_to_num(table.score), LEFT_OUT).astype(np.int32)

    def check(self, sample: Sample) -> None:
        if sample.feedback is not None and sample.score is not None and not math.isnan(sample.score):
            _check_score(sample.score, _where_sample(sample))

    def text(self, sample: Sample, label: int) -> str:
        return str(sample.feedback)

    def names(self, table: Table | None = None) -> list[str]:
        return [f"score {score}" for score in range(TOP_SCORE, -1, -1)]

    def texts_for(self, feedback: str | None) -> list[str]:
        return [*super().texts_for(feedback), *([] if feedback is None else [feedback])]

    def askable(self) -> dict[str, str]:
        return {f"exemplar {i}": text for i, text in enumerate(self.exemplars)}

    @property
    def best(self) -> str:
        """The first exemplar."""
        if not self.exemplars:
            raise ValueError(
                "No exemplars are set, and one of them asks for the best. Give some, or use with_exemplars()."
            )
        return self.exemplars[0]

    def best_for(self, prompt: Text) -> str:
        """Return one of the exemplars, chosen by a hash of the prompt."""
        if len(self.exemplars) < 2:
            return self.best
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
        return self.exemplars[int.from_bytes(digest[:8], "big") % len(self.exemplars)]

    def with_exemplars(self, exemplars: Sequence[str]) -> TextCondition:
        """Return this condition with other exemplars."""
        return replace(self, exemplars=exemplars)

    def exemplars_from(self, table: Table, n: int = 8) -> list[str]:
        """Return the n most frequent feedbacks of the samples with the best score; ties in order of appearance.

        Raises:
            ValueError: no sample has both feedback and score.
        """
        label = self.label(table)
        if not (label >= 0).any():
            raise ValueError(f"None of the {len(table)} samples has both feedback and score: the judge left all out.")
        best = table.feedback_codes[label == label[label >= 0].min()]
        codes, first, counts = np.unique(best, return_index=True, return_counts=True)
        return [table.feedback_values[codes[i]] for i in np.lexsort((first, -counts))[:n]]


@dataclass(frozen=True, kw_only=True)
class AttributeCondition(Condition):
    """Condition on several numbers that a judge gave: SteerLM, arXiv:2310.05344.

    The feedback is a JSON object of these numbers. Labels are the combinations of values that occur, in the order of
    their distance sum_a |value - wanted|, ties by value.

    Args:
        attributes: name -> wanted value, in the order of the text.

    >>> AttributeCondition(attributes={"harmful": 0, "helpful": 2}).apply_best("Hello")
    'attributes: harmful:0,helpful:2 input: Hello'
    """

    kind: ClassVar[str] = "attributes"
    reads: ClassVar[tuple[str, ...]] = ("feedback",)
    form: str = "attributes: {condition} input: {prompt}"
    attributes: Mapping[str, int | float] = field(default_factory=lambda: {"harmful": 0, "helpful": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        found = self.attributes
        if not isinstance(found, Mapping) or not found or not all(map(_is_number, found.values())):
            raise ValueError(
                f"'attributes' is {found!r}, expected wanted values by name, as in {{harmful: 0, helpful: 2}}."
            )

    def _values(self, feedback: str, where: str) -> tuple[int | float, ...]:
        try:
            found = json.loads(feedback)
        except ValueError:
            found = None
        if (
            not isinstance(found, dict)
            or set(found) != set(self.attributes)
            or not all(map(_is_number, found.values()))
        ):
            names = ", ".join(f'"{name}": number' for name in self.attributes)
            raise ValueError(f"{where}: the feedback is {feedback!r}, expected {{{names}}}.")
        return tuple(found[name] for name in self.attributes)

    def _setting(self, values: Sequence[int | float]) -> str:
        return ",".join(f"{name}:{value:g}" for name, value in zip(self.attributes, values, strict=True))

    def _ranked(self, table: Table) -> tuple[NDArray, list[tuple[int | float, ...]]]:
        """Return the label of each feedback code (-1 for codes outside of the table), and the settings, best first."""
        codes, first = np.unique(table.feedback_codes, return_index=True)
        wanted = list(self.attributes.values())
        values = {
            code: self._values(table.feedback_values[code], _where(table, i))
            for code, i in zip(codes, first, strict=True)
            if code >= 0
        }
        ranked = sorted(
            set(values.values()), key=lambda v: (sum(abs(x - w) for x, w in zip(v, wanted, strict=True)), v)
        )
        rank = np.full(len(table.feedback_values) + 1, LEFT_OUT, dtype=np.int32)
        for code, value in values.items():
            rank[code] = ranked.index(value)
        return rank, ranked

    def label(self, table: Table) -> NDArray[np.int32]:
        return self._ranked(table)[0][table.feedback_codes]

    def check(self, sample: Sample) -> None:
        if sample.feedback is not None:
            self._values(sample.feedback, _where_sample(sample))

    def text(self, sample: Sample, label: int) -> str:
        return self._setting(self._values(sample.feedback, _where_sample(sample)))

    def texts_for(self, feedback: str | None) -> list[str]:
        own = [] if feedback is None else [self._setting(self._values(feedback, "attributes"))]
        return [*super().texts_for(feedback), *own]

    def names(self, table: Table | None = None) -> list[str]:
        """Return the settings in the table, best first; without a table, the wanted setting only."""
        return [self.best] if table is None else [self._setting(values) for values in self._ranked(table)[1]]

    @property
    def best(self) -> str:
        return self._setting(list(self.attributes.values()))


def _where(table: Table, i: int) -> str:
    return f"round {table.round[i]}, row {table.row[i]} (prompt {table.prompt_index[i]})"


def _where_sample(sample: Sample) -> str:
    return f"round {sample.round}, prompt {sample.prompt_index}, completion {sample.sample_index}"


def _check_score(score: float, where: str) -> None:
    if score not in range(TOP_SCORE + 1):
        raise ValueError(f"{where}: the score is {score:g}, expected one of 0, 1, .., {TOP_SCORE}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
