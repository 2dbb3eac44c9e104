"""Completions from a server, such as vLLM's, in place of the model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.utils import logging

from contrastive_align.calls.endpoint import LONGEST_RETRY_AFTER, CallError, Endpoint, Fault, Unreadable
from contrastive_align.calls.options import check_address, check_counts, check_model, check_number
from contrastive_align.calls.schedule import backoff, run_jobs


logger = logging.get_logger(__name__)

# vLLM and its kin take what a request leaves out from the model's generation config: plain sampling must be asked for.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
SEEDS = 2**31  # every server takes a seed below
HOW_TO_START = (
    "Start it so that it takes adapters while it runs: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE "
    "--enable-lora --max-lora-rank RANK, with the base model that is trained, at least the rank of the adapter, and "
    "access to the folder that it lies in."
)


@dataclass(frozen=True)
class Completion:
    """What a server wrote; ``finished`` where it ended by itself, before ``max_tokens``."""

    text: str
    finished: bool


class ServerSampler:
    """Draws completions from an OpenAI-compatible server's ``/completions``.

    The key comes from the environment variable ``OPENAI_API_KEY`` and is kept nowhere; one's own server needs none.

    Args:
        base_url: of the API, for instance ``http://localhost:8000/v1``.
        model: the name under which the server has the model, or the base of the adapter.
        concurrency: the most requests in flight.
        timeout: seconds for one request, which brings all completions of a prompt.
        max_retries: how often a prompt is asked again after 408, 409, 425, 429, 5xx, a timeout or a broken connection.
        extra_body: what is sent beside OpenAI's own options: by default what turns off the sampling options that the
            model's generation config may set. ``{}`` for a server that refuses unknown options.

    Raises:
        ValueError: an option with no meaning.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 5,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        check_counts(concurrency=(concurrency, 1), max_retries=(max_retries, 0))
        check_number("timeout", timeout, "seconds, more than 0", allowed=timeout != 0)
        check_model(model)
        check_address(base_url)
        self.base_url, self.model = base_url, model
        self.adapter: str | None = None
        self._concurrency, self._timeout, self._max_retries = concurrency, timeout, max_retries
        self._extra = dict(PLAIN if extra_body is None else extra_body)
        self._backoff = backoff

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        per_prompt: int,
        max_tokens: int,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[list[Completion]]:
        """K completions of each prompt, with the weights of the current adapter or, without one, of the model.

        Args:
            prompts: texts, or token ids, which reach the model as they are.
            per_prompt: K, asked for in one request.
            max_tokens: of a completion.
            seeds: one for each prompt; a server that honours them draws the same again.
            temperature, top_p: of sampling.

        Raises:
            CallError: the server refuses for good, or a prompt failed ``max_retries`` + 1 times: with what it said.
            ValueError: not as many seeds as prompts.
            ImportError: ``openai`` is not installed.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one for each.")
        if not prompts:
            return []
        found: list[list[Completion]] = [[] for _ in prompts]
        same = {"model": self.adapter or self.model, "n": per_prompt, "max_tokens": max_tokens}
        same |= {"temperature": temperature, "top_p": top_p, "extra_body": self._extra}
        with _CompletionEndpoint(self.base_url, self._timeout) as endpoint:

            def ask(row: int) -> Fault | None:
                prompt = prompts[row] if isinstance(prompts[row], str) else list(prompts[row])
                answer = endpoint.complete(prompt=prompt, seed=seeds[row] % SEEDS, **same)
                if isinstance(answer, Fault):
                    return answer
                found[row] = answer
                return None

            self._persist(ask, [f"Prompt {row}" for row in range(len(prompts))])
        return found

    def set_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter on a vLLM server and sample from it; the one before is unloaded.

        Args:
            name: not that of an adapter with other weights, which the server may still hold in its cache.
            path: the adapter's folder, which the server must be able to read.

        Raises:
            CallError: the server refuses: with what it answered, and how to start it.
        """
        body = {"lora_name": name, "lora_path": str(Path(path).resolve())}
        with _AdapterEndpoint(self.base_url, self._timeout) as endpoint:
            load = partial(endpoint.post, "/load_lora_adapter", body)
            try:
                self._persist(lambda _: load(), [f"The adapter {name}"])
            except CallError as error:
                # An earlier run may have left an adapter of this name there.
                if error.status != 400 or not self._unload(endpoint, name):
                    raise
                self._persist(lambda _: load(), [f"The adapter {name}"])
            if self.adapter not in (None, name):
                self._unload(endpoint, self.adapter)
        self.adapter = name

    def _unload(self, endpoint: _AdapterEndpoint, name: str) -> bool:
        """False where the server has no such adapter."""
        try:
            self._persist(lambda _: endpoint.post("/unload_lora_adapter", {"lora_name": name}), [f"The adapter {name}"])
        except CallError as error:
            if error.status not in (400, 404):
                raise
            return False
        return True

    def _persist(self, work: Callable[[int], Fault | None], names: Sequence[str]) -> None:
        """Call ``work(i)`` for each name until it is done, up to ``max_retries`` times again."""
        faults = [0] * len(names)

        def attempt(i: int) -> float | None:
            try:
                fault = work(i)
            except CallError as error:
                refused = type(error)(f"{names[i]}: {error}")
                refused.status = error.status
                raise refused from None
            if fault is None:
                return None
            faults[i] += 1
            too_long = fault.retry_after is not None and fault.retry_after > LONGEST_RETRY_AFTER
            if faults[i] > self._max_retries or too_long:
                raise CallError(f"{names[i]}: {self.base_url} failed {faults[i]} times, the last: {fault.reason}")
            return self._backoff(faults[i], fault.retry_after)

        run_jobs(range(len(names)), attempt, concurrency=min(self._concurrency, len(names)))
        if sum(faults):
            logger.warning(f"{self.base_url}: {sum(faults)} requests failed and were made again.")


class _CompletionEndpoint(Endpoint):
    who = "server"

    def complete(self, **request: Any) -> list[Completion] | Fault:
        create = self._client.completions.with_streaming_response.create
        return self.call(create, partial(_read, n=request["n"]), **request)


class _AdapterEndpoint(Endpoint):
    checks = {**Endpoint.checks, **dict.fromkeys((400, 404, 405, 422), HOW_TO_START)}  # noqa: RUF012 (a constant)

    def post(self, path: str, body: dict[str, str]) -> Fault | None:
        return self.call(self._posted, lambda body: None, path=path, body=body)

    @contextmanager
    def _posted(self, path: str, body: dict[str, str]) -> Iterator[SimpleNamespace]:
        said = self._client.post(path, cast_to=str, body=body)
        yield SimpleNamespace(iter_bytes=lambda: [said.encode()])


def _read(body: bytes, n: int) -> list[Completion]:
    try:
        choices = sorted(json.loads(body)["choices"], key=lambda choice: choice["index"])
        found = [(choice["text"], choice["finish_reason"]) for choice in choices]
    except (ValueError, KeyError, TypeError):
        raise Unreadable("not a completion") from None
    if len(found) != n or not all(isinstance(text, str) for text, _ in found):
        raise Unreadable(f"not {n} completions, as asked for")
    # "abort", "error", "content_filter": of such a text nobody knows what it would have been.
    if wrong := [reason for _, reason in found if reason not in ("stop", "length")]:
        raise Unreadable(f"a completion whose finish_reason is {wrong[0]!r}, not 'stop' or 'length'")
    return [Completion(text, reason == "stop") for text, reason in found]
