"""Features are TRL reward functions with a name: how they are called, and how their answers are checked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import numbers
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
        return _result(self.begin(prompts, completions, **columns))

    def begin(self, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any:
        """Return the answer, or the future of an async function, which runs in the process's one event loop.

        ``trainer_state``, ``log_extra`` and ``log_metric`` are filled in where ``columns`` lacks them, and given only
        to functions that take them.
        """
        keywords = _keywords_of(self.function)
        given = {name: value for name, value in columns.items() if name not in OUTSIDE_OF_A_TRAINER or name in keywords}
        answer = self.function(prompts=prompts, completions=completions, **{**keywords, **given})
        if inspect.iscoroutine(answer):
            return asyncio.run_coroutine_threadsafe(answer, _event_loop(os.getpid()))
        return answer

    @property
    def __name__(self) -> str:  # TRL names a reward function by it
        return self.name


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of this process, in a thread of its own; clients that belong to it last for the run."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def _result(answer: Any) -> Any:
    return answer.result() if isinstance(answer, Future) else answer


def _keywords_of(function: Callable) -> dict[str, Any]:
    """Return those of TRL's keywords beside the columns that a function takes, as they are outside of a trainer."""
    keywords = {name: make() for name, make in OUTSIDE_OF_A_TRAINER.items()}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some callables there is none
        return keywords
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in keywords.items() if takes_all or name in parameters}


def _untrained() -> Any:
    from transformers import TrainerState  # not needed to import this room

    return TrainerState()


# TRL's keywords for every reward function -> their values where no trainer calls it, and nothing is logged.
OUTSIDE_OF_A_TRAINER: dict[str, Callable[[], Any]] = {
    "trainer_state": _untrained,
    "log_extra": lambda: lambda column, values: None,
    "log_metric": lambda: lambda name, value: None,
}


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

    Columns whose names a reward function receives for other values (``NOT_COLUMNS``) are left out. What a row lacks is
    None, as in a dataset. ``repeat`` is the number of completions of each row, one number for all or a list.

    >>> columns_of([{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": "y"}], [2, 1])
    {'topic': ['x', 'x', 'y']}
    """
    counts = [repeat] * len(rows) if isinstance(repeat, int) else repeat
    repeated = [row for row, k in zip(rows, counts, strict=True) for _ in range(k)]
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS)
    return {name: [row.get(name) for row in repeated] for name in names}


def reward_arguments(
    rows: Sequence[Mapping[str, Any]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    texts: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the keywords with which TRL calls a reward function on the completions of each row.

    They are ``prompts``, ``completions`` (messages where the prompt is one), ``completion_ids`` and the further columns
    of the dataset, each a list with an entry for every completion.

    Args:
        rows: of the dataset, C of them, each with a ``prompt``.
        completion_ids, texts: of the completions of each row.

    >>> reward_arguments([{"prompt": "Hi. ", "topic": "x"}], [[[7], [8]]], [["Hello.", "Bye."]])["topic"]
    ['x', 'x']
    """
    prompts = [row["prompt"] for row, group in zip(rows, texts, strict=True) for _ in group]
    flat = zip(prompts, (text for group in texts for text in group), strict=True)
    return {
        "prompts": prompts,
        "completions": [t if isinstance(p, str) else [{"role": "assistant", "content": t}] for p, t in flat],
        "completion_ids": [ids for group in completion_ids for ids in group],
        **columns_of(rows, [len(group) for group in texts]),
    }


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
    values = call_features(features, prompts, completions, columns)
    return torch.tensor(values, dtype=torch.float64).view(len(features), len(completions)).T.contiguous()


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
    none_allowed: bool = False,
) -> list[Any]:
    """Return the checked answer of a feature: n floats, or None for some with ``none_allowed``."""
    return call_features([feature], prompts, completions, columns, none_allowed=none_allowed)[0]


def call_features(
    features: Sequence[Feature],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: dict[str, Any],
    *,
    none_allowed: bool = False,
) -> list[list[Any]]:
    """Return the checked answers of J features, each a list of n; async functions among them run together."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions, expected one prompt for each.")
    if not len(completions):
        return [[] for _ in features]
    checked, with_answers = [], []
    for feature in features:
        with _naming(feature, prompts, columns):
            with_answers.append((feature, feature.begin(prompts, completions, **columns)))
    for feature, answer in with_answers:
        with _naming(feature, prompts, columns):
            answer = _result(answer)
        where = [f"Feature '{feature.name}', sample {i} (prompt {shorten(p)})" for i, p in enumerate(prompts)]
        values = _as_list(answer, feature.name, len(completions))
        checked.append([_number(value, none_allowed, place) for value, place in zip(values, where, strict=True)])
    return checked


@contextlib.contextmanager
def _naming(feature: Feature, prompts: Sequence[Text], columns: dict[str, Any]) -> Iterator[None]:
    """Raise what a feature raises as an error that names it."""
    try:
        yield
    except FeatureError:
        raise  # a part of a product or sum, already named
    except Exception as error:
        raise FeatureError(
            f"Feature '{feature.name}' raised {type(error).__name__}: {error} (on {len(prompts)} samples, the "
            f"first prompt being {shorten(prompts[0])}). It is called as TRL calls a reward function: "
            f"f(prompts=, completions=, **columns) -> one number each, here with the columns {sorted(columns)}."
        ) from error


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
            f"{where} is None, expected a number. None is 'does not apply' in TRL, which no moment averages: return "
            "0.0 there, or combine it in a sum with a function that answers: parts that are None are left out of it."
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
