"""Options of a TRL class that one of ours does not have are refused, never ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def refuse(config: Any, base: type, table: dict[str, tuple[str, str]], trainer: str) -> None:
    """Raise where an option of ``table`` (option -> why it has no meaning, the way out) is not at ``base``'s default.

    Raises:
        ValueError: naming the option, the reason and the way out.
    """
    defaults = {f.name: f.default for f in fields(base)}
    for name, (why, way_out) in table.items():
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not supported by {trainer}: {why}. Way out: {way_out}."
            )


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a finite number above 0.")
