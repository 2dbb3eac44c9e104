"""Completions from a server, such as vLLM's, in place of the model in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from contrastive_align.openai_client import (
    CallError,
    Client,
    Fault,
    Unreadable,
    check_endpoint,
    check_text,
    read_json,
    run_to_end,
)


logger = logging.get_logger(__name__)

# vLLM takes options that a request lacks from the model's generation config, so plain sampling is asked for.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
SEEDS = 2**31  # every server accepts a seed below this
HOW_TO_START = (
    "Start it so that it takes adapters while it runs: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE "
    "--enable-lora --max-lora-rank RANK, with the base model that is trained, at least the rank of the adapter, and "
    "access to the folder that it lies in."
)


@dataclass(frozen=True)
class Completion:
    """A server's text; ``finished`` where it ended by itself, before ``max_tokens``."""

    text: str
    finished: bool


class ServerSampler:
    """Draw completions from a vLLM server, or from another with its form of OpenAI's ``/completions``.

    Prompts are sent as token ids, with sampling options that OpenAI's API lacks; adapters go to ``/load_lora_adapter``.
    The key is read from the environment variable ``OPENAI_API_KEY`` and stored nowhere; a local server needs none.

    Args:
        base_url: of the API, for instance ``http://localhost:8000/v1``.
        model: the server's name for the model, or for the base model of the adapter.
        concurrency: the most requests in flight.
        timeout: seconds for one request, which returns all completions of a prompt.
        max_retries: number of times a request is repeated after status 408, 409, 425, 429 or 5xx, a timeout, a broken
            connection or an incomplete body.
        extra_body: options sent in addition to OpenAI's own. The default turns off sampling options that the model's
            generation config may set. Use ``{}`` for a server that refuses unknown options.

    Raises:
        ValueError: an option has no meaning.
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
        check_endpoint(base_url, model, concurrency=concurrency, timeout=timeout, max_retries=max_retries)
        self.base_url, self.model = base_url, model
        self.adapter: str | None = None
        self._concurrency, self._timeout, self._max_retries = concurrency, timeout, max_retries
        self._extra = dict(PLAIN if extra_body is None else extra_body)
        try:
            json.dumps(self._extra)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra_body: found {self._extra}, expected what JSON can hold ({error}).") from None

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
        """Draw K completions of each prompt from the current adapter or, without one, from the model.

        Args:
            prompts: texts, or token ids, which reach the model unchanged.
            per_prompt: K, asked for in one request.
            max_tokens: of a completion.
            seeds: one for each prompt; a server that honours seeds draws the same again.
            temperature, top_p: of sampling.

        Returns:
            For each prompt, in order, its K completions.

        Raises:
            CallError: the server refuses, or a prompt failed ``max_retries`` + 1 times.
            ValueError: seeds and prompts differ in number, or no key is set.
            ImportError: ``openai`` is not installed.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one for each.")
        if not prompts:
            return []
        same = {"model": self.adapter or self.model, "n": per_prompt, "max_tokens": max_tokens}
        same |= {"temperature": temperature, "top_p": top_p, **self._extra}
        requests = [
            {"prompt": prompt if isinstance(prompt, str) else list(prompt), "seed": seed % SEEDS, **same}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return run_to_end(self._draw(requests))

    async def _draw(self, requests: list[dict[str, Any]]) -> list[list[Completion]]:
        found: list[list[Completion]] = [[] for _ in requests]
        faults = 0

        async def ask(row: int) -> None:
            nonlocal faults
            found[row], failed = await self._call(
                client, f"Prompt {row}", "/completions", requests[row], lambda text: _read(text, requests[row]["n"])
            )
            faults += failed

        tokens = requests[0]["n"] * requests[0]["max_tokens"]
        async with self._client(concurrency=min(self._concurrency, len(requests)), tokens=tokens) as client:
            await client.run(range(len(requests)), ask)
        self._report(faults)
        return found

    def set_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter on a vLLM server, sample from it, and unload the adapter before it.

        Args:
            name: new to the server, whose cache may still hold an earlier adapter of the same name.
            path: the adapter's folder, which the server must be able to read.

        Raises:
            CallError: the server refuses; the message has its answer and how to start it.
        """
        run_to_end(self._set_adapter(name, str(Path(path).resolve())))
        self.adapter = name

    async def _set_adapter(self, name: str, path: str) -> None:
        async with self._client(checks=dict.fromkeys((400, 404, 405, 422), HOW_TO_START)) as client:

            async def post(action: str, **body: str) -> None:
                _, faults = await self._call(
                    client, f"The adapter {body['lora_name']}", f"/{action}_lora_adapter", body, lambda text: None
                )
                self._report(faults)

            async def unload(name: str) -> bool:
                """Return False where the server has no such adapter."""
                try:
                    await post("unload", lora_name=name)
                except CallError as error:
                    if error.status not in (400, 404):
                        raise
                    return False
                return True

            try:
                await post("load", lora_name=name, lora_path=path)
            except CallError as error:
                # An earlier run may have left an adapter of this name there.
                if error.status != 400 or not await unload(name):
                    raise
                await post("load", lora_name=name, lora_path=path)
            if self.adapter not in (None, name):
                await unload(self.adapter)

    def _client(self, **options: Any) -> Client:
        return Client(self.base_url, self._timeout, max_retries=self._max_retries, **options)

    async def _call(self, client: Client, name: str, *request: Any) -> tuple[Any, int]:
        """Return the answer and the number of faults before it; errors name what was asked for."""
        faults: list[Fault] = []
        try:
            return await client.call(*request, faults=faults), len(faults)
        except CallError as error:
            named = CallError(f"{name}: {error}")
            named.status = error.status
        except Fault as fault:
            named = CallError(f"{name}: {self.base_url} failed {len(faults)} times, the last: {fault.reason}")
        raise named

    def _report(self, faults: int) -> None:
        if faults:
            logger.warning(f"{self.base_url}: {faults} requests failed and were made again.")


def _read(text: str, n: int) -> list[Completion]:
    def completions_in(body: Any) -> list[Completion]:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        found = [(choice["text"], choice["finish_reason"]) for choice in choices]
        if len(found) != n or not all(isinstance(text, str) for text, _ in found):
            raise Unreadable(f"not {n} completions, as asked for")
        # "abort", "error", "content_filter": the text is not a sample of the model.
        if wrong := [reason for _, reason in found if reason not in ("stop", "length")]:
            raise Unreadable(f"a completion whose finish_reason is {repr(wrong[0])[:80]}, not 'stop' or 'length'")
        for text, _ in found:
            check_text(text)
        return [Completion(text, reason == "stop") for text, reason in found]

    return read_json(text, "not a completion", completions_in)
