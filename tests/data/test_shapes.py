"""Published shapes -> the groups that they mean, and what no shape fits is refused with what to type."""

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from contrastive_align import demo
from contrastive_align.data import Options, prepare_groups
from contrastive_align.data.columns import key_of, read_options
from contrastive_align.data.reading import groups_of


P, A, B, C = "Name a fruit.", "A lime.", "Pear?", "No."
SYSTEM = "Be brief."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(*texts):
    return [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]


def from_value(role, text):
    return {"from": role, "value": text}


def groups(rows, on_bad_row="raise", **options):
    found = groups_of(Dataset.from_list(rows), options=Options(**options), on_bad_row=on_bad_row, name="train")
    return [(g.prompt, g.completions, g.scores) for g in found]


TEXT = (P, [A, B], [1, 0])
TALK = ([user(P)], [[assistant(A)], [assistant(B)]], [1, 0])
PUBLISHED = {
    "orca": ({"system": SYSTEM, "question": P, "chosen": A, "rejected": B}, (f"{SYSTEM}\n\n{P}", [A, B], [1, 0])),
    "alpaca": ({"instruction": "Answer.", "input": P, "chosen": A, "rejected": B}, (f"Answer.\n{P}", [A, B], [1, 0])),
    "alpaca_without_input": ({"instruction": P, "input": "", "chosen": A, "rejected": B}, TEXT),
    "dolly": ({"instruction": "Answer.", "context": P, "chosen": A, "rejected": B}, (f"Answer.\n{P}", [A, B], [1, 0])),
    "llama_factory_history": (
        {"instruction": "And in winter?", "history": [["Cold?", "No."]], "chosen": A, "rejected": B, "system": SYSTEM},
        (
            [{"role": "system", "content": SYSTEM}, *talk("Cold?", "No.", "And in winter?")],
            [[assistant(A)], [assistant(B)]],
            [1, 0],
        ),
    ),
    "sharegpt": (
        {"conversations": [from_value("human", P)], "chosen": from_value("gpt", A), "rejected": from_value("gpt", B)},
        TALK,
    ),
    "sharegpt_text": ({"conversations": f'[{{"from": "human", "value": "{P}"}}]', "chosen": A, "rejected": B}, TALK),
    "single_messages": ({"messages": [user(P)], "chosen": assistant(A), "rejected": assistant(B)}, TALK),
    "dialogues": ({"chosen": talk(P, A), "rejected": talk(P, B), "source": "own"}, TALK),
    "dialogues_and_rendered_prompt": ({"prompt": f"<|user|>{P}", "chosen": talk(P, A), "rejected": talk(P, B)}, TALK),
    "system_beside_dialogues": (
        {"system": SYSTEM, "chosen": talk(P, A), "rejected": talk(P, B)},
        ([{"role": "system", "content": SYSTEM}, user(P)], *TALK[1:]),
    ),
    "ms_swift": ({"messages": talk(P, A), "rejected_response": B}, TALK),
    "hh": ({"chosen": f"\n\nHuman: {P}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {P}\n\nAssistant: {B}"},
           (f"\n\nHuman: {P}\n\nAssistant:", [f" {A}", f" {B}"], [1, 0])),
    "math_preference": (
        {"instruction": P, "chosen_response": A, "rejected_response": B, "chosen_rating": 9, "rejected_rating": 4},
        (P, [A, B], [9, 4]),
    ),
    "ratings_with_dashes": (
        {"prompt": P, "chosen": A, "Chosen-Rating": 5.0, "rejected": B, "Rejected-Rating": 5.0, "chosen-model": "m"},
        (P, [A, B], [5, 5]),
    ),
    "stack_exchange": ({"qid": 1, "question": P, "response_j": A, "response_k": B}, TEXT),
    "lists_of_chosen": ({"prompt": P, "chosen": [A, C], "rejected": [B]}, (P, [A, C, B], [1, 1, 0])),
    "distilabel": ({"input": P, "generations": [B, A], "rating": [2.0, 5.0], "order": ["rejected", "chosen"]}, (P, [B, A], [2, 5])),
    "nectar": (
        {"prompt": P, "answers": [{"answer": A, "model": "m", "rank": 1.0}, {"answer": B, "model": "n", "rank": 2.0}]},
        (P, [A, B], [-1, -2]),
    ),
    "ranks": ({"prompt": P, "responses": [B, A], "ranks": [2, 1]}, (P, [B, A], [-2, -1])),
    "webgpt": (
        {"question": {"id": "1", "full_text": P}, "answer_0": A, "score_0": 0.5, "answer_1": B, "score_1": -0.5},
        (P, [A, B], [0.5, -0.5]),
    ),
    "shp": (
        {"post_id": "x", "history": P, "human_ref_A": A, "human_ref_B": B, "labels": 1, "score_A": 52, "score_B": 7},
        (P, [A, B], [52, 7]),
    ),
    "score_inside": ({"prompt": P, "response_a": A, "response_a_score": 3, "response_b": B, "response_b_score": 1}, (P, [A, B], [3, 1])),
    "help_steer_2_preference": (
        {"prompt": P, "response_1": A, "response_2": B, "preference_strength": -2, "preference_statement": "better"},
        (P, [A, B], [2, 0]),
    ),
    "help_steer_3": (
        {"domain": "x", "context": [user(P)], "response1": A, "response2": B, "overall_preference": 1},
        ([user(P)], TALK[1], [0, 1]),
    ),
    "summarise": (
        {"info": {"post": P, "title": "T"}, "summaries": [{"text": A}, {"text": B}], "choice": 1},
        (f"T\n{P}", [A, B], [0, 1]),
    ),
    "arena": ({"conversation_a": talk(P, A), "conversation_b": talk(P, B), "winner": "model_a", "judge": "j"}, TALK),
    "arena_tie": ({"conversation_a": talk(P, A), "conversation_b": talk(P, B), "winner": "tie (bothbad)"}, (*TALK[:2], [0.5, 0.5])),
    "lmsys": (
        {"prompt": f'["{P}"]', "response_a": f'["{A}"]', "response_b": f'["{B}"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        TEXT,
    ),
    "pku_asked": ({"prompt": P, "response_0": B, "response_1": A, "better_response_id": 1}, (P, [B, A], [0, 1])),
    "prometheus": ({"instruction": P, "response_A": A, "response_B": B, "orig_preference": "A"}, TEXT),
    "panda_lm": (
        {"instruction": P, "input": "", "response1": A, "response2": B, "annotator1": 1, "annotator2": 1, "annotator3": 2},
        (P, [A, B], [2, 1]),
    ),
    "alpaca_eval": (
        {"instruction": P, "output_1": B, "generator_1": "m", "output_2": A, "generator_2": "n", "preference": 1.75},
        (P, [B, A], [0.25, 0.75]),
    ),
    "letters_case": ({"PROMPT": P, "a0": A, "a1": B, "Score_A0": 2, "Score_A1": 1}, (P, [A, B], [2, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_the_groups_that_it_means(name):
    row, expected = PUBLISHED[name]
    assert groups([row, row, row]) == [expected] * 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stream_of_it_gives_the_same(name):
    row, expected = PUBLISHED[name]
    rows = IterableDataset.from_generator(lambda: iter([row] * 3))
    found = groups_of(rows, options=Options(), on_bad_row="raise", name="train")
    assert [(g.prompt, g.completions, g.scores) for g in found] == [expected] * 3


LONG = [
    {"prompt": P, "completion": A, "label": True},
    {"prompt": "What?", "completion": "This.", "label": True},
    {"prompt": P, "completion": B, "label": False},
    {"prompt": P, "completion": C, "label": False},
]


def test_rows_of_a_prompt_are_joined_wherever_they_stand():
    assert groups(LONG) == [(P, [A, B, C], [1, 0, 0])]
    chat = [{**row, "prompt": [user(row["prompt"])], "completion": [assistant(row["completion"])]} for row in LONG]
    assert groups(chat) == [([user(P)], [[assistant(A)], [assistant(B)], [assistant(C)]], [1, 0, 0])]
    other = [*LONG, {**LONG[0], "completion": "A fig."}]
    assert groups([{**row, "system": f"s{i // 4}"} for i, row in enumerate(other)])[0][1] == [A, B, C]
    helpsteer = [{"prompt": P, "response": text, "helpfulness": n, "coherence": 4} for n, text in enumerate((C, B, A))]
    with pytest.raises(ValueError, match="'helpfulness', 'coherence'. Say which: score_column='helpfulness'"):
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
    with pytest.raises(ValueError, match="cannot be a stream. Load it whole"):
        prepare_groups(stream, tokenizer, **told)
    with pytest.raises(ValueError, match="No two rows of the train dataset have the same prompt.*columns='prompt=NAME'"):
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
    with pytest.raises(ValueError, match="'riddle' may be the prompt.*columns='prompt=riddle', or say.*columns='prompt='"):
        groups([row])
    assert groups([row], columns={"prompt": "riddle"}) == [("two and two?", ["The answer is 4.", "The answer is 5."], [1, 0])]
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
        ({"verse": "a b", "chorus": "c d"}, r"'verse' \(text\), 'chorus' \(text\).*columns='prompt=verse,chosen=NAME,rejected=NAME'"),
        ({"verse": P, "one": A, "two": B}, "columns='prompt=verse,chosen=NAME,rejected=NAME'"),
        ({"verse": P, "line": A, "fame": 3}, r"columns='prompt=verse,completion=line,score=fame' \(one answer a row\)"),
        ({"prompt": P, "response_0": A, "response_1": B, "better_response_id": 0, "safer_response_id": 1}, "score_column='better_response_id'"),
        ({"prompt": P, "chosen": A, "rejected": B, "Prompt": "x"}, "'prompt' and 'Prompt' differ in case or punctuation alone"),
        ({"question": P, "answers": [{"text": A, "wit": 3}, {"text": B, "wit": 1}]}, "score_column='wit'"),
    ],
)  # fmt: skip
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
    [("A>B", [1, 0]), ("B >> A", [0, 1]), ("A<B", [0, 1]), ("A=B", [0.5, 0.5]), ("model_b", [0, 1]), ("Tie (bothbad)", [0.5, 0.5]),
     ("A is better than B", None), ("not a", None), (1, None), ("-1", None)],
)  # fmt: skip
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
        ({"messages": talk("h", "r", "q"), "prompt": "another", "chosen": A, "rejected": B}, "'messages', 'prompt' may each be"),
        ({"instruction": "Answer.", "question": P, "chosen": A, "rejected": B}, "columns='system=instruction,prompt=question'"),
        ({"prompt": P, "completions": [A, B], "labels": [True, False]}, "score_column='labels'"),
        ({"prompt": P, "completions": [{"response": A, "wit": 1}, {"response": B, "wit": 2}]}, "score_column='wit'"),
    ],
)  # fmt: skip
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
    prometheus = {"orig_instruction": P, "orig_response_A": A, "orig_response_B": B, "orig_preference": "B",
                  "instruction": f"Judge {A} and {B}", "input": "", "output": "B"}  # fmt: skip
    assert groups([prometheus]) == [(P, [A, B], [0, 1])]


def test_keys_are_free_of_case_and_punctuation():
    assert key_of(" Chosen-Rating ") == key_of("chosen_rating") and key_of("質問") == "質問" and key_of("?") == "?"
