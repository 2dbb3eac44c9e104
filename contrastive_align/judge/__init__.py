"""Judge completions with a language model."""

from contrastive_align.judge.judge import Judge, JudgeError, Verdict, resolve_judge


__all__ = ["Judge", "JudgeError", "Verdict", "resolve_judge"]
