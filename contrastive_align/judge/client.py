"""Ask a judge one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from contrastive_align.openai_client import CallError, Client, Fault, read_json


class JudgeError(CallError):
    """The judge's endpoint refuses in a way that asking again does not change, or nobody is there."""


@dataclass(frozen=True)
class Reply:
    """A judge's text; ``cut`` where it reached ``max_tokens``."""

    text: str
    cut: bool = False


CHECK_400 = "Check the model's name, max_tokens and temperature, and whether the item is longer than the model reads."
judge_client = partial(Client, who="judge", error=JudgeError, checks={400: CHECK_400}, cancel_hung=True)


async def ask(
    client: Client, *, faults: list[Fault], before: Callable[[], None] = lambda: None, **request: Any
) -> Reply:
    """Make one chat call.

    Args:
        client: made by ``judge_client``.
        faults, before: as in :meth:`~contrastive_align.openai_client.Client.call`.
        **request: messages, model, temperature, max_tokens.

    Raises:
        Fault: retries are used up.
        JudgeError: status 400, 401, 403, 404 and others that waiting does not change.
    """

    def reply_in(body: Any) -> Reply:
        choice = body["choices"][0]
        content = choice["message"].get("content")
        return Reply(client.clean(content if isinstance(content, str) else ""), choice.get("finish_reason") == "length")

    return await client.call(
        "/chat/completions",
        request,
        lambda text: read_json(text, "not a chat completion", reply_in),
        faults=faults,
        before=before,
    )
