"""Every spelling at the door, and every row that must not pass it."""

import json

import numpy as np
import pytest
from reading import read

from contrastive_align.data import BadRow, Group, Options, distinct_prompts, recognise
from contrastive_align.data.formats import TooFew


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def shape_of(row: dict, **options) -> str:
    return recognise([row], list(row), Options(**options)).shape


def refused(row: dict, *parts: str) -> str:
    """The error of a row: it names the row, and every part."""
    with pytest.raises(BadRow) as caught:
        read(row, source="train")
    message = str(caught.value)
    assert message.startswith("train, row 17: ")
    for part in parts:
        assert part in message, message
    return message


PLAIN = {"prompt": "The sky is", "completions": [" blue.", " green.", " up."], "scores": [1.0, 0.0, 0.4]}


# ------------------------------------------------------------------------------------------------------ spellings


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"instruction": "The sky is", "responses": [" blue.", " green.", " up."], "rewards": [1, 0, 0.4]},
        {
            "prompt": "The sky is",
            **{"A0": " blue.", "score_A0": 1, "A1": " green.", "score_A1": 0, "A2": " up.", "score_A2": 0.4},
        },
        {
            "instruction": "The sky is",
            "completions": [
                {"response": " blue.", "overall_score": 1.0, "model": "a"},
                {"response": " green.", "overall_score": 0.0, "model": "b"},
                {"response": " up.", "overall_score": 0.4, "model": "c"},
            ],
        },
        {"prompt": "The sky is", "completions": json.dumps(PLAIN["completions"]), "scores": " [1, 0, 0.4]"},
    ],
    ids=["canonical", "responses_rewards", "lettered", "ultrafeedback", "json_in_a_csv_cell"],
)
def test_every_spelling_gives_the_same_group(row):
    assert read(row) == Group("The sky is", [" blue.", " green.", " up."], [1.0, 0.0, 0.4])


def test_letters_are_read_by_number_and_short_rows_are_ragged():
    row = {"prompt": "p", **{f"A{i}": f"a{i}" for i in range(11)}, **{f"score_A{i}": i for i in range(11)}}
    assert read(row).completions == [f"a{i}" for i in range(11)]  # A10 after A9, not after A1
    row |= {f"{name}{i}": None for name in ("A", "score_A") for i in range(3, 11)}
    assert read(row) == Group("p", ["a0", "a1", "a2"], [0.0, 1.0, 2.0])


def test_explicit_scores_go_before_a_preference():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert shape_of({**pair, **PLAIN}) == "lists" and shape_of(pair) == "pairs"
    rated = {**pair, "score_chosen": 3, "score_rejected": 5}
    assert read(rated).scores == [3, 5] and read(pair).scores == [1, 0]


def test_bad_first_rows_do_not_hide_the_shape():
    good = {
        "instruction": "p",
        "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 0}],
    }
    rows = [{"instruction": "p", "completions": None}, {"instruction": "p", "completions": []}, good, good, good]
    assert recognise(rows, list(good), Options()).shape == "nested"


def test_unknown_columns_say_what_was_found_and_what_to_type():
    with pytest.raises(
        ValueError, match=r"'verse' \(text\), 'chorus' \(text\), 'hits' \(number\).*columns='prompt=verse,completion="
    ):
        read({"verse": "Roses are", "chorus": "red", "hits": 3})
    with pytest.raises(ValueError, match=r"No groups found in the columns 'prompt' \(text\), 'completions' \(list\)"):
        read({"prompt": "p", "completions": ["a", "b"]})  # no scores anywhere
    with pytest.raises(ValueError, match=r"'Score' is text \('superb'\), expected a number"):
        read({"prompt": "p", "completion": "a", "Score": "superb"})
    with pytest.raises(
        ValueError, match="No column is known to be the prompt: add it, or name it with columns='prompt=NAME'"
    ):
        read({"completion": "a", "score": 1})
    columns = {"prompt": "verse", "completions": "lines", "scores": "hits"}
    row = {"verse": "Roses are", "lines": ["red", "blue"], "hits": [2, 1], "chorus": "la"}
    assert read(row, columns=columns) == Group("Roses are", ["red", "blue"], [2.0, 1.0])
    with pytest.raises(ValueError, match=r"no column 'vers'.*Did you mean 'verse'\?"):
        read(row, columns={"prompt": "vers"})
    with pytest.raises(ValueError, match="'verse' is no part of a group"):
        read(row, columns={"verse": "verse"})


