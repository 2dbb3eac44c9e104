"""Options of whatever calls a server, checked before anything is asked."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlsplit


def check_counts(**found: tuple[Any, int]) -> None:
    """Each a whole number of at least its second part."""
    for name, (value, least) in found.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: found {value!r}, expected a whole number of at least {least}.")


def check_number(name: str, value: Any, expected: str, *, allowed: bool = True) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf or not allowed:
        raise ValueError(f"{name}: found {value!r}, expected {expected}.")


def check_model(model: Any) -> None:
    if not isinstance(model, str) or not model:
        raise ValueError(f"model: found {model!r}, expected the model's name at the endpoint.")


def check_address(base_url: Any) -> None:
    """None, or an address without anything secret in it: options are printed and saved."""
    if base_url is None:
        return
    parts = urlsplit(base_url) if isinstance(base_url, str) else None
    if parts is not None and (parts.username or parts.password or parts.query):
        raise ValueError(
            f"base_url: the address at {parts.hostname} has a user name, a password or a query in it, which would be "
            "shown and saved with the options. Put the key into the environment variable OPENAI_API_KEY."
        )
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: found {base_url!r}, expected an address such as http://localhost:8000/v1.")
