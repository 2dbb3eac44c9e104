"""Read completions that have scores or feedback as samples of a pool: in every shape that ``data/shapes.py`` knows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from contrastive_align.conditions.conditions import Condition
from contrastive_align.conditions.judged import AttributeCondition
from contrastive_align.data.columns import Options, key_of
from contrastive_align.data.formats import NUMBERS, Group, Parts, checked_group, number_of
from contrastive_align.data.messages import Text
from contrastive_align.data.reading import read_shape, sample_of
from contrastive_align.data.rows import FIX, ROW, BadRow, number_in_file, short, values_of, without_advice
from contrastive_align.data.scores import Ask
from contrastive_align.data.shapes import Reading
from contrastive_align.data.tokenise import NoRoom, tokenise_group, tokenise_prompt
from contrastive_align.pool.files import Sample


logger = logging.get_logger(__name__)

# One completion a row, or a list of them: (completion, score, feedback, finished).
SINGLE = ("completion", "score", "feedback", "finished")
LISTS = ("completions", "scores", "feedbacks", "finished")
TEMPLATE_ALLOWANCE = 256  # tokens; no chat template adds more. A token has a byte at least, so bytes bound tokens.


FEEDBACK = "feedback"  # of the columns read, beside the names of attributes


@dataclass
class ScoredGroup:
    """A prompt, and of each of its completions the score, the feedback, and whether it ended by itself."""

    prompt: Text
    completions: list[str]
    scores: list[float | None]
    feedbacks: list[str | None]
    finished: list[bool]


@dataclass
class ScoredRows:
    """The rows of a dataset as scored groups, in any shape that ``data/shapes.py`` knows.

    Scores, feedback (words, or JSON objects for the condition ``attributes``), each attribute and ``finished`` are
    columns of the same completions, and each is read as their scores are.
    """

    dataset: Dataset
    readings: dict[str, Reading]  # "score", "feedback", "finished", and attributes by their names
    attributes: list[str] = field(default_factory=list)  # which make the feedback
    negate: bool = False

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        condition: Condition | None = None,
        *,
        options: Options | None = None,
        feedback_column: str | None = None,
        negate_score: bool = False,
    ) -> ScoredRows:
        """Find the columns.

        Args:
            dataset: the rows.
            condition: what the completions are sorted by, which needs scores or feedback.
            options: what the user says of the columns.
            feedback_column: by default ``feedback`` or ``feedbacks``, or a column for each attribute of the condition.
            negate_score: lower scores are better.

        Raises:
            ValueError: the dataset is a stream, or lacks the columns.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "Scored completions are sorted by their scores, so they cannot be a stream. Load them whole, without "
                "streaming."
            )
        options = options or Options()
        problem: ValueError | None = None
        _, names = sample_of(dataset, "train")
        keys = {key_of(name): name for name in names}
        wanted = {"finished": keys.get("finished")}
        attributes = list(condition.attributes) if isinstance(condition, AttributeCondition) else []
        missing = [name for name in attributes if name not in names]
        feedback = feedback_column or next((keys[key] for key in ("feedback", "feedbacks") if key in keys), None)
        if feedback_column is None and attributes and not missing:
            wanted |= {name: name for name in attributes}
        elif attributes and feedback is None:
            raise ValueError(
                f"The condition 'attributes' is of {attributes}, and the data has no column for {missing}, only "
                f"{sorted(names)}. Name a column of JSON objects, feedback_column='NAME', or give the condition "
                "attributes that are there."
            )
        else:
            wanted, attributes = {**wanted, FEEDBACK: feedback}, []
        said = {FEEDBACK} if feedback_column else set(attributes) if attributes else set()
        readings = {}
        for what, name in {"score": options.score_column, **wanted}.items():
            if what != "score" and name is None:
                continue
            try:
                readings[what] = read_shape(dataset, replace(options, score_column=name), "train")
            except ValueError as error:
                if what in said or (what == "score" and options.score_column):
                    raise
                problem = error if what == "score" else problem  # else a column of this name, and not of the answers
        found = {"score": "score" in readings, FEEDBACK: bool(attributes) or FEEDBACK in readings}
        if negate_score and not found["score"]:
            raise ValueError(f"negate_score is given, and the data has no scores. {problem}")
        if not any(found.values()):
            if isinstance(problem, Ask):
                raise problem
            raise ValueError(
                f"{problem} Expected 'prompt' and 'completion' with 'score' or 'feedback' (or 'completions' with "
                "'scores' or 'feedbacks', lists of K) to learn from; or give reward_funcs or a judge to sample and "
                "score."
            )
        for what in () if condition is None else condition.reads:
            if not found[what]:
                raise ValueError(
                    f"The condition '{condition.kind}' is made from each completion's {what}, and the data has the "
                    f"columns {sorted(names)}. Name the one that has it, {what}_column='NAME', or use a condition that "
                    "reads the other."
                )
        return cls(dataset, readings, attributes, negate_score)

    @property
    def unread_columns(self) -> list[str]:
        """Columns that nothing is read from."""
        read = {name for reading in self.readings.values() for name in reading.read_columns}
        return [name for name in sample_of(self.dataset, "train")[1] if name not in read]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], list[ScoredGroup] | BadRow]]:
        """Yield each row's number, its columns that are not read, and its groups or what is wrong with it."""
        unread = self.unread_columns
        for place, row in enumerate(self.dataset):
            number = number_in_file(row, place)
            where = f"row {number}"
            try:
                values = values_of(row, where)
                found = {what: reading(values, where) for what, reading in self.readings.items()}
                rows = zip(*found.values(), strict=True)
                groups = [self._group(dict(zip(found, each, strict=True)), where) for each in rows]
                yield number, {name: values.get(name) for name in unread}, groups
            except BadRow as error:
                yield number, {}, error

    def to_dataset(self, *, on_bad_row: str) -> tuple[Dataset, list[str]]:
        """Return the rows in the canonical form, with their columns that are not read; and what was dropped.

        Raises:
            BadRow: a row cannot be read, under ``on_bad_row="raise"``.
            ValueError: no row is left.
        """
        there = {"scores": "score" in self.readings, "finished": "finished" in self.readings}
        there |= {"completions": True, "feedbacks": bool(self.attributes) or FEEDBACK in self.readings}
        rows, problems = [], []
        for number, others, found in self:
            if isinstance(found, BadRow):
                if on_bad_row == "raise":
                    raise found
                problems.append(without_advice(str(found)))
                continue
            for group in found:
                told = {name: getattr(group, name) for name in LISTS if there[name]}
                rows.append({**others, ROW: number, "prompt": group.prompt, **told})
        if not rows:
            raise ValueError(f"None of the {len(problems)} rows is left to train on. {'; '.join(problems[:3])}")
        return Dataset.from_list(rows), problems

    def _group(self, parts: dict[str, Parts], where: str) -> ScoredGroup:
        """Check the parts of a row, of which all hold the same completions."""
        first = next(iter(parts.values()))
        n, columns = len(first.completions), first.columns
        told = {what: found.scores for what, found in parts.items()}
        for what, values in told.items():
            if len(values) != n:
                name = parts[what].columns.scores
                raise BadRow(f"{where}: '{name}' has {len(values)} entries for {n} completions, expected one each.")
        finished, words = told.get("finished", [None] * n), told.get(FEEDBACK, [None] * n)
        for i in range(n):
            if finished[i] not in (None, True, False):
                raise BadRow(
                    f"{where}: 'finished' of {columns.completion(i)} is {short(finished[i])}, expected true, false or "
                    f"null. {FIX}"
                )
            if words[i] is not None and not isinstance(words[i], str):
                raise BadRow(
                    f"{where}: the feedback of {columns.completion(i)} is {short(words[i])}, expected text or null. "
                    f"{FIX}"
                )
        # An empty completion that ended is an EOS.
        empty = [end is True and text == "" for text, end in zip(first.completions, finished, strict=True)]
        texts = ["." if nothing else text for text, nothing in zip(first.completions, empty, strict=True)]
        checked = replace(first, completions=texts, scores=[0.0] * n, written=NUMBERS)
        repeats = next(iter(self.readings.values())).prompt_repeats
        group, _ = checked_group(checked, where, least=1, prompt_repeats=repeats)
        if group.template_kwargs:
            raise BadRow(
                f"{where}: there are {', '.join(group.template_kwargs)}, with which conditional training renders no "
                "prompt. Take them out, or drop the row (on_bad_row='drop')."
            )
        completions = [
            "" if nothing else _text(completion, f"{where}: {columns.completion(i)}")
            for i, (completion, nothing) in enumerate(zip(group.completions, empty, strict=True))
        ]
        scores = [self._number(parts["score"], i, where) for i in range(n)] if "score" in parts else [None] * n
        if self.attributes:
            each = [{name: _plain(told[name][i], f"{where}: '{name}'") for name in self.attributes} for i in range(n)]
            words = [json.dumps(values) for values in each]
        return ScoredGroup(group.prompt, completions, scores, words, [end is not False for end in finished])

    def _number(self, parts: Parts, i: int, where: str) -> float | None:
        if parts.scores[i] is None:
            return None
        told = {"decimal_comma": parts.decimal_comma, "written": parts.written}
        number = number_of(parts.scores[i], f"{where}: {parts.columns.score(i)}", **told)
        return -number if self.negate else number


