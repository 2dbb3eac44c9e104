"""What is logged and drawn of a round: rewards, lengths, diversity, and what its feedback leaves unsaid."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from transformers.utils import logging

from contrastive_align.pool.pool import Table
from contrastive_align.report import plot_round


logger = logging.get_logger(__name__)


class RoundMetricsMixin:
    """The metrics ``round/...`` of :class:`~contrastive_align.ConditionalTrainer`."""

    _cut_said = False

    def log_round(self, number: int, table: Table, through: int) -> None:
        newest = table.round == number if self.online else np.ones(len(table), dtype=bool)
        scores = table.score[newest]
        scores = scores[~np.isnan(scores)]
        logs = {
            "round/number": number,
            "round/samples": int(newest.sum()),
            "round/left_out": int((table.label[newest] < 0).sum()),
            "round/unscored": int(np.isnan(table.score[newest]).sum()),
            "round/pool": len(table),
            "round/finished": float(table.finished[newest].mean()),
            "round/mean_length": float(table.length[newest].mean()),
        }
        if len(scores):
            logs |= {"round/mean_reward": float(scores.mean()), "round/reward_std": float(scores.std())}
            if self.condition.reads == ("score",):
                logs["round/no_signal"] = self._no_signal(number, table, newest)
        if self.online and self.condition.free_words:
            logs |= self._words_cut(number, table, newest & (table.label >= 0))
        names = self.condition.names(table)
        for label, name in enumerate(names):
            there = (table.label == label) & ~np.isnan(table.score)
            if there.any():
                logs[f"round/reward/{name}"] = float(table.score[there].mean())
        logs |= self._text_metrics(np.flatnonzero(newest)[:: max(1, int(newest.sum()) // 512)], through)
        self.log_measured(logs)
        if self.args.should_save:
            self._draw_round(number, table)

    def _no_signal(self, number: int, table: Table, newest: np.ndarray) -> float:
        """The share of groups sorted by themselves, of which all scores of this round are equal; with a warning."""
        newest = newest & ~np.isnan(table.score)
        by_prompt = getattr(self.condition, "per_prompt", False)
        group = table.prompt_index[newest] if by_prompt else np.zeros(int(newest.sum()), dtype=np.int64)
        places, of = np.unique(group, return_inverse=True)
        low, high = np.full(len(places), np.inf), np.full(len(places), -np.inf)
        np.minimum.at(low, of, table.score[newest])
        np.maximum.at(high, of, table.score[newest])
        tied = places[low == high]
        if len(tied) and (number == 1 or len(tied) == len(places)):
            of_them = f"of {len(tied)} of {len(places)} prompts ({tied[:5].tolist()} first) " if by_prompt else ""
            logger.warning(
                f"Round {number}: all completions {of_them}have the same score. Their quantiles follow the order in "
                "which they were sampled, and say nothing. round/no_signal is the share of such."
            )
        return len(tied) / len(places)

    def _words_cut(self, number: int, table: Table, newest: np.ndarray) -> dict[str, int]:
        """How many words of this round's samples are cut to fit, and of what its prompts were asked with; a warning."""
        samples = self.pool.read(np.flatnonzero(newest), number)
        own = [s for s in samples if self.conditioned.cuts(s.prompt, s.feedback)]
        asked = []
        if number > 1:
            best, prompts = self.best_condition(number - 1), {s.prompt_index: s.prompt for s in samples}
            asked = [i for i, prompt in prompts.items() if self.conditioned.cuts(prompt, best.best_for(prompt))]
        if (own or asked) and not self._cut_said:
            self._cut_said = True
            rows = sorted({s.prompt_index for s in own} | set(asked))
            logger.warning(
                f"Round {number}: a judge's words that leave no room for a completion lose their end: those of "
                f"{len(own)} samples, and those that {len(asked)} prompts were asked with; of the prompts {rows[:5]} "
                f"first. Prompt and words have {self.conditioned.room} tokens. Let the judge use fewer words, or raise "
                "max_length. round/words_cut and round/asked_cut count them."
            )
        return {"round/words_cut": len(own), "round/asked_cut": len(asked)}

    def log_measured(self, logs: dict[str, float]) -> None:
        """Log by itself: means over the steps since training was logged wait for its next log."""
        was_training = self.model.training
        self.model.eval()  # TRL's log asks the model which of the two it is
        self.log(logs)
        self.model.train(was_training)

    def _text_metrics(self, indices: np.ndarray, through: int) -> dict[str, float]:
        """distinct-n, and the perplexity under the reference where there is one, of some hundred samples."""
        samples = self.pool.read(indices, through)
        metrics = {}
        for n in (1, 2, 3):
            grams = [tuple(s.completion_ids[i : i + n]) for s in samples for i in range(len(s.completion_ids) - n + 1)]
            metrics[f"round/distinct_{n}"] = len(set(grams)) / len(grams) if grams else math.nan
        if self.has_reference:
            nll, tokens = self.nll_given(samples, [None] * len(samples), reference=True)
            metrics["round/reference_perplexity"] = math.exp(nll.sum() / tokens.sum())
        return metrics

    def _draw_round(self, number: int, table: Table) -> None:
        path = Path(self.args.output_dir) / "rounds" / f"round-{number:03d}.png"
        try:
            plot_round(
                table.label,
                table.score,
                table.length,
                names=self.condition.names(table),
                path=path,
                title=f"The pool in round {number}: what each condition stands for",
            )
        except ImportError as error:
            logger.warning_once(str(error))
