"""Features are TRL reward functions with a name: how they are called, and how their answers are checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


Message = dict[str, Any]
Text = str | list[Message]
SHORT = 60  # characters of a prompt or value that an error shows
NOT_COLUMNS = frozenset(  # keyword arguments that TRL gives a reward function beside the dataset's columns
    # and __row__, the number that the data's reader gives a row
    "prompt prompts completion completions completion_ids trainer_state log_extra log_metric __row__".split()
)


class FeatureError(ValueError):
    """A feature that raised, or answered with something other than one finite number for each completion."""


@dataclass(frozen=True)
class Feature:
    """A named reward function, ``feature(prompts=, completions=, **columns) -> list[float]``, as TRL calls them."""

    function: Callable[..., Any]  # the reward function itself; it may be async
    name: str  # in errors, metrics and saved targets
    spec: Any = None  # the text or mapping that it was built from (see resolve_feature); None for a Python function
    boolean: bool | None = None  # True if all values are 0 or 1, False if they need not be, None if unknown

    def __call__(self, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any:
        answer = self.function(prompts=prompts, completions=completions, **columns)
        if inspect.iscoroutine(answer):  # in its own thread, since this one may already run an event loop
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(asyncio.run, answer).result()
        return answer

    @property
    def __name__(self) -> str:  # TRL names a reward function by it
        return self.name


def completion_text(completion: Text) -> str:
    """Return the assistant's text: the completion itself, or the contents of its messages, one per line.

    >>> completion_text([{"role": "assistant", "content": "Yes."}])
    'Yes.'
    """
    if isinstance(completion, str):
        return completion
    spoken = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    texts = [[{"text": content}] if isinstance(content, str) else content for content in spoken if content]
    return "\n".join("".join(part.get("text", "") for part in parts) for parts in texts)  # parts: text, images, ...


def columns_of(rows: Sequence[Mapping[str, Any]], repeat: int | Sequence[int]) -> dict[str, list[Any]]:
    """Return the further columns of a dataset's rows, each entry repeated for the completions of its prompt.

    Columns whose names a reward function receives for other values (``NOT_COLUMNS``) are left out. ``repeat`` is the
    number of completions of each row, one number for all or a list.

    >>> columns_of([{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": "y"}], [2, 1])
    {'topic': ['x', 'x', 'y']}
    """
    counts = [repeat] * len(rows) if isinstance(repeat, int) else repeat
    repeated = [row for row, k in zip(rows, counts, strict=True) for _ in range(k)]
    return {name: [row[name] for row in repeated] for name in (rows[0] if len(rows) else ()) if name not in NOT_COLUMNS}


def evaluate_features(
    features: Sequence[Feature], /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
) -> Tensor:
    """Return phi, (n, J) float64: the value of each of J features on each of n completions.

    Prompts and completions are plain text or lists of messages; ``columns`` are lists of n (``completion_ids``, columns
    of the dataset), and other arguments that features read.

    Raises:
        FeatureError: see :func:`evaluate_feature`.

    >>> shouts = Feature(lambda prompts, completions, **columns: [c.isupper() for c in completions], "shouts")
    >>> evaluate_features([shouts], ["Hi. ", "Hi. "], ["Hello.", "HELLO."])
    tensor([[0.],
            [1.]], dtype=torch.float64)
    """
    values = [evaluate_feature(feature, prompts, completions, **columns) for feature in features]
    return torch.stack(values, -1) if values else torch.zeros(len(completions), 0, dtype=torch.float64)


def evaluate_feature(
    feature: Feature, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
) -> Tensor:
    """Return one feature on n completions, checked: (n,) float64.

    Raises:
        FeatureError: the feature raises, returns another number of values than n, or a value that is None, NaN,
            infinite or no number. Names the feature, the sample and its prompt, and the way out.
    """
    return torch.tensor(call_feature(feature, prompts, completions, columns), dtype=torch.float64)


def call_feature(
    feature: Feature,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: dict[str, Any],
    *,
    none_allowed=False,
) -> list[Any]:
    """Return the checked answer of a feature: n floats, or None for some with ``none_allowed``."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions, expected one prompt for each.")
    if not len(completions):
        return []
    try:
        answer = feature(prompts=prompts, completions=completions, **columns)
    except FeatureError:
        raise  # a part of a product or sum, already named
    except Exception as error:
        raise FeatureError(
            f"Feature '{feature.name}' raised {type(error).__name__}: {error} (on {len(completions)} samples, the "
            f"first prompt being {shorten(prompts[0])}). It is called as TRL calls a reward function: "
            f"f(prompts=, completions=, **columns) -> one number each, here with the columns {sorted(columns)}."
        ) from error
    values = _as_list(answer, feature.name, len(completions))
    return [
        _number(value, none_allowed, f"Feature '{feature.name}', sample {i} (prompt {shorten(prompts[i])})")
        for i, value in enumerate(values)
    ]


def _as_list(answer: Any, name: str, n: int) -> list[Any]:
    expected = f"expected a list of {n} numbers, one for each completion"
    if hasattr(answer, "tolist"):  # a tensor or an array
        if answer.ndim != 1:
            raise FeatureError(f"Feature '{name}' returned an array of shape {tuple(answer.shape)}, {expected}.")
        answer = answer.tolist()
    if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
        raise FeatureError(f"Feature '{name}' returned {shorten(answer)} ({type(answer).__name__}), {expected}.")
    values = list(answer)
    if len(values) != n:
        raise FeatureError(f"Feature '{name}' returned {len(values)} values, {expected}.")
    return values


def _number(value: Any, none_allowed: bool, where: str) -> float | None:
    if value is None:
        if none_allowed:
            return None
        raise FeatureError(
            f"{where} is None, expected a number. None is 'does not apply' in TRL, which no moment averages: "
            "return 0.0 there, or combine the functions in a sum, where None counts as 0."
        )
    if hasattr(value, "item") and not isinstance(value, numbers.Real):  # tensors of one number
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise FeatureError(f"{where} is {shorten(value)} ({type(value).__name__}), expected a number. Return floats.")
    if not math.isfinite(value):
        raise FeatureError(
            f"{where} is {float(value)}, expected a finite number. Find what divides by zero or takes the log of "
            "it, or clamp it in the function."
        )
    return float(value)


def shorten(value: Any) -> str:
    """Return ``repr`` of a value in at most ``SHORT`` characters."""
    shown = repr(value)
    return shown if len(shown) <= SHORT else shown[: SHORT - 3] + "..."