def test_preference_with_and_without_prompt():
    assert read({"prompt": "Hi", "chosen": " there", "rejected": " you"}) == Group("Hi", [" there", " you"], [1.0, 0.0])
    implicit = {"chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"}
    assert read(implicit) == Group("Q: 1+1? A:", [" 2", " 3"], [1.0, 0.0])
    dialogue = {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go")]}
    assert read(dialogue) == Group([user("Hi")], [[assistant("Hello")], [assistant("Go")]], [1.0, 0.0])


def test_preference_under_instruction_keeps_it_as_the_prompt():
    group = read({"instruction": "Say", "chosen": "Yes, it is", "rejected": "Yes, no"})
    assert group == Group("Say", ["Yes, it is", "Yes, no"], [1.0, 0.0])


def test_a_missing_prompt_is_not_taken_from_the_completions_when_there_is_a_prompt_column():
    refused({"prompt": None, "chosen": "Yes, it is", "rejected": "Yes, no"}, "'prompt'", "empty", "on_bad_row='drop'")


@pytest.mark.parametrize("chosen, rejected", [("same", "same"), ("the beginning", "the beginning of it")])
def test_an_implicit_prompt_needs_two_completions(chosen, rejected):
    refused({"chosen": chosen, "rejected": rejected}, "beginning of the other", "'prompt' column", "on_bad_row='drop'")


def test_chosen_equal_to_rejected():
    for value in ("same", [assistant("same")]):
        with pytest.raises(TooFew, match="of 2 completions 0 are left once equal ones are taken out"):
            read({"prompt": "p", "chosen": value, "rejected": value})


def test_completions_without_a_common_beginning_have_no_implicit_prompt():
    refused({"chosen": "yes", "rejected": "no"}, "no prompt", "share '' at most", "'prompt' column")
    refused({"chosen": "14", "rejected": "15"}, "share '1' at most")


# ------------------------------------------------------------------------------------------------ forms of dialogue


def test_whole_dialogues_under_a_string_prompt():
    row = {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("Hello")],
        "rejected": [user("Hi"), assistant("Go")],
        "messages": [user("Hi"), assistant("Hello")],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    assert read(row) == Group([user("Hi")], [[assistant("Hello")], [assistant("Go")]], [8.0, 3.0])


def test_whole_dialogues_in_letters_and_with_equal_answers():
    answers = ["a", "a", "b"]
    row = {"prompt": "Hi", **{f"A{i}": [user("Hi"), assistant(a)] for i, a in enumerate(answers)}}
    row |= {f"score_A{i}": i for i in range(3)}
    with pytest.raises(TooFew):  # of the two "a" neither is right
        read(row)
    assert read({**row, "score_A1": 0}) == Group([user("Hi")], [[assistant("a")], [assistant("b")]], [0.0, 2.0])
    assert read({**row, "A1": [user("Hi"), assistant("c")]}).completions == [[assistant(a)] for a in "acb"]


def test_a_list_prompt_repeated_inside_the_completions_is_taken_out_as_it_stands():
    prompt = [user("1"), assistant("x"), user("2")]
    row = {"prompt": prompt, "scores": [1, 0], "completions": [[*prompt, assistant(a)] for a in "ab"]}
    group = read(row)
    assert group.prompt == prompt and group.completions == [[assistant(a)] for a in "ab"]
    row["prompt"] = prompt[:1]
    refused(row, "'completions'[0] has a turn of the user inside", "End the prompt with the user's last turn")


def test_dialogues_of_another_prompt_are_refused():
    row = {"prompt": [user("1")], "completions": [[user("2"), assistant(a)] for a in "ab"], "scores": [1, 0]}
    refused(row, "'completions'[0] begins with the role 'user'", "expected 'assistant'", "the 'prompt'", "drop")
    half = {**PLAIN, "completions": [[assistant("x")], [user("The sky is"), assistant("y")], [assistant("z")]]}
    refused(half, "'completions'[1] begins with the role 'user'")


def test_list_prompt_with_string_completions_and_the_reverse():
    group = read({**PLAIN, "prompt": [system("Be brief."), user("Sky?")]})
    assert group.prompt == [system("Be brief."), user("Sky?")]
    assert group.completions[0] == [assistant(" blue.")]
    group = read({**PLAIN, "completions": [[assistant(c)] for c in "abc"]})
    assert group.prompt == [user("The sky is")]
    assert group.is_conversational and not read(PLAIN).is_conversational


def test_a_single_message_stands_for_a_list_of_one():
    group = read({"prompt": user("Hi"), "chosen": assistant("a"), "rejected": assistant("b")})
    assert group == Group([user("Hi")], [[assistant("a")], [assistant("b")]], [1.0, 0.0])


def test_keys_that_arrow_filled_with_none_are_taken_out():
    row = {
        "prompt": [{**user("Hi"), "name": None, "tool_calls": None}],
        "chosen": [{**assistant("a"), "name": "x", "tool_calls": None}],
        "rejected": [{**assistant("b"), "name": None, "tool_calls": None}],
    }
    group = read(row)
    assert group.prompt == [user("Hi")]
    assert group.completions == [[{**assistant("a"), "name": "x"}], [assistant("b")]]


def test_tool_turns():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "content": "4"}
    prompt = [user("2+2?"), call, tool, tool]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {**PLAIN, "prompt": prompt, "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    group = read(row)
    assert group.prompt == prompt
    assert group.template_kwargs == {"tools": tools, "enable_thinking": False}
    assert read({**row, "tools": tools}) == group
    assert read({**row, "chat_template_kwargs": '{"enable_thinking": false}'}) == group
    assert read({**PLAIN, "tools": None, "chat_template_kwargs": None}).template_kwargs == {}


@pytest.mark.parametrize(
    "column, value, part",
    [
        ("tools", "[oops", "'tools' is not JSON"),
        ("tools", "{}", "'tools' is {}, expected a list"),
        ("chat_template_kwargs", "[1]", "'chat_template_kwargs' is [1], expected a dict"),
    ],
)
def test_bad_template_arguments(column, value, part):
    refused({**PLAIN, column: value}, part, "on_bad_row='drop'")


def test_unicode_passes_untouched():
    texts = ["größer 🙂", "zwei\u2028Zeilen", "\u202eעברית"]
    assert read({**PLAIN, "prompt": "日本語\x85?", "completions": texts}).completions == texts
    assert read({**PLAIN, "prompt": "日本語\x85?"}).prompt == "日本語\x85?"


# -------------------------------------------------------------------------------------------- what must not pass


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"completions": [" blue."], "scores": [1]}, ["'completions' has 1 completion, ", "at least 2", "drop"]),
        ({"completions": [], "scores": []}, ["'completions' has 0 completions, "]),
        ({"scores": [1, 0]}, ["'scores' has 2 numbers for 3 completions", "drop"]),
        ({"scores": [1, 0, 0.5, 2]}, ["'scores' has 4 numbers for 3 completions"]),
        ({"scores": [1, float("nan"), 0]}, ["'scores'[1] is nan", "finite number", "drop"]),
        ({"scores": [1, 0, float("-inf")]}, ["'scores'[2] is -inf", "finite number"]),
        ({"scores": [10**400, 0, 0]}, ["'scores'[0] is inf"]),
        ({"scores": [0, 1e39, 0]}, ["'scores'[1] is 1e+39", "float32"]),
        ({"scores": [1, None, 0]}, ["'scores'[1] is missing", "Fill it in or drop"]),
        ({"scores": [1, "half", 0]}, ["'scores'[1] is 'half'", "a finite number", "drop"]),
        ({"scores": [1, "4,5", 0]}, ["Write decimals with a point"]),
        ({"scores": [[1], 0, 0]}, ["'scores'[0] is [1]", "not a list"]),
        ({"scores": None}, ["'scores' is missing"]),
        ({"scores": 3.0}, ["'scores' is 3.0", "a list with one entry per completion"]),
        ({"scores": "1, 0, 2"}, ["'scores' is '1, 0, 2'"]),
        ({"completions": "['a', 'b']"}, ["'completions' is text that is not a JSON list", "drop"]),
        ({"completions": None}, ["'completions' is missing"]),
        ({"completions": "just text"}, ["'completions' is 'just text'"]),
        ({"completions": ["a", "", "c"]}, ["'completions'[1] is empty", "drop"]),
        ({"completions": ["a", "b", " \n"]}, ["'completions'[2] is empty"]),
        ({"completions": ["a", None, "c"]}, ["'completions'[1] is empty"]),
        ({"completions": ["a", True, "c"]}, ["'completions'[1] is True", "text or a list of messages"]),
        ({"completions": ["a", 10**20, "c"]}, ["'completions'[1] is 1000"]),
        ({"completions": [["a"], ["b"], ["c"]]}, ["'completions'[0][0] is 'a'", "'role' among"]),
        ({"completions": [[], [assistant("b")], [assistant("c")]]}, ["'completions'[0] is empty"]),
        (
            {"completions": [[user("x"), assistant("b")], None, [user("x"), assistant("c")]]},
            ["'completions'[1] is empty"],
        ),
        ({"prompt": ""}, ["'prompt' is empty", "drop"]),
        ({"prompt": " \n\t"}, ["'prompt' is empty"]),
        ({"prompt": None}, ["'prompt' is empty"]),
        ({"prompt": []}, ["'prompt' is empty"]),
        ({"prompt": 3}, ["'prompt' is 3", "text or a list of messages"]),
        ({"prompt": ["Hi", "Ho"]}, ["'prompt'[0] is 'Hi'", "expected a message"]),
        ({"prompt": [user("  ")]}, ["'prompt'[0] has an empty 'content' (role 'user')"]),
        ({"prompt": [{"role": "narrator", "content": "x"}]}, ["'prompt'[0] is", "'narrator'", "'role' among"]),
        ({"prompt": [user("a"), assistant("b")]}, ["'prompt' ends with the role 'assistant'", "user's turn last"]),
        ({"prompt": [system("a")]}, ["'prompt' ends with the role 'system'"]),
        ({"prompt": [assistant("a"), user("b")]}, ["['assistant', 'user']", "user first"]),
        ({"prompt": [user("a"), user("b")]}, ["['user', 'user']", "in turn", "drop"]),
        ({"prompt": [user("a"), system("b"), user("c")]}, ["['user', 'system', 'user']", "in turn"]),
        (
            {"completions": [[assistant("a")], [assistant("b"), user("c")], [assistant("d")]]},
            ["'completions'[1] ends with the role 'user'", "expected 'assistant'"],
        ),
        (
            {"completions": [[assistant("a")], [assistant("")], [assistant("d")]]},
            ["'completions'[1][0] has an empty 'content' (role 'assistant')"],
        ),
    ],
)
def test_a_bad_row_is_named_with_its_column(change, parts):
    refused({**PLAIN, **change}, *parts)


