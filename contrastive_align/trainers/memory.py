"""Keep freed memory while a trainer trains or evaluates on a CPU."""

from __future__ import annotations

from typing import Any

from contrastive_align.models.cpu.freed_memory import freed_memory_kept


class KeepsFreedMemory:
    """For a trainer: on a CPU its activations come on pages that the process has already, until training ends."""

    def train(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type, hand_back=False):  # in a loop of somebody's own, too
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type):
            return super().evaluation_loop(*args, **kwargs)
