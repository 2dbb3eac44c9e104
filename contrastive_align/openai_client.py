"""Make many calls of an OpenAI-compatible server: each ends in an answer, a fault that may pass, or a refusal.

The ``openai`` client makes one attempt at a time. Its own retries hold a slot while they wait, are not counted against
a budget, and wait longer than faults of single calls need, so attempts are repeated here.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit


Answer = TypeVar("Answer")
Job = TypeVar("Job")

RETRIED_STATUSES = (408, 409, 425, 429)  # and every 5xx
LONGEST_RETRY_AFTER = 600.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds, where the server names no wait
BEGUN_PER_SLOT = 4
NO_KEY = "EMPTY"  # local servers accept any key
# The longest tokens of known vocabularies have 128 bytes, which JSON may escape with as many again. The rest of a body
# (ids, counts, what a gateway adds) has some kilobytes.
BYTES_PER_TOKEN, BYTES_BESIDE_TOKENS = 256, 64 * 1024

# A call that hangs is cancelled after 4 times the 90th percentile of recent answers' seconds. A pause of the server or
# of this process delays all calls in flight at once, so that these must be few among the recent answers.
RECENT_ANSWERS, RECENT_PER_SLOT, ENOUGH_ANSWERS = 200, 20, 10
USUAL_TIMES, SHORTEST_TIMEOUT, POLL = 4.0, 0.2, 0.2  # a factor; seconds; seconds

_JITTER = random.Random()  # the global generator's seed belongs to the user

CHECKS = {
    400: "Check the model's name and the options, and whether the prompt is longer than the model reads.",
    401: "Check the environment variable OPENAI_API_KEY, which must belong to this endpoint.",
    403: "Check that the key may use this model, and that this address may be used from where you are.",
    404: "Check base_url, which usually ends in /v1, and the model's name.",
    429: "Check the account's credit: waiting does not help.",
}


class CallError(RuntimeError):
    """A refusal that asking again does not change, or a call whose retries are used up.

    Attributes:
        status: the HTTP status of a refusal, else None.
    """

    status: int | None = None


class Fault(Exception):
    """A failure of one call that may pass.

    Attributes:
        reason: what happened, without the key.
        retry_after: seconds, where the server names them.
        reached: False where no connection was made: no server there, or no such host.
        hung: True where the call was cancelled because other calls are answered much faster.
        unreadable: what kept the reply from being read; None where none came.
    """

    def __init__(
        self,
        reason: str,
        retry_after: float | None = None,
        *,
        reached: bool = True,
        hung: bool = False,
        unreadable: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.reached, self.hung = reason, retry_after, reached, hung
        self.unreadable = unreadable


class Unreadable(Exception):
    """A reply of the wrong form, which another call may not have.

    Args:
        kind: what is wrong, in words under which such replies are counted, as in "not a completion".
        found: what the reply has instead.
    """

    def __init__(self, kind: str, found: str = "") -> None:
        super().__init__(f"{kind}: {found}" if found else kind)
        self.kind = kind


class Client:
    """Make calls while its ``async with`` block lasts.

    The key is read from the environment variable ``OPENAI_API_KEY`` and leaves memory with the block.

    No reply is trusted: a body is read in pieces up to a limit that follows from the tokens that were asked for, no
    cookie is kept, and what cannot be read is a fault of that call alone.

    Args:
        base_url: address of the API, usually ending in ``/v1``; None: ``OPENAI_BASE_URL``, else OpenAI's own.
        timeout: seconds for the whole reply to one call, however slowly its bytes come.
        concurrency: the most calls in flight. A call that waits before its next attempt is not in flight.
        max_retries: number of faults after which a call is made again.
        tokens: the most that one reply may have in all of its texts.
        cancel_hung: cancel a call that takes much longer than recent answers and make it again, instead of waiting for
            the timeout. A call's last attempt always has the whole timeout.
        who: name of the server in messages.
        checks: HTTP status to advice, for refusals with that status; the rest is taken from ``CHECKS``.
        error: the class of refusals.

    Attributes:
        address: the server's address, without anything secret.
        reached: whether any call got as far as a connection.

    Raises:
        ImportError: ``openai`` is not installed.
        ValueError: no key is set and the address needs one.
    """

    def __init__(
        self,
        base_url: str | None,
        timeout: float,
        *,
        concurrency: int = 1,
        max_retries: int = 0,
        tokens: int = 0,
        cancel_hung: bool = False,
        who: str = "server",
        checks: Mapping[int, str] | None = None,
        error: type[CallError] = CallError,
    ) -> None:
        try:
            import openai
        except ImportError as missing:
            raise ImportError(f'A {who} needs openai: pip install "contrastive-align[judge]".') from missing
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._key = os.environ.get("OPENAI_API_KEY") or (NO_KEY if self._base_url else None)
        if self._key is None:
            raise ValueError(
                f"No key for the {who}: set the environment variable OPENAI_API_KEY, or base_url for a server "
                "that needs none, for instance base_url: http://localhost:8000/v1."
            )
        self._openai, self._timeout, self._cancel_hung = openai, timeout, cancel_hung
        self.longest_body = BYTES_BESIDE_TOKENS + BYTES_PER_TOKEN * tokens
        self.max_retries, self._concurrency = max_retries, concurrency
        self._checks, self._error = {**CHECKS, **(checks or {})}, error
        self._recent: deque[float] = deque(maxlen=max(RECENT_ANSWERS, RECENT_PER_SLOT * concurrency))
        self.reached = False

    async def __aenter__(self) -> Client:
        # Connecting has less than the whole timeout, so that an absent host is told from a slow answer.
        timeout = self._openai.Timeout(self._timeout, connect=0.9 * self._timeout)
        http = self._openai.DefaultAsyncHttpxClient(
            event_hooks={"response": [self._read_body]},
            headers={"Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,  # each would be a call that nobody counts, perhaps of another server
        )
        self._api = self._openai.AsyncOpenAI(
            api_key=self._key, base_url=self._base_url, timeout=timeout, max_retries=0, http_client=http
        )
        parts = urlsplit(str(self._api.base_url))
        self.address = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self._slots, self._stop = asyncio.Semaphore(self._concurrency), asyncio.Event()
        self._one_new_call = asyncio.Semaphore(1)  # waits for a slot at a time, so that repeated calls soon have one
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.close()

    async def run(self, jobs: Iterable[Job], work: Callable[[Job], Awaitable[None]]) -> None:
        """Await ``work(job)`` for each job.

        At most ``4 * concurrency`` jobs are begun at a time: a server that fails every call does not see every job.

        Raises:
            the first error that ``work`` raises. Calls in flight are finished first; no other call is begun.
        """
        room, errors, tasks = asyncio.Semaphore(BEGUN_PER_SLOT * self._concurrency), [], set()

        async def guarded(job: Job) -> None:
            try:
                await work(job)
            except _Stopped:
                pass
            except Exception as error:
                errors.append(error)
                self._stop.set()
            finally:
                room.release()

        for job in jobs:
            await room.acquire()
            if self._stop.is_set():
                break
            tasks.add(task := asyncio.create_task(guarded(job)))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        if errors:
            raise errors[0]

    async def call(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[str], Answer],
        *,
        faults: list[Fault] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Make a call until it is answered, at most ``max_retries`` times again.

        Args:
            path: of the endpoint below ``base_url``, such as ``/chat/completions``.
            body: the request, sent as JSON.
            read: text of the reply to the answer; raises :class:`Unreadable` where the call is to be repeated.
            faults: of earlier calls for the same question, which count against ``max_retries``; extended in place.
            before: called before each attempt; what it raises ends the call.

        Raises:
            Fault: the last one, where retries are used up or the server asks to wait longer than ten minutes.
            CallError: status 400, 401, 403, 404 and others that waiting does not change, with advice.
        """
        faults = [] if faults is None else faults
        while True:
            async with self._slot(new=not faults):
                hung = True
                while hung:  # a call that hung is made again at once, ahead of new ones
                    if self._stop.is_set():
                        raise _Stopped
                    before()
                    try:
                        answer = await self._attempt(path, body, read, faults)
                        self.reached = True
                        return answer
                    except Fault as fault:
                        faults.append(fault)
                        self.reached, hung = self.reached or fault.reached, fault.hung
            last = faults[-1]
            if last.retry_after is not None and last.retry_after > LONGEST_RETRY_AFTER:
                raise Fault(f"the server asks to wait for {last.retry_after:g} s: {last.reason}")
            if len(faults) > self.max_retries:
                raise last
            await self._sleep(backoff(sum(not fault.hung for fault in faults), last.retry_after))

    @asynccontextmanager
    async def _slot(self, *, new: bool) -> AsyncIterator[None]:
        async with self._one_new_call if new else nullcontext():
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def _sleep(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _attempt(
        self, path: str, body: Mapping[str, Any], read: Callable[[str], Answer], faults: list[Fault]
    ) -> Answer:
        try:  # post, as the client's typed methods spend a third more time on each call
            return read(_decoded(await self._in_time(self._post(path, body), faults)))
        except self._openai.APIStatusError as error:
            failure = self._of_status(error)
        except self._openai.APITimeoutError as error:
            failure = Fault(f"no answer within {self._timeout:g} s", reached=_was_connected(error))
        except self._openai.APIConnectionError as error:  # older versions of the client wrap what a hook raises in it
            cause = error.__cause__
            reason = f"{error.message} {printable(self.clean(str(cause or '')))}".strip()
            unread = self._unread(cause) if isinstance(cause, Unreadable) else None
            failure = unread or Fault(reason, reached=_was_connected(error))
        except Unreadable as error:
            failure = self._unread(error)
        # Raised outside of the handlers: the openai errors hold the request, and with it the key.
        raise failure

    async def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        try:
            return await self._api.post(path, cast_to=bytes, body=body)
        except (self._openai.OpenAIError, Unreadable):
            raise
        except Exception as error:  # of the HTTP library, which does not foresee every reply
            raise Unreadable("a reply that HTTP does not know", f"{type(error).__name__}: {error}") from None

    def _unread(self, error: Unreadable) -> Fault:
        return Fault(printable(self.clean(str(error))), unreadable=error.kind)

    async def _read_body(self, response: Any) -> None:
        """Read the body of a response up to the limit; the rest is left unread."""
        response.encoding = "utf-8"  # whatever the server names, which may be any of Python's codecs
        encoding = response.headers.pop("Content-Encoding", "identity")
        try:
            body, whole = await read_pieces(response.stream, self.longest_body, encoding)
        finally:
            await response.stream.aclose()
        if not whole and response.status_code < 400:  # of a refusal, the beginning says enough
            most = f"more than {self.longest_body} bytes, {BYTES_PER_TOKEN} a token"
            raise Unreadable("a body that is too long", most)
        http = self._openai.DefaultAsyncHttpxClient.__base__.__module__  # httpx or httpx2, by the client's version
        response.stream = sys.modules[http].ByteStream(body)

    async def _in_time(self, attempt: Awaitable[Any], faults: list[Fault]) -> Any:
        task, begun = asyncio.ensure_future(attempt), time.monotonic()
        try:
            while not task.done():
                seconds = self._seconds_for(faults)  # asked again, as other calls are answered meanwhile
                left = begun + seconds - time.monotonic()
                if left <= 0:
                    hung = seconds < self._timeout
                    why = ", much longer than other calls take" if hung else ""
                    raise Fault(f"no answer within {round(seconds, 2):g} s{why}", hung=hung)
                await asyncio.wait({task}, timeout=min(left, POLL))
            result = task.result()
        finally:
            task.cancel()
        self._recent.append(time.monotonic() - begun)
        return result

    def _seconds_for(self, faults: list[Fault]) -> float:
        if not self._cancel_hung or len(faults) >= self.max_retries or len(self._recent) < ENOUGH_ANSWERS:
            return self._timeout
        usual = sorted(self._recent)[int(0.9 * len(self._recent))]
        doubled = 2.0 ** sum(fault.hung for fault in faults)
        return min(self._timeout, max(SHORTEST_TIMEOUT, USUAL_TIMES * usual) * doubled)

    def _of_status(self, error: Any) -> Fault | CallError:
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        said = body.get("message")
        said = repr(self.clean((said if isinstance(said, str) else error.response.text).strip())[:300])
        if status < 400:
            where = error.response.headers.get("Location", "")[:80]
            return Fault(f"status {status}, to {where!r}: redirects are not followed, base_url has the address itself")
        if (status in RETRIED_STATUSES or status >= 500) and body.get("code") != "insufficient_quota":
            return Fault(f"status {status}: {said}", read_retry_after(error.response.headers.get("Retry-After")))
        check = self._checks.get(status, "Check base_url, the model's name and its options.")
        refusal = self._error(f"{self.address} refuses with status {status}: {said}. {check}")
        refusal.status = status
        return refusal

    def clean(self, text: str) -> str:
        """Replace the key, which some servers repeat in what they say."""
        return text if self._key == NO_KEY else text.replace(self._key, "[key]")


class _Stopped(Exception):
    """Another job failed, so that this one makes no further call."""


def run_to_end(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine from synchronous code, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def read_pieces(pieces: AsyncIterable[bytes], limit: int, encoding: str = "identity") -> tuple[bytes, bool]:
    """Read and unpack a body up to ``limit`` bytes; return it, and whether that is all of it.

    Raises:
        Unreadable: the encoding is another than gzip or deflate, or what is packed is damaged or cut.
    """
    unpack = None
    if encoding.strip().lower() not in ("identity", ""):
        if encoding.strip().lower() not in ("gzip", "deflate"):
            raise Unreadable("a body in an encoding that was not asked for", repr(encoding[:80]))
        unpack = zlib.decompressobj(zlib.MAX_WBITS + 32)  # either of the two, by its first bytes
    body, taken = bytearray(), 0
    try:
        async for piece in pieces:
            taken += len(piece)
            body += piece if unpack is None else unpack.decompress(piece, limit + 1 - len(body))
            if max(taken, len(body)) > limit:
                return bytes(body[:limit]), False
    except zlib.error as error:
        raise Unreadable("a body whose compression is damaged", str(error)) from None
    if unpack is not None and not unpack.eof:
        raise Unreadable("a body whose compression is damaged", "it is cut")
    return bytes(body), True


def _decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise Unreadable("a body that is not UTF-8", repr(body[max(0, error.start - 20) : error.end])) from None


def read_json(text: str, what: str, read: Callable[[Any], Answer]) -> Answer:
    """Apply ``read`` to the JSON of a reply.

    Raises:
        Unreadable: the text is no JSON, is nested too deeply, or lacks what ``read`` looks up.
    """
    try:
        return read(json.loads(text))
    except Unreadable as error:
        what = error.kind
    except RecursionError:
        what = "a body that is nested too deeply"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        pass
    raise Unreadable(what, repr(text[:200]))


def check_text(text: str) -> None:
    r"""Raise Unreadable for a text that no file can store: one with half of a surrogate pair, as of a cut emoji.

    >>> check_text("\ud83d")
    Traceback (most recent call last):
    contrastive_align.openai_client.Unreadable: half of a surrogate pair: '\ud83d'
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = repr(text[max(0, error.start - 20) : error.start + 20])
        raise Unreadable("half of a surrogate pair", found) from None


def printable(text: str) -> str:
    r"""Replace characters that steer a terminal, or that nobody sees, by their escapes.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def backoff(faults: int, retry_after: float | None) -> float:
    """Return the seconds to wait after a number of faults in a row.

    The wait doubles with each fault from 0.25 s to 30 s, less up to half of it at random. A server's ``Retry-After`` is
    waited for in full, plus at most a tenth, so that not all calls return at once.

    >>> 1.0 <= backoff(4, None) <= 2.0 and 10.0 <= backoff(1, retry_after=10) <= 10.25
    True
    """
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (faults - 1)) * _JITTER.uniform(0.5, 1.0)
    return wait if retry_after is None else retry_after + min(wait, 0.1 * retry_after)


def read_retry_after(header: str | None) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which has seconds or a date; None where it has neither.

    >>> read_retry_after("1.5"), read_retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), read_retry_after("soon")
    (1.5, 0.0, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def _was_connected(error: Exception) -> bool:
    # By name: the HTTP library below the openai client differs between its versions.
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")


# --------------------------------------------------------------------------------------------- options of a caller


def check_counts(**found: tuple[Any, int]) -> None:
    """Raise ValueError unless each value is a whole number of at least the second entry of its pair."""
    for name, (value, least) in found.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: found {value!r}, expected a whole number of at least {least}.")


def check_number(name: str, value: Any, expected: str, *, allowed: bool = True) -> None:
    """Raise ValueError unless the value is finite, at least 0, and ``allowed``."""
    if type(value) not in (int, float) or not 0 <= value < math.inf or not allowed:
        raise ValueError(f"{name}: found {value!r}, expected {expected}.")


def check_endpoint(base_url: Any, model: Any, *, concurrency: Any, timeout: Any, max_retries: Any) -> None:
    """Raise ValueError unless the options have a meaning and the address, which is printed with them, no secret."""
    check_counts(concurrency=(concurrency, 1), max_retries=(max_retries, 0))
    check_number("timeout", timeout, "seconds, more than 0", allowed=timeout != 0)
    if not isinstance(model, str) or not model:
        raise ValueError(f"model: found {model!r}, expected the model's name at the endpoint.")
    if base_url is None:
        return
    parts = urlsplit(base_url) if isinstance(base_url, str) else None
    if parts is not None and (parts.username or parts.password or parts.query):
        raise ValueError(
            f"base_url: the address at {parts.hostname} has a user name, a password or a query in it, which would be "
            "shown and saved with the options. Put the key into the environment variable OPENAI_API_KEY."
        )
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
        raise ValueError(f"base_url: found {base_url!r}, expected an address such as http://localhost:8000/v1.")


def _has_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:  # no number, or none of a port
        return False
