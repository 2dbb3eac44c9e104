"""Load models, and compute the log-probs of completions under them."""

from contrastive_align.models.loading import Start, load_tokenizer, resolve_start, verify_saved, with_pad_token
from contrastive_align.models.logps import CompletionLogps, completion_logps


__all__ = [
    "CompletionLogps",
    "Start",
    "completion_logps",
    "load_tokenizer",
    "resolve_start",
    "verify_saved",
    "with_pad_token",
]
