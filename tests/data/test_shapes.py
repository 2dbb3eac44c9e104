"""Published shapes -> the groups that they mean, and what no shape fits is refused with what to type."""

import re

import pytest
from data.published import LONG, ONE_ROW, READ, REFUSED, SHAPES, SYSTEM, A, B, C, P, assistant, from_json, talk, user
from datasets import Dataset
from transformers import AutoTokenizer

from contrastive_align import demo
from contrastive_align.data import BadRow, Options, prepare_groups
from contrastive_align.data.columns import key_of, read_options
from contrastive_align.data.reading import groups_of


TEMPLATE = "{% for m in messages %}{{ m.content or m.tool_calls | tojson }}|{% endfor %}{{ tools | tojson }}"


def groups(rows, on_bad_row="raise", **options):
    found = groups_of(from_json(rows), options=Options(**options), on_bad_row=on_bad_row, name="train")
    return [(g.prompt, g.completions, g.scores) for g in found]


@pytest.mark.parametrize("name", READ)
def test_a_published_shape_is_the_groups_that_it_means(name):
    shape = SHAPES[name]
    copies = 3 if len(shape["rows"]) == 1 else 1
    assert groups(shape["rows"] * copies, **shape.get("options", {})) == [tuple(shape["group"])] * copies


@pytest.mark.parametrize("name", REFUSED)
def test_a_shape_that_is_not_told_by_its_names_is_refused_with_what_it_needs(name):
    shape = SHAPES[name]
    with pytest.raises(ValueError) as caught:
        groups(shape["rows"] * 3)
    assert [word for word in shape["refused"] if word not in str(caught.value)] == []
    for option in ("columns", "score_column"):  # an option that is offered is known, and leads on
        if match := re.search(rf"\b{option}='([^']*)'", str(caught.value)):
            told = read_options(match[1], None).columns if option == "columns" else match[1]
            if "NAME" not in match[1] and not isinstance(caught.value, BadRow):
                try:
                    groups(shape["rows"] * 3, **{option: told})
                except ValueError as error:
                    assert str(error) != str(caught.value)


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_stream_of_it_is_prepared_and_counted_like_the_whole(name):
    shape = SHAPES[name]
    rows = [{**shape["rows"][0], "n": n} for n in range(3)]
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    tokenizer.chat_template = TEMPLATE
    told = {
        "max_length": 100,
        "max_prompt_length": None,
        "on_bad_row": "drop",
        "options": Options(**shape.get("options", {})),
    }
    whole, counts = prepare_groups(from_json(rows), tokenizer, **told)
    stream, report = prepare_groups(from_json(rows).to_iterable_dataset(), tokenizer, **told)
    assert [{name: row[name] for name in whole.column_names} for row in stream] == whole.to_list()
    assert report.as_dict() == {**counts.as_dict(), "streamed": True} and report.groups == report.rows == 3


def test_rows_of_a_prompt_are_joined_wherever_they_stand():
    assert groups(LONG) == [(P, [A, B, C], [1, 0, 0])]
    chat = [{**row, "prompt": [user(row["prompt"])], "completion": [assistant(row["completion"])]} for row in LONG]
    assert groups(chat) == [([user(P)], [[assistant(A)], [assistant(B)], [assistant(C)]], [1, 0, 0])]
    other = [*LONG, {**LONG[0], "completion": "A fig."}]
    assert groups([{**row, "system": f"s{i // 4}"} for i, row in enumerate(other)])[0][1] == [A, B, C]
    helpsteer = [{"prompt": P, "response": text, "helpfulness": n, "coherence": 4} for n, text in enumerate((C, B, A))]
    with pytest.raises(ValueError, match=r"'helpfulness', 'coherence'\. Say which: score_column='helpfulness'"):
        groups(helpsteer)
    assert groups(helpsteer, score_column="helpfulness") == [(P, [C, B, A], [0, 1, 2])]


def test_what_is_joined_is_counted_and_a_stream_of_it_refused():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    told = {"max_length": None, "max_prompt_length": None, "on_bad_row": "drop"}
    bad = [*LONG, {**LONG[0], "label": "maybe"}]
    bad = [{**row, "label": str(row["label"]) if row["label"] == "maybe" else str(int(row["label"]))} for row in bad]
    found, report = prepare_groups(Dataset.from_list(bad), tokenizer, **told)
    assert (len(found), report.rows, report.single_answers, report.dropped) == (1, 5, 1, 1)
    assert "1 prompts with one answer dropped" in " ".join(report.lost())
    stream = Dataset.from_list(LONG).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"cannot be a stream\. Load it whole, without streaming"):
        prepare_groups(stream, tokenizer, **told)
    with pytest.raises(
        ValueError, match=r"No two rows of the train dataset have the same prompt.*columns='prompt=NAME'"
    ):
        prepare_groups(Dataset.from_list(LONG[:2]), tokenizer, **told)


