"""Texts of users, models and judges, as a page shows them."""

from __future__ import annotations

import re
from typing import Any


LONGEST_TEXT = 3000  # characters of a sample or a prompt that a page shows
_INVISIBLE = re.compile(r"[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(value: Any) -> str:
    r"""Cut a long text, and show characters that nobody sees, such as those that turn the direction of writing.

    >>> clean("a\u202eb"), len(clean("x" * 5000))
    ('a\ufffdb', 3003)
    """
    text = _INVISIBLE.sub("\ufffd", str(value))
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
