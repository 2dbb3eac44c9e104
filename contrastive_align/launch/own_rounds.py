"""What the commands share whose runs sample rounds: the bundled reward, the pool, and rewards of samples."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from contrastive_align.launch.arguments import Arguments
from contrastive_align.launch.usage import UsageError


DEMO_REWARD = "contrastive_align.demo:reward"
# A run without these flags may replace its samples: its model, prompts and folder are the bundled ones.
NOT_BUNDLED = {"model_name_or_path", "dataset_name", "datasets", "prompt", "reward", "judge", "output_dir", "pool_dir"}


def remove_bundled_pool(args: Arguments, checkpoint: str | bool | None) -> None:
    """Remove the samples of an earlier bundled run, before another one begins anew."""
    if not NOT_BUNDLED & args.given and not checkpoint:
        if PartialState().is_main_process:
            shutil.rmtree(Path(args.training.output_dir) / "pool", ignore_errors=True)
        PartialState().wait_for_everyone()


def refuse_earlier_pool(trainer: Any, checkpoint: str | bool | None) -> None:
    """Raise UsageError where a run that begins anew finds the samples of an earlier one."""
    if trainer.online and trainer.pool.rounds and not checkpoint:
        raise UsageError(
            f"{trainer.pool.folder} has the samples of an earlier run (rounds {trainer.pool.rounds}). Go on with "
            "--resume_from_checkpoint=true, or start anew in another --output_dir or --pool_dir."
        )


def kept_rounds(trainer: Any) -> str:
    """Name the rounds that are on the disk."""
    rounds = trainer.pool.rounds if trainer.online else []
    which = f"round{'s 1 to' if len(rounds) > 1 else ''} {len(rounds)}"
    return f"The samples of {which} are in {trainer.pool.folder}." if rounds else ""


SPEEDS = ("sampling", "training")


def rounds_of(trainer: Any) -> list[dict[str, Any]]:
    """Return the log entry of each round, without its speeds."""
    own = [row for row in trainer.state.log_history if "round/number" in row]
    rounds = {row["round/number"]: row for row in own}  # a resumed run may have logged one twice
    return [{k: v for k, v in row.items() if not k.endswith("_tokens_per_second")} for row in rounds.values()]


def speeds_of(trainer: Any) -> list[dict[str, Any]]:
    """Return the tokens a second of each round: of sampling, where this process did it, and of training."""
    speeds: dict[int, dict[str, Any]] = {}
    number = 0
    for row in trainer.state.log_history:
        number = row.get("round/number", number)
        found = {name: row[key] for name in SPEEDS if (key := f"round/{name}_tokens_per_second") in row}
        speeds.setdefault(number, {"round": number}).update(found)
    return [found for number, found in speeds.items() if number]


def sample_rewards(trainer: Any) -> tuple[Any, str]:
    """Return what scores samples by the trainer's reward, and its name; no judge, who is slow or costs money."""
    feedback = trainer.feedback
    if feedback is None or trainer.judge is not None:
        return None, ""
    tokenizer = trainer.processing_class

    def reward(rows: list[dict[str, Any]], texts: list[list[str]]) -> list[list[float]]:
        groups = [
            [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in group] for group in texts
        ]
        answers = feedback(rows, groups)
        return [[math.nan if score is None else score for score, _ in group] for group in answers]

    return reward, "reward"


def plain(spec: Any) -> Any:
    """Convert a spec to values that JSON can hold."""
    if isinstance(spec, dict):
        return {str(key): plain(value) for key, value in spec.items()}
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return [plain(value) for value in spec]
    return spec if isinstance(spec, (str, int, bool, type(None))) or math.isfinite(spec) else str(spec)
