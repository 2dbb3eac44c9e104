"""Write the question for a judge, and read its reply as a verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


PROMPTS = {"helpful_categories": "categories.txt", "feedback": "feedback.txt"}
FOLDER = Path(__file__).parent / "prompts"
BEST_SCORE = 3
_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)\s*```", re.DOTALL | re.IGNORECASE)


class Unparsable(ValueError):
    """A judge's reply does not have the form that it was asked for."""


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one completion.

    Args:
        text: the category, spelled as in the options, or the feedback in words.
        score: higher is better. Categories: 0 for the last (worst) to their number - 1 for the first; text: 0 to 3.
        analysis: the judge's reason; None where it gave none.
    """

    text: str
    score: float
    analysis: str | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class CategoryAnswers:
    """Read a category from ``{"category": "...", "analysis": "..."}``, where the analysis is optional.

    >>> CategoryAnswers(("Good", "Bad")).parse('{"category": "good"}')
    Verdict(text='Good', score=1.0)
    """

    names: tuple[str, ...]  # the best first

    def __post_init__(self) -> None:
        if len(self.names) < 2 or not all(isinstance(name, str) and name.strip() for name in self.names):
            raise ValueError(f"answers: found {list(self.names)}, expected two or more categories, the best first.")
        if len({_folded(name) for name in self.names}) < len(self.names):
            raise ValueError(f"answers: {list(self.names)} has categories that differ in case or spaces only.")

    @property
    def fields(self) -> dict[str, str]:
        """Placeholder -> text, for the template."""
        return {"categories": "\n".join(f"- {name}" for name in self.names)}

    @property
    def kind(self) -> list[Any]:
        return ["categories", *self.names]

    @property
    def reminder(self) -> str:
        return f'Answer with a single JSON object whose "category" is exactly one of: {json.dumps(self.names)}.'

    def parse(self, reply: str) -> Verdict:
        found = _read_object(reply, {"category": str}, {"analysis": str})
        for rank, name in enumerate(self.names):
            if _folded(name) == _folded(found["category"]):
                return Verdict(name, float(len(self.names) - 1 - rank), found.get("analysis"))
        raise Unparsable(f"the category {found['category'][:80]!r} is none of {list(self.names)}")


@dataclass(frozen=True)
class FeedbackAnswers:
    """Read words and a score of 0 to 3 from ``{"feedback": "...", "score": 2}``, where ``analysis`` may be added.

    >>> FeedbackAnswers(max_words=5).parse('{"feedback": "Accurate, but too long.", "score": 2}')
    Verdict(text='Accurate, but too long.', score=2.0)
    """

    max_words: int

    @property
    def fields(self) -> dict[str, str]:
        return {"max_words": str(self.max_words)}

    @property
    def kind(self) -> list[Any]:
        return ["text", self.max_words]

    @property
    def reminder(self) -> str:
        return (
            f'Answer with a single JSON object whose "feedback" has at most {self.max_words} words and whose "score" '
            "is 0, 1, 2 or 3."
        )

    def parse(self, reply: str) -> Verdict:
        found = _read_object(reply, {"feedback": str, "score": int}, {"analysis": str})
        words = found["feedback"].split()
        if not 0 < len(words) <= self.max_words:
            raise Unparsable(f"the feedback has {len(words)} words, expected 1 to {self.max_words}")
        if not 0 <= found["score"] <= BEST_SCORE:
            raise Unparsable(f"the score is {found['score']}, expected 0 to {BEST_SCORE}")
        return Verdict(" ".join(words), float(found["score"]), found.get("analysis"))


def answers_from(spec: str | Sequence[str], max_words: int) -> CategoryAnswers | FeedbackAnswers:
    """Make the kind of answers from ``"text"``, or from a list of categories, the best first."""
    if spec == "text":
        return FeedbackAnswers(max_words)
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise ValueError(f"answers: found {spec!r}, expected 'text' or a list of categories, the best first.")
    return CategoryAnswers(tuple(spec))


def _read_object(reply: str, needed: Mapping[str, type], optional: Mapping[str, type]) -> dict[str, Any]:
    text = reply.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        found = json.loads(fenced.group(1) if fenced else text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unparsable):
            raise
        raise Unparsable(f"no JSON object: {text[:80]!r}") from None
    if not isinstance(found, dict):
        raise Unparsable(f"JSON, but no object: {text[:80]!r}")
    types = {**needed, **optional}
    missing, unknown = [k for k in needed if k not in found], [k for k in found if k not in types]
    if missing or unknown:
        raise Unparsable(f"keys {list(found)}, expected {list(needed)} and perhaps {list(optional)}")
    for name, value in found.items():
        if type(value) is not types[name]:  # not isinstance, for which True is an int
            raise Unparsable(f"{name} is {json.dumps(value)[:80]}, expected {types[name].__name__}")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Unparsable(f"a key twice: {[key for key, _ in pairs]}")
    return dict(pairs)


def _folded(text: str) -> str:
    return "".join(text.split()).casefold()


# ------------------------------------------------------------------------------------------------------ the question


def read_template(prompt: str | Path, answers: CategoryAnswers | FeedbackAnswers) -> str:
    """Read a bundled prompt, by name, or a file.

    Raises:
        FileNotFoundError: it is neither a bundled prompt nor a file.
        ValueError: a placeholder is missing, or these answers do not fill one.
    """
    file = FOLDER / PROMPTS[str(prompt)] if str(prompt) in PROMPTS else Path(prompt).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"prompt: {str(prompt)!r} is neither a file nor one of the bundled prompts ({', '.join(PROMPTS)})."
        )
    template = file.read_text(encoding="utf-8")
    needed = ["prompt", "completion", *(["categories"] if isinstance(answers, CategoryAnswers) else [])]
    missing = [f"{{{name}}}" for name in needed if f"{{{name}}}" not in template]
    if missing:
        raise ValueError(f"{file}: the prompt has no {', '.join(missing)}. Add it where that text belongs.")
    for name in ("categories", "max_words"):
        if f"{{{name}}}" in template and name not in answers.fields:
            kind = "a list of categories" if name == "categories" else "answers='text'"
            raise ValueError(f"{file}: the prompt has {{{name}}}, which needs {kind}; found {answers.kind}.")
    return template


def render(template: str, prompt: Any, completion: Any, answers: CategoryAnswers | FeedbackAnswers) -> str:
    """Fill the template's placeholders in one pass, so that braces in the prompt and completion stay as they are.

    >>> render("{prompt} -> {completion}", [{"role": "user", "content": "{completion}?"}], "no", FeedbackAnswers(9))
    'user: {completion}? -> no'
    """
    if not isinstance(completion, str) and len(completion) == 1:
        completion = _content(completion[0])  # a single turn needs no role
    fields = {"prompt": _as_text(prompt), "completion": _as_text(completion), **answers.fields}
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def _as_text(text: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {_content(message)}" for message in text)


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"found a message with {str(content)[:80]!r}, expected text: a judge reads only text.")