def _text(completion: Text, what: str) -> str:
    """Return the text of a completion that is one turn."""
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 or completion[0].get("tool_calls"):
        raise BadRow(
            f"{what} has {len(completion)} turns or a tool call, expected one answer of text. Drop the row "
            "(on_bad_row='drop')."
        )
    return completion[0]["content"]


def _plain(value: Any, what: str) -> Any:
    """Return an attribute as a number, where it is the text of one."""
    if not isinstance(value, str):
        return value
    number = number_of(value, what)
    return int(number) if number.is_integer() else number


def read_scored(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    condition: Condition | None = None,
    on_bad_row: str = "raise",
    options: Options | None = None,
    feedback_column: str | None = None,
    negate_score: bool = False,
) -> tuple[list[Sample], dict[str, Any]]:
    """Read rows as samples of round 1.

    A row is a scored group in any shape that ``ContrastiveTrainer`` reads, whose completions may have feedback beside
    their scores or in their place, or one completion. A sample whose score or feedback is None is kept and never drawn.
    Completions end in one EOS, except where ``finished`` (with lists, its entry) is False: those were cut when they
    were sampled. Rows with the same prompt are one prompt, whose ``prompt_index`` is the number of the first of them.

    Args:
        dataset: the rows.
        tokenizer: the model's.
        max_length: tokens of prompt and completion together. A longer completion keeps its beginning and has no EOS. A
            prompt that leaves no room for a completion is dropped and counted.
        condition: the prompt is measured with the longest text of this condition.
        on_bad_row: ``"raise"``, or ``"drop"``: leave the row out and count it.
        options, feedback_column, negate_score: see :meth:`ScoredRows.of`.

    Returns:
        The samples, and counts: ``rows``, ``completions``, ``dropped``, ``cut``, ``no_score``.

    Raises:
        BadRow: a row is malformed; with row and column.
        ValueError: the dataset lacks the columns, or every value that the condition is made from.
    """
    rows = ScoredRows.of(
        dataset, condition, options=options, feedback_column=feedback_column, negate_score=negate_score
    )
    report = {"rows": len(dataset), "completions": 0, "dropped": 0, "cut": 0, "no_score": 0}
    samples, first_bad = [], []
    place, seen = {}, Counter()  # prompt -> its first row; of that prompt, how many samples there are
    for number, _, found in rows:
        of_row = []
        try:
            if isinstance(found, BadRow):
                raise found
            for group in found:
                parts = zip(group.completions, group.scores, group.feedbacks, group.finished, strict=True)
                for k, (completion, score, feedback, finished) in enumerate(parts):
                    where = f"row {number}, completion {k}"
                    limit = _limit(group.prompt, completion, feedback, tokenizer, max_length, condition, where)
                    ids, whole = _tokens(group.prompt, completion, tokenizer, limit, where)
                    cut = not whole
                    if whole and not finished and len(ids) > 1:
                        ids, whole = ids[:-1], False  # without its EOS
                    of_row.append((cut, group.prompt, ids, completion, score, feedback, whole))
        except BadRow as error:
            if on_bad_row == "raise" and not isinstance(error, NoRoom):
                raise
            report["dropped"] += 1
            first_bad += [str(error)] if len(first_bad) < 3 else []
            continue
        for cut, *parts in of_row:
            first = place.setdefault(repr(parts[0]), number)
            report["cut"] += cut
            samples.append(Sample(*parts, first, seen[first], 1, 0))
            report["no_score"] += samples[-1].score is None and samples[-1].feedback is None
            seen[first] += 1
    report["completions"] = len(samples)
    if report["dropped"]:
        logger.warning(f"{report['dropped']} of {len(dataset)} rows are dropped: {'; '.join(first_bad)}")
    if not samples:
        raise ValueError(f"None of the {len(dataset)} rows is left to train on. {'; '.join(first_bad)}")
    needed = () if condition is None else condition.reads
    if needed and all(any(getattr(sample, what) is None for what in needed) for sample in samples):
        raise ValueError(
            f"None of the {len(samples)} completions has a {' and a '.join(needed)}, from which the condition "
            f"'{condition.kind}' is made. Fill in the column, or name the one that has it."
        )
    return samples, report


