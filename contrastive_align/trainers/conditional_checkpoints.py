"""What a ConditionalTrainer goes on from and leaves behind: checkpoints, the condition beside the model, the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from contrastive_align.report.card import add_section, how_to_ask
from contrastive_align.trainers.card import CardMixin
from contrastive_align.trainers.checkpoints import last_whole_checkpoint
from contrastive_align.trl_seam import get_config_model_id


STATE_FILE = "conditional_state.json"


class ConditionalCheckpointsMixin(CardMixin):
    """Resuming and saving of :class:`~contrastive_align.ConditionalTrainer`."""

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any):
        """As TRL. ``resume_from_checkpoint=True`` goes on from the newest checkpoint that was written to its end, and
        from the start where there is none; what the pool has already is not sampled again either way."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, STATE_FILE)
        elif not resume_from_checkpoint and self.online and self.pool.rounds:
            raise ValueError(
                f"{self.pool.folder} has the samples of an earlier run (rounds {self.pool.rounds}). Go on with "
                "resume_from_checkpoint=True, or give another output_dir or pool_dir to start anew."
            )
        self.check_pool()
        if resume_from_checkpoint:
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._load_state(Path(resume_from_checkpoint))
        self._step_sums = None
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # before the Trainer's files, of which the last says that the checkpoint is whole
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of a checkpoint that is written again
            state = {"kl_coef": self.kl_coef.state_dict(), "entropy_coef": self.entropy_coef.state_dict()}
            state["steps_per_round"] = self.steps_per_round
            (folder / STATE_FILE).write_text(json.dumps({**state, "condition": self.condition.spec}))
        super()._save_checkpoint(model, trial)

    def _load_state(self, checkpoint: Path) -> None:
        file = checkpoint / STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE}: it was not written by a ConditionalTrainer, or not to its end. "
                "Give another checkpoint, or start anew from its weights."
            )
        state = json.loads(file.read_text())
        if state["condition"] != self.condition.spec:
            raise ValueError(
                f"{checkpoint} was trained under {state['condition']}, and this run's condition is "
                f"{self.condition.spec}. Use the same condition, or start anew from its weights."
            )
        steps = state.get("steps_per_round", self.steps_per_round)
        if self.online and steps != self.steps_per_round:
            raise ValueError(
                f"A round had {steps} optimiser steps in {checkpoint} and has {self.steps_per_round} now: its samples "
                "would be trained on in another round. Keep draws_per_round, and per_device_train_batch_size x "
                "gradient_accumulation_steps x processes."
            )
        self.kl_coef.load_state_dict(state["kl_coef"])
        self.entropy_coef.load_state_dict(state["entropy_coef"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As TRL; the condition goes with it: ``Condition.load(output_dir).apply_best(prompt)`` asks for the best."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.best_condition().save(output_dir or self.args.output_dir)

    def objective(self) -> dict[str, Any]:
        args = self.args
        found = {"condition": json.dumps(self.condition.spec), "entropy_coef": args.entropy_coef}
        found |= {"kl_coef": args.kl_coef, "kl_direction": args.kl_direction if args.kl_coef else None}
        found |= {name: getattr(args, name) for name in ("kl_target", "entropy_target")}
        return {name: value for name, value in found.items() if value is not None}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL, with the objective; in place of its quick start, which has no condition, how to ask for the best."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            condition, adapter = self.best_condition(), is_peft_model(self.model)
            try:
                best = condition.best
            except ValueError:  # a judge's words, before the first round
                best = "words of the judge, once there are some"
            base = get_config_model_id(self.model.config)
            section = how_to_ask(condition.kind, best, adapter=adapter, tokens=bool(condition.tokens), base=base)
            add_section(self.args.output_dir, section, instead_of="## Quick start")
