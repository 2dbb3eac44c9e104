"""A form: where the condition's text and the prompt go, in plain prompts and in conversations."""

from __future__ import annotations

import re
from typing import Any


Prompt = str | list[dict[str, Any]]

_FIELDS = ("{condition}", "{prompt}")


def check_form(form: str) -> None:
    """Raise ValueError unless the form has ``{condition}`` and ``{prompt}`` once each."""
    for field in _FIELDS:
        if not isinstance(form, str) or (found := form.count(field)) != 1:
            times = f" {found} times" if isinstance(form, str) else ""
            raise ValueError(
                f"The form {form!r} has {field}{times}, expected once, as in 'feedback: {{condition}} {{prompt}}'."
            )


def fill_form(form: str, condition: str, text: str) -> str:
    """The form with both in their places; braces in them, and other braces in the form, mean nothing.

    >>> fill_form("{condition}. input: {prompt}", "Good", "Print {condition} in C: {}")
    'Good. input: Print {condition} in C: {}'
    """
    values = dict(zip(_FIELDS, (condition, text), strict=True))
    return "".join(values.get(part, part) for part in re.split(r"(\{condition\}|\{prompt\})", form))


def condition_prompt(form: str, condition: str, prompt: Prompt) -> Prompt:
    """The prompt under a condition: a text goes through the form, of a conversation the last user message does.

    Raises:
        ValueError: a conversation without a user message, or whose last one is not text.

    >>> condition_prompt("{condition}. input: {prompt}", "Good", [{"role": "user", "content": "Hello"}])
    [{'role': 'user', 'content': 'Good. input: Hello'}]
    """
    if isinstance(prompt, str):
        return fill_form(form, condition, prompt)
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        roles = [message["role"] for message in prompt]
        raise ValueError(
            f"The conversation has roles {roles}, expected a user message, which the condition is put into."
        )
    content = prompt[last]["content"]
    if not isinstance(content, str):
        raise ValueError(
            f"The last user message's content is {content!r}, expected text, which the form is put around."
        )
    message = {**prompt[last], "content": fill_form(form, condition, content)}
    return [*prompt[:last], message, *prompt[last + 1 :]]