# --------------------------------------------------------------------------------------------------------- the user's


def test_columns_are_named_by_the_user():
    rows = [{"verse": P, "lines": [A, B], "hits": [2, 1], "prompt": "another"}]
    assert groups(rows, columns={"prompt": "verse", "completions": "lines", "scores": "hits"}) == [(P, [A, B], [2, 1])]
    assert read_options("prompt=verse,completions=lines", None).columns == {"prompt": "verse", "completions": "lines"}
    for wrong in ("verse", "=verse", "prompt=verse,lines"):
        with pytest.raises(ValueError, match="expected role=column"):
            read_options(wrong, None)


def test_an_implicit_prompt_is_believed_only_where_no_column_may_be_the_prompt():
    row = {"chosen": "The answer is 4.", "rejected": "The answer is 5.", "riddle": "two and two?", "id": "x"}
    with pytest.raises(
        ValueError, match=r"'riddle' may be the prompt.*columns='prompt=riddle', or say.*columns='prompt='"
    ):
        groups([row])
    assert groups([row], columns={"prompt": "riddle"}) == [
        ("two and two?", ["The answer is 4.", "The answer is 5."], [1, 0])
    ]
    assert groups([row], columns={"prompt": ""}) == [("The answer is", [" 4.", " 5."], [1, 0])]


def test_pairs_are_hard_where_they_are_wanted_so():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    pair = {"prompt": P, "chosen": A, "rejected": B}
    rows = [{**pair, "score_chosen": c, "score_rejected": r} for c, r in ((5, 3), (4, 4), (2, 3))]
    told = {"max_length": None, "max_prompt_length": None, "on_bad_row": "raise"}
    for hard, scores in ((True, [[1, 0]] * 3), (False, [[5, 3], [4, 4], [2, 3]])):
        found, report = prepare_groups(Dataset.from_list(rows), tokenizer, options=Options(hard_pairs=hard), **told)
        assert found["scores"][:] == scores and (report.ties, report.contradictions) == ((1, 1) if hard else (0, 0))


def test_columns_that_are_not_read_are_named():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    told = {"max_length": None, "max_prompt_length": None, "on_bad_row": "raise"}
    rows = [{"id": 1, "prompt": P, "chosen": A, "rejected": B, "note": "x", "empty": None}]
    _, report = prepare_groups(Dataset.from_list(rows), tokenizer, **told)
    assert report.notes() == ["columns not read: id, note, empty."]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"verse": "a b", "chorus": "c d"},
            r"'verse' \(text\), 'chorus' \(text\).*columns='prompt=verse,chosen=NAME,rejected=NAME'",
        ),
        ({"verse": P, "one": A, "two": B}, "columns='prompt=verse,chosen=one,rejected=two'"),
        (
            {"verse": P, "line": A, "fame": 3},
            "resemble those of HelpSteer2, KTO, with columns='prompt=verse,completion=line,score=fame'",
        ),
        (
            {"prompt": P, "response_0": A, "response_1": B, "better_response_id": 0, "safer_response_id": 1},
            "score_column='better_response_id'",
        ),
        (
            {"prompt": P, "chosen": A, "rejected": B, "Prompt": "x"},
            r"'prompt' and 'Prompt' differ in case or punctuation alone.*columns='prompt=prompt'",
        ),
        ({"question": P, "answers": [{"text": A, "wit": 3}, {"text": B, "wit": 1}]}, "score_column='wit'"),
    ],
)
def test_what_no_shape_fits_is_refused_with_what_to_type(row, said):
    with pytest.raises(ValueError, match=said):
        groups([row])


def test_a_prompt_that_all_completions_repeat_is_taken_out():
    rows = [{"prompt": p, "chosen": p + A, "rejected": p + B} for p in ("Human: a\n", "Human: b\n")]
    assert groups(rows) == [(row["prompt"], [A, B], [1, 0]) for row in rows]
    once = [*rows, {"prompt": "x", "chosen": A, "rejected": B}]  # not in every row: an answer that begins so by chance
    assert groups(once)[0] == ("Human: a\n", ["Human: a\n" + A, "Human: a\n" + B], [1, 0])


