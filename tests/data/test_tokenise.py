"""Group -> token ids: one BOS, one EOS, TRL's boundary, nothing cut or dropped in silence."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from reading import read
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOTrainer

from contrastive_align import demo
from contrastive_align.data import BadRow, Group, prepare, prepare_groups, tokenise_group
from contrastive_align.data.tokenise import NoRoom


TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
ASK = "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
CLOSED = TURNS + "{{ eos_token }}" + ASK
CLOSED_NEWLINE = TURNS + "{{ eos_token + '\n' }}" + ASK
OPEN = TURNS + "{{ '\n' }}" + ASK


def tokenizer_of_characters(
    template: str | None = None, bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = "<pad>", adds=""
) -> PreTrainedTokenizerFast:
    """A token per character, but for ``ab``, one token: a boundary between a and b merges."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    specials = list(dict.fromkeys(t for t in ("<unk>", bos, eos, pad) if t))
    vocabulary = {token: i for i, token in enumerate([*specials, *characters, "ab"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()  # no spaces between the characters
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    if adds:
        pattern = " ".join({"bos": bos, "text": "$A", "eos": eos}[part] for part in adds.split())
        backend.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[(t, vocabulary[t]) for t in {bos, eos} if t and t in pattern]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "demo": lambda: AutoTokenizer.from_pretrained(demo.MODEL_PATH),
    "adds_bos": lambda: tokenizer_of_characters("{{ bos_token }}" + CLOSED, adds="bos text"),
    "adds_bos_and_eos": lambda: tokenizer_of_characters(CLOSED, adds="bos text eos"),
    "bos_is_eos_is_pad": lambda: tokenizer_of_characters(CLOSED, bos="<|end|>", eos="<|end|>", pad="<|end|>"),
    "eos_then_newline": lambda: tokenizer_of_characters(CLOSED_NEWLINE),
    "no_bos": lambda: tokenizer_of_characters(CLOSED, bos=None),
    "open_turns": lambda: tokenizer_of_characters(OPEN),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return tokenizer_of_characters()


def trl_pairs(rows: list[dict], tokenizer, max_length: int | None = None) -> Dataset:
    """What TRL itself makes of pairs."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    stub = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(stub, Dataset.from_list(rows), tokenizer, args, "train")


def ours(rows, tokenizer, **options):
    options = {"max_length": None, "max_prompt_length": None, "on_bad_row": "raise", **options}
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_groups(dataset, tokenizer, **options)


def as_pairs(dataset) -> list[tuple]:
    return [(r["prompt_ids"], *r["completion_ids"]) for r in dataset]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


PAIRS = [
    {"prompt": "Ask Anna:", "chosen": " please sit.", "rejected": " sit!"},
    {"prompt": "merge a", "chosen": "b and on", "rejected": "nd on"},  # one completion moves the boundary of both
    {"prompt": "shared", "chosen": " the same start", "rejected": " the same end"},
    {"prompt": "same twice", "chosen": "yes", "rejected": "yes, it is"},
]
TALKS = [
    {
        "prompt": [turn("user", "Ask Anna.")],
        "chosen": [turn("assistant", "Please sit.")],
        "rejected": [turn("assistant", "Sit!")],
    },
    {
        "prompt": [turn("system", "Be kind."), turn("user", "a"), turn("assistant", "b"), turn("user", "ab")],
        "chosen": [turn("assistant", "one and two")],
        "rejected": [turn("assistant", "one and a half")],
    },
]


# --------------------------------------------------------------------------------------------------- as TRL does


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if n != "adds_bos_and_eos"])
def test_pairs_are_tokenised_as_trl_tokenises_them(name):
    tokenizer = TOKENIZERS[name]()
    implicit = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in PAIRS[:3]]
    for rows in (PAIRS, implicit):
        expected = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trl_pairs(rows, tokenizer)]
        assert as_pairs(ours(rows, tokenizer)[0]) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_dialogues_are_tokenised_as_trl_tokenises_them(name):
    tokenizer = TOKENIZERS[name]()
    expected = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trl_pairs(TALKS, tokenizer)]
    assert as_pairs(ours(TALKS, tokenizer)[0]) == expected


def test_all_bundled_pairs_are_tokenised_as_trl_tokenises_them():
    tokenizer = TOKENIZERS["demo"]()
    rows = demo.load_preference_dataset()["test"].to_list()
    expected = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trl_pairs(rows, tokenizer)]
    assert as_pairs(ours(rows, tokenizer)[0]) == expected


def test_pairs_without_room_are_dropped_as_trl_drops_them(plain):
    rows = [{"prompt": "p" * n, "chosen": "yes", "rejected": "no"} for n in (2, 4, 5, 6, 20)]
    kept, report = ours(rows, plain, max_length=5)
    assert [r["prompt_ids"] for r in kept] == [r["prompt_ids"] for r in trl_pairs(rows, plain, max_length=5)]
    assert len(kept) == 2 and report.dropped == 3
    assert list(report.dropped_because) == ["2", "3", "4"]
    assert "train, row 2: the prompt has 5 tokens and max_length is 5" in report.dropped_because["2"]
    assert "max_prompt_length" in report.dropped_because["2"]


def test_where_trl_trains_two_eos_there_is_one():
    tokenizer = TOKENIZERS["adds_bos_and_eos"]()
    eos = tokenizer.eos_token_id
    theirs = trl_pairs(PAIRS, tokenizer)
    for (prompt, *completions), row in zip(as_pairs(ours(PAIRS, tokenizer)[0]), theirs, strict=True):
        assert prompt == row["prompt_ids"]
        assert [[*c, eos] for c in completions] == [row["chosen_ids"], row["rejected_ids"]]


# ------------------------------------------------------------------------------------------------- one BOS, one EOS


TALKS_ONE = TALKS[:1]


@pytest.mark.parametrize("rows", [PAIRS, TALKS_ONE], ids=["plain", "dialogues"])
def test_one_bos_at_most_and_one_eos_exactly(tokenizer, rows):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in rows:
        ids = tokenise_group(read(row), tokenizer)
        for completion in ids.completion_ids:
            if rows is TALKS_ONE and tokenizer.chat_template == OPEN:
                assert eos not in completion  # a turn ends as its template ends it
                continue
            assert completion.count(eos) == 1
            after = tokenizer.decode(completion[completion.index(eos) + 1 :])
            assert after in ("", "\n")  # a template may close the line after the turn
            if bos is not None and bos != eos:
                assert bos not in ids.prompt_ids[1:] + completion


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_of_the_text_is_lost(name):
    tokenizer = TOKENIZERS[name]()
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    for row in PAIRS:
        ids = tokenise_group(read(row), tokenizer)
        texts = [tokenizer.decode(ids.prompt_ids + c) for c in ids.completion_ids]
        assert [t.removeprefix(bos) for t in texts] == [row["prompt"] + row[c] + eos for c in ("chosen", "rejected")]


def test_eos_and_bos_that_are_written_out_are_not_doubled(tokenizer):
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    bare = tokenise_group(Group("Hi", [" you", " there"], [1.0, 0.0]), tokenizer)
    for ending in (eos, eos + eos):
        written = tokenise_group(Group("Hi", [" you" + ending, " there"], [1.0, 0.0]), tokenizer)
        assert written == bare
    if bos and bos != eos:
        written = tokenise_group(Group(bos + "Hi", [" you", " there"], [1.0, 0.0]), tokenizer)
        assert written.prompt_ids[:2].count(tokenizer.bos_token_id) == 1
        assert written.completion_ids == bare.completion_ids


def test_a_tokenizer_without_eos_is_refused_with_the_way_out():
    tokenizer = tokenizer_of_characters(eos=None)
    with pytest.raises(ValueError, match=r"no eos_token.*tokenizer\.eos_token = ") as caught:
        tokenise_group(Group("p", ["a", "b"], [1.0, 0.0]), tokenizer)
    assert not isinstance(caught.value, BadRow)  # no row is to blame, so none is dropped for it


def test_dialogues_without_a_chat_template_are_refused_with_the_way_out(plain):
    with pytest.raises(ValueError, match=r"no chat template.*tokenizer\.chat_template") as caught:
        ours(TALKS, plain, on_bad_row="drop")
    assert not isinstance(caught.value, BadRow)


def test_what_the_row_brings_for_the_template_reaches_it():
    template = "{{ (tools | map(attribute='function.name') | join) if tools else 0 }}{{ style or '' }}" + CLOSED
    tokenizer = tokenizer_of_characters(template)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    rows = [{**TALKS[0], "tools": json.dumps(tools), "chat_template_kwargs": {"style": "x"}}]
    pair = as_pairs(ours(rows, tokenizer)[0])
    assert tokenizer.decode(pair[0][0]).startswith("fxuser: ")
    theirs = trl_pairs(rows, tokenizer)[0]
    assert pair == [(theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"])]


# ------------------------------------------------------------------------------------------------- the boundary


def test_one_merging_completion_moves_the_boundary_of_all(plain):
    ids = tokenise_group(Group("x a", ["b!", "c", "d"], [1.0, 0.0, 0.0]), plain)
    assert plain.decode(ids.prompt_ids) == "x "
    assert [plain.decode(c) for c in ids.completion_ids] == ["ab!</s>", "ac</s>", "ad</s>"]
    assert ids.moved_boundary == 1
    assert tokenise_group(Group("x a", ["c", "d"], [1.0, 0.0]), plain).moved_boundary == 0


def test_a_prompt_that_merges_away_is_refused(plain):
    with pytest.raises(BadRow, match=r"differ from the first on.*End the prompt on a token boundary"):
        tokenise_group(Group("a", ["b", "c"], [1.0, 0.0]), plain)
    rows = [{"prompt": "x", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(BadRow, match=r"^train, row 1: the prompt's tokens"):
        ours(rows, plain)
    kept, report = ours(rows, plain, on_bad_row="drop")
    assert len(kept) == 1 and report.dropped == 1 and list(report.dropped_because) == ["1"]


def test_moved_boundaries_are_counted_and_said(plain):
    _, report = ours(PAIRS, plain)
    assert report.moved_boundaries == 1
    assert any("in 1 groups the prompt's last token merges" in line for line in report.notes())


@pytest.mark.parametrize("name", ["adds_bos_and_eos", "adds_bos", "no_bos"])
def test_an_eos_that_the_tokenizer_adds_to_the_prompt_is_no_moved_boundary(name):
    _, report = ours([PAIRS[0], PAIRS[2], PAIRS[3]], TOKENIZERS[name]())
    assert report.moved_boundaries == 0
    _, report = ours(PAIRS, TOKENIZERS[name]())
    assert report.moved_boundaries == 1


def test_a_template_that_drops_the_completion_is_refused():
    drops = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer = tokenizer_of_characters(drops)
    with pytest.raises(BadRow, match=r"^train, row 0: the chat template leaves out a text of completion 0: 'Please sit.'"):
        ours(TALKS[:1], tokenizer)


# ----------------------------------------------------------------------------------------------------- truncation


def test_completions_are_cut_at_their_end_and_lose_their_eos(plain):
    group = Group("12345", ["abc", "cdefgh", "g"], [1.0, 0.5, 0.0])
    ids = tokenise_group(group, plain, max_length=9)
    assert [plain.decode(c) for c in ids.completion_ids] == ["abc</s>", "cdef", "g</s>"]
    assert (ids.cut_completions, ids.cut_prompt_tokens) == (1, 0)
    ids = tokenise_group(group, plain, max_length=6)
    assert [plain.decode(c) for c in ids.completion_ids] == ["ab", "c", "g"] and ids.cut_completions == 3


def test_a_completion_that_just_fits_keeps_its_eos(plain):
    ids = tokenise_group(Group("12", ["xyz", "x"], [1.0, 0.0]), plain, max_length=6)
    assert [plain.decode(c) for c in ids.completion_ids] == ["xyz</s>", "x</s>"] and ids.cut_completions == 0
    ids = tokenise_group(Group("12", ["xyz", "x"], [1.0, 0.0]), plain, max_length=5)
    assert [plain.decode(c) for c in ids.completion_ids] == ["xyz", "x</s>"] and ids.cut_completions == 1


def test_a_long_prompt_keeps_its_end(plain):
    group = Group("123456789", ["xyz", "x"], [1.0, 0.0])
    ids = tokenise_group(group, plain, max_length=6, max_prompt_length=4)
    assert plain.decode(ids.prompt_ids) == "6789" and ids.cut_prompt_tokens == 5
    assert [plain.decode(c) for c in ids.completion_ids] == ["xy", "x</s>"]
    assert tokenise_group(group, plain, max_prompt_length=9).cut_prompt_tokens == 0


def test_no_truncation_leaves_a_completion_without_tokens(tokenizer):
    group = Group("Ask Anna to sit:", [" please sit down, Anna.", " sit!", " a"], [1.0, 0.5, 0.0])
    whole = len(tokenise_group(group, tokenizer).prompt_ids)
    for max_length in range(2, whole + 12):
        for max_prompt_length in (None, *range(1, max_length)):
            options = {"max_length": max_length, "max_prompt_length": max_prompt_length}
            if min(whole, max_prompt_length or whole) >= max_length:
                with pytest.raises(NoRoom, match=f"max_length is {max_length}"):
                    tokenise_group(group, tokenizer, **options)
                continue
            ids = tokenise_group(group, tokenizer, **options)
            assert all(ids.completion_ids) and ids.prompt_ids
            assert all(len(ids.prompt_ids) + len(c) <= max_length for c in ids.completion_ids)


def test_what_was_cut_is_counted_and_said(plain):
    rows = [
        {"prompt": "12345678", "completions": ["abcdefgh", "b", "cdefghij"], "scores": [1.0, 2.0, 3.0]},
        {"prompt": "1", "completions": ["x", "yz"], "scores": [1.0, 2.0]},
        {"prompt": "123456", "completions": ["x", "yzyzyzyz"], "scores": [1.0, 2.0]},
    ]
    kept, report = ours(rows, plain, max_length=8, max_prompt_length=4)
    assert (report.cut_completions, report.cut_prompts, report.dropped) == (3, 2, 0)
    assert report.groups_by_k == {2: 2, 3: 1}
    assert "3 completions cut to fit max_length (they train no EOS)." in report.notes()
    assert "2 prompts cut to max_prompt_length (their end is kept)." in report.notes()
    assert kept.column_names == ["prompt_ids", "completion_ids", "scores"]


# ------------------------------------------------------------------------------------------------ a whole dataset


def group(n: int, scores=(1.0, 0.0)) -> dict:
    return {"prompt": f"q{n}:", "completions": ["yes", "no"], "scores": list(scores)}


def bad(n: int) -> dict:
    return {**group(n), "completions": ["yes", ""]}


MIXED = [group(0), bad(1), group(2, (3.0, 3.0)), bad(3), group(4), group(5, (0.0, 0.0))]


def check_mixed(kept, report) -> None:
    assert (report.rows, report.groups, report.dropped, report.groups_by_k) == (6, 4, 2, {2: 4})
    assert list(report.dropped_because) == ["1", "3"]
    assert report.dropped_because["3"].startswith("train, row 3: 'completions'[1] is empty")
    assert (report.no_signal, report.no_signal_rows) == (2, [2, 5])  # the dataset's own numbers
    assert [list(s) for s in kept["scores"]] == [[1, 0], [3, 3], [1, 0], [0, 0]]  # equal scores are kept
    assert report.notes() == [
        f"2 of 6 rows dropped. The first: {report.dropped_because['1']}; {report.dropped_because['3']}",
        "2 of 4 groups have equal scores only (first rows [2, 5]).",
    ]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bad_rows_are_dropped_counted_and_shown(plain, num_proc):
    kept, report = ours(MIXED, plain, on_bad_row="drop", num_proc=num_proc)
    check_mixed(kept, report)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_first_bad_row_raises(plain, num_proc):
    with pytest.raises(BadRow, match=r"^train, row [13]: 'completions'\[1\] is empty"):
        ours(MIXED, plain, num_proc=num_proc)


def test_only_the_first_rows_are_shown(plain):
    rows = [group(0), *map(bad, range(1, 10)), *(group(n, (1.0, 1.0)) for n in range(10, 20))]
    _, report = ours(rows, plain, on_bad_row="drop")
    assert report.dropped == 9 and list(report.dropped_because) == ["1", "2", "3", "4", "5"]
    assert report.no_signal == 10 and report.no_signal_rows == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_many_bad_rows_before_the_first_good_one(plain, num_proc):
    """More than a writer's batch, so that no row with tokens is there when the columns get their types."""
    kept, report = ours([bad(n) for n in range(1100)] + [group(0)], plain, on_bad_row="drop", num_proc=num_proc)
    assert report.dropped == 1100 and len(kept) == 1
    assert plain.decode(kept[0]["prompt_ids"]) == "q0:"


def test_the_cache_gives_the_same_rows_and_the_same_report(plain, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, MIXED)))
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    first, report = ours(dataset, plain, on_bad_row="drop")
    check_mixed(first, report)

    def not_again(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare, "tokenise_groups", not_again)
    second, again = ours(dataset, plain, on_bad_row="drop")
    assert again == report and second.to_list() == first.to_list()
    with pytest.raises(AssertionError, match="tokenised again"):  # other options, other ids
        ours(dataset, plain, on_bad_row="drop", max_length=7)


def test_a_dataset_with_none_left_is_an_error_with_the_reasons(plain):
    with pytest.raises(ValueError, match=r"No group is left of the eval dataset's 2 rows(.|\n)*eval, row 0: .*empty"):
        ours([bad(0), bad(1)], plain, on_bad_row="drop", name="eval")
    with pytest.raises(ValueError, match=r"No group is left(.|\n)*no room for a completion"):
        ours([group(0)], plain, max_length=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_without_rows_is_an_error(plain, stream):
    empty = IterableDataset.from_generator(lambda: iter([])) if stream else Dataset.from_list([group(0)]).select([])
    with pytest.raises(ValueError, match="The train dataset has no rows, expected at least one group"):
        ours(empty, plain)


def test_images_are_refused_with_the_way_out(plain):
    with pytest.raises(ValueError, match=r"images.*trl\.DPOTrainer"):
        ours([{**group(0), "image": "x.png"}], plain)


def test_token_ids_are_taken_as_they_are(plain):
    rows = [{"prompt_ids": [3], "completion_ids": [[4], [5, 1]], "scores": [1, 1]}]
    kept, report = ours(rows, plain)
    assert kept.to_list() == rows
    assert (report.spelling, report.groups, report.no_signal) == ("token ids", 1, 1)


@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_a_dataset_that_gives_tensors_is_read_as_lists(plain, format):
    expected = ours([group(0)], plain)[0].to_list()
    kept, _ = ours(Dataset.from_list([group(0)]).with_format(format), plain)
    assert kept[0] == expected[0]
    again, _ = ours(kept.with_format(format), plain)  # token ids
    assert again[0] == expected[0]


def test_other_columns_are_left_behind(plain):
    rows = [{**group(n), "models": ["a", "b"], "problem": "none", "cut_completions": 7} for n in range(2)]
    kept, report = ours(rows, plain)
    assert kept.column_names == ["prompt_ids", "completion_ids", "scores"]
    assert (len(kept), report.dropped, report.cut_completions) == (2, 0, 0)


def test_the_report_can_be_written_as_json(plain):
    _, report = ours(MIXED, plain, on_bad_row="drop")
    assert json.loads(json.dumps(report.as_dict()))["dropped"] == 2


# --------------------------------------------------------------------------------------------------------- streams


def stream(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("make", [stream, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
def test_a_stream_gives_the_rows_of_the_whole_dataset(plain, make):
    whole, _ = ours(MIXED, plain, on_bad_row="drop")
    kept, report = ours(make(MIXED), plain, on_bad_row="drop")
    for _ in range(2):  # every epoch
        assert [{k: r[k] for k in ("prompt_ids", "completion_ids", "scores")} for r in kept] == whole.to_list()
    assert (report.spelling, report.groups) == ("lists", None)


def test_a_bad_row_of_a_stream_raises_when_it_is_read(plain):
    rows = iter(ours(stream(MIXED), plain)[0])
    assert next(rows)["scores"] == [1.0, 0.0]
    with pytest.raises(BadRow, match=r"^train, row 1: 'completions'\[1\] is empty"):
        list(rows)


def test_dropped_rows_of_a_stream_are_said(plain, caplog):
    logging.getLogger("transformers").propagate = True
    rows = [group(0), {**group(1), "completions": ["only a stream has this", ""]}]
    with caplog.at_level(logging.WARNING, logger=prepare.logger.name):
        prepare.logger.addHandler(caplog.handler)
        try:
            assert len(list(ours(stream(rows), plain, on_bad_row="drop", name="streamed")[0])) == 1
        finally:
            prepare.logger.removeHandler(caplog.handler)
    assert "streamed, row 1: 'completions'[1] is empty" in caplog.text


# ----------------------------------------------------------------------------------------------- real data, if there

DATA = os.environ.get("CONTRASTIVE_ALIGN_DATA")
REAL = sorted(Path(DATA).glob("*_groups.jsonl")) if DATA else []

if REAL:

    @pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
    def test_real_groups(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:100] if line]
        tokenizer = TOKENIZERS["demo"]()
        kept, report = ours(rows, tokenizer, on_bad_row="drop", max_length=400, max_prompt_length=300)
        assert report.groups + report.dropped == len(rows) and report.groups > 90
        assert sum(report.groups_by_k.values()) == report.groups
        assert all(all(r["completion_ids"]) and len(r["completion_ids"]) == len(r["scores"]) for r in kept)

    def test_real_pairs_are_tokenised_as_trl_tokenises_them():
        lines = (Path(DATA) / "hh_harmless_pairs.jsonl").read_text(encoding="utf-8").split("\n")[:100]
        tokenizer = TOKENIZERS["demo"]()
        rows = [json.loads(line) for line in lines]
        kept, report = ours(rows, tokenizer, on_bad_row="drop")
        assert report.dropped < 5
        dropped = {int(number) for number in report.dropped_because}
        theirs = trl_pairs([r for i, r in enumerate(rows) if i not in dropped], tokenizer)
        assert as_pairs(kept) == [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in theirs]
