"""One call of an OpenAI-compatible server: what it answers, a fault that may pass, or an error that will not."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import urlsplit

from contrastive_align.calls.patience import Patience


Answer = TypeVar("Answer")

PASSING = (408, 409, 425, 429)  # and every 5xx
LONGEST_RETRY_AFTER = 600.0  # seconds
NO_KEY = "EMPTY"  # what local servers take for a key
LOOK = 0.2  # seconds between two looks whether answers to other calls say by now how long to wait


class CallError(RuntimeError):
    """The server refuses in a way that asking again does not change, with this HTTP status."""

    status: int | None = None


@dataclass(frozen=True)
class Fault:
    """A failure that may pass; ``retry_after`` in seconds where the server says so.

    ``reached`` is False where no connection was made at all: nobody listens there, or no such host. ``given_up`` where
    the call was not waited for any longer.
    """

    reason: str
    retry_after: float | None = None
    reached: bool = True
    given_up: bool = False


class Mailbox(Generic[Answer]):
    """Where the calls made for one question leave what they got: a call that is given up may still be answered.

    Attributes:
        given_up: how many calls were.
    """

    def __init__(self) -> None:
        self.given_up = 0
        self._outcomes: queue.SimpleQueue[tuple[object, Answer | None, BaseException | None]] = queue.SimpleQueue()

    def put(self, call: object, answer: Answer | None, error: BaseException | None) -> None:
        self._outcomes.put((call, answer, error))

    def get(self, call: object | None, seconds: float) -> Answer | None:
        """The first answer to any call, waited for so long, or None. Of errors only ``call``'s own is raised."""
        end = time.monotonic() + seconds
        while True:
            try:
                whose, answer, error = self._outcomes.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if error is None:
                return answer
            if whose is call:
                raise error


