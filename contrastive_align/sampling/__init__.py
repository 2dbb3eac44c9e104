"""Completions from a policy."""

from contrastive_align.sampling.generate import sample_completions


__all__ = ["sample_completions"]
