"""Conversations: every spelling of a turn becomes ``{"role": ..., "content": ...}``; the order of roles is checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from contrastive_align.data.rows import FIX, BadRow, parsed, short


Message = dict[str, Any]
Text = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names and others' -> the role of a chat template.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    **{"human": "user", "prompter": "user", "instruction": "user"},
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **{"gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant"},
    **{"chatbot": "assistant", "ai": "assistant"},
}
CALLS = ("function_call", "tool_call")  # roles whose content is the call


def as_text(value: Any, what: str) -> Any:
    """Return text as it is, and a conversation, in any spelling, as a list of messages; any other value as it is.

    A single message, ShareGPT's from and value, JSON text of messages and the OASST's role and text are understood;
    parts of text are joined; None, which Arrow fills into objects for keys that only others have, is taken out.

    Raises:
        BadRow: content that is not text.

    >>> as_text({"from": "human", "value": "Hi"}, "row 0")
    [{'role': 'user', 'content': 'Hi'}]
    """
    found = parsed(value, what)
    if isinstance(found, Mapping) and is_turn(found):
        found = [found]
    if isinstance(found, list) and found and all(map(is_turn, found)):
        roles = [turn.get("role", turn.get("from")) for turn in found]
        if isinstance(value, str) and not all(isinstance(role, str) and role.lower() in ROLE_NAMES for role in roles):
            return value  # an answer in JSON
        return [_message(turn, f"{what}[{i}]") for i, turn in enumerate(found)]
    return value


def is_turn(value: Any) -> bool:
    """Return whether a value is a message in one of the spellings."""
    if not isinstance(value, Mapping):
        return False
    spelled = ("role" in value and bool({"content", "tool_calls", "text"} & set(value))) or {"from", "value"} <= set(
        value
    )
    return spelled or ("role" in value and len(value) == 1)


def _message(turn: Mapping[str, Any], what: str) -> Message:
    turn = without_none(turn)
    if "role" not in turn and "from" in turn:
        role, content = turn["from"], turn.get("value")
        rest = {key: value for key, value in turn.items() if key in ("weight", "name")}
    else:
        role, content = turn.get("role"), turn.get("content", turn.get("text"))
        rest = {key: value for key, value in turn.items() if key not in ("role", "content", "text")}
    content = joined_parts(content, what)
    if role in CALLS:
        return {"role": "assistant", "tool_calls": tool_calls(content, what), **rest}
    if "function_call" in rest:
        rest["tool_calls"] = tool_calls(rest.pop("function_call"), what)
    role = ROLE_NAMES.get(role.lower(), role) if isinstance(role, str) else role
    return {"role": role, **({} if content is None else {"content": content}), **rest}


def tool_calls(told: Any, what: str) -> list[dict[str, Any]]:
    """Return the tool calls that a turn of its own holds: an object with a name and arguments, or a list of them.

    Raises:
        BadRow: it holds something else.
    """
    found = parsed(told, what)
    calls = [without_none(call) for call in (found if isinstance(found, list) else [found])]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(f"{what} is the tool call {short(told)}, expected JSON with a 'name' and 'arguments'. {FIX}")
    arguments = [parsed(call.get("arguments", call.get("parameters")), what) for call in calls]
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": {} if value is None else value}}
        for call, value in zip(calls, arguments, strict=True)
    ]


def joined_parts(content: Any, what: str) -> Any:
    """Join a content that is a list of parts of text.

    Raises:
        BadRow: a part that is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise BadRow(f"{what} has a part of the content that is {short(part)}, expected text alone. {FIX}")
        texts.append(text)
    return "".join(texts)


def without_none(value: Any) -> Any:
    """Take the entries out that are None, at any depth of objects.

    >>> without_none({"a": None, "b": [{"c": None}, None]})
    {'b': [{}, None]}
    """
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def check_prompt(prompt: Any, what: str) -> None:
    """Check that a prompt is text or messages that end with a turn to answer, in an order that templates take.

    Raises:
        BadRow: it is neither.
    """
    roles = _check_form(prompt, what)
    if not roles:
        return
    if roles[-1] not in ("user", "tool"):
        raise BadRow(f"{what} ends with the role '{roles[-1]}', expected the user's turn last (roles: {roles}). {FIX}")
    rest = roles[1:] if roles[0] in ("system", "developer") else roles
    if rest[0] != "user":
        raise BadRow(f"{what} has the roles {roles}, expected user first, or system then user. {FIX}")
    for before, after in itertools.pairwise(rest):
        if after in ("system", "developer") or (before == after and after != "tool"):
            raise BadRow(f"{what} has the roles {roles}, expected user and assistant in turn. {FIX}")


def check_completion(completion: Any, what: str) -> None:
    """Check that a completion is text or messages of the assistant, in which no later turn of the user is trained.

    Raises:
        BadRow: it is neither.
    """
    roles = _check_form(completion, what)
    for where, role in (("begins", roles[0]), ("ends", roles[-1])) if roles else ():
        if role != "assistant":
            raise BadRow(f"{what} {where} with the role '{role}', expected 'assistant' (roles: {roles}). {FIX}")
    if others := [role for role in roles if role not in ("assistant", "tool")]:
        raise BadRow(
            f"{what} has a turn of the {others[0]} inside (roles: {roles}), on which the model would be trained. "
            "End the prompt with the user's last turn, or drop the row (on_bad_row='drop')."
        )


def _check_form(messages: Any, what: str) -> list[str]:
    """Check that this is text or messages, with content; return the messages' roles."""
    if messages is None or messages == [] or (isinstance(messages, str) and not messages.strip()):
        raise BadRow(f"{what} is empty, expected text or messages. Fill it in or drop the row (on_bad_row='drop').")
    if isinstance(messages, str):
        return []
    if not isinstance(messages, list):
        raise BadRow(f"{what} is {short(messages)}, expected text or a list of messages. {FIX}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRow(
                f"{what}[{i}] is {short(message)}, expected a message with 'content' and a 'role' among {ROLES}. {FIX}"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise BadRow(f"{what}[{i}] has the content {short(content)}, expected text. {FIX}")
        if not message.get("tool_calls") and (not content or not content.strip()):
            raise BadRow(f"{what}[{i}] has an empty 'content' (role '{message['role']}'), expected text. {FIX}")
    return [message["role"] for message in messages]
