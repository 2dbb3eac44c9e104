"""Specs -> features: what a YAML file or a script may write where a feature is wanted.

=====================================================  ==============================================================
spec                                                   value for each completion
=====================================================  ==============================================================
a callable                                             what the TRL reward function returns
``file.py:function``, ``package.module:function``      the same, found by name
a model id or folder, or a loaded model                the score of a reward model (a sequence classifier, one logit)
``{contains: please}``                                 1 where the text is in it, else 0 (see ``text_features``)
``{words: [art, arts]}``, ``{words: file.txt}``        1 where any of the words is in it as a whole word, else 0
``{matches: regex}``                                   1 where the regular expression is found, else 0
``{length: words, max: 20}``                           1 within the bounds, else 0; the length itself without bounds
``{function: file.py:function}``                       as above
``{reward_model: id}``                                 as above, with options (see ``SequenceScorer``)
``{classifier: id, label: positive, threshold: 0.5}``  whether the label's probability reaches it; without, probability
``{product: [spec, ...]}``                             the product of features: for booleans, "and"
``{sum: [[weight, spec], ...]}``                       the weighted sum; a part that answers None counts as 0, as in TRL
``{not: spec}``                                        1 - the feature, for booleans
=====================================================  ==============================================================

Every mapping may also have a ``name``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from contrastive_align.targets import text_features
from contrastive_align.targets.evaluate import Feature, FeatureError, call_feature, callable_name, shorten
from contrastive_align.targets.sequence_models import SequenceScorer


MODEL_KINDS = ("reward_model", "classifier")
PART_KINDS = ("product", "sum", "not")


def resolve_feature(
    spec: Any, *, device: str | torch.device | None = None, tokenizer: Any = None, trust_remote_code: bool = False
) -> Feature:
    """The feature that a spec means; the table above lists the specs.

    Args:
        spec: a :class:`Feature` (returned as it is), a callable, a text or a mapping.
        device: where reward models and classifiers run, unless their spec says so.
        tokenizer: for a loaded model that does not know where its tokenizer is.
        trust_remote_code: whether a model's repository may run code of its own.

    Raises:
        ValueError: no such kind, a key that the kind does not take, or a value it cannot use.
        FileNotFoundError, AttributeError: ``file.py:function`` is not there.

    >>> polite = resolve_feature({"contains": "please"})
    >>> polite.name, polite(prompts=["", ""], completions=["Please wait.", "Wait."])
    ('contains:please', [1.0, 0.0])
    """
    context = {"device": device, "trust_remote_code": trust_remote_code}
    if isinstance(spec, Feature):
        return spec
    if isinstance(spec, torch.nn.Module):  # also callable, but not on texts
        model_name = str(getattr(spec.config, "_name_or_path", "") or type(spec).__name__)
        return Feature(SequenceScorer(spec, tokenizer=tokenizer), _last_part(model_name), boolean=False)
    if callable(spec):
        return Feature(spec, callable_name(spec))
    if isinstance(spec, str):
        kind = "function" if ":" in spec else "reward_model"
        if kind == "reward_model" and spec in KINDS:
            raise ValueError(f"{spec!r} is a kind of feature, expected what it is about: {{{spec}: ...}}.")
        return replace(KINDS[kind](spec, **(context if kind in MODEL_KINDS else {})), spec=spec)
    if isinstance(spec, Mapping):
        return _from_mapping(spec, context)
    raise ValueError(
        f"Found {shorten(spec)} ({type(spec).__name__}) where a feature is wanted. Expected a function, a model id, "
        f"'file.py:function' or a mapping with one of {', '.join(KINDS)}."
    )


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
    accepted = [key for key in accepted if key != "context"]
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


# ------------------------------------------------------------------------------------------------ functions, models


def _function(value: Any) -> Feature:
    if callable(value):
        return resolve_feature(value)
    place, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not place or not name:
        raise ValueError(f"function: found {shorten(value)}, expected 'file.py:function' or 'package.module:function'.")
    module = _load_file(place) if place.endswith(".py") else _import(place)
    if not callable(getattr(module, name, None)):
        there = [key for key, item in vars(module).items() if inspect.isfunction(item) and not key.startswith("_")]
        raise AttributeError(f"{place} has no function {name!r}. It has: {', '.join(there) or 'none'}.")
    return Feature(getattr(module, name), name)


def _import(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"{place} could not be imported, which raised {type(error).__name__}: {error}. For a file write "
            "'file.py:function'."
        ) from error


def _load_file(path: str) -> Any:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"No file {path!r} (looked for {file}), expected 'file.py:function'.")
    name = f"features_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{file} could not be imported, which raised {type(error).__name__}: {error}") from error
    return module


def _reward_model(
    value: Any,
    *,
    revision: str | None = None,
    reads: str = "both",
    special_tokens: bool = False,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Feature:
    options = {key: item for key, item in locals().items() if key != "value"}
    _check_model_id("reward_model", value)
    return Feature(SequenceScorer(value, **options), _last_part(value), boolean=False)


def _classifier(
    value: Any,
    *,
    label: str | int | None = None,
    threshold: float | None = None,
    revision: str | None = None,
    reads: str = "completion",
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Feature:
    options = {key: item for key, item in locals().items() if key != "value"}
    _check_model_id("classifier", value)
    if label is None:
        raise ValueError(f"The classifier {value} needs a label: {{classifier: {value}, label: positive}}.")
    name = f"{_last_part(value)}:{label}" + (f">={threshold:g}" if isinstance(threshold, (int, float)) else "")
    return Feature(SequenceScorer(value, special_tokens=True, **options), name, boolean=threshold is not None)


def _check_model_id(kind: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{kind}: found {shorten(value)}, expected a model id or folder.")
    if value.endswith(".py"):
        raise ValueError(f"{kind}: found {value!r}, a Python file. Name the function in it: '{value}:function'.")
    if value.startswith((".", "/", "~")) and not Path(value).is_dir():
        raise ValueError(f"{kind}: there is no folder {value!r} (looked in {Path.cwd()}).")


def _last_part(model_id: str) -> str:
    return model_id.rstrip("/").split("/")[-1]


# ------------------------------------------------------------------------------------------------------- combinations


def _product(value: Any, *, context: dict[str, Any]) -> Feature:
    parts = [resolve_feature(part, **context) for part in _parts("product", value, "a list of features")]

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
        values = [call_feature(part, prompts, completions, columns, none_allowed=True) for part in parts]
        return [None if None in row else math.prod(row) for row in zip(*values, strict=True)]

    boolean = all(part.boolean for part in parts)
    return Feature(function, "*".join(part.name for part in parts), boolean=boolean or None)


def _sum(value: Any, *, context: dict[str, Any]) -> Feature:
    form = "a list of [weight, feature]"
    pairs = _parts("sum", value, form)
    for pair in pairs:
        weight = pair[0] if isinstance(pair, (list, tuple)) and len(pair) == 2 else None
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"sum: found {shorten(pair)}, expected {form}, such as [0.5, {{contains: please}}].")
    weights = [float(weight) for weight, _ in pairs]
    parts = [resolve_feature(part, **context) for _, part in pairs]

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
        values = [call_feature(part, prompts, completions, columns, none_allowed=True) for part in parts]
        rows = [
            [w * v for w, v in zip(weights, row, strict=True) if v is not None] for row in zip(*values, strict=True)
        ]
        return [math.fsum(row) if row else None for row in rows]

    return Feature(function, "+".join(f"{w:g}*{part.name}" for w, part in zip(weights, parts, strict=True)))


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


def _plain(spec: Any) -> Any:
    """The spec as JSON can hold it, or None where a function of Python is in it."""
    if isinstance(spec, Mapping):
        values = {key: _plain(value) for key, value in spec.items()}
        return None if any(value is None and spec[key] is not None for key, value in values.items()) else values
    if isinstance(spec, (list, tuple)):
        values = [_plain(value) for value in spec]
        return None if any(new is None and old is not None for new, old in zip(values, spec, strict=True)) else values
    return spec if isinstance(spec, (str, int, float, bool, type(None))) else None


KINDS: dict[str, Callable[..., Feature]] = {
    "contains": text_features.contains,
    "words": text_features.words,
    "matches": text_features.matches,
    "length": text_features.length,
    "function": _function,
    "reward_model": _reward_model,
    "classifier": _classifier,
    "product": _product,
    "sum": _sum,
    "not": _not,
}
