"""TRL's model card with a section on the objective."""

from __future__ import annotations

from typing import Any

from contrastive_align.report.card import add_section, objective_section


class CardMixin:
    """Adds the objective of a run to TRL's model card, which names the trainer's class and paper only."""

    def objective(self) -> dict[str, Any]:
        """Return the options that decide the objective, name -> value."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card and add a section on the objective."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(self.args.output_dir, objective_section(self.objective()))
