"""One live line of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


LINES = 3  # of progress, where the output is no terminal
# Metric of the log -> its word in the line, the first that are there.
SHOWN = {
    "loss": "loss",
    "logps/best_delta": "best",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "kl_target": "KL(p||pi)",
    "kl_base": "KL(pi||base)",
    "nll": "nll",
    "kl": "KL",
    "round/mean_reward": "reward",
}


class LiveLine(TrainerCallback):
    """Show step, loss, best, margin, accuracy, tokens/s and time left: a bar in a terminal, a few lines elsewhere.

    It stands in the place of Trainer's own bar and of its print of every log, whose entries are in ``log.jsonl``.
    """

    def __init__(self, *, bar: bool) -> None:
        self.shows_bar = bar
        self.bar: Any = None
        self.evaluating: Any = None
        self.values: dict[str, float] = {}
        self.rate: float | None = None  # tokens/s
        self._started, self._first_step, self._first_tokens, self._next = 0.0, 0, None, 0.0

    @classmethod
    def install(cls, trainer: Any) -> LiveLine:
        """Put the line in the place of Trainer's callbacks."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        line = cls(bar=sys.stderr.isatty() and not trainer.args.disable_tqdm)
        trainer.add_callback(line)
        return line

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first_step, self._next = time.perf_counter(), state.global_step, 0.0
        if state.is_world_process_zero and self.shows_bar:
            self.bar = _Bar(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=BAR)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.shows_bar and hasattr(eval_dataloader, "__len__"):
            if self.evaluating is None:
                self.evaluating = tqdm(total=len(eval_dataloader), desc="evaluating", leave=False, dynamic_ncols=True)
            self.evaluating.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluating is not None:
            self.evaluating.close()
            self.evaluating = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        self.values |= {name: logs[name] for name in SHOWN if isinstance(logs.get(name), int | float)}
        if self._first_tokens is None and "num_tokens" in logs:
            self._first_tokens = (float(logs["num_tokens"]), time.perf_counter())
        text = self.text(state, logs)
        if self.bar is not None:
            self.bar.text = text
            self.bar.refresh()
        elif not self.shows_bar and state.global_step >= max(1.0, self._next) and "loss" in logs:
            self._next = state.global_step + state.max_steps / LINES
            print(f"step {state.global_step}/{state.max_steps}  {text}  {self._left(state)}"[:120], flush=True)

    def text(self, state: Any, logs: Mapping[str, Any]) -> str:
        """Write the numbers of the line."""
        parts = [f"{word} {self.values[name]:.4g}" for name, word in SHOWN.items() if name in self.values]
        if self._first_tokens is not None and logs.get("num_tokens", 0) > self._first_tokens[0]:
            tokens, then = self._first_tokens
            self.rate = (float(logs["num_tokens"]) - tokens) / max(1e-9, time.perf_counter() - then)
        if self.rate is not None:  # entries of an evaluation do not count tokens
            parts.append(f"{self.rate:,.0f} tokens/s")
        return "  ".join(parts)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        seconds = (time.perf_counter() - self._started) / max(1, done) * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Bar(tqdm):
    """A bar with a text of ours in its format: before ``{postfix}`` tqdm writes a comma."""

    text = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        """Add the text to what the format may name."""
        return {**super().format_dict, "text": self.text}


BAR = "step {n_fmt}/{total_fmt} {bar:12} {text}  {remaining} left"
