"""A language model as judge of completions, behind any OpenAI-compatible endpoint (ALT, arXiv:2407.16970)."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from contrastive_align.judge.answers import (
    Verdict,
    answers_from,
    as_text,
    longest_answer,
    read_reply,
    read_template,
    render,
)
from contrastive_align.judge.client import JudgeError, ask, judge_client
from contrastive_align.judge.ledger import AnswerCache, content_key
from contrastive_align.openai_client import (
    Client,
    Fault,
    Unreadable,
    check_counts,
    check_endpoint,
    check_number,
    run_to_end,
)


__all__ = ["Judge", "JudgeError", "Verdict", "resolve_judge"]

logger = logging.get_logger(__name__)

COUNTS = ("items", "answered", "unparsable", "failed", "over_budget", "cached", "repeated", "calls", "retried")


class Judge:
    """Ask a language model what it thinks of each completion, and keep every answer.

    The key is read from the environment variable ``OPENAI_API_KEY`` and stored nowhere.

    Args:
        prompt: ``"helpful_categories"``, ``"feedback"``, or a text file with ``{prompt}``, ``{completion}`` and, for
            categories, ``{categories}`` (for text, perhaps ``{max_words}``). What is judged is put between markers with
            a tag that no text can know; a file that has ``{tag}`` before and after both texts has its own in their
            place.
        model: the judge's name at the endpoint.
        answers: a list of categories, the best first, or ``"text"``: feedback in words and a score of 0 to 3.
        cache: a folder. Every answer is stored there under a hash of its question; a rerun makes no call.
        base_url: of the API, for instance ``http://localhost:8000/v1``; None: ``OPENAI_BASE_URL``, else OpenAI's.
        concurrency: the most calls in flight.
        timeout: seconds for one call. A call that takes much longer than recent answers did is cancelled earlier and
            made again; an item's last attempt always has the whole timeout.
        max_retries: number of times an item is asked again after status 408, 409, 425, 429 or 5xx, a timeout, a broken
            connection or an incomplete body, before it counts as failed.
        budget: the most calls ever made with this cache, restarts included; None: no limit.
        temperature, max_tokens: of the judge's answer. A reply of more than 256 bytes a token is not read.
        max_words: of the feedback.

    Raises:
        ValueError: an option has no meaning, or the prompt lacks a placeholder.
        FileNotFoundError: the prompt is neither a bundled one nor a file.
    """

    def __init__(
        self,
        prompt: str | Path,
        *,
        model: str,
        answers: Sequence[str] | str,
        cache: str | Path,
        base_url: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        budget: int | None = None,
        temperature: float = 0.0,
        max_tokens: int = 256,
        max_words: int = 10,
    ) -> None:
        check_endpoint(base_url, model, concurrency=concurrency, timeout=timeout, max_retries=max_retries)
        check_counts(max_tokens=(max_tokens, 1), max_words=(max_words, 1))
        check_counts(budget=(0 if budget is None else budget, 0))
        check_number("temperature", temperature, "a number of at least 0")
        self._answers = answers_from(answers, max_words)
        self._template = read_template(prompt, self._answers)
        self._base_url, self._timeout = base_url, timeout
        self._model, self._temperature, self._max_tokens = model, temperature, max_tokens
        self._concurrency, self._max_retries, self._budget = concurrency, max_retries, budget
        self.spec = {
            "prompt": str(prompt), "model": model, "answers": answers if isinstance(answers, str) else list(answers),
            "cache": str(cache), "base_url": base_url, "concurrency": concurrency, "timeout": timeout,
            "max_retries": max_retries, "budget": budget, "temperature": temperature, "max_tokens": max_tokens,
            "max_words": max_words,
        }  # fmt: skip
        self._cache = AnswerCache(cache, longest_answer(max_tokens))
        self._counts: Counter[str] = Counter()
        self._unreadable: Counter[str] = Counter()  # kind -> replies
        self._lock = threading.Lock()
        self._reached = False  # whether any call got as far as a connection

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Verdict | None]:
        """Judge each completion.

        Args:
            prompts, completions: texts, or lists of messages, which are shown as ``role: text`` lines.

        Returns:
            The verdicts, in order; None for items without one, which are counted in :meth:`report` and logged.

        Raises:
            JudgeError: the endpoint refuses (400, 401, 403, 404 ...), or an item's attempts are used up and no server
                was ever reached. It is raised when the calls in flight are back; their answers are in the cache.
            ValueError: prompts and completions differ in number, an item is no text, or no key is set.
            ImportError: ``openai`` is not installed.
        """
        jobs = self._jobs(prompts, completions)
        new = []
        for key, job in jobs.items():
            if key in self._cache:
                job.outcome, job.verdict = _outcome(self._cache[key]), self._cache[key]
                self._count(cached=len(job.rows))
            else:
                new.append(job)
        self._count(items=len(prompts), repeated=len(prompts) - len(jobs))
        try:
            if new:
                run_to_end(self._ask_all(new))
        finally:
            self._count_outcomes(jobs)
        verdicts: list[Verdict | None] = [None] * len(prompts)
        for job in jobs.values():
            for row in job.rows:
                verdicts[row] = job.verdict
        _report_missing(list(jobs.values()), len(prompts))
        return verdicts

    def check(self) -> None:
        """Raise now what the first call would raise without asking: no ``openai``, no key.

        A judge whose cache has answers passes: it may never make a call.

        Raises:
            ImportError: ``openai`` is not installed.
            ValueError: no key is set and the address needs one.
        """
        if not len(self._cache):
            judge_client(self._base_url, self._timeout)

    def report(self) -> dict[str, Any]:
        """Return counts since this object was made, and ``calls_ever`` of its cache, which the budget limits.

        Every item is ``answered``, ``unparsable``, ``failed`` or ``over_budget``, or left open by an error. Of these,
        ``cached`` items were known from an earlier call or run, and ``repeated`` items equal an earlier item of the
        same call. ``retried`` counts the calls that asked again, and ``unreadable`` the replies without a verdict, by
        what is wrong with them.
        """
        with self._lock:
            found: dict[str, Any] = {name: self._counts[name] for name in COUNTS}
            return found | {"calls_ever": self._cache.calls, "unreadable": dict(self._unreadable.most_common())}

    def as_reward(self) -> JudgeReward:
        """Return the judge as a TRL reward function: the verdicts' scores, None for items without a verdict."""
        return JudgeReward(self)

    def __repr__(self) -> str:
        return f"Judge({', '.join(f'{name}={value!r}' for name, value in self.spec.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return resolve_judge, (self.spec,)  # without lock and counts

    def _jobs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[str, _Job]:
        if len(prompts) != len(completions):
            raise ValueError(f"Found {len(completions)} completions for {len(prompts)} prompts, expected as many.")
        jobs: dict[str, _Job] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                question, untagged = (
                    render(self._template, prompt, completion, self._answers, tagged=tagged) for tagged in (True, False)
                )
                question.encode()
                judged = (as_text(prompt), as_text(completion))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"Item {row} cannot be shown to the judge ({type(error).__name__}: {error}). Expected prompt and "
                    "completion as text, or as lists of messages with 'role' and 'content'."
                ) from error
            key = content_key(
                model=self._model, messages=_messages(untagged), temperature=float(self._temperature),
                max_tokens=self._max_tokens, answers=self._answers.kind,
            )  # fmt: skip
            jobs.setdefault(key, _Job(key, question, judged)).rows.append(row)
        return jobs

    async def _ask_all(self, jobs: list[_Job]) -> None:
        concurrency = min(self._concurrency, len(jobs))
        client = judge_client(
            self._base_url,
            self._timeout,
            concurrency=concurrency,
            max_retries=self._max_retries,
            tokens=self._max_tokens,
        )
        async with client:
            await client.run(jobs, lambda job: self._settle(job, client))

    async def _settle(self, job: _Job, client: Client) -> None:
        faults: list[Fault] = []
        try:
            await self._ask_twice(job, client, faults)
        finally:
            with self._lock:
                self._unreadable.update(fault.unreadable for fault in faults if fault.unreadable)

    async def _ask_twice(self, job: _Job, client: Client, faults: list[Fault]) -> None:
        """Ask, and once more where the reply has another form than was asked for."""
        for reminder in ("", f"\n\n{self._answers.reminder}"):
            try:
                reply = await ask(
                    client,
                    faults=faults,
                    before=lambda: self._take_call(job),
                    messages=_messages(job.question + reminder),
                    model=self._model,
                    temperature=self._temperature,
                    max_tokens=self._max_tokens,
                )
            except _OverBudget:
                return job.settle("over_budget", f"the budget of {self._budget} calls is used up")
            except JudgeError as error:
                raise JudgeError(f"Item {job.rows[0]}: {error}") from None
            except Fault as fault:
                return self._fail(job, fault, len(faults), client)
            self._reached = True
            try:
                job.verdict = read_reply(reply.text, self._answers, max_tokens=self._max_tokens, judged=job.judged)
                break
            except Unreadable as error:
                with self._lock:
                    self._unreadable[error.kind] += 1
                job.reason = f"{error} (cut at max_tokens={self._max_tokens}; raise it)" if reply.cut else str(error)
        self._cache.add(job.key, reply.text, job.verdict, job.calls)
        job.settle(_outcome(job.verdict), job.reason)

    def _take_call(self, job: _Job) -> None:
        """Count a call before it is made, so that no kill or error makes room for one more."""
        if not self._cache.take_call(self._budget):
            raise _OverBudget
        self._count(calls=1, retried=int(job.calls > 0))
        job.calls += 1

    def _fail(self, job: _Job, fault: Fault, faults: int, client: Client) -> None:
        self._reached = self._reached or client.reached
        if not self._reached:  # every other item would fail the same way
            raise JudgeError(
                f"No server was reached at {client.address} in {job.calls} attempts ({fault.reason}). Start the "
                "server, or check base_url and the network."
            )
        job.settle("failed", f"{faults} faults, the last: {fault.reason}")

    def _count_outcomes(self, jobs: Mapping[str, _Job]) -> None:
        for job in jobs.values():
            if job.outcome:
                self._count(**{job.outcome: len(job.rows)})

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


