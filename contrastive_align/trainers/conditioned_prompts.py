"""The one place where a prompt comes under its condition, and where words that would leave no room are cut."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

from contrastive_align.conditions.conditions import Condition
from contrastive_align.conditions.scored_rows import TEMPLATE_ALLOWANCE
from contrastive_align.data.formats import Text


class ConditionedPrompts:
    """Prompts under the text of a condition; a judge's words keep as much of their beginning as fits.

    Args:
        condition: texts of a condition that is not made of free words are never cut: they would be others.
        encode: prompt -> token ids.
        room: tokens that the conditioned prompt may have; None: any number.

    >>> from contrastive_align.conditions import resolve_condition
    >>> under = ConditionedPrompts(resolve_condition("text"), str.split, room=6)
    >>> under("Hi!", "short and to the point")
    'feedback: short and to input: Hi!'
    >>> under.cuts("Hi!", "short"), under.cuts("Hi!", "short and to the point")
    (False, True)
    """

    def __init__(self, condition: Condition, encode: Callable[[Text], list], room: int | None) -> None:
        self.condition, self.encode, self.room = condition, encode, room

    def __call__(self, prompt: Text, text: str) -> Text:
        """The prompt under as much of the text as leaves it at most ``room`` tokens."""
        return self.condition.apply(prompt, self._fitting(prompt, text))

    def cuts(self, prompt: Text, text: str) -> bool:
        """Whether the text is cut for this prompt."""
        return self._fitting(prompt, text) != text

    def _fitting(self, prompt: Text, text: str) -> str:
        if not self.condition.free_words or self.room is None or self._fits(prompt, text):
            return text
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        if ends and not self._fits(prompt, text[: ends[0]]):  # as where a language has no spaces
            ends = list(range(1, ends[0]))
        n = bisect_left(ends, True, key=lambda end: not self._fits(prompt, text[:end]))
        return text[: ends[n - 1]] if n else ""

    def _fits(self, prompt: Text, text: str) -> bool:
        conditioned = self.condition.apply(prompt, text)
        # A token has at least one byte, and no template adds so many: most need not be encoded.
        return (
            len(repr(conditioned).encode()) + TEMPLATE_ALLOWANCE < self.room
            or len(self.encode(conditioned)) <= self.room
        )
