"""Group -> token ids, for a whole dataset: checked, cut, counted."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from contrastive_align.data import formats
from contrastive_align.data.formats import BadRow, Columns, Group, Text, check_scores, detect_spelling, read_group


logger = logging.get_logger(__name__)

TOKENS = "token ids"
TOKEN_COLUMNS = ["prompt_ids", "completion_ids", "scores"]
_SOURCE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, formats.__file__))).hexdigest()
FIRST_ROWS = 5


class NoRoom(BadRow):
    """The prompt alone fills ``max_length``: dropped and counted, whatever ``on_bad_row`` says, as TRL does."""


@dataclass
class TokenisedGroup:
    """Token ids of one group."""

    prompt_ids: list[int]  # the tokens all completions share, BOS included where the tokenizer has one
    completion_ids: list[list[int]]  # K lists; each ends with one EOS unless it was cut
    cut_completions: int = 0  # how many of the K were cut to fit max_length
    cut_prompt_tokens: int = 0  # how many tokens the prompt lost at its start
    moved_boundary: int = 0  # the prompt's last tokens that differ once a completion follows, and are scored with it


def tokenise_group(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> TokenisedGroup:
    """Tokenise prompt and completions together and split where they part.

    As TRL's DPO does for pairs: prompt alone and prompt + completion are tokenised, and the completion starts where
    they diverge, for all K at the same place. BOS at most once, at the front. EOS once, at the end of every completion;
    a chat template that closes the turn with EOS has done it already.

    ``max_prompt_length`` keeps the end of the prompt; then every completion is cut to ``max_length`` less the prompt
    and loses its EOS with its end.

    Raises:
        NoRoom: the prompt leaves no room for a completion token.
        BadRow: prompt and completion share no token to start from, or a completion has no token of its own.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no eos_token, without which no completion can end. Set "
            "one, for instance tokenizer.eos_token = '</s>'."
        )
    prompt_ids, full_ids = _encode(group, tokenizer)
    tokens_at = zip(prompt_ids, *full_ids, strict=False)
    start = next(
        (i for i, tokens in enumerate(tokens_at) if len(set(tokens)) > 1), min(map(len, [prompt_ids, *full_ids]))
    )
    completion_ids = [_one_eos(ids[start:], tokenizer.eos_token_id, group.is_conversational) for ids in full_ids]
    for i, ids in enumerate(completion_ids):
        if not [t for t in ids if t != tokenizer.eos_token_id]:
            raise BadRow(
                f"completion {i} has no token of its own after the prompt's {start} tokens (its last: "
                f"{prompt_ids[max(0, start - 3) : start]}). The chat template may drop its content; drop the row "
                "(on_bad_row='drop')."
            )
    if not start:
        raise BadRow(
            f"the prompt's tokens {prompt_ids[:8]} and those of prompt + completion {full_ids[0][:8]} differ from the "
            "first on, so that nothing is left to condition on. End the prompt on a token boundary, for instance with "
            "a newline, or drop the row (on_bad_row='drop')."
        )
    open_prompt = _without_eos(prompt_ids, tokenizer.eos_token_id)  # a tokenizer may close every text it reads
    moved, prompt_ids = max(0, len(open_prompt) - start), prompt_ids[:start]

    bos = tokenizer.bos_token_id
    return _fit(TokenisedGroup(prompt_ids, completion_ids, moved_boundary=moved), max_length, max_prompt_length, bos)


def _fit(ids: TokenisedGroup, max_length: int | None, max_prompt_length: int | None, bos: int | None) -> TokenisedGroup:
    """Cut to length: the prompt keeps its end (and its BOS), every completion its beginning."""
    prompt_ids, completion_ids = ids.prompt_ids, ids.completion_ids
    cut_prompt = 0
    if max_prompt_length is not None and len(prompt_ids) > max_prompt_length:
        kept = prompt_ids[:1] if prompt_ids[0] == bos else []
        cut_prompt = len(prompt_ids) - max_prompt_length
        prompt_ids = kept + prompt_ids[len(kept) + cut_prompt :]
    cut = 0
    if max_length is not None:
        room = max_length - len(prompt_ids)
        if room < 1:
            raise NoRoom(
                f"the prompt has {len(prompt_ids)} tokens and max_length is {max_length}: no room for a completion "
                "token. Raise max_length, or set max_prompt_length (the prompt keeps its end)."
            )
        cut = sum(len(ids) > room for ids in completion_ids)
        completion_ids = [ids[:room] for ids in completion_ids]
    return TokenisedGroup(prompt_ids, completion_ids, cut, cut_prompt, ids.moved_boundary)


