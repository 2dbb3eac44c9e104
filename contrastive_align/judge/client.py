"""One call of a judge: a reply, a fault that may pass, or an error that will not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from contrastive_align.calls.endpoint import CallError, Endpoint, Fault, Mailbox, Unreadable


class JudgeError(CallError):
    """The endpoint refuses in a way that asking again does not change."""


@dataclass(frozen=True)
class Reply:
    """What the judge wrote; ``cut`` where it ran into ``max_tokens``."""

    text: str
    cut: bool = False


class JudgeEndpoint(Endpoint):
    """Makes chat calls while its ``with`` block lasts.

    Args:
        base_url, timeout: as :class:`~contrastive_align.calls.endpoint.Endpoint`.
        **request: what is the same in every call: model, temperature, max_tokens.
    """

    who, error = "judge", JudgeError
    checks = {  # noqa: RUF012 (a constant of the class)
        **Endpoint.checks,
        400: "Check the model's name, max_tokens and temperature, and whether the item is longer than the model reads.",
    }

    def __init__(self, base_url: str | None, timeout: float, **request: Any) -> None:
        super().__init__(base_url, timeout)
        self._request = request

    def ask(
        self,
        messages: list[dict[str, str]],
        *,
        mailbox: Mailbox[Reply] | None = None,
        patient: bool = True,
    ) -> Reply | Fault:
        """One call.

        Args:
            mailbox, patient: as :meth:`~contrastive_align.calls.endpoint.Endpoint.call`.

        Raises:
            JudgeError: 400, 401, 403, 404 and their like, with what the server said and what to check.
        """
        create = self._client.chat.completions.with_streaming_response.create
        return self.call(create, self._reply, mailbox=mailbox, patient=patient, messages=messages, **self._request)

    def _reply(self, body: bytes) -> Reply:
        try:
            choice = json.loads(body)["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise Unreadable("not a chat completion") from None
        return Reply(self.clean(content if isinstance(content, str) else ""), choice.get("finish_reason") == "length")
