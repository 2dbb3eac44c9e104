"""A language model as judge of completions."""

from contrastive_align.judge.judge import Judge, JudgeError, Verdict, resolve_judge


__all__ = ["Judge", "JudgeError", "Verdict", "resolve_judge"]