def _limit(
    prompt: Text,
    completion: str,
    feedback: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    condition: Condition | None,
    where: str,
) -> int | None:
    """Return the ``max_length`` of the prompt alone and its completion that leaves room for the condition's texts."""
    if max_length is None or condition is None:
        return max_length
    try:
        prompts = [condition.apply(prompt, text) for text in condition.texts_for(feedback)]
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from error
    longest = max((len(repr(p).encode()) for p in prompts), default=0)
    if longest + len(completion.encode()) + TEMPLATE_ALLOWANCE < max_length:
        return max_length
    alone = len(tokenise_prompt(prompt, tokenizer))
    added = max((len(tokenise_prompt(p, tokenizer)) for p in prompts), default=alone) - alone
    if alone + added >= max_length:
        raise NoRoom(
            f"{where}: the prompt has {alone + added} tokens with its condition and max_length is {max_length}: no "
            "room for a completion token. Raise max_length."
        )
    return max_length - max(0, added)


def _tokens(
    prompt: Text, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, where: str
) -> tuple[list[int], bool]:
    """Return the ids of a completion, with EOS unless it was cut, and whether it is whole."""
    eos: Any = tokenizer.eos_token_id
    if not completion:  # it ended at once
        if max_length is not None and len(tokenise_prompt(prompt, tokenizer)) >= max_length:
            raise NoRoom(f"{where}: the prompt leaves no room for a completion token under max_length={max_length}.")
        return [eos], True
    answer = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
    try:
        ids = tokenise_group(Group(prompt, [answer], [0.0]), tokenizer, max_length=max_length)
    except BadRow as error:
        raise type(error)(f"{where}: {error}") from error
    if not ids.moved_boundary or not isinstance(prompt, str):
        tokens, whole = ids.completion_ids[0], not ids.cut_completions
        if whole and eos not in tokens:  # the template leaves the turn open, and a sample ends in EOS
            room = max_length is None or len(ids.prompt_ids) + len(tokens) < max_length
            return [*tokens, eos] if room else tokens, room
        return tokens, whole
    # Together, prompt and completion would change the prompt's last token. At inference the prompt stands alone, so
    # the completion is tokenised alone too.
    alone = [*tokenizer(text=completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = len(alone) if max_length is None else max_length - len(ids.prompt_ids) - ids.moved_boundary
    if room < 1:
        raise NoRoom(f"{where}: the prompt leaves no room for a completion token under max_length={max_length}.")
    return alone[:room], len(alone) <= room
