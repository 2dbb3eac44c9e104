"""A local OpenAI-compatible chat endpoint that answers as it is told: well, late, wrongly or not at all.

``behaviour(text, attempt)`` names what the ``attempt``-th call (from 0) for one user message gets:

=================  ==================================================================================
``"good"``         the answer that ``answer(text)`` gives
``"429"``          too many requests
``"429 after"``    the same, with a ``Retry-After`` header of ``retry_after`` seconds
``"500"``          an error of the server
``"cut"``          a body that ends before its Content-Length
``"cut json"``     a whole body of JSON that is not
``"nonsense"``     a well-formed reply whose text follows no instruction
``"hang"``         no answer
``"close"``        the connection closed without an answer
``"drip"``         a body of spaces, a few at a time, that is not done after seconds
``(status, it)``   another HTTP status, with this text as the error's message, or this mapping as the error
a mapping          this JSON, with status 200
bytes              this body, with status 200
a function         of the handler of the request: it sends what it likes
=================  ==================================================================================

The user message is shown to both without the tags that mark where texts begin and end (``untagged``).

``python tests/judge_server.py --seed 0 --latency 0.05`` prints its address and serves until its input closes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


FAULTS = ("429", "429 after", "500", "cut", "cut json", "nonsense", "hang", "close")
HANG, DRIP = 30.0, 3.0  # seconds, or until the server stops


class JudgeServer:
    """Serves in threads while its ``with`` block lasts.

    Attributes:
        calls: what each request asked, in order: (headers, in lower case, body).
        served: how often each behaviour was given.
        most_at_once: the largest number of requests that were open together.
    """

    def __init__(
        self,
        answer: Callable[[str], Any],
        behaviour: Callable[[str, int], Any] = lambda text, attempt: "good",
        *,
        latency: float = 0.0,
        retry_after: float | str = 0,
    ) -> None:
        self.answer, self.behaviour, self.latency, self.retry_after = answer, behaviour, latency, retry_after
        self.calls: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.served: Counter[str] = Counter()
        self.most_at_once = self._open = 0
        self._attempts: Counter[str] = Counter()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        self._http = _HTTPServer(("127.0.0.1", 0), _Handler)
        self._http.judge = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def behaviour_of(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[str, Any]:
        text = untagged(next(m["content"] for m in body["messages"] if m["role"] == "user"))
        with self._lock:
            self.calls.append((headers, body))
            attempt = self._attempts[text]
            self._attempts[text] += 1
            behaviour = self.behaviour(text, attempt)
            self.served[behaviour if isinstance(behaviour, str) else "other"] += 1
        return text, behaviour

    def count_open(self, change: int) -> None:
        with self._lock:
            self._open += change
            self.most_at_once = max(self.most_at_once, self._open)

    def wait(self, seconds: float) -> bool:
        """True when the server stops before that."""
        return self._stopped.wait(seconds)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    judge: JudgeServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that goes early is none of the server's
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        judge = self.server.judge
        judge.count_open(1)
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self._send(404, {"error": {"message": f"no such path {self.path}"}})
            self._answer(*judge.behaviour_of(_lowered(self.headers), body))
        except ConnectionError:
            self.close_connection = True  # the client gave up waiting
        finally:
            judge.count_open(-1)

    def _answer(self, text: str, behaviour: Any) -> None:
        judge = self.server.judge
        if behaviour == "hang":
            judge.wait(HANG)
            self.close_connection = True
            return
        judge.wait(judge.latency)
        reply = json.dumps(_completion(_as_text(judge.answer(text)))).encode()
        if callable(behaviour):
            behaviour(self)
            self.close_connection = True
        elif behaviour == "good":
            self._send(200, reply)
        elif behaviour == "close":
            self.close_connection = True
        elif behaviour == "429":
            self._send(429, {"error": {"message": "slow down"}})
        elif behaviour == "429 after":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": str(judge.retry_after)})
        elif behaviour == "500":
            self._send(500, b"<html>oh no</html>")
        elif behaviour == "cut":
            self._send(200, reply[: len(reply) // 2], {"Content-Length": str(len(reply))})
            self.close_connection = True
        elif behaviour == "cut json":
            self._send(200, reply[: len(reply) // 2])
        elif behaviour == "nonsense":
            self._send(200, _completion("I would rather not say."))
        elif behaviour == "drip":
            self._send(200, b"", {"Content-Length": "1000000"})
            end = time.monotonic() + DRIP
            while time.monotonic() < end and not judge.wait(0.02):
                self.wfile.write(b" ")
            self.close_connection = True
        elif isinstance(behaviour, bytes | Mapping):
            self._send(200, behaviour)
        else:
            status, error = behaviour
            self._send(status, {"error": {"message": error} if isinstance(error, str) else error})

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Head and body in one packet: two would wait for each other's acknowledgement."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        head = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in head.items():
            self.send_header(name, value)
        self._headers_buffer += [b"\r\n", body]
        self.flush_headers()


def untagged(question: str) -> str:
    """The question as it would be without what marks the beginnings and ends of texts by a tag."""
    tag = re.search(r"<<<(-[0-9a-f]{16})", question)[1]
    notice, _, rest = question.partition("\n\n")
    assert tag in notice
    return rest.replace(f"<<<{tag}\n", "").replace(f"\n>>>{tag}", "").replace(tag, "")


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


def _as_text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer)


def some_faults(seed: int, share: float = 0.2, kinds: tuple[str, ...] = FAULTS) -> Callable[[str, int], str]:
    """A share of all calls fail, each in one of the kinds: a function of seed, text and attempt alone."""

    def behaviour(text: str, attempt: int) -> str:
        number = int.from_bytes(hashlib.sha256(f"{seed} {attempt} {text}".encode()).digest()[:8], "big")
        part, which = divmod(number, len(kinds))
        return kinds[which] if part / (2**64 / len(kinds)) < share else "good"

    return behaviour


def scored(text: str) -> dict[str, Any]:
    """A verdict in words and a score that depend on the text alone."""
    score = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 4
    return {"analysis": "short", "feedback": f"worth {score} of three", "score": score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.2, help="of calls that fail")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--retry-after", type=float, default=0.5, help="seconds")
    args = parser.parse_args()
    faults = some_faults(args.seed, args.share)
    with JudgeServer(scored, faults, latency=args.latency, retry_after=args.retry_after) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:  # a line asks for the counts, the end of input stops
            print(json.dumps({"served": server.served, "most_at_once": server.most_at_once}), flush=True)


if __name__ == "__main__":
    main()