def test_a_part_of_the_prompt_that_is_empty_in_the_first_rows_is_read_in_others():
    rows = [{"instruction": P, "input": "x" * (n > 70), "system": None, "chosen": A, "rejected": B} for n in range(80)]
    rows[75]["system"] = SYSTEM
    found = groups(rows)
    assert found[0][0] == P and found[71][0] == f"{P}\nx" and found[75][0] == f"{SYSTEM}\n\n{P}\nx"


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        ("A>B", [1, 0]),
        ("B >> A", [0, 1]),
        ("A<B", [0, 1]),
        ("A=B", [0.5, 0.5]),
        ("model_b", [0, 1]),
        ("Tie (bothbad)", [0.5, 0.5]),
        ("A is better than B", None),
        ("not a", None),
        (1, None),
        ("-1", None),
    ],
)
def test_a_winner_is_read_whole_or_refused(value, scores):
    row = {"question": P, "response_A": A, "response_B": B, "winner": value}
    if scores is None:
        with pytest.raises(ValueError, match="expected 'a' or 'b', the better answer, or 'tie'"):
            groups([row])
    else:
        assert groups([row]) == [(P, [A, B], scores)]


@pytest.mark.parametrize(("value", "scores"), [("1.0", [0, 1]), (0.0, [1, 0]), ("A", [1, 0]), (-1, None), (2, None)])
def test_a_winner_by_number(value, scores):
    row = {"question": P, "response_0": A, "response_1": B, "winner": value}
    if scores is None:
        with pytest.raises(ValueError, match="expected '0' or '1'"):
            groups([row])
    else:
        assert groups([row]) == [(P, [A, B], scores)]


def test_ranks_count_down_however_they_are_named():
    row = {"prompt": P, "responses": [A, B], "human_ranking": [2, 1]}
    assert groups([row], columns={"scores": "human_ranking"}) == [(P, [A, B], [-2, -1])]
    assert groups([row], score_column="human_ranking") == [(P, [A, B], [-2, -1])]
    assert groups([{"prompt": P, "responses": [A, B], "ranking": [2, 1]}]) == [(P, [A, B], [-2, -1])]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": P, "responses": [A, B], "chosen": 1, "rejected": 0}, "hold labels of answers"),
        ({"prompt": P, "answer_a": A, "answer_b": B, "chosen": "A", "rejected": "B"}, "hold labels of answers"),
        (
            {"messages": talk("h", "r", "q"), "prompt": "another", "chosen": A, "rejected": B},
            "'messages', 'prompt' may each be",
        ),
        (
            {"instruction": "Answer.", "question": P, "chosen": A, "rejected": B},
            "columns='system=instruction,prompt=question'",
        ),
        ({"prompt": P, "completions": [A, B], "labels": [True, False]}, "score_column='labels'"),
        ({"prompt": P, "completions": [{"response": A, "wit": 1}, {"response": B, "wit": 2}]}, "score_column='wit'"),
    ],
)
def test_what_may_mean_two_things_is_asked(row, said):
    with pytest.raises(ValueError, match=said):
        groups([row])


def test_more_spellings():
    talked = {"messages": talk("h", "r", "q"), "prompt": "q", "chosen": A, "rejected": B}
    assert groups([talked])[0][0] == talk("h", "r", "q")
    rated = {"prompt": P, "chosen": A, "rejected": B, "chosen_avg_rating": 4.5, "rejected_avg_rating": 2}
    assert groups([rated]) == [(P, [A, B], [4.5, 2])]
    kto = [{"prompt": P, "completion": text, "label": label} for text, label in ((A, "True"), (B, "False"))]
    assert groups(kto) == [(P, [A, B], [1, 0])]
    swapped = {"prompt": P, "chosen": B, "rejected": A}
    assert groups([swapped], columns={"chosen": "rejected", "rejected": "chosen"}) == [(P, [A, B], [1, 0])]
    assert groups([{**swapped, "system": SYSTEM}], columns={"system": ""})[0][0] == P
    with pytest.raises(ValueError, match="gives one column two roles"):
        groups([swapped], columns={"chosen": "rejected", "rejected": "rejected"})
    prometheus = {
        "orig_instruction": P,
        "orig_response_A": A,
        "orig_response_B": B,
        "orig_preference": "B",
        "instruction": f"Judge {A} and {B}",
        "input": "",
        "output": "B",
    }
    assert groups([prometheus]) == [(P, [A, B], [0, 1])]


