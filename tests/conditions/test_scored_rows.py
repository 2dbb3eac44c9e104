"""Completions with scores or feedback, in every shape that the other trainers read."""

import json

import pytest
from data.published import LONG, ONE_ROW, SHAPES, A, B, P, assistant, from_json, talk, user
from datasets import Dataset
from transformers import AutoTokenizer

from contrastive_align import demo
from contrastive_align.conditions import resolve_condition
from contrastive_align.conditions.scored_rows import ScoredRows, read_scored
from contrastive_align.data import BadRow, Options


def scored(rows, condition=None, **options):
    [(_, _, found)] = list(ScoredRows.of(Dataset.from_list(rows), condition, **options))
    if isinstance(found, BadRow):
        raise found
    return [(g.completions, g.scores, g.feedbacks, g.finished) for g in found]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_published_shape_is_the_completions_that_it_means(name):
    prompt, completions, scores = SHAPES[name]["group"]
    rows = ScoredRows.of(from_json(SHAPES[name]["rows"]), options=Options(**SHAPES[name].get("options", {})))
    [(_, _, found)] = list(rows)
    if isinstance(found, BadRow):  # a tool call is no text
        assert "tool" in str(found) and any(word in str(SHAPES[name]["rows"]) for word in ("tool", "function_call"))
        return
    [group] = found
    assert (group.prompt, group.completions) == (prompt, list(map(text_of, completions)))
    assert group.scores == scores and group.feedbacks == [None] * len(scores) and all(group.finished)


def test_one_completion_a_row_stays_so():
    samples, report = read_scored(Dataset.from_list(LONG), AutoTokenizer.from_pretrained(demo.MODEL_PATH))
    assert [s.prompt_index for s in samples] == [0, 1, 0, 0] and [s.score for s in samples] == [1, 1, 0, 0]
    assert (report["rows"], report["completions"]) == (4, 4)


def test_feedback_scores_and_ends_are_read_alike():
    told = [("good", 1.0, True), (None, None, None), ("bad", 0.0, False)]
    words, scores, finished = map(list, zip(*told, strict=True))
    expected = [([A, B, "x"], scores, words, [True, True, False])]
    lists = {"question": P, "answers": [A, B, "x"], "feedbacks": words, "rewards": scores, "finished": finished}
    assert scored([lists]) == expected
    inside = [{"text": t, "score": s, "feedback": w} for t, s, w in zip([A, B, "x"], scores, words, strict=True)]
    assert scored([{"prompt": P, "answers": inside}], feedback_column="feedback")[0][:3] == expected[0][:3]
    wide = {"prompt": P, "answer_1": A, "feedback_1": "good", "answer_2": B, "feedback_2": "bad"}
    assert scored([wide], feedback_column="feedback_1") == [([A, B], [None, None], ["good", "bad"], [True, True])]
    one = {"messages": talk(P, A), "feedback": "good"}
    assert scored([one]) == [([A], [None], ["good"], [True])]


def test_columns_are_named_and_scores_negated():
    tokens, attributes = resolve_condition("quantile_tokens"), resolve_condition("attributes")
    row = {"instruction": "a", "completions": ["b", "c"], "harm": [1.0, None], "scores": [9, 9]}
    assert scored([row], tokens, options=Options(score_column="harm"), negate_score=True)[0][:2] == (
        ["b", "c"],
        [-1.0, None],
    )
    row = {"prompt": "a", "response": "b", "harmful": "1", "helpful": 2, "words": "no"}
    [(_, scores, [feedback], _)] = scored([row], attributes)
    assert scores == [None] and json.loads(feedback) == {"harmful": 1, "helpful": 2}
    assert scored([row], attributes, feedback_column="words")[0][2] == ["no"]
    row = {"prompt": "a", "completions": ["b", "c"], "harmful": [1], "helpful": [2, 0]}
    with pytest.raises(ValueError, match="row 0: 'harmful' has 1 entries for 2 completions"):
        scored([row], attributes)
    verse = {"verse": "a", "line": "b", "hits": 2}
    named = Options({"prompt": "verse", "completion": "line", "score": "hits"})
    assert scored([verse], options=named)[0][:2] == (["b"], [2.0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finished": [True, "no"]}, "'finished' of 'completions'[1] is 'no', expected true, false or null"),
        ({"feedbacks": ["x", 3]}, "the feedback of 'completions'[1] is 3, expected text or null"),
        ({"scores": [1, "x"]}, "'scores'[1] is 'x', expected a finite number"),
        ({"completions": ["a", [assistant("b"), {"role": "tool", "content": "t"}, assistant("c")]]}, "has 3 turns"),
        ({"prompt": [user(P)], "tools": [{"name": "f"}]}, "there are tools, with which"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_named(change, said, monkeypatch):
    row = {"prompt": P, "completions": [A, B], "scores": [1, 0], **change}
    rows = Dataset.from_dict({"__json__": [json.dumps(row)], "__row__": [7], "__unreadable__": [None]})
    scoring = ScoredRows.of(rows)
    with pytest.raises(BadRow) as caught:
        scoring.to_dataset(on_bad_row="raise")
    assert str(caught.value).startswith("row 7: ") and said in str(caught.value)
    with pytest.raises(ValueError, match=r"None of the 1 rows is left to train on\. row 7: "):
        scoring.to_dataset(on_bad_row="drop")
