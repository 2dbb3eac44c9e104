"""Calls of OpenAI-compatible servers: one, with what may go wrong in it; many at once, tried again after a wait."""

from contrastive_align.calls.endpoint import CallError, Endpoint, Fault, Mailbox
from contrastive_align.calls.schedule import backoff, run_jobs


__all__ = ["CallError", "Endpoint", "Fault", "Mailbox", "backoff", "run_jobs"]