def _encode(group: Group, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    prompt_ids = tokenise_prompt(group.prompt, tokenizer, **group.template_kwargs)
    if group.is_conversational:
        render = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=True, **group.template_kwargs)
        full_ids = [render(group.prompt + completion)["input_ids"] for completion in group.completions]
    else:
        eos = tokenizer.eos_token
        texts = [group.prompt + c + ("" if c.endswith(eos) else eos) for c in group.completions]
        full_ids = [tokenizer(text=text)["input_ids"] for text in texts]
    return prompt_ids, [_one_bos(ids, tokenizer.bos_token_id) for ids in full_ids]


def tokenise_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[int]:
    """Token ids of a prompt: text as the tokenizer reads it, messages by its chat template; BOS at most once, in front.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(text=prompt)["input_ids"]
    elif tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            prompt, tokenize=True, add_generation_prompt=True, return_dict=True, **template_kwargs
        )["input_ids"]
    else:
        raise ValueError(
            f"The prompts are conversations, but the tokenizer of {tokenizer.name_or_path!r} has no chat template. "
            "Set tokenizer.chat_template, or give prompts and completions as plain text."
        )
    return _one_bos(ids, tokenizer.bos_token_id)


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def _one_eos(ids: list[int], eos: int, conversational: bool) -> list[int]:
    if conversational and eos in ids:  # the template closes the turn itself, perhaps with a newline after it
        return ids
    return [*_without_eos(ids, eos), eos]


def _without_eos(ids: list[int], eos: int) -> list[int]:
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


@dataclass
class DataReport:
    """What a dataset turned out to hold. Row numbers are the dataset's own, from 0.

    Counts are known for a map-style dataset; a stream is read as it is trained on, so that only ``spelling`` is.
    """

    spelling: str
    rows: int | None = None
    groups: int | None = None
    groups_by_k: dict[int, int] = field(default_factory=dict)
    dropped: int = 0
    dropped_because: dict[str, str] = field(default_factory=dict)
    no_signal: int = 0
    no_signal_rows: list[int] = field(default_factory=list)
    cut_completions: int = 0
    cut_prompts: int = 0
    moved_boundaries: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lost(self) -> list[str]:
        """Say what was dropped or cut, a line each, with the first rows."""
        first = "; ".join(self.dropped_because.values())
        lines = {
            f"{self.dropped} of {self.rows} rows dropped. The first: {first}": self.dropped,
            f"{self.cut_completions} completions cut to fit max_length (they train no EOS).": self.cut_completions,
            f"{self.cut_prompts} prompts cut to max_prompt_length (their end is kept).": self.cut_prompts,
            f"in {self.moved_boundaries} groups the prompt's last token merges with the completion's first; the "
            "completions are scored from there on.": self.moved_boundaries,
        }
        return [line for line, count in lines.items() if count]

    def notes(self) -> list[str]:
        """Say what was lost, and what weighs nothing."""
        rows = f"(first rows {self.no_signal_rows})"
        flat = [f"{self.no_signal} of {self.groups} groups have equal scores only {rows}."] if self.no_signal else []
        return self.lost() + flat


def prepare_groups(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    on_bad_row: str,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Turn a dataset in any known spelling into one with ``prompt_ids``, ``completion_ids`` and ``scores``.

    A dataset that already has these columns is checked and cut to length like any other; further columns go.

    Args:
        on_bad_row: ``"raise"`` at the first bad row, or ``"drop"`` and count. Groups whose prompt leaves no room under
            ``max_length`` are dropped and counted in either case, as TRL does.

    Raises:
        BadRow: with file, row and column.
        ValueError: no known spelling, or no group left.
    """
    dataset = dataset.with_format(None)  # plain lists and numbers, whatever tensors it would give
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset has no rows, expected at least one group.")
    columns = list(dataset.column_names or first_row)
    if "image" in columns or "images" in columns:
        raise ValueError(
            f"The {name} dataset has images (columns {columns}). Vision data is not supported here; for pairs use "
            "trl.DPOTrainer, or remove the column."
        )
    spelling = TOKENS if all(c in columns for c in TOKEN_COLUMNS) else detect_spelling(columns, first_row)
    reader = _RowReader(spelling, tokenizer, max_length, max_prompt_length, on_bad_row, name)
    options = {"with_indices": True, "remove_columns": columns, "features": _FEATURES}
    if isinstance(dataset, IterableDataset):
        return dataset.map(reader, **options).filter(_is_good), DataReport(spelling)

    desc = f"Reading and tokenising the {name} groups"
    mapped = dataset.map(reader, **options, num_proc=num_proc, desc=desc)
    problems = mapped["problem"]
    good = [i for i, problem in enumerate(problems) if not problem]
    report = _count(mapped.select(good), spelling)
    report.rows, report.dropped = len(mapped), len(mapped) - len(good)
    dropped = ((str(row), problem) for row, problem in zip(mapped["row"], problems, strict=True) if problem)
    report.dropped_because = dict(itertools.islice(dropped, FIRST_ROWS))
    if not good:
        reasons = "\n  ".join(report.dropped_because.values())
        raise ValueError(
            f"No group is left of the {name} dataset's {len(mapped)} rows. The first reasons:\n  {reasons}"
        )
    return (mapped if len(good) == len(mapped) else mapped.select(good)).remove_columns(_COUNTED), report


