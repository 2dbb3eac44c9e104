"""A local server with vLLM's ``/v1/completions``, ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``.

What it writes is a function of the model's name, the prompt, the seed and the choice's number. ``behaviour(path, body,
attempt)`` answers ``"good"`` or ``(status, message)`` for the ``attempt``-th request (from 0) with this body; or
``"close"``, a connection closed without an answer; or a mapping, which is the answer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def text_of(model: str, prompt: Any, seed: int, index: int) -> str:
    """A few words, by the hash of what they depend on."""
    digest = hashlib.sha256(json.dumps([model, prompt, seed, index]).encode()).digest()
    return " ".join(["Please", "close", "the", "door", "Anna"][byte % 5] for byte in digest[: 1 + digest[0] % 6])


class SamplingServer:
    """Serves in threads while its ``with`` block lasts.

    Args:
        adapters: whether it was started so that it takes adapters.
        write: what it answers with, ``text_of`` by default.

    Attributes:
        calls: (path, headers in lower case, body) of each request, in order.
        loaded: name -> the bytes of the adapter's weights when it was loaded.
        history: "+name" and "-name", in order.
    """

    def __init__(
        self,
        behaviour: Callable[[str, dict[str, Any], int], Any] = lambda path, body, attempt: "good",
        *,
        adapters: bool = True,
        models: tuple[str, ...] = ("base",),
        write: Callable[[str, Any, int, int], str] = text_of,
    ) -> None:
        self.behaviour, self.adapters, self.models, self.write = behaviour, adapters, models, write
        self.calls: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.loaded: dict[str, bytes] = {}
        self.history: list[str] = []
        self.most_at_once = self.open = 0
        self._attempts: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> SamplingServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads, self._http.sampling = True, self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Any:
        with self.lock:
            self.calls.append((path, headers, body))
            key = path + json.dumps(body, sort_keys=True)
            self._attempts[key] += 1
            told = self.behaviour(path, body, self._attempts[key] - 1)
            if told != "good":
                return told
            if path == "/v1/completions":
                return self._complete(body)
            if path == "/v1/load_lora_adapter" and self.adapters:
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter" and self.adapters:
                return self._unload(body["lora_name"])
            return 404, "Not Found"

    def _complete(self, body: dict[str, Any]) -> Any:
        if body["model"] not in (*self.models, *self.loaded):
            return 404, f"The model `{body['model']}` does not exist."
        choices = []
        for index in range(body["n"]):
            text = self.write(body["model"], body["prompt"], body["seed"], index)
            words = text.split(" ")
            cut = len(words) > body["max_tokens"]
            choices.append(
                {
                    "index": index,
                    "text": " ".join(words[: body["max_tokens"]]),
                    "finish_reason": "length" if cut else "stop",
                }
            )
        return {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices[::-1]}

    def _load(self, name: str, path: str) -> Any:
        weights = Path(path) / "adapter_model.safetensors"
        if name in self.loaded:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if not weights.is_file():
            return 404, f"No adapter found for '{path}'."
        self.loaded[name] = weights.read_bytes()
        self.history.append(f"+{name}")
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> Any:
        if name not in self.loaded:
            return 404, f"The lora adapter '{name}' cannot be found."
        del self.loaded[name]
        self.history.append(f"-{name}")
        return f"Success: LoRA adapter '{name}' removed successfully."


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        server: SamplingServer = self.server.sampling
        with server.lock:
            server.open += 1
            server.most_at_once = max(server.most_at_once, server.open)
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._send(server.answer(self.path, headers, body))
        finally:
            with server.lock:
                server.open -= 1

    def _send(self, answer: Any) -> None:
        if answer == "close":
            self.close_connection = True
            return
        status = 200
        if isinstance(answer, tuple):
            status, message = answer
            answer = {"error": {"message": message, "code": status}}
        data = json.dumps(answer).encode() if isinstance(answer, Mapping) else answer.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json" if isinstance(answer, Mapping) else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self._headers_buffer += [b"\r\n", data]  # head and body in one packet
        self.flush_headers()

    def log_message(self, *_: Any) -> None:
        pass
