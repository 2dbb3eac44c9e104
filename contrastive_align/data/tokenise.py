"""Group -> token ids, for a whole dataset: checked, cut, counted."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from contrastive_align.data import formats, messages, rows, shapes
from contrastive_align.data.formats import Columns, Group, TooFew, check_scores, checked_group, distinct
from contrastive_align.data.messages import Text
from contrastive_align.data.rows import RAW, ROW, BadRow, values_of
from contrastive_align.data.shapes import Options, Reading, first_rows, recognise


logger = logging.get_logger(__name__)

TOKENS = "token ids"
TOKEN_COLUMNS = ["prompt_ids", "completion_ids", "scores"]
_FILES = (__file__, formats.__file__, messages.__file__, rows.__file__, shapes.__file__)
_SOURCE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in _FILES)).hexdigest()
FIRST_ROWS = 5
BATCH = 256  # rows whose texts go to the tokenizer in one call


class NoRoom(BadRow):
    """The prompt alone fills ``max_length``: dropped and counted, whatever ``on_bad_row`` says, as TRL does."""


ALWAYS_DROPPED = (NoRoom, TooFew)


@dataclass
class TokenisedGroup:
    """Token ids of one group."""

    prompt_ids: list[int]  # the tokens all completions share, BOS included where the tokenizer has one
    completion_ids: list[
        list[int]
    ]  # K lists; text ends with one EOS, a dialogue as its template ends, unless it was cut
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
    they diverge, for all K at the same place. BOS at most once, at the front. A completion of plain text ends with one
    EOS; a turn of a dialogue ends as its chat template ends it.

    ``max_prompt_length`` keeps the end of the prompt; then every completion is cut to ``max_length`` less the prompt
    and loses its EOS with its end.

    Raises:
        NoRoom: the prompt leaves no room for a completion token.
        BadRow: the template refuses the messages or leaves some of their text out, prompt and completion share no token
            to start from, or a completion has no token of its own.
    """
    [found] = tokenise_groups([group], tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    if isinstance(found, BadRow):
        raise found
    return found


def tokenise_groups(
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> list[TokenisedGroup | BadRow]:
    """Do what :func:`tokenise_group` does for many groups in one call of the tokenizer; errors are in their places."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no eos_token, without which no completion can end. Set "
            "one, for instance tokenizer.eos_token = '</s>'."
        )
    rendered: list[Any] = []
    for group in groups:
        try:
            rendered.append(_render(group, tokenizer))
        except BadRow as error:
            rendered.append(error)
    found: list[Any] = [item if isinstance(item, BadRow) else None for item in rendered]
    for chat in (False, True):
        places = [
            i for i, g in enumerate(groups) if g.is_conversational == chat and not isinstance(rendered[i], BadRow)
        ]
        texts = [text for i in places for text in rendered[i]]
        ids = iter(_encode(texts, tokenizer, special=not chat))
        for i in places:
            of_group = [_one_bos(next(ids), tokenizer.bos_token_id) for _ in rendered[i]]
            try:
                found[i] = _parted(of_group, groups[i], tokenizer, max_length, max_prompt_length)
            except BadRow as error:
                found[i] = error
    return found


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=special, **options)["input_ids"]


def _render(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the prompt and of prompt + completion, K + 1 in all."""
    prompt: Any = group.prompt
    if not group.is_conversational:
        eos: Any = tokenizer.eos_token
        completions: list[Any] = group.completions
        closed = [text.rstrip() if text.rstrip().endswith(eos) else text + eos for text in completions]
        return [prompt, *(prompt + text for text in closed)]
    texts = [render_messages(group.prompt, tokenizer, add_generation_prompt=True, **group.template_kwargs)]
    for i, completion in enumerate(group.completions):
        whole = [*prompt, *completion]
        texts.append(render_messages(whole, tokenizer, **group.template_kwargs))
        _check_rendered(completion, texts[-1], f"completion {i}")
    _check_rendered(prompt, texts[1] if len(texts) > 1 else texts[0], "the prompt")
    if tools := group.template_kwargs.get("tools"):
        names = [tool.get("function", tool).get("name") for tool in tools if isinstance(tool, Mapping)]
        lost = [name for name in names if isinstance(name, str) and name not in texts[0]]
        if lost:
            raise BadRow(
                f"the chat template renders nothing of the tool '{lost[0]}'. Use a model whose template knows "
                "tools, or drop "
                "the row (on_bad_row='drop')."
            )
    return texts


def render_messages(turns: Text, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """Return the text of a dialogue under the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
        BadRow: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are conversations, but the tokenizer of {tokenizer.name_or_path!r} has no chat template. "
            "Set tokenizer.chat_template, or give prompts and completions as plain text."
        )
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        return text
    except Exception as error:  # whatever a template raises
        roles = [turn.get("role") for turn in turns]
        raise BadRow(
            f"the chat template refuses the messages (roles {roles}): {type(error).__name__}: {error}. Change the "
            "row, or "
            "drop it (on_bad_row='drop')."
        ) from error


def _check_rendered(turns: Sequence[Mapping[str, Any]], text: str, what: str) -> None:
    """Check that what was given stands in what was rendered."""
    for turn in turns:
        content = (turn.get("content") or "").rsplit("</think>", 1)[-1].strip()  # templates leave out earlier thoughts
        if content and content not in text:
            raise BadRow(
                f"the chat template leaves out a text of {what}: {content[:60]!r} (role '{turn.get('role')}'). "
                "Use another "
                "template, or drop the row (on_bad_row='drop')."
            )
        for call in turn.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            leaves = [function.get("name"), *_leaves(function.get("arguments"))]
            lost = [
                leaf
                for leaf in leaves
                if isinstance(leaf, str) and leaf not in text and json.dumps(leaf)[1:-1] not in text
            ]
            if lost or not leaves[0]:
                raise BadRow(
                    f"the chat template leaves out the tool call of {what}: {str(lost or call)[:60]!r}. Use a "
                    "model whose "
                    "template knows tool calls, or drop the row (on_bad_row='drop')."
                )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            yield value
            return
        if isinstance(inner, Mapping | list):
            yield from _leaves(inner)
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _parted(
    encoded: list[list[int]],
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int | None,
) -> TokenisedGroup:
    """Split prompt + completion where they diverge from the prompt, and cut."""
    (prompt_ids, *full_ids), eos = encoded, tokenizer.eos_token_id
    start = min(_common(prompt_ids, ids) for ids in full_ids)
    start = min(start, *(_common(full_ids[0], ids) for ids in full_ids[1:])) if len(full_ids) > 1 else start
    completion_ids = [ids[start:] if group.is_conversational else _one_eos(ids[start:], eos) for ids in full_ids]
    for i, ids in enumerate(completion_ids):
        if not ids or all(token == eos for token in ids):
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
    open_prompt = _without_eos(prompt_ids, eos)  # a tokenizer may close every text it reads
    moved = max(0, len(open_prompt) - start)
    found = TokenisedGroup(prompt_ids[:start], completion_ids, moved_boundary=moved)
    return _fit(found, max_length, max_prompt_length, tokenizer.bos_token_id)


def _common(a: list[int], b: list[int]) -> int:
    """Return how many first tokens two lists share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


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


def tokenise_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[int]:
    """Token ids of a prompt: text as the tokenizer reads it, messages by its chat template; BOS at most once, in front.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
        BadRow: the template refuses the messages.
    """
    chat = not isinstance(prompt, str)
    text = render_messages(prompt, tokenizer, add_generation_prompt=True, **template_kwargs) if chat else prompt
    return _one_bos(_encode([text], tokenizer, special=not chat)[0], tokenizer.bos_token_id)


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def _one_eos(ids: list[int], eos: int) -> list[int]:
    return [*_without_eos(ids, eos), eos]


def _without_eos(ids: list[int], eos: int) -> list[int]:
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


@dataclass
class DataReport:
    """What a dataset turned out to hold. Row numbers are the dataset's own, from 0.

    Counts are known for a map-style dataset; a stream is read as it is trained on, so that only its shape and columns
    are.
    """

    spelling: str  # the name of its shape
    known_from: str = ""
    rows: int | None = None
    groups: int | None = None
    groups_by_k: dict[int, int] = field(default_factory=dict)
    read_columns: list[str] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)
    dropped: int = 0
    dropped_because: dict[str, str] = field(default_factory=dict)
    single_answers: int = 0
    no_signal: int = 0
    no_signal_rows: list[int] = field(default_factory=list)
    cut_completions: int = 0
    cut_prompts: int = 0
    moved_boundaries: int = 0
    equal_completions: int = 0
    repeated_prompts: int = 0
    ties: int = 0
    contradictions: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def recognised(self) -> str:
        """Say as what the dataset was recognised, and how many groups it holds."""
        known = f"{self.spelling} (like {self.known_from})" if self.known_from else self.spelling
        read = f", from {', '.join(self.read_columns)}" if self.read_columns else ""
        if self.groups is None:
            return f"a stream of {known}{read}"
        ks = ", ".join(f"{n} of K = {k}" for k, n in self.groups_by_k.items())
        return f"{self.groups} groups ({ks}) of {self.rows} rows, read as {known}{read}"

    def lost(self) -> list[str]:
        """Say what was dropped or cut, a line each, with the first rows."""
        first = "; ".join(self.dropped_because.values())
        lines = {
            f"{self.dropped} of {self.rows} rows dropped. The first: {first}": self.dropped,
            f"{self.single_answers} prompts with one answer dropped: a group needs two.": self.single_answers,
            f"{self.equal_completions} completions left out that equal another of their group.": self.equal_completions,
            f"{self.cut_completions} completions cut to fit max_length (they train no EOS).": self.cut_completions,
            f"{self.cut_prompts} prompts cut to max_prompt_length (their end is kept).": self.cut_prompts,
            f"in {self.moved_boundaries} groups the prompt's last token merges with the completion's first; the "
            "completions are scored from there on.": self.moved_boundaries,
            f"in {self.repeated_prompts} groups the completions began with the prompt, which was taken out of them.": (
                self.repeated_prompts
            ),
        }
        return [line for line, count in lines.items() if count]

    def notes(self) -> list[str]:
        """Say what was not read, what was lost, and what weighs nothing."""
        unread = [f"columns not read: {', '.join(self.unread_columns)}."] if self.unread_columns else []
        rated = []
        if self.ties or self.contradictions:
            rated = [
                f"of the pairs, {self.ties} have equal ratings and {self.contradictions} a higher one for the "
                "rejected; they "
                "are trained as pairs all the same."
            ]
        where = f"(first rows {self.no_signal_rows})"
        flat = [f"{self.no_signal} of {self.groups} groups have equal scores only {where}."] if self.no_signal else []
        return [*unread, *self.lost(), *rated, *flat]


def read_shape(dataset: Dataset | IterableDataset, options: Options, name: str) -> Reading | None:
    """Recognise how a dataset is spelled, by its first rows; None for token ids.

    Raises:
        ValueError: see :func:`contrastive_align.data.shapes.recognise`.
    """
    sample, problem = [], None
    for number, row in enumerate(first_rows(dataset)):
        try:
            sample.append(values_of(row, f"{name}, row {number}"))
        except BadRow as error:
            problem = problem or error
    names = dataset.column_names
    if names is None or RAW in names:
        names = list(dict.fromkeys(column for row in sample for column in row))
    if not sample:
        if problem is not None:
            raise problem
        raise ValueError(f"The {name} dataset has no rows, expected at least one group.")
    if "image" in names or "images" in names:
        raise ValueError(
            f"The {name} dataset has images (columns {names}). Vision data is not supported here; for pairs use "
            "trl.DPOTrainer, or remove the column."
        )
    if all(column in names for column in TOKEN_COLUMNS):
        return None
    return recognise(sample, names, options)


def join_rows(dataset: Dataset, reading: Reading, *, on_bad_row: str, name: str) -> tuple[Dataset, dict[str, Any]]:
    """Join the rows of a prompt, wherever they stand, into groups in the canonical form.

    Returns:
        The groups, and counts: ``rows``, ``dropped``, ``dropped_because``, ``single_answers`` (prompts with one,
        dropped).

    Raises:
        BadRow: a row cannot be read, under ``on_bad_row="raise"``.
    """
    keys = dataset.map(
        _Keys(reading, on_bad_row, name),
        with_indices=True,
        batched=True,
        batch_size=1000,
        remove_columns=dataset.column_names,
        features=Features(key=Value("int64"), problem=Value("string")),
        desc=f"Joining the {name} rows of each prompt",
    )
    found, problems = np.asarray(keys["key"][:], dtype=np.int64), keys["problem"][:]
    bad = [i for i, problem in enumerate(problems) if problem]
    good = np.setdiff1d(np.arange(len(found)), np.asarray(bad, dtype=np.int64))
    _, first, inverse, sizes = np.unique(found[good], return_index=True, return_inverse=True, return_counts=True)
    order = good[np.lexsort((good, first[inverse]))]
    counts = {
        "rows": len(dataset),
        "dropped": len(bad),
        "single_answers": int((sizes == 1).sum()),
        "dropped_because": {str(i): problems[i] for i in bad[:FIRST_ROWS]},
    }
    if not (sizes > 1).any():
        raise ValueError(
            f"No two rows of the {name} dataset have the same prompt ({len(dataset)} rows of one answer each, read as "
            f"'{reading.shape}'), and a group needs two answers. The prompt is {_prompt_columns(reading)}: if "
            "another column "
            "is, say so with columns='prompt=NAME'."
        )
    told = {"order": order, "sizes": sizes[np.argsort(first)], "reading": reading, "name": name}
    joined = Dataset.from_generator(
        _joined_groups,
        gen_kwargs={"dataset": dataset, **told},
        features=Features({ROW: Value("int64"), RAW: Value("string")}),
        fingerprint=Hasher.hash((dataset._fingerprint, reading, _SOURCE, on_bad_row)),
    )
    return joined, counts


def _prompt_columns(reading: Reading) -> str:
    prompt = reading.roles["prompt"]
    return " + ".join(
        f"'{reading.names[key]}'" for key in (prompt.system, prompt.history, prompt.main, *prompt.added) if key
    )


@dataclass
class _Keys:
    """A picklable function of rows: a number for each prompt."""

    reading: Reading
    on_bad_row: str
    name: str
    source: str = _SOURCE

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        keys, problems = [], []
        for row, number in zip(_unbatched(batch), indices, strict=True):
            key, problem = 0, ""
            try:
                group, _ = _single(self.reading, row, number, self.name)
                told = json.dumps([group.prompt, group.template_kwargs], sort_keys=True)
                key = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big", signed=True)
            except BadRow as error:
                if self.on_bad_row == "raise":
                    raise
                problem = _as_utf8(error)
            keys.append(key)
            problems.append(problem)
        return {"key": keys, "problem": problems}


def _single(reading: Reading, row: Mapping[str, Any], number: int, name: str) -> tuple[Group, int]:
    number = row.get(ROW, number)
    where = f"{name}, row {number}"
    values = values_of(row, where)
    [parts] = reading(values, where)
    return checked_group(parts, where, least=1, prompt_repeats=reading.prompt_repeats)[0], number


def _joined_groups(
    dataset: Dataset, order: np.ndarray, sizes: np.ndarray, reading: Reading, name: str
) -> Iterator[dict[str, Any]]:
    rows_in_order, at = iter(dataset.select(order)), 0
    for size in sizes:
        members = [_single(reading, next(rows_in_order), int(order[at + i]), name) for i in range(size)]
        at += size
        if size == 1:
            continue
        (first, number) = members[0]
        told = {
            "prompt": first.prompt, "completions": [c for group, _ in members for c in group.completions],
            "scores": [s for group, _ in members for s in group.scores], **first.template_kwargs,
        }  # fmt: skip
        extra = {k: told.pop(k) for k in list(first.template_kwargs) if k != "tools"}
        told |= {"chat_template_kwargs": extra} if extra else {}
        yield {ROW: number, RAW: json.dumps(told, ensure_ascii=False)}


def groups_of(dataset: Dataset | IterableDataset, *, options: Options, on_bad_row: str, name: str) -> Iterator[Group]:
    """Yield the groups of a dataset as text; bad rows raise, or are left out."""
    reading: Any = read_shape(dataset, options, name)
    if reading is None:
        raise ValueError(f"The {name} dataset holds token ids, and no text.")
    if reading.joined and isinstance(dataset, Dataset):
        dataset, _ = join_rows(dataset, reading, on_bad_row=on_bad_row, name=name)
        reading = read_shape(dataset, Options(), name)
    for number, row in enumerate(dataset):
        where = f"{name}, row {row.get(ROW, number)}"
        try:
            values = values_of(row, where)
            for parts in reading(values, where):
                yield checked_group(parts, where, prompt_repeats=reading.prompt_repeats)[0]
        except BadRow as error:
            if on_bad_row == "raise" and not isinstance(error, ALWAYS_DROPPED):
                raise


def _unbatched(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def prepare_groups(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    on_bad_row: str,
    num_proc: int | None = None,
    name: str = "train",
    options: Options | None = None,
    vocabulary: int | None = None,
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Turn a dataset of any known shape into one with ``prompt_ids``, ``completion_ids`` and ``scores``.

    A dataset that already has these columns is checked and cut to length like any other; further columns go.

    Args:
        dataset: the rows.
        tokenizer: the model's.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, which keeps its end.
        on_bad_row: ``"raise"`` at the first bad row, or ``"drop"`` and count. Groups whose prompt leaves no room under
            ``max_length`` are dropped and counted in either case, as TRL does; and those with fewer than two different
            completions.
        num_proc: processes.
        name: the split, for errors.
        options: what the user says of the columns.
        vocabulary: rows of the model's embedding; a token beyond them is refused.

    Raises:
        BadRow: with file, row and column.
        ValueError: no known shape, no group left, or tokens that the model does not have.
    """
    options = options or Options()
    dataset = dataset.with_format(None)  # plain lists and numbers, whatever tensors it would give
    reading = read_shape(dataset, options, name)
    spelling = TOKENS if reading is None else reading.shape
    joined: dict[str, Any] = {}
    told = DataReport(spelling)
    if reading is not None:
        told.known_from = shapes.SHAPES[reading.shape].known_from
        told.read_columns, told.unread_columns = reading.read_columns, reading.unread_columns
        if reading.joined:
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"The {name} dataset has one answer a row, and the rows of a prompt may stand anywhere in it, "
                    "so it cannot "
                    "be a stream. Load it whole."
                )
            dataset, joined = join_rows(dataset, reading, on_bad_row=on_bad_row, name=name)
            reading = read_shape(dataset, Options(), name)
    reader = _RowReader(reading, tokenizer, max_length, max_prompt_length, on_bad_row, name, vocabulary)
    columns = list(dataset.column_names or next(iter(dataset)))
    map_options = {
        "with_indices": True,
        "batched": True,
        "batch_size": BATCH,
        "remove_columns": columns,
        "features": _FEATURES,
    }
    if isinstance(dataset, IterableDataset):
        reader.as_lists = True
        map_options["batch_size"] = 1  # a stream is read as it is trained on
        return dataset.map(reader, **map_options).filter(_is_good), told

    desc = f"Reading and tokenising the {name} groups"
    key = reader.cache_key(dataset)
    mapped = dataset.map(reader, **map_options, num_proc=num_proc, desc=desc, new_fingerprint=key)
    problems = mapped["problem"][:]
    good = [i for i, problem in enumerate(problems) if not problem]
    _count(mapped.select(good), told)
    told.rows = joined.get("rows", len(dataset))
    told.single_answers = joined.get("single_answers", 0)
    told.dropped = len(mapped) - len(good) + joined.get("dropped", 0)
    dropped = ((str(row), problem) for row, problem in zip(mapped["row"][:], problems, strict=True) if problem)
    told.dropped_because = dict(itertools.islice([*joined.get("dropped_because", {}).items(), *dropped], FIRST_ROWS))
    if not good:
        reasons = "\n  ".join(told.dropped_because.values())
        raise ValueError(f"No group is left of the {name} dataset's {told.rows} rows. The first reasons:\n  {reasons}")
    return (mapped if len(good) == len(mapped) else mapped.select(good)).remove_columns(_COUNTED), told


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
    equal_completions=Value("int64"),
    repeated_prompt=Value("int64"),
    rated=Value("int64"),  # of a hard pair: the sign of the ratings beside it, plus 2; 0 where there are none
)
_COUNTED = [name for name in _FEATURES if name not in TOKEN_COLUMNS]


@dataclass
class _Read:
    """A group on its way to token ids, or the error of its row."""

    row: int
    where: str
    group: Group | None = None
    tokens: TokenisedGroup | None = None
    scores: list[float] = field(default_factory=list)
    error: BadRow | None = None
    repeated_prompt: int = 0
    equal_completions: int = 0
    rated: int = 0


@dataclass
class _RowReader:
    """A picklable function of a batch of rows, so that ``datasets`` can cache and parallelise it."""

    reading: Reading | None
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    max_prompt_length: int | None
    on_bad_row: str
    name: str
    vocabulary: int | None = None
    as_lists: bool = False
    source: str = _SOURCE  # part of the cache's key: rows cached by other code are read again

    def cache_key(self, dataset: Dataset) -> str | None:
        """Return the key of the cache; None for a tokenizer in Python, of which datasets hashes every attribute.

        Of a fast tokenizer its own serialisation is hashed, which takes a hundredth of the time.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        options = replace(self, tokenizer=None)  # type: ignore[arg-type]
        tokenizer = type(self.tokenizer).__qualname__, self.tokenizer.chat_template, self.tokenizer.special_tokens_map
        written = hashlib.sha256(backend.to_str().encode()).hexdigest()
        return Hasher.hash((dataset._fingerprint, options, repr(tokenizer), written))

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> Any:
        read: list[_Read] = []
        for row, number in zip(_unbatched(batch), indices, strict=True):
            read += self._read(row, row.get(ROW, number))
        waiting = [item for item in read if item.group is not None]
        limits = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
        tokenised = tokenise_groups([item.group for item in waiting], self.tokenizer, **limits)
        for item, found in zip(waiting, tokenised, strict=True):
            if isinstance(found, BadRow):
                item.error = type(found)(f"{item.where}: {found}")
            else:
                item.tokens, item.scores = found, item.group.scores
        for item in read:
            if item.error is None:
                self._finish(item)
            if item.error is not None:
                if self.on_bad_row == "raise" and not isinstance(item.error, ALWAYS_DROPPED):
                    raise item.error
                item.tokens, item.scores = TokenisedGroup([], [[]]), [0.0]
        return _as_lists(read) if self.as_lists else _as_table(read)

    def _read(self, row: Mapping[str, Any], number: int) -> list[_Read]:
        where = f"{self.name}, row {number}"
        try:
            values = values_of(row, where)
            if self.reading is None:
                scores = self._check_tokens(values, where)
                ids = TokenisedGroup(values["prompt_ids"], values["completion_ids"])
                try:
                    ids = _fit(ids, self.max_length, self.max_prompt_length, self.tokenizer.bos_token_id)
                except BadRow as error:
                    raise type(error)(f"{where}: {error}") from error
                return [_Read(number, where, None, ids, scores)]
            return [self._group(parts, values, number, where) for parts in self.reading(values, where)]
        except BadRow as error:
            return [_Read(number, where, error=error)]

    def _group(self, parts: Any, values: Mapping[str, Any], number: int, where: str) -> _Read:
        group, counts = checked_group(parts, where, prompt_repeats=self.reading.prompt_repeats)
        found = _Read(number, where, group, None, [], None, counts.repeated_prompt, counts.equal_completions)
        if self.reading.options.hard_pairs:
            found.rated = self._rated(values, where)
            best, worst = max(group.scores), min(group.scores)
            if best > worst:
                group.scores = [float(score == best) for score in group.scores]
        ultrafeedback = self.reading.shape == "nested" and self.reading.roles["text"] == "response"
        if ultrafeedback and not group.is_conversational and self.tokenizer.chat_template:
            # Instructions and responses of UltraFeedback are turns of a chat, written as plain text.
            group.prompt = [{"role": "user", "content": group.prompt}]
            group.completions = [[{"role": "assistant", "content": text}] for text in group.completions]
        return found

    def _rated(self, values: Mapping[str, Any], where: str) -> int:
        """Return 3, 2 or 1: the ratings beside a pair are higher, equal or lower for the chosen; 0: there are none."""
        ratings = self.reading.roles.get("scores") if self.reading.shape == "pairs" else None
        row = shapes.by_key(values, self.reading.options)
        if not ratings or any(row.get(key) is None for key in ratings):
            return 0
        try:  # they are only counted
            chosen, rejected = (formats.number_of(row[key], where) for key in ratings)
        except BadRow:
            return 0
        return 2 + (chosen > rejected) - (chosen < rejected)

    def _finish(self, item: _Read) -> None:
        """Take out completions that are the same tokens after the cut, and check that the model has every token."""
        ids = item.tokens
        if ids.cut_completions and self.reading is not None:
            kept = distinct([str(tokens) for tokens in ids.completion_ids], item.scores)
            if len(kept) < len(ids.completion_ids):
                item.equal_completions += len(ids.completion_ids) - len(kept)
                if len(kept) < 2:
                    item.error = TooFew(
                        f"{item.where}: cut to max_length={self.max_length}, completions are the same tokens, and "
                        f"{len(kept)} of {len(ids.completion_ids)} are left. Dropped."
                    )
                    return
                ids.completion_ids = [ids.completion_ids[i] for i in kept]
                item.scores = [item.scores[i] for i in kept]
        if self.vocabulary is not None:
            largest = max(max(ids.prompt_ids), *(max(tokens) for tokens in ids.completion_ids if tokens))
            if largest >= self.vocabulary:
                fix = "Resize the model: model.resize_token_embeddings(len(tokenizer))."
                if self.reading is None:
                    fix = "Tokenise with the model's own tokenizer, or drop the row (on_bad_row='drop')."
                raise_as = BadRow if self.reading is None else ValueError
                error = raise_as(
                    f"{item.where}: the token id {largest} is beyond the model's embedding of {self.vocabulary} "
                    f"rows. {fix}"
                )
                if self.reading is not None:
                    raise error
                item.error = error

    def _check_tokens(self, row: Mapping[str, Any], where: str) -> list[float]:
        prompt, completions = row["prompt_ids"], row["completion_ids"]
        for column, ok in (("prompt_ids", prompt), ("completion_ids", completions and all(completions))):
            if not ok:
                raise BadRow(f"{where}: '{column}' is empty, expected token ids. Drop the row (on_bad_row='drop').")
        lists = [prompt, *completions]
        if any(not isinstance(ids, list) or any(not isinstance(i, int) or i < 0 for i in ids) for ids in lists):
            raise BadRow(f"{where}: 'prompt_ids' or 'completion_ids' hold something else than token ids. {rows.FIX}")
        columns = Columns("prompt_ids", "completion_ids", "scores")
        return check_scores(row["scores"] or [], len(completions), where, columns)


def _columns_of(read: list[_Read]) -> dict[str, list[int] | list[str]]:
    return {
        "row": [item.row for item in read],
        "problem": [_as_utf8(item.error) for item in read],
        "cut_completions": [item.tokens.cut_completions for item in read],
        "cut_prompt_tokens": [item.tokens.cut_prompt_tokens for item in read],
        "moved_boundary": [item.tokens.moved_boundary for item in read],
        "equal_completions": [item.equal_completions for item in read],
        "repeated_prompt": [item.repeated_prompt for item in read],
        "rated": [item.rated for item in read],
    }


def _as_utf8(error: Exception | None) -> str:
    """Return an error's text, which may quote what is no text; empty for None."""
    return "" if error is None else str(error).encode("utf-8", "backslashreplace").decode()


def _as_lists(read: list[_Read]) -> dict[str, list[Any]]:
    ids = {"prompt_ids": [i.tokens.prompt_ids for i in read], "completion_ids": [i.tokens.completion_ids for i in read]}
    return {**ids, "scores": [item.scores for item in read], **_columns_of(read)}


def _as_table(read: list[_Read]) -> pa.Table:
    """Build the Arrow table of a batch from flat arrays, which is faster than from lists of lists."""
    completions = [item.tokens.completion_ids for item in read]
    columns = {
        "prompt_ids": _list_array([item.tokens.prompt_ids for item in read], np.int64),
        "completion_ids": pa.ListArray.from_arrays(
            _offsets(completions), _list_array([ids for group in completions for ids in group], np.int64)
        ),
        "scores": _list_array([item.scores for item in read], np.float64),
        **{name: pa.array(values) for name, values in _columns_of(read).items()},
    }
    return pa.table(columns, schema=_FEATURES.arrow_schema)


def _offsets(lists: list[Any]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, lists)], dtype=np.int32))


def _list_array(lists: list[list[Any]], dtype: Any) -> pa.ListArray:
    flat = np.fromiter(itertools.chain.from_iterable(lists), dtype=dtype)
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(flat))


def _is_good(row: Mapping[str, Any]) -> bool:
    if row["problem"]:
        logger.warning_once(f"Rows of the stream are dropped; the first: {row['problem']}")
    return not row["problem"]


def _count(dataset: Dataset, report: DataReport) -> None:
    scores, numbers = dataset["scores"][:], dataset["row"][:]
    flat = [i for i, s in enumerate(scores) if len(set(s)) == 1]
    rated = Counter(dataset["rated"][:])
    report.groups = len(dataset)
    report.groups_by_k = dict(sorted(Counter(len(s) for s in scores).items()))
    report.no_signal, report.no_signal_rows = len(flat), [numbers[i] for i in flat[:FIRST_ROWS]]
    report.cut_completions = sum(dataset["cut_completions"][:])
    report.cut_prompts = sum(n > 0 for n in dataset["cut_prompt_tokens"][:])
    report.moved_boundaries = sum(n > 0 for n in dataset["moved_boundary"][:])
    report.equal_completions = sum(dataset["equal_completions"][:])
    report.repeated_prompts = sum(dataset["repeated_prompt"][:])
    report.ties, report.contradictions = rated[2], rated[1]