def test_keys_are_free_of_case_and_punctuation():
    assert key_of(" Chosen-Rating ") == key_of("chosen_rating") and key_of("質問") == "質問" and key_of("?") == "?"


# ---------------------------------------------------------------------------------------------- joined columns, words


def test_several_columns_may_have_a_role():
    row = {"riddle": P, "more": "Any.", "left text": A, "right text": B, "left mark": 1, "right mark": 2}
    told = {"completions": "left text+right text", "scores": "left mark + right mark"}
    assert groups([row], columns={"prompt": "riddle", **told}) == [(P, [A, B], [1, 2])]
    assert groups([row], columns={"prompt": "riddle+more", **told}) == [(f"{P}\nAny.", [A, B], [1, 2])]
    ragged = [row, {**row, "right text": None, "right mark": None, "left text": "x"}]
    assert groups(ragged, on_bad_row="drop", columns={"prompt": "riddle", **told}) == [(P, [A, B], [1, 2])]
    for wrong, said in (
        ({**told, "scores": "left mark+right"}, r"columns='scores=left mark\+right': there is no column 'right'"),
        ({**told, "scores": "left mark+right mark+more"}, "names 2 columns of completions .* and 3 of scores"),
        ({"chosen": "left text+right text"}, "only prompt and completions and scores may stand in several columns"),
    ):
        with pytest.raises(ValueError, match=said):
            groups([row], columns={"prompt": "riddle", **wrong})
    voted = {"prompt": P, "response_a": A, "response_b": B}
    voted = [{**voted, "label": label} for label in (0, 1)]
    with pytest.raises(ValueError, match=r"numbers \(0, 1\).*say so: columns='completions=response_a\+response_b'"):
        groups(voted)
    found = groups(voted, columns={"completions": "response_a+response_b"})
    assert [scores for _, _, scores in found] == [[1, 0], [0, 1]]


def test_of_columns_that_are_alike_the_one_that_is_named_is_read():
    row = {"prompt": P, "Prompt": "Another.", "chosen": A, "rejected": B, "Note": 1, "note": 2}
    assert groups([row], columns={"prompt": "Prompt"}) == [("Another.", [A, B], [1, 0])]
    _, report = prepare_groups(
        from_json([row]),
        AutoTokenizer.from_pretrained(demo.MODEL_PATH),
        max_length=None,
        max_prompt_length=None,
        on_bad_row="raise",
        options=Options({"prompt": "prompt"}),
    )
    assert report.read_columns == ["chosen", "rejected", "prompt"] and report.unread_columns == [
        "Prompt",
        "Note",
        "note",
    ]


@pytest.mark.parametrize(
    ("scores", "read"),
    [
        (["85%", "20 %"], [0.85, 0.2]),
        (["yes", "No"], [1, 0]),
        (["True", "false"], [1, 0]),
        (["👍", "👎"], [1, 0]),
        (["85%", 0.2], "'scores'[1] is 0.2, expected a percentage as in other rows"),
        (["yes", "no", 1], "'scores'[2] is 1, expected a label such as yes or no as in other rows"),
        ([3, 2, "yes"], "'scores'[2] is 'yes', expected a finite number"),
        (["A", "B+"], "'scores'[0] is the grade 'A', expected a finite number: how far grades are apart is not known"),
    ],
)
def test_scores_are_written_in_one_way(scores, read):
    row = {"prompt": P, "completions": [A, B, C][: len(scores)], "scores": scores}
    if isinstance(read, list):
        assert groups([row]) == [(P, row["completions"], read)]
    else:
        with pytest.raises(BadRow) as caught:
            groups([row])
        assert read in str(caught.value)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (
            {"from": "function_call", "value": "find(fruit)"},
            "is the tool call 'find(fruit)', expected JSON with a 'name'",
        ),
        ({"role": "tool_call", "content": '{"arguments": {}}'}, "expected JSON with a 'name' and 'arguments'"),
    ],
)
def test_a_tool_call_that_is_none_is_a_bad_row(turn, said):
    with pytest.raises(BadRow) as caught:
        groups([{"prompt": P, "chosen": turn, "rejected": {"from": "gpt", "value": B}}])
    assert said in str(caught.value)


def test_prompts_alone_are_told_of_own_samples():
    with pytest.raises(ValueError, match=r"own samples: say what a good one is, with --reward=file\.py:function"):
        groups([{"prompt": P}])
