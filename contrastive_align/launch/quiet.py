"""Noise of other libraries on the console, removed at its cause."""

from __future__ import annotations

import logging
import os
import sys
import warnings


# Logger, message, and why nobody can act on it here.
NOISE = (
    # The CPU kernel that bitsandbytes offers for 4-bit evaluation is switched off anyway: models/cpu/four_bit.py.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # A merge that dequantises its base says so itself.
    ("transformers.integrations.bitsandbytes", "The modules are dequantized in"),
)


def quiet_imports() -> None:
    """Drop what libraries say when they are imported; call it before they are."""
    for name, message in NOISE:
        logging.getLogger(name).addFilter(_Without(message))
    # TRL uses the names that transformers deprecates; the configs of this package set the new ones.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_disable", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated", category=FutureWarning)


def quiet_run(*, on_cpu: bool) -> None:
    """Drop what libraries say while a trainer is built."""
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, warns that it looked
    # The command has one live line of its own.
    transformers_logging.disable_progress_bar()  # the hub's as well
    datasets_logging.disable_progress_bar()
    if sys.stderr.isatty():  # a download may take an hour
        enable_progress_bars()


class _Without(logging.Filter):
    """Drop one message of a logger."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.message)

    def __eq__(self, other: object) -> bool:  # a logger takes an equal filter once
        return isinstance(other, _Without) and other.message == self.message

    def __hash__(self) -> int:
        return hash(self.message)
