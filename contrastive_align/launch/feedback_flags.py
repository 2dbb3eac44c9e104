"""Build the judge, the sampler and the rewards that flags or a YAML file describe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from contrastive_align.conditions import AttributeCondition, CategoryCondition, Condition, TextCondition
from contrastive_align.judge.judge import Judge, resolve_judge
from contrastive_align.launch.arguments import FeedbackArguments
from contrastive_align.models.loading import adapter_config_path
from contrastive_align.sampling.server import PLAIN, ServerSampler
from contrastive_align.targets import resolve_feature
from contrastive_align.targets.features import MODEL_KINDS


JUDGED_PROMPTS = 16  # the default of eval_prompts with a judge, which is slow or costs money


def build_judge(spec: Any, condition: Condition | None, output_dir: str) -> Judge:
    """Build the judge, which gives the answers that the condition needs and stores them in ``<output_dir>/judge``.

    Without a condition it gives scores.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"judge is {spec!r}, expected a mapping: {{model: name, base_url: address}}.")
    wanted: Any = list(condition.categories) if isinstance(condition, CategoryCondition) else "text"
    answers = spec.get("answers", wanted)
    if isinstance(condition, AttributeCondition):
        raise ValueError(
            "The condition 'attributes' needs numbers that a judge does not give. Use data that has them "
            "(--feedback_column, or a column for each attribute), or the condition 'categories'."
        )
    if isinstance(condition, (CategoryCondition, TextCondition)) and answers != wanted:
        raise ValueError(f"The judge answers {answers!r} and the condition {condition.kind} needs {wanted!r}.")
    prompt = "feedback" if answers == "text" else "helpful_categories"
    return resolve_judge({"prompt": prompt, "answers": answers, "cache": str(Path(output_dir) / "judge"), **spec})


def build_feedback(
    script: FeedbackArguments, training: Any, notes: list[str], condition: Condition | None = None
) -> dict[str, Any]:
    """Return a trainer's keywords ``reward_funcs``, ``judge`` and ``sampler``; add what a judge costs to the notes."""
    context = {"device": training.device, "trust_remote_code": training.trust_remote_code}
    found: dict[str, Any] = {"reward_funcs": None, "judge": None}
    found["sampler"] = None if script.sampler is None else build_sampler(script.sampler)
    if script.judge is not None:
        found["judge"] = judge = build_judge(script.judge, condition, training.output_dir)
        judge.check()
        if script.eval_prompts:
            under = " under every condition" if condition is not None else ""
            asked = f"asks the judge about {training.num_generations} completions of each{under}"
            more = f"measuring on {script.eval_prompts} prompts {asked}, beside those of the rounds"
            notes.append(f"{more}; --eval_prompts=0 leaves it out")
    if script.reward is not None:
        if condition is not None:
            check_reward(condition)
        specs = script.reward if isinstance(script.reward, list) else [script.reward]
        found["reward_funcs"] = [resolve_feature(spec, **context) for spec in specs]
        check_models(specs)
    return found


def build_sampler(spec: Any, **body: Any) -> ServerSampler:
    """Build the sampler of a server from ``{base_url: address, model: name}`` and the class's other options.

    ``body`` are options of each request beside those in ``extra_body``.
    """
    known = list(inspect.signature(ServerSampler).parameters)
    if not isinstance(spec, Mapping) or not {"base_url", "model"} <= set(spec) <= set(known):
        expected = "a mapping with base_url and model: '{base_url: http://localhost:8000/v1, model: name}'"
        raise ValueError(f"sampler is {spec!r}, expected {expected}; it takes {', '.join(known)}.")
    extra = PLAIN if spec.get("extra_body") is None else spec["extra_body"]
    if not isinstance(extra, Mapping):
        raise ValueError(f"extra_body of the sampler is {extra!r}, expected a mapping of the request's options.")
    return ServerSampler(**{**spec, "extra_body": {**extra, **body}})


def check_reward(condition: Condition) -> None:
    """Raise ValueError for a condition that rewards cannot assign."""
    if isinstance(condition, (CategoryCondition, TextCondition, AttributeCondition)):
        raise ValueError(
            f"The condition '{condition.kind}' is made of words, and a reward gives numbers. Use quantile_tokens or "
            "phrases with it; or a judge, or data with feedback."
        )


def check_models(spec: Any) -> None:
    """Raise OSError for a reward model or classifier of a spec that does not exist.

    Its weights are loaded with the first completions; without this check a wrong name would be found only then.
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
        spec = [spec.get("not"), *spec.get("product", ()), *(part for _, part in spec.get("sum", ()))]
    if isinstance(spec, list | tuple):
        for part in spec:
            check_models(part)
