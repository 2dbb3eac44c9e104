"""A language model as judge of completions, behind any OpenAI-compatible endpoint (ALT, arXiv 2407.16970).

judge_answers.py asks and reads, judge_cache.py keeps, judge_endpoint.py makes a call, calls/schedule.py many.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from contrastive_align.calls.endpoint import LONGEST_RETRY_AFTER, Fault, Mailbox
from contrastive_align.calls.options import check_address, check_counts, check_model, check_number
from contrastive_align.calls.schedule import backoff, run_jobs
from contrastive_align.judge.answers import Unparsable, Verdict, answers_from, read_template, render
from contrastive_align.judge.client import JudgeEndpoint, JudgeError, Reply
from contrastive_align.judge.ledger import AnswerCache, content_key


__all__ = ["Judge", "JudgeError", "Verdict", "resolve_judge"]

logger = logging.get_logger(__name__)

COUNTS = ("items", "answered", "unparsable", "failed", "over_budget", "cached", "repeated", "calls", "retried")


class Judge:
    """Asks a language model what it thinks of each completion; asks once, whatever goes wrong in between.

    The key comes from the environment variable ``OPENAI_API_KEY`` and is kept nowhere.

    Args:
        prompt: ``"helpful_categories"``, ``"feedback"``, or a text file with ``{prompt}``, ``{completion}`` and, for
            categories, ``{categories}`` (for text, perhaps ``{max_words}``).
        model: the judge's name at the endpoint.
        answers: a list of categories, the best first, or ``"text"``: feedback in words and a score of 0 to 3.
        cache: a folder. Every answer is kept there by the content of its question; a rerun makes no call.
        base_url: of the API, for instance ``http://localhost:8000/v1``; None: ``OPENAI_BASE_URL``, else OpenAI's.
        concurrency: the most calls waited for at a time.
        timeout: seconds for one call, at the most. One that takes far longer than others did is made again before, and
            the first answer is taken (``calls/patience.py``).
        max_retries: how often an item is asked again after 408, 409, 425, 429, 5xx, a timeout, a broken connection or a
            cut-off body, before it counts as failed.
        budget: the most calls ever made with this cache, restarts included; None: no limit.
        temperature, max_tokens: of the judge's answer.
        max_words: of the feedback.

    Raises:
        ValueError, FileNotFoundError: an option with no meaning; a prompt that is not there or lacks a placeholder.
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
        check_counts(concurrency=(concurrency, 1), max_retries=(max_retries, 0), max_tokens=(max_tokens, 1))
        check_counts(max_words=(max_words, 1), budget=(0 if budget is None else budget, 0))
        check_number("timeout", timeout, "seconds, more than 0", allowed=timeout != 0)
        check_number("temperature", temperature, "a number of at least 0")
        check_model(model)
        check_address(base_url)
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
        self._cache = AnswerCache(cache)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._backoff = backoff
        self._reached = False  # anybody at the address, ever

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Verdict | None]:
        """A verdict for each completion, in order; None where there is none, which is counted and logged.

        Args:
            prompts, completions: texts, or lists of messages, which are shown as ``role: text`` lines.

        Raises:
            JudgeError: the endpoint refuses for good (400, 401, 403, 404 ...), or nobody has been reached there and an
                item's tries are used up; as soon as the calls in flight are back. What was answered by then is in the
                cache.
            ValueError: not as many completions as prompts; an item that is no text; no key.
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
        if new:
            request = {"model": self._model, "temperature": self._temperature, "max_tokens": self._max_tokens}
            try:
                with JudgeEndpoint(self._base_url, self._timeout, **request) as endpoint:
                    run_jobs(new, lambda job: self._work(job, endpoint), concurrency=min(self._concurrency, len(new)))
            finally:
                self._count_outcomes(jobs)
        else:
            self._count_outcomes(jobs)
        verdicts: list[Verdict | None] = [None] * len(prompts)
        for job in jobs.values():
            for row in job.rows:
                verdicts[row] = job.verdict
        _report_missing(list(jobs.values()), len(prompts))
        return verdicts

    def check(self) -> None:
        """Raise ImportError or ValueError now where the first call would: no ``openai``, no key. Nothing is asked.

        A judge whose cache has answers may never make a call, and passes.
        """
        if not len(self._cache):
            with JudgeEndpoint(self._base_url, self._timeout):
                pass

    def report(self) -> dict[str, int]:
        """Counts since this object was made, and ``calls_ever`` of its cache, which is what the budget limits.

        Every item is ``answered``, ``unparsable``, ``failed`` or ``over_budget``, or left open by an error. Beside
        that, ``cached`` ones were known from an earlier call or run, ``repeated`` ones equal an earlier item of the
        same call; ``retried`` counts the calls that asked again.
        """
        with self._lock:
            return {name: self._counts[name] for name in COUNTS} | {"calls_ever": self._cache.calls}

    def as_reward(self) -> JudgeReward:
        """The judge as a TRL reward function: the verdicts' scores, None where there is none."""
        return JudgeReward(self)

    def __repr__(self) -> str:
        return f"Judge({', '.join(f'{name}={value!r}' for name, value in self.spec.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return resolve_judge, (self.spec,)  # locks and counts stay here

    def _jobs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[str, _Job]:
        if len(prompts) != len(completions):
            raise ValueError(f"Found {len(completions)} completions for {len(prompts)} prompts, expected as many.")
        jobs: dict[str, _Job] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                question = render(self._template, prompt, completion, self._answers)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"Item {row} cannot be shown to the judge ({type(error).__name__}: {error}). Expected prompt and "
                    "completion as text, or as lists of messages with 'role' and 'content'."
                ) from error
            key = content_key(
                model=self._model, messages=_messages(question), temperature=float(self._temperature),
                max_tokens=self._max_tokens, answers=self._answers.kind,
            )  # fmt: skip
            jobs.setdefault(key, _Job(key, question)).rows.append(row)
        return jobs

    def _work(self, job: _Job, endpoint: JudgeEndpoint) -> float | None:
        """One call for the job: None when it is settled, else the seconds to wait before the next."""
        late = job.mailbox.get(None, 0)
        if late is not None:  # the answer to a call that was given up came while the job waited
            return self._after_reply(job, late)
        if not self._cache.take_call(self._budget):
            return job.settle("over_budget", f"the budget of {self._budget} calls is used up")
        self._count(calls=1, retried=int(job.calls > 0))
        job.calls += 1
        reminder = f"\n\n{self._answers.reminder}" if job.reminded else ""
        try:
            last = job.faults >= self._max_retries
            found = endpoint.ask(_messages(job.question + reminder), mailbox=job.mailbox, patient=last)
        except JudgeError as error:
            raise JudgeError(f"Item {job.rows[0]}: {error}") from None
        if not isinstance(found, Fault):
            self._reached = True
            return self._after_reply(job, found)
        self._reached = self._reached or found.reached
        if job.faults >= self._max_retries and not self._reached:  # every other item would fare the same
            raise JudgeError(
                f"Nobody was reached at {endpoint.address} in {job.calls} tries ({found.reason}). Start the server, or "
                "check base_url and the network."
            )
        return self._after_fault(job, found)

    def _after_fault(self, job: _Job, fault: Fault) -> float | None:
        job.faults += 1
        if job.faults > self._max_retries:
            return job.settle("failed", f"{job.faults} faults, the last: {fault.reason}")
        if fault.given_up:  # nothing says that the server is overloaded
            return 0.0
        wait = fault.retry_after
        if wait is not None and wait > LONGEST_RETRY_AFTER:
            return job.settle("failed", f"the server asks to wait for {wait:g} s: {fault.reason}")
        return self._backoff(job.faults - job.mailbox.given_up, wait)

    def _after_reply(self, job: _Job, reply: Reply) -> float | None:
        try:
            job.verdict = self._answers.parse(reply.text)
        except Unparsable as error:
            if not job.reminded:
                job.reminded = True
                job.mailbox = Mailbox()  # it is another question from now on
                return 0.0
            cut = f" (cut at max_tokens={self._max_tokens}; raise it)" if reply.cut else ""
            job.reason = f"{error}{cut}"
        self._cache.add(job.key, reply.text, job.verdict, job.calls)
        return job.settle(_outcome(job.verdict), job.reason)

    def _count_outcomes(self, jobs: Mapping[str, _Job]) -> None:
        for job in jobs.values():
            if job.outcome:
                self._count(**{job.outcome: len(job.rows)})

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


@dataclass
class _Job:
    """A question, and the items that ask it."""

    key: str
    question: str
    rows: list[int] = field(default_factory=list)
    calls: int = 0
    faults: int = 0
    mailbox: Mailbox[Reply] = field(default_factory=Mailbox)
    reminded: bool = False
    verdict: Verdict | None = None
    outcome: str = ""
    reason: str = ""

    def settle(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason


@dataclass
class JudgeReward:
    """``f(prompts, completions, **columns) -> list[float | None]``, as TRL's trainers and this package's features."""

    judge: Judge
    __name__ = "judge"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [None if verdict is None else verdict.score for verdict in self.judge(prompts, completions)]


def resolve_judge(spec: Judge | Mapping[str, Any]) -> Judge:
    """The judge that a YAML mapping of :class:`Judge`'s arguments describes; a judge is returned as it is.

    Raises:
        ValueError: a key that a judge does not take, or one that is missing; what :class:`Judge` refuses.
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
