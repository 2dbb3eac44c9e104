"""Options of a TRL class that one of ours does not have are refused, never ignored."""

from __future__ import annotations

from dataclasses import field, fields
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


def as_in(base: type, name: str) -> Any:
    """An option of another dataclass, for a class of one's own: its default and its help.

    Raises:
        TypeError: the other class has no such option.
    """
    found = next((f for f in fields(base) if f.name == name), None)
    if found is None:
        raise TypeError(
            f"{base.__name__} has no option {name!r}: TRL renamed or dropped it. Use a version that has it."
        )
    return field(default=found.default, metadata=dict(found.metadata))


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a finite number above 0.")