def test_errors_name_the_column_as_the_dataset_spells_it():
    letters = {"prompt": "p", "A0": "a", "score_A0": 1, "A1": "b", "score_A1": 2, "A2": "c", "score_A2": 3}
    refused({**letters, "score_A2": float("nan")}, "'score_A2' is nan")
    refused({**letters, "A1": " "}, "'A1' is empty")
    refused({**letters, "A0": None, "score_A0": None, "A2": ""}, "'A2' is empty")  # a gap does not move the letters
    refused({**letters, "score_A3": 4}, "'A3' is empty")  # a score without a completion
    refused({**letters, "score_A1": None}, "'score_A1' is missing")
    refused({"prompt": "p", "chosen": "a", "rejected": ""}, "'rejected' is empty")
    refused({"prompt": "p", "chosen": None, "rejected": "a"}, "'chosen' is missing")
    refused({"instruction": "p", "responses": ["a", "b"], "rewards": [1, None]}, "'rewards'[1] is missing")
    refused({"instruction": "", "responses": ["a", "b"], "rewards": [1, 0]}, "'instruction' is empty")
    items = [{"response": "a", "overall_score": 1.0}, {"response": "b", "overall_score": None}]
    refused({"instruction": "p", "completions": items}, "'overall_score'[1] is missing")
    refused({"instruction": "p", "completions": [items[0], "b"]}, "'completions'[1] is 'b'", "an object with")
    refused({"instruction": "p", "completions": [items[0], {"overall_score": 1}]}, "'completions'[1] is empty")


def test_long_values_are_shortened_in_the_error():
    assert len(refused({**PLAIN, "scores": "1" * 5000}, "'scores' is '111")) < 300


@pytest.mark.parametrize("score", [np.float32(0.5), np.float64(0.5), np.int64(2), 3, True])
def test_what_counts_as_a_number(score):
    scores = read({**PLAIN, "scores": [score, 0, 0]}).scores
    assert scores[0] == float(score) and all(type(s) is float for s in scores)


def test_the_row_is_not_changed_by_reading():
    row = {"prompt": [user("Hi")], "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}
    before = json.dumps(row)
    read(row)
    assert json.dumps(row) == before


def test_distinct_prompts_are_the_first_rows_of_their_prompts():
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(["a", chat, "a", [*chat], "b"])]
    assert [row["n"] for row in distinct_prompts(rows)] == [0, 1, 4]
    assert [row["n"] for row in distinct_prompts(iter(rows), 2)] == [0, 1] and distinct_prompts(rows, 0) == []