# Told, not guessed from the first rows: these may all be dropped ones, whose lists are empty.
_FEATURES = Features(
    prompt_ids=List(Value("int64")),
    completion_ids=List(List(Value("int64"))),
    scores=List(Value("float64")),
    row=Value("int64"),
    problem=Value("string"),
    cut_completions=Value("int64"),
    cut_prompt_tokens=Value("int64"),
    moved_boundary=Value("int64"),
)
_COUNTED = [name for name in _FEATURES if name not in TOKEN_COLUMNS]


@dataclass
class _RowReader:
    """A picklable function of (row, number), so that ``datasets`` can cache and parallelise it."""

    spelling: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    max_prompt_length: int | None
    on_bad_row: str
    name: str
    source: str = _SOURCE  # part of the cache's key: rows cached by other code are read again

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        number = row.get(formats.ROW, number)
        try:
            scores, ids = self._read(row, number, f"{self.name}, row {number}: ")
        except BadRow as error:
            if self.on_bad_row == "raise" and not isinstance(error, NoRoom):
                raise
            return {**asdict(TokenisedGroup([], [[]])), "scores": [0.0], "row": number, "problem": str(error)}
        return {**asdict(ids), "scores": scores, "row": number, "problem": ""}

    def _read(self, row: Mapping[str, Any], number: int, where: str) -> tuple[list[float], TokenisedGroup]:
        limits = self.max_length, self.max_prompt_length
        if self.spelling == TOKENS:
            scores = self._check_tokens(row, where)
        else:
            group = self._read_text(row, number)
        try:
            if self.spelling == TOKENS:
                ids = TokenisedGroup(row["prompt_ids"], row["completion_ids"])
                return scores, _fit(ids, *limits, self.tokenizer.bos_token_id)
            ids = tokenise_group(group, self.tokenizer, max_length=limits[0], max_prompt_length=limits[1])
            return group.scores, ids
        except BadRow as error:
            raise type(error)(where + str(error)) from error

    def _read_text(self, row: Mapping[str, Any], number: int) -> Group:
        group = read_group(row, number, self.spelling, source=self.name)
        if self.spelling == "ultrafeedback" and not group.is_conversational and self.tokenizer.chat_template:
            # Its instructions and responses are turns of a chat, written as plain text.
            group.prompt = [{"role": "user", "content": group.prompt}]
            group.completions = [[{"role": "assistant", "content": text}] for text in group.completions]
        return group

    def _check_tokens(self, row: Mapping[str, Any], where: str) -> list[float]:
        prompt, completions = row["prompt_ids"], row["completion_ids"]
        for column, ok in (("prompt_ids", prompt), ("completion_ids", completions and all(completions))):
            if not ok:
                raise BadRow(f"{where}'{column}' is empty, expected token ids. Drop the row (on_bad_row='drop').")
        columns = Columns("prompt_ids", "completion_ids", "scores")
        return check_scores(row["scores"] or [], len(completions), where.removesuffix(": "), columns)


def _is_good(row: Mapping[str, Any]) -> bool:
    if row["problem"]:
        logger.warning_once(f"Rows of the stream are dropped; the first: {row['problem']}")
    return not row["problem"]


def _count(dataset: Dataset, spelling: str) -> DataReport:
    scores, rows = dataset["scores"][:], dataset["row"][:]
    flat = [i for i, s in enumerate(scores) if len(set(s)) == 1]
    return DataReport(
        spelling=spelling,
        groups=len(dataset),
        groups_by_k=dict(sorted(Counter(len(s) for s in scores).items())),
        no_signal=len(flat),
        no_signal_rows=[rows[i] for i in flat[:FIRST_ROWS]],
        cut_completions=sum(dataset["cut_completions"]),
        cut_prompts=sum(n > 0 for n in dataset["cut_prompt_tokens"]),
        moved_boundaries=sum(n > 0 for n in dataset["moved_boundary"]),
    )
