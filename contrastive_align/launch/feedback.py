"""Where feedback comes from, as a command line or a YAML says it: a reward, a judge, or columns of the data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PreTrainedConfig
from trl import DatasetMixtureConfig

from contrastive_align.conditions import AttributeCondition, CategoryCondition, Condition, TextCondition
from contrastive_align.data.formats import PROMPT_COLUMNS
from contrastive_align.judge.judge import Judge, resolve_judge
from contrastive_align.launch.arguments import RunArguments, UsageError, _StrictLoader
from contrastive_align.launch.datasets import load_splits
from contrastive_align.models.loading import adapter_config_path
from contrastive_align.sampling.server import ServerSampler
from contrastive_align.targets.features import MODEL_KINDS


SCORES = ("score", "scores", "reward", "rewards")  # what a column of numbers is called where nothing is said
FEEDBACK = ("feedback", "feedbacks")


def read_spec(name: str, value: Any) -> Any:
    """A mapping or list that stands on the command line as text; other values as they are.

    >>> read_spec("condition", "{kind: phrases, phrases: toxicity}"), read_spec("condition", "phrases")
    ({'kind': 'phrases', 'phrases': 'toxicity'}, 'phrases')
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is {value!r}, which is not YAML: {error}") from error


def build_judge(spec: Any, condition: Condition, output_dir: str) -> Judge:
    """The judge, asked by default for what the condition needs; its answers are kept in ``<output_dir>/judge``.

    Raises:
        ValueError: it is asked for other answers than the condition needs; what :func:`resolve_judge` refuses.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"judge is {spec!r}, expected a mapping: {{model: name, base_url: address}}.")
    in_words = "text"
    wanted: Any = list(condition.categories) if isinstance(condition, CategoryCondition) else in_words
    answers = spec.get("answers", wanted)
    if isinstance(condition, AttributeCondition):
        raise ValueError(
            "The condition 'attributes' needs numbers that a judge does not give. Use data that has them "
            "(--feedback_column, or a column for each attribute), or the condition 'categories'."
        )
    if isinstance(condition, (CategoryCondition, TextCondition)) and answers != wanted:
        raise ValueError(f"The judge answers {answers!r} and the condition {condition.kind} needs {wanted!r}.")
    prompt = "feedback" if answers == in_words else "helpful_categories"
    cache = str(Path(output_dir) / "judge")
    return resolve_judge({"prompt": prompt, "answers": answers, "cache": cache, **spec})


def build_sampler(spec: Any) -> ServerSampler:
    """A server that draws the completions: ``{base_url: address, model: name}`` and the class's other options."""
    known = [name for name in inspect.signature(ServerSampler).parameters]
    if not isinstance(spec, Mapping) or not {"base_url", "model"} <= set(spec) <= set(known):
        raise ValueError(
            f"sampler is {spec!r}, expected a mapping with base_url and model: '{{base_url: http://localhost:8000/v1, "
            f"model: name}}'; it takes {', '.join(known)}."
        )
    return ServerSampler(**spec)


def check_reward(condition: Condition) -> None:
    """Raise ValueError where rewards cannot say which condition a sample has."""
    if isinstance(condition, (CategoryCondition, TextCondition, AttributeCondition)):
        raise ValueError(
            f"The condition '{condition.kind}' is made of words, and a reward gives numbers. Use quantile_tokens or "
            "phrases with it; or a judge, or data with feedback."
        )


def check_models(spec: Any) -> None:
    """Raise OSError now where a reward model or classifier of a spec is not there; its weights wait until it is asked.

    A model that is loaded only when the first completions are to be scored would be missed only then.
    """
    if isinstance(spec, str) and ":" not in spec:
        spec = {"reward_model": spec}
    if isinstance(spec, Mapping):
        for kind in set(MODEL_KINDS) & set(spec):
            name, revision = spec[kind], spec.get("revision")
            try:
                if adapter_config_path(name, revision) is None:
                    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
                    if not config:
                        raise OSError("it has no config.json.")
            except OSError as error:
                raise OSError(f"No {kind.replace('_', ' ')} {name!r}: {error}") from error
        for part in [spec.get("not"), *spec.get("product", ()), *(part for _, part in spec.get("sum", ()))]:
            check_models(part)
    elif isinstance(spec, list | tuple):
        for part in spec:
            check_models(part)


