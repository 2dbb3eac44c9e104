"""What FDPGTrainer saves beside TRL's checkpoint, and reads back: nothing is drawn or measured again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from contrastive_align.trainers.fdpg import FDPGTrainer

TARGET_FILE = "target.json"
PROPOSAL_FILE = "proposal.pt"


def save_state(trainer: FDPGTrainer, folder: Path) -> None:
    """Target and proposal once; running log Z, windows and the groups already drawn for each process."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": trainer._step, "log_z": trainer.log_z.state_dict(), "groups": trainer._buffered_inputs}
    if trainer.baseline is not None:
        state["baseline"] = trainer.baseline.state_dict()
    if trainer.kept_proposal is not None:
        state["proposal"] = trainer.kept_proposal.state_dict()
    if trainer.args.should_save:
        trainer.target.save(folder / TARGET_FILE)
        if trainer.kept_proposal is not None and not trainer.kept_proposal.is_base:
            torch.save(trainer.kept_proposal.weights, folder / PROPOSAL_FILE)
    torch.save(state, folder / state_file(trainer.args.process_index))


def load_state(trainer: FDPGTrainer, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: files are missing, or the proposal is that of another model.
    """
    file = checkpoint / state_file(trainer.args.process_index)
    if not (checkpoint / TARGET_FILE).is_file() or not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {TARGET_FILE} or no {file.name}: it was not written by an FDPGTrainer on this "
            "many processes, and its samples and log Z cannot be continued. Start anew from its weights."
        )
    trainer.target.load(checkpoint / TARGET_FILE)
    state = torch.load(file, map_location=trainer.accelerator.device, weights_only=True)
    trainer._step, trainer._buffered_inputs = state["step"], state["groups"]
    trainer.log_z.load_state_dict(state["log_z"])
    if trainer.baseline is not None and "baseline" in state:  # else the run began with another baseline
        trainer.baseline.load_state_dict(state["baseline"])
    if trainer.kept_proposal is not None and "proposal" in state:  # else it begins with the base
        file, weights = checkpoint / PROPOSAL_FILE, None
        if state["proposal"]["replacements"]:
            if not file.is_file():
                raise ValueError(f"{file} is not there, but the proposal was replaced. The checkpoint is not whole.")
            weights = torch.load(file, map_location="cpu", weights_only=True)
        trainer.kept_proposal.load_state_dict(state["proposal"], weights, trainer.policy)


def state_file(process: int) -> str:
    return f"fdpg_state_{process}.pt"