class Endpoint:
    """Makes calls while its ``with`` block lasts. The key is read from the environment, and leaves with the block.

    Args:
        base_url: of the API, usually ending in ``/v1``; None: ``OPENAI_BASE_URL``, else OpenAI's own.
        timeout: seconds for a whole reply, however it trickles in.

    Raises:
        ImportError: ``openai`` is not installed.
        ValueError: no key, where one is needed.
    """

    who: ClassVar[str] = "server"  # what the errors call it
    error: ClassVar[type[CallError]] = CallError
    # Status -> what to check where the server refuses with it.
    checks: ClassVar[Mapping[int, str]] = {
        400: "Check the model's name and the options, and whether the prompt is longer than the model reads.",
        401: "Check the environment variable OPENAI_API_KEY, which must belong to this endpoint.",
        403: "Check that the key may use this model, and that this address may be used from where you are.",
        404: "Check base_url, which usually ends in /v1, and the model's name.",
        429: "Check the account's credit: waiting does not help.",
    }

    def __init__(self, base_url: str | None, timeout: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(f'A {self.who} needs openai: pip install "contrastive-align[judge]".') from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._key = os.environ.get("OPENAI_API_KEY") or (NO_KEY if base_url else None)
        if self._key is None:
            raise ValueError(
                f"No key for the {self.who}: set the environment variable OPENAI_API_KEY, or base_url for a server "
                "that needs none, for instance base_url: http://localhost:8000/v1."
            )
        self._openai, self._timeout, self._patience = openai, timeout, Patience(timeout)
        # Its own retries are off: they would be neither counted nor held to a budget.
        self._client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout, max_retries=0)
        parts = urlsplit(str(self._client.base_url))
        self.address = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def call(
        self,
        create: Callable[..., Any],
        read: Callable[[bytes], Answer],
        *,
        mailbox: Mailbox[Answer] | None = None,
        patient: bool = True,
        **request: Any,
    ) -> Answer | Fault:
        """One call: ``read`` of the body that ``create(**request)`` streams.

        Args:
            create: a ``with_streaming_response`` method of the client.
            read: raises :class:`Unreadable` for a body that may be another one when asked again.
            mailbox: of all calls for the same question; the first answer to any of them is taken.
            patient: False, with a mailbox: the call is given up when it takes far longer than others did (see
                :class:`~contrastive_align.calls.patience.Patience`). True: it has the whole timeout.

        Raises:
            CallError, or what ``error`` is: 400, 401, 403, 404 and their like, with what the server said and what to
                check.
        """
        try:
            if mailbox is None:
                return self._read(create, read, request)
            return self._awaited(create, read, request, mailbox, patient)
        except self._openai.APIStatusError as error:
            status, said, headers = error.status_code, self._said(error), error.response.headers
            code = error.body.get("code") if isinstance(error.body, dict) else None
        except self._openai.APITimeoutError as error:
            return Fault(f"no answer within {self._timeout:g} s", reached=_connected(error))
        except self._openai.APIConnectionError as error:
            return Fault(f"{error.message} {self.clean(str(error.__cause__ or ''))}".strip(), reached=_connected(error))
        except _Broken as error:
            return Fault(self.clean(str(error)), given_up=isinstance(error, _GivenUp))
        # Outside the handler: an error raised there would drag the request, and with it the key, along.
        if (status in PASSING or status >= 500) and code != "insufficient_quota":
            return Fault(f"status {status}: {said}", _seconds(headers.get("Retry-After")))
        check = self.checks.get(status, "Check base_url, the model's name and its options.")
        refused = self.error(f"{self.address} refuses with status {status}: {said}. {check}")
        refused.status = status
        raise refused

    def _body(self, create: Callable[..., Any], request: dict[str, Any]) -> bytes:
        """Read as it comes: the client's own timeout starts anew with every byte."""
        end = time.monotonic() + self._timeout
        with create(**request) as reply:
            chunks = []
            try:
                for chunk in reply.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > end:
                        raise _Broken(f"no whole answer within {self._timeout:g} s")
            except _Broken:
                raise
            except Exception as error:  # of whichever HTTP library the client is built on
                raise _Broken(f"the answer broke off: {type(error).__name__} {error}") from None
        return b"".join(chunks)

    def _read(self, create: Callable[..., Any], read: Callable[[bytes], Answer], request: dict[str, Any]) -> Answer:
        body = self._body(create, request)
        try:
            return read(body)
        except Unreadable as error:
            raise _Broken(f"{error}: {self.clean(body.decode(errors='replace'))[:200]!r}") from None

    def _awaited(
        self,
        create: Callable[..., Any],
        read: Callable[[bytes], Answer],
        request: dict[str, Any],
        mailbox: Mailbox[Answer],
        patient: bool,
    ) -> Answer:
        """Asked in a thread of its own: a call that hangs cannot be ended, but need not be waited for."""
        call, begun = object(), time.monotonic()

        def ask() -> None:
            try:
                answer = self._read(create, read, request)
            except BaseException as error:
                mailbox.put(call, None, error)
            else:
                self._patience.learn(time.monotonic() - begun)  # late or not
                mailbox.put(call, answer, None)

        threading.Thread(target=ask, daemon=True).start()
        while True:
            patience = self._timeout if patient else self._patience.seconds(mailbox.given_up)
            known = patience < self._timeout
            left = begun + patience - time.monotonic()
            if known and left <= 0:
                mailbox.given_up += 1
                raise _GivenUp(f"no answer within {patience:.2g} s, far longer than others take")
            answer = mailbox.get(call, left if known else LOOK)
            if answer is not None:
                return answer

    def _said(self, error: Any) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, dict) else None
        said = said if isinstance(said, str) else error.response.text
        return repr(self.clean(said.strip())[:300])

    def clean(self, text: str) -> str:
        """Some servers repeat the key in what they say."""
        return text if self._key == NO_KEY else text.replace(self._key, "[key]")


class Unreadable(Exception):
    """A body that is not what it should be; the message says what it should be, as in "not a completion"."""


class _Broken(Exception):
    """The body did not come to its end."""


class _GivenUp(_Broken):
    """It may still come."""


def _connected(error: Exception) -> bool:
    """Whether a call got as far as a connection; by name, as the HTTP library below the client may be another."""
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After``: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