def load_scored(
    script: RunArguments,
    mixture: DatasetMixtureConfig,
    *,
    condition: Condition,
    want_eval: bool,
    seed: int,
    **columns: Any,
) -> tuple[Dataset, Dataset | None]:
    """Completions with scores or feedback, for training and evaluation; ``columns`` as :func:`with_feedback`'s."""
    train, test = load_splits(script, mixture, want_eval=want_eval, seed=seed, on_bad_row=None)
    if not isinstance(train, Dataset):
        raise UsageError("scored completions are sorted by their scores, so they cannot be a stream. Leave it out.")
    return tuple(None if x is None else with_feedback(x, condition, **columns) for x in (train, test))


def with_feedback(
    dataset: Dataset,
    condition: Condition,
    *,
    score_column: str | None = None,
    negate_score: bool = False,
    feedback_column: str | None = None,
) -> Dataset:
    """The dataset with its columns under the names that the trainer reads.

    Args:
        score_column: numbers, higher is better; a list of K where a row has K completions.
        negate_score: lower is better, as of toxicity.
        feedback_column: words, or the JSON objects of the condition ``attributes``. Under that condition, columns with
            the attributes' names are put together where this is None.

    Raises:
        ValueError: no such column, or nothing to negate.
    """
    for option, name in (("score_column", score_column), ("feedback_column", feedback_column)):
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"{option} is '{name}', and the data has the columns {sorted(dataset.column_names)}.")
    lists = bool({"completions", "responses"} & set(dataset.column_names))
    score_name, feedback_name = ("scores", "feedbacks") if lists else ("score", "feedback")
    score_column = score_column or _first(dataset, SCORES)
    if negate_score:
        if score_column is None:
            raise ValueError("negate_score is given, and the data has no scores. Name them with score_column.")
        dataset = dataset.map(
            lambda row, i: {score_column: _negative(row[score_column], f"row {i}, '{score_column}'")},
            with_indices=True,
            load_from_cache_file=False,
        )
    dataset = _called(dataset, score_column, score_name, SCORES)
    attributes = list(condition.attributes) if isinstance(condition, AttributeCondition) else []
    if feedback_column is None and attributes and set(attributes) <= set(dataset.column_names):
        dataset = dataset.map(
            lambda row: {feedback_name: _objects({a: row[a] for a in attributes})}, load_from_cache_file=False
        )
    elif feedback_column is None and attributes and _first(dataset, FEEDBACK) is None:
        missing = [a for a in attributes if a not in dataset.column_names]
        raise ValueError(
            f"The condition 'attributes' is of {attributes}, and the data has no column for {missing}, only "
            f"{sorted(dataset.column_names)}. Rename the columns, or name one that has JSON objects of them with "
            "feedback_column."
        )
    dataset = _called(dataset, feedback_column or _first(dataset, FEEDBACK), feedback_name, FEEDBACK)
    return _called(dataset, _first(dataset, PROMPT_COLUMNS), "prompt", PROMPT_COLUMNS)


def _first(dataset: Dataset, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in dataset.column_names), None)


def _called(dataset: Dataset, old: str | None, new: str, aliases: tuple[str, ...]) -> Dataset:
    """One column under its name; others that could be taken for it are left out."""
    if old is None:
        return dataset
    dataset = dataset.remove_columns([c for c in dataset.column_names if c in aliases and c != old])
    return dataset if old == new else dataset.rename_column(old, new)


def _negative(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_negative(x, where) for x in value]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{where} is {value!r}, expected a number to negate.")
    return None if value is None else -value


def _objects(values: Mapping[str, Any]) -> str | list[str]:
    """JSON of attributes, or of each of K where they are lists.

    >>> _objects({"helpful": 2}), _objects({"helpful": [2, 0]})
    ('{"helpful": 2}', ['{"helpful": 2}', '{"helpful": 0}'])
    """
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    if not lists:
        return json.dumps(dict(values))
    sizes = {name: len(value) for name, value in lists.items()}
    if len(lists) < len(values) or len(set(sizes.values())) > 1:
        raise ValueError(f"attributes of one row have {sizes} entries, expected as many of each of {list(values)}.")
    return [json.dumps({name: value[k] for name, value in lists.items()}) for k in range(min(sizes.values()))]