@dataclass
class _Job:
    """A question, the items that ask it, and its outcome."""

    key: str
    question: str
    judged: tuple[str, str]
    rows: list[int] = field(default_factory=list)
    calls: int = 0
    verdict: Verdict | None = None
    outcome: str = ""
    reason: str = ""

    def settle(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason


class _OverBudget(Exception):
    """No call is left in the budget."""


@dataclass
class JudgeReward:
    """A reward function of a judge's scores, for TRL's trainers and this package's features."""

    judge: Judge
    __name__ = "judge"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [None if verdict is None else verdict.score for verdict in self.judge(prompts, completions)]


def resolve_judge(spec: Judge | Mapping[str, Any]) -> Judge:
    """Make a judge from a mapping of :class:`Judge`'s arguments, as in a YAML; return a judge unchanged.

    Raises:
        ValueError: a key is unknown or missing, or :class:`Judge` refuses its value.
        FileNotFoundError: the prompt is neither a bundled one nor a file.
    """
    if isinstance(spec, Judge):
        return spec
    parameters = list(inspect.signature(Judge).parameters.values())
    accepted = [p.name for p in parameters]
    if not isinstance(spec, Mapping):
        raise ValueError(f"judge: found {type(spec).__name__}, expected a mapping with keys of {', '.join(accepted)}.")
    unknown = [str(key) for key in spec if key not in accepted]
    if unknown:
        secret = " The key belongs in the environment variable OPENAI_API_KEY." if "key" in unknown[0].lower() else ""
        raise ValueError(f"judge: unknown key {unknown[0]!r}, expected some of {', '.join(accepted)}.{secret}")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in spec]
    if missing:
        raise ValueError(f"judge: {', '.join(missing)} is missing. Its keys: {', '.join(accepted)}.")
    return Judge(**spec)


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _outcome(verdict: Verdict | None) -> str:
    return "unparsable" if verdict is None else "answered"


def _report_missing(jobs: list[_Job], items: int) -> None:
    parts = []
    for outcome in ("unparsable", "failed", "over_budget"):
        found = [job for job in jobs if job.outcome == outcome]
        if found:
            reason = f" ({found[0].reason})" if found[0].reason else ""
            rows = sum(len(job.rows) for job in found)
            parts.append(f"{rows} {outcome.replace('_', ' ')}, first item {found[0].rows[0]}{reason}")
    if parts:
        logger.warning(f"The judge leaves items of {items} without a verdict: {'; '.join(parts)}.")
