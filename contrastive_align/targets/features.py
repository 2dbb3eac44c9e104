"""Features from specs: what a YAML file or a script may give as a feature.

=====================================================  ==============================================================
spec                                                   value for each completion
=====================================================  ==============================================================
a callable                                             what the TRL reward function returns
``file.py:function``, ``package.module:function``      the same, found by name
a name given to :func:`register_feature`               the same
a model id or folder, or a loaded model                the score of a reward model (a sequence classifier, one logit)
``{contains: please}``                                 1 where the text is in it, else 0 (see :func:`contains`)
``{words: [art, arts]}``, ``{words: file.txt}``        1 where any of the words is in it as a whole word, else 0
``{matches: regex}``                                   1 where the regular expression is found, else 0
``{length: words, max: 20}``                           1 within the bounds, else 0; the length itself without bounds
``{function: file.py:function}``                       as above
``{reward_model: id}``                                 as above, with options (see ``SequenceScorer``)
``{classifier: id, label: positive, threshold: 0.5}``  whether the label's probability reaches it; without, probability
``{product: [spec, ...]}``                             the product of features: for booleans, "and"
``{sum: [[weight, spec], ...]}``                       the weighted sum of the parts that are not None; None if all are
``{not: spec}``                                        1 - the feature, for booleans
=====================================================  ==============================================================

Every mapping may also have a ``name``.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from contrastive_align.registry import NoSuchFunction, Registry, load_function
from contrastive_align.targets.classifiers import SCORER_OPTIONS, classifier, loaded_reward_model, reward_model
from contrastive_align.targets.evaluate import (
    Feature,
    FeatureError,
    call_feature,
    call_features,
    completion_text,
    shorten,
)


MODEL_KINDS = ("reward_model", "classifier")
PART_KINDS = ("product", "sum", "not")
LENGTH_UNITS = ("words", "characters", "tokens")


def resolve_feature(
    spec: Any, *, device: str | torch.device | None = None, tokenizer: Any = None, trust_remote_code: bool = False
) -> Feature:
    """Build the feature that a spec describes; the table above lists the specs.

    Args:
        spec: a :class:`Feature` (returned as it is), a callable, a text or a mapping.
        device: where reward models and classifiers run, unless their spec says so.
        tokenizer: for a loaded model, where none was saved with it.
        trust_remote_code: whether a model's repository may run code of its own.

    Raises:
        ValueError: an unknown kind, a key that the kind does not take, or a value that it cannot use.
        FileNotFoundError, NoSuchFunction: ``file.py:function`` is not there.

    >>> polite = resolve_feature({"contains": "please"})
    >>> polite.name, polite(prompts=["", ""], completions=["Please wait.", "Wait."])
    ('contains:please', [1.0, 0.0])
    """
    context = {"device": device, "trust_remote_code": trust_remote_code}
    if isinstance(spec, Feature):
        return spec
    if isinstance(spec, torch.nn.Module):  # also callable, but not on texts
        return loaded_reward_model(spec, tokenizer)
    if callable(spec):
        return Feature(spec, callable_name(spec))
    if isinstance(spec, str):
        kind = "function" if ":" in spec or spec in FUNCTIONS else "reward_model"
        if kind == "reward_model" and spec in KINDS:
            raise ValueError(f"{spec!r} is a kind of feature, expected what it is about: {{{spec}: ...}}.")
        return replace(KINDS[kind](spec, **(context if kind in MODEL_KINDS else {})), spec=spec)
    if isinstance(spec, Mapping):
        return _from_mapping(spec, context)
    raise ValueError(
        f"Found {shorten(spec)} ({type(spec).__name__}) where a feature is wanted. Expected a function, a model id, "
        f"'file.py:function' or a mapping with one of {', '.join(KINDS)}."
    )


def weighted_sum(
    functions: Any, weights: Sequence[float] | None = None, *, name: str | None = None, **resolve_kwargs: Any
) -> Feature:
    r"""Build the one feature that is the weighted sum of reward functions, as TRL sums rewards.

    .. math:: r(x, y) = \sum_j w_j\, r_j(x, y)

    A function that answers None does not count in the sum, which is None where all do. A single function of weight 1 is
    that feature itself, under its own name.

    Args:
        functions: a reward function or a list of J; each a spec that :func:`resolve_feature` reads, with its options.
        weights: (J,) numbers. Default: 1 each.
        name: of the sum. Default: made from the weights and the names of its parts.

    Raises:
        ValueError: another number of weights than functions, or what ``resolve_feature`` refuses.

    >>> brief_and_polite = weighted_sum([{"contains": "please"}, {"length": "words"}], [2, -0.5])
    >>> brief_and_polite(prompts=["", ""], completions=["Yes please.", "Yes."])
    [1.0, -0.5]
    """
    functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward functions.")
    if weights == [1.0]:
        return resolve_feature(functions[0], **resolve_kwargs)
    spec = {"sum": [list(pair) for pair in zip(weights, functions, strict=True)]}
    return resolve_feature(spec if name is None else {**spec, "name": name}, **resolve_kwargs)


def callable_name(function: Callable) -> str:
    """Return the name of a function, of the function that a partial wraps, or of an instance's class, as TRL does.

    >>> callable_name(functools.partial(print, end=""))
    'print'
    """
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _from_mapping(spec: Mapping[str, Any], context: dict[str, Any]) -> Feature:
    kinds = [key for key in spec if key in KINDS]
    if len(kinds) != 1:
        raise ValueError(
            f"The feature {shorten(dict(spec))} has {kinds or 'no kind'}, expected exactly one of {', '.join(KINDS)}."
        )
    (kind,) = kinds
    build = KINDS[kind]
    options = {key: value for key, value in spec.items() if key not in (kind, "name")}
    accepted = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    accepted = dict.fromkeys([*(SCORER_OPTIONS if kind in MODEL_KINDS else ()), *accepted])
    accepted.pop("context", None)
    unknown = [key for key in options if key not in accepted]
    if unknown:
        moment = " A moment belongs to a constraint, around the feature." if "moment" in unknown else ""
        raise ValueError(
            f"The feature {shorten(dict(spec))} has the unknown key {unknown[0]!r}. '{kind}' takes "
            f"{', '.join([*accepted, 'name'])}.{moment}"
        )
    if kind in MODEL_KINDS:
        options = {**context, **options}
    if kind in PART_KINDS:
        options["context"] = context
    feature = build(spec[kind], **options)
    name = spec.get("name", feature.name)
    if not isinstance(name, str) or not name:
        raise ValueError(f"The feature {shorten(dict(spec))} has the name {name!r}, expected a text.")
    return replace(feature, spec=_plain(spec), name=name)


def contains(value: Any, *, case_sensitive: bool = False, count: bool = False) -> Feature:
    """Build the feature that is 1 where the completion contains a text, or any of a list, also inside a word, else 0.

    With ``case_sensitive``, "Please" differs from "please"; with ``count``, the number of occurrences is the value.

    >>> contains("please")(prompts=[""] * 2, completions=["Please wait.", "Wait."])
    [1.0, 0.0]
    """
    texts = _texts("contains", value)
    return _pattern("contains", texts, "|".join(map(re.escape, _longest_first(texts))), case_sensitive, count)


def words(value: Any, *, case_sensitive: bool = False, count: bool = False) -> Feature:
    """Build the feature that is 1 where the completion has any of the words (or phrases) as whole words, else 0.

    ``value`` is a list of words, or the path of a text file with one on each line.

    >>> words(["art", "arts"])(prompts=[""] * 2, completions=["The arts.", "A party."])
    [1.0, 0.0]
    """
    if isinstance(value, str):
        if not Path(value).is_file():
            raise ValueError(f"words: no file {value!r}. Give a file with one word on each line, or a list: [{value}].")
        lines = Path(value).read_text(encoding="utf-8").splitlines()
        found, name = [line.strip() for line in lines if line.strip()], [Path(value).stem]
        if not found:
            raise ValueError(f"words: the file {value!r} has no words, expected one on each line.")
    else:
        found = name = _texts("words", value)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, _longest_first(found)))})(?!\w)"
    return _pattern("words", name, pattern, case_sensitive, count)


def matches(value: Any, *, count: bool = False) -> Feature:
    r"""Build the feature that is 1 where a regular expression (Python's ``re``) is found; ``(?i)`` ignores case.

    >>> matches(r"\d+", count=True)(prompts=[""], completions=["3 times 4"])
    [2.0]
    """
    if not isinstance(value, str):
        raise ValueError(f"matches: found {shorten(value)}, expected a regular expression as text.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"matches: {value!r} is no regular expression: {error}. See Python's 're'.") from error
    return _pattern("matches", [value], value, True, count)


def length(value: Any, *, min: float | None = None, max: float | None = None) -> Feature:
    """Build the feature of the completion's length in ``"words"``, ``"characters"`` or ``"tokens"``.

    With ``min`` or ``max`` it is 1 where min <= length <= max and else 0. Tokens need the column ``completion_ids``.

    >>> length("words", max=2)(prompts=[""] * 2, completions=["Two words.", "Now three words."])
    [1.0, 0.0]
    """
    if value not in LENGTH_UNITS:
        raise ValueError(f"length: found {shorten(value)}, expected one of {', '.join(LENGTH_UNITS)}.")
    for key, limit in (("min", min), ("max", max)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float))):
            raise ValueError(f"length: {key} is {shorten(limit)}, expected a number.")
    bounded = min is not None or max is not None
    low, high = (float("-inf") if min is None else min), (float("inf") if max is None else max)

    def measure(prompts: Sequence, completions: Sequence, completion_ids: Sequence | None = None, **columns: Any):
        if value == "tokens":
            if completion_ids is None:
                raise ValueError("length in tokens reads the column 'completion_ids', which was not given")
            sizes = [len(ids) for ids in completion_ids]
        else:
            texts = map(completion_text, completions)
            sizes = [len(text.split()) if value == "words" else len(text) for text in texts]
        return [float(low <= size <= high) if bounded else float(size) for size in sizes]

    limits = [f"{key}={limit:g}" for key, limit in (("min", min), ("max", max)) if limit is not None]
    return Feature(measure, ":".join(["length", value, *limits]), boolean=bounded)


def _pattern(kind: str, shown: list[str], pattern: str, case_sensitive: bool, count: bool) -> Feature:
    regex = re.compile(pattern, 0 if case_sensitive else re.IGNORECASE)

    def value(text: str) -> float:
        return float(sum(1 for _ in regex.finditer(text)) if count else bool(regex.search(text)))

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        return [value(completion_text(completion)) for completion in completions]

    name = f"{kind}:{','.join(shown)}" + ":count" * count
    return Feature(function, name if len(name) <= 48 else name[:45] + "...", boolean=not count)


def _texts(kind: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t for t in texts):
        hint = " In YAML, quote words such as yes, no and numbers." if not isinstance(value, str) else ""
        raise ValueError(
            f"{kind}: found {shorten(value)}, expected a text or a list of texts that are not empty.{hint}"
        )
    return list(texts)


def _longest_first(texts: list[str]) -> list[str]:
    return sorted(texts, key=len, reverse=True)  # so that counting does not take the "art" of "arts"


def _function(value: Any) -> Feature:
    if callable(value):
        return resolve_feature(value)
    if isinstance(value, str) and value in FUNCTIONS:
        return Feature(FUNCTIONS[value], value)
    try:
        return Feature(load_function(value), value.rpartition(":")[2])
    except NoSuchFunction:
        raise
    except ValueError as error:
        raise ValueError(f"function: {error}") from error


def _product(value: Any, *, context: dict[str, Any]) -> Feature:
    parts = [resolve_feature(part, **context) for part in _parts("product", value, "a list of features")]
    boolean = all(part.boolean for part in parts) or None
    product = _combine(parts, lambda row: None if None in row else math.prod(row))
    return Feature(product, "*".join(part.name for part in parts), boolean=boolean)


def _sum(value: Any, *, context: dict[str, Any]) -> Feature:
    form = "a list of [weight, feature]"
    pairs = _parts("sum", value, form)
    for pair in pairs:
        weight = pair[0] if isinstance(pair, (list, tuple)) and len(pair) == 2 else None
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"sum: found {shorten(pair)}, expected {form}, such as [0.5, {{contains: please}}].")
    weights = [float(weight) for weight, _ in pairs]
    parts = [resolve_feature(part, **context) for _, part in pairs]

    def add(row: Sequence[float | None]) -> float | None:
        terms = [w * v for w, v in zip(weights, row, strict=True) if v is not None]
        return math.fsum(terms) if terms else None

    name = "+".join(f"{w:g}*{part.name}" for w, part in zip(weights, parts, strict=True))
    return Feature(_combine(parts, add), name)


def _combine(parts: list[Feature], merge: Callable[[Sequence[float | None]], float | None]) -> Callable:
    """Return the reward function that merges the values of the parts on each completion."""

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
        values = call_features(parts, prompts, completions, columns, none_allowed=True)
        return [merge(row) for row in zip(*values, strict=True)]

    function.parts = [part.function for part in parts]  # whose sources decide its values
    return function


def _not(value: Any, *, context: dict[str, Any]) -> Feature:
    part = resolve_feature(value, **context)

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        values = call_feature(part, prompts, completions, columns)
        for i, found in enumerate(values):
            if found not in (0, 1):
                raise FeatureError(f"not: feature '{part.name}' is {found} on sample {i}, expected 0 or 1 everywhere.")
        return [1.0 - found for found in values]

    return Feature(function, f"not:{part.name}", boolean=True)


def _parts(kind: str, value: Any, form: str) -> list[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{kind}: found {shorten(value)}, expected {form}.")
    return list(value)


def _plain(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the spec as JSON can hold it, or None where it contains a Python function."""
    try:
        return json.loads(json.dumps(dict(spec)))
    except TypeError:
        return None


KINDS: dict[str, Callable[..., Feature]] = {
    "contains": contains,
    "words": words,
    "matches": matches,
    "length": length,
    "function": _function,
    "reward_model": reward_model,
    "classifier": classifier,
    "product": _product,
    "sum": _sum,
    "not": _not,
}
# Reward functions of one's own: names -> functions.
FUNCTIONS = Registry("feature", {})


def register_feature(name: str, function: Callable) -> Callable:
    """Let specs name a reward function: ``resolve_feature(name)``, ``{function: name}``, ``--reward=name``.

    Args:
        name: anything but a kind of feature; it must not hold a colon.
        function: a TRL reward function.

    Raises:
        ValueError: a name that is taken by a kind.
    """
    if name in KINDS or ":" in name:
        raise ValueError(f"A feature cannot be named {name!r}, which is a kind, or reads as file:function.")
    return FUNCTIONS.register(name, function)
