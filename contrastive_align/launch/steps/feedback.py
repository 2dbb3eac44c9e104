"""``score`` and ``judge``: completions -> a number each, or a judge's words and score."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
import yaml

from contrastive_align.judge.judge import resolve_judge
from contrastive_align.launch.arguments import _StrictLoader
from contrastive_align.launch.feedback import read_spec
from contrastive_align.launch.steps.files import LISTS, Output, Row, fingerprint, read_rows
from contrastive_align.targets.evaluate import call_feature
from contrastive_align.targets.features import resolve_feature


ROWS_AT_ONCE = 64  # written together; a judge keeps its answers itself
_NOT_COLUMNS = (*LISTS, "prompt", "condition")


def score(args: Namespace) -> str:
    """Write ``rewards``; what was done, in a line."""
    rows = read_rows(args.input, generations=True)
    settings = {"input": fingerprint(args.input), "reward": args.reward}
    output = Output(args.output, settings, overwrite=args.overwrite)
    feature = resolve_feature(
        read_spec("reward", args.reward),
        device=torch.accelerator.current_accelerator() or "cpu",
        trust_remote_code=args.trust_remote_code,
    )

    def work(some: list[Row]) -> list[Row]:
        names = {name for row in some for name in row if name not in _NOT_COLUMNS}
        prompts, completions = _flat(some)
        columns = {name: [row.get(name) for row in some for _ in row["generations"]] for name in sorted(names)}
        rewards = iter(call_feature(feature, prompts, completions, columns, none_allowed=True))
        return [row | {"rewards": [next(rewards) for _ in row["generations"]]} for row in some]

    rewards = [r for row in output.fill(rows, work, at_once=ROWS_AT_ONCE) for r in row["rewards"]]
    known = [r for r in rewards if r is not None]
    mean = f", mean {sum(known) / len(known):.4f}" if known else ""
    return f"{args.output}: {feature.name} of {len(known)} of {len(rewards)} completions{mean}"


def judge(args: Namespace) -> str:
    """Write ``feedbacks``, ``scores`` and ``analysis``, None where there is no verdict; what was done, in a line."""
    rows = read_rows(args.input, generations=True)
    asked = resolve_judge(_read_yaml(args.judge))
    settings = {"input": fingerprint(args.input), "judge": {**asked.spec, "cache": None}}
    output = Output(args.output, settings, overwrite=args.overwrite)

    def work(some: list[Row]) -> list[Row]:
        verdicts = iter(asked(*_flat(some)))
        found = []
        for row in some:
            own = [next(verdicts) for _ in row["generations"]]
            found.append(
                row
                | {"feedbacks": [None if v is None else v.text for v in own]}
                | {"scores": [None if v is None else v.score for v in own]}
                | {"analysis": [None if v is None else v.analysis for v in own]}
            )
        return found

    scores = [s for row in output.fill(rows, work, at_once=len(rows)) for s in row["scores"]]
    known = sum(s is not None for s in scores)
    return f"{args.output}: verdicts on {known} of {len(scores)} completions; {asked.report()}"


def _flat(rows: list[Row]) -> tuple[list, list]:
    """Prompts and completions, an entry for each completion: in messages where the prompt is in messages."""
    pairs = [(row["prompt"], text) for row in rows for text in row["generations"]]
    spoken = [text if isinstance(p, str) else [{"role": "assistant", "content": text}] for p, text in pairs]
    return [prompt for prompt, _ in pairs], spoken


def _read_yaml(path: str) -> object:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no YAML file '{path}' (looked in {Path.cwd()}).")
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
