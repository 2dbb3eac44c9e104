"""Conditions by quantile of the score: a special token (Quark), or a phrase (ALT_RM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from contrastive_align.conditions.conditions import Condition, ladder
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import NEW, Table
from contrastive_align.pool.quantiles import quantiles


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
class _Quantiles(Condition):
    """Labels are quantiles of the scores, by default of each prompt's own."""

    reads: ClassVar[tuple[str, ...]] = ("score",)
    quantiles: int = 5
    per_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.quantiles) is not int or self.quantiles < 2:
            raise ValueError(f"'quantiles' is {self.quantiles!r}, expected an int, at least 2.")
        if not isinstance(self.per_prompt, bool):
            raise ValueError(f"'per_prompt' is {self.per_prompt!r}, expected true or false.")

    def label(self, table: Table) -> NDArray[np.int32]:
        """Quantiles; a prompt of which too few samples are left to be sorted again keeps the labels it had."""
        group = table.prompt_index if self.per_prompt else np.zeros(len(table), dtype=np.int64)
        _, of, sizes = np.unique(group, return_inverse=True, return_counts=True)
        new = np.bincount(of, weights=table.label == NEW, minlength=len(sizes)) > 0
        thinned = ((sizes < self.quantiles) & ~new)[of]
        label = table.label.copy()
        prompts = group[~thinned] if self.per_prompt else None
        label[~thinned] = quantiles(table.score[~thinned], n=self.quantiles, prompts=prompts)
        return label

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
class QuantileTokens(_Quantiles):
    """A special token for each quantile: Quark, arXiv:2205.13636.

    Args:
        token: its pattern, ``{i}`` being the quantile, 0 the best.
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
class Phrases(_Quantiles):
    """A phrase for each quantile: ALT_RM, arXiv:2407.16970.

    Args:
        phrases: best first, or the name of a ladder: quality, toxicity.
        quantiles: by default as many as phrases, and never another number.
    """

    kind: ClassVar[str] = "phrases"
    form: str = "{condition}. input: {prompt}"
    phrases: Sequence[str] = "quality"
    quantiles: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrases", ladder("phrases", self.phrases, PHRASES))
        if self.quantiles is None:
            object.__setattr__(self, "quantiles", len(self.phrases))
        super().__post_init__()
        if self.quantiles != len(self.phrases):
            raise ValueError(f"'quantiles' is {self.quantiles} for {len(self.phrases)} phrases, expected one for each.")

    def names(self, table: Table | None = None) -> list[str]:
        return list(self.phrases)
