"""Conditions: labels, texts and forms of every kind; prompts with braces and conversations; every error of a spec."""

import json

import numpy as np
import pytest
import yaml

from contrastive_align.conditions import CONDITIONS, Condition, resolve_condition
from contrastive_align.pool import Pool, Sample, quantiles


def pool_of(folder, *rounds, label=lambda table: np.zeros(len(table), int), **options):
    """Rounds of (prompt, score, feedback)."""
    pool = Pool(folder, label=label, **options)
    for number, rows in enumerate(rounds, start=1):
        pool.add(
            Sample(f"prompt {p}", [1], "text", score, feedback, True, p, k, number, 0)
            for k, (p, score, feedback) in enumerate(rows)
        )
    return pool


def said(folder, *feedbacks):
    return pool_of(folder, [(0, None, f) for f in feedbacks]).table()


# ------------------------------------------------------------------------------------------------- published forms


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("quantile_tokens", "<quantile_0>Hello"),
        ("phrases", "Excellent. input: Hello"),
        ({"kind": "phrases", "phrases": "toxicity"}, "Lowest Toxicity. input: Hello"),
        ("categories", "feedback: Harmless and very helpful input: Hello"),
        ({"kind": "text", "exemplars": ["Kind and clear."]}, "feedback: Kind and clear. input: Hello"),
        ("attributes", "attributes: harmful:0,helpful:2 input: Hello"),
        ({"kind": "quantile_tokens", "token": "[{i}]", "form": "{prompt} {condition}"}, "Hello [0]"),
    ],
)
def test_the_prompt_that_asks_for_the_best(spec, expected, tmp_path):
    condition = resolve_condition(spec)
    assert condition.apply_best("Hello") == expected
    condition.save(tmp_path / "model")
    assert Condition.load(tmp_path / "model") == condition
    assert Condition.load(tmp_path / "model").apply_best("Hello") == expected
    assert [x.name for x in (tmp_path / "model").iterdir()] == ["condition.json"]
    assert resolve_condition(yaml.safe_load(yaml.safe_dump(condition.spec))) == condition
    assert resolve_condition(condition) is condition


def test_names_and_tokens():
    assert resolve_condition("quantile_tokens").tokens == [f"<quantile_{i}>" for i in range(5)]
    assert resolve_condition("phrases").tokens == []
    assert resolve_condition("phrases").names() == ["Excellent", "Good", "Mediocre", "Bad", "Horrible"]
    assert resolve_condition("categories").names()[-1] == "Harmful"
    assert resolve_condition("text").names() == ["score 3", "score 2", "score 1", "score 0"]
    assert sorted(CONDITIONS) == ["attributes", "categories", "phrases", "quantile_tokens", "text"]


# -------------------------------------------------------------------------------------------------------------- prompts


def test_braces_in_prompts_and_texts_mean_nothing():
    condition = resolve_condition({"kind": "text", "exemplars": ["{prompt}"], "form": "{x} {condition} | {prompt} {}"})
    assert condition.apply_best("f'{condition}' {0} {{}}") == "{x} {prompt} | f'{condition}' {0} {{}} {}"


def test_the_last_user_message_goes_through_the_form():
    prompt = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C", "name": "me"},
        {"role": "assistant", "content": "D"},
    ]
    before = json.dumps(prompt)
    conditioned = resolve_condition("phrases").apply(prompt, "Bad")
    assert [m["content"] for m in conditioned] == ["S", "A", "B", "Bad. input: C", "D"]
    assert conditioned[3]["name"] == "me" and json.dumps(prompt) == before


def test_conversations_without_a_place_for_the_condition():
    condition = resolve_condition("phrases")
    with pytest.raises(ValueError, match=r"roles \['system'\], expected a user message"):
        condition.apply_best([{"role": "system", "content": "S"}])
    with pytest.raises(ValueError, match=r"content is \[.*expected text"):
        condition.apply_best([{"role": "user", "content": [{"type": "text", "text": "A"}]}])


# ------------------------------------------------------------------------------------------------------------ quantiles


def test_quantiles_of_each_prompt_or_of_all(tmp_path):
    rows = [(0, 9.0, None), (0, 8.0, None), (5, 2.0, None), (5, None, None), (5, 1.0, None)]
    table = pool_of(tmp_path, rows).table()
    spec = {"kind": "quantile_tokens", "quantiles": 2}
    assert pool_of(tmp_path, label=resolve_condition(spec).label).table().label.tolist() == [0, 1, 0, -1, 1]
    pooled = resolve_condition(spec | {"per_prompt": False})
    assert pool_of(tmp_path, label=pooled.label).table().label.tolist() == [0, 0, 1, -1, 1]
    assert [pooled.text(None, i) for i in (0, 1)] == ["<quantile_0>", "<quantile_1>"]
    assert len(table) == 5


def test_all_samples_of_a_prompt_are_ranked_together(tmp_path):
    condition = resolve_condition({"kind": "phrases", "phrases": ["up", "down"]})
    pool = pool_of(tmp_path, [(0, 1.0, None), (0, 2.0, None)], [(0, 3.0, None), (0, 4.0, None)], label=condition.label)
    assert pool.table(1).label.tolist() == [1, 0] and pool.table().label.tolist() == [1, 1, 0, 0]
    assert condition.text(pool[3], 0) == "up"


def test_a_prompt_with_too_few_samples_left_keeps_its_labels(tmp_path):
    condition = resolve_condition({"kind": "quantile_tokens", "quantiles": 4})
    first = [(0, float(s), None) for s in (1, 4, 3, 2)] + [(1, float(s), None) for s in (5, 8, 7, 6)]
    second = [(1, float(s), None) for s in (1, 2, 3, 4)]
    pool = pool_of(tmp_path, first, second, label=condition.label, drop_factor=0.5)
    table, by_score = pool.table(), dict(zip((1.0, 2.0, 3.0, 4.0), (3, 2, 1, 0), strict=True))
    old = (table.prompt_index == 0) & (table.round == 1)
    assert 0 < old.sum() < 4 and len(table) == 8
    assert table.label[old].tolist() == [by_score[s] for s in table.score[old]]
    again = table.prompt_index == 1
    assert table.label[again].tolist() == quantiles(table.score[again], n=4).tolist()


def test_too_few_samples_in_a_round(tmp_path):
    pool = pool_of(tmp_path, [(3, 1.0, None)] * 4, label=resolve_condition("phrases").label)
    with pytest.raises(ValueError, match="Prompt 3 has 4 samples, expected at least one for each of 5 quantiles"):
        pool.table()


# --------------------------------------------------------------------------------------------------------------- judges


def test_categories(tmp_path):
    condition = resolve_condition("categories")
    table = said(tmp_path, "Harmful", None, "Harmless and very helpful", "Harmless and helpful", "Harmful")
    assert condition.label(table).tolist() == [3, -1, 0, 1, 3]
    assert condition.text(None, 1) == "Harmless and helpful"


def test_a_category_that_is_none(tmp_path):
    table = said(tmp_path, "Harmful", "harmful")
    with pytest.raises(ValueError, match=r"row 1 \(prompt 0\): the feedback is 'harmful', expected one of \['Ha"):
        resolve_condition("categories").label(table)


def test_no_feedback_at_all(tmp_path):
    table = said(tmp_path, None, None)
    for kind in ("categories", "text", "attributes"):
        assert resolve_condition(kind).label(table).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="None of the 2 samples has both feedback and score"):
        resolve_condition("text").exemplars_from(table)


def test_text_is_balanced_by_score(tmp_path):
    condition = resolve_condition("text")
    rows = [(0, 3.0, "good"), (0, 0.0, "bad"), (1, 2.0, "fine"), (1, None, "lost"), (1, 3.0, None), (1, 3.0, "clear")]
    pool = pool_of(tmp_path, [*rows, (2, 3.0, "clear")], label=condition.label)
    assert pool.table().label.tolist() == [0, 3, 1, -1, -1, 0, 0]
    assert condition.text(pool[1], 3) == "bad"
    assert condition.exemplars_from(pool.table()) == ["clear", "good"]
    assert condition.exemplars_from(pool.table(), n=1) == ["clear"]
    with pytest.raises(ValueError, match="No exemplars are set"):
        condition.apply_best("Hello")
    assert condition.with_exemplars(["clear", "good"]).best == "clear"


def test_exemplars_of_the_best_score_there_is(tmp_path):
    table = pool_of(tmp_path, [(0, 1.0, "so so"), (0, 0.0, "bad")]).table()
    assert resolve_condition("text").exemplars_from(table) == ["so so"]


def test_a_prompt_always_gets_the_same_exemplar():
    texts = ["a", "b", "c"]
    condition = resolve_condition({"kind": "text", "exemplars": texts})
    prompts = [f"prompt {i}" for i in range(300)] + [[{"role": "user", "content": "x"}]]
    chosen = [condition.best_for(p) for p in prompts]
    assert chosen == [resolve_condition(condition.spec).best_for(p) for p in prompts]
    assert all(70 < chosen.count(x) < 130 for x in texts)
    assert condition.apply_best(prompts[7]) == f"feedback: {chosen[7]} input: prompt 7"


@pytest.mark.parametrize("score", [4.0, 1.5, -1.0])
def test_a_score_that_is_none_of_a_judges(tmp_path, score):
    table = pool_of(tmp_path, [(0, 3.0, "good"), (8, score, "bad")]).table()
    with pytest.raises(ValueError, match=rf"round 1, row 1 \(prompt 8\): the score is {score:g}, expected one of 0"):
        resolve_condition("text").label(table)


def test_attributes_are_ordered_by_their_distance_to_what_is_wanted(tmp_path):
    settings = [(1, 0), (0, 2), (0, 1), (0, 2), (2, 2)]
    texts = [json.dumps({"helpful": b, "harmful": a}) for a, b in settings]
    texts[3] = ' {"harmful": 0.0, "helpful": 2}'  # the same setting in other words
    condition = resolve_condition("attributes")
    pool = pool_of(tmp_path, [(0, None, f) for f in [*texts, None]], label=condition.label)
    assert pool.table().label.tolist() == [3, 0, 1, 0, 2, -1]  # distances 3, 0, 1, 0, 2
    names = condition.names(pool.table())
    assert names == ["harmful:0,helpful:2", "harmful:0,helpful:1", "harmful:2,helpful:2", "harmful:1,helpful:0"]
    assert [condition.text(pool[i], 0) for i in range(5)] == [names[i] for i in (3, 0, 1, 0, 2)]
    assert condition.names() == [condition.best] == names[:1]


def test_ties_of_attributes_go_by_value(tmp_path):
    table = said(tmp_path, '{"x": 2}', '{"x": 0}')
    condition = resolve_condition({"kind": "attributes", "attributes": {"x": 1}})
    assert condition.label(table).tolist() == [1, 0] and condition.best == "x:1"


OTHER_KEYS = ['{"harmful": 0}', '{"harmful": 0, "helpful": 2, "new": 1}', '{"harmful": true, "helpful": 2}']


@pytest.mark.parametrize("feedback", ["helpful", "[0, 2]", *OTHER_KEYS])
def test_attributes_that_are_none(tmp_path, feedback):
    table = said(tmp_path, '{"harmful": 0, "helpful": 2}', feedback)
    with pytest.raises(ValueError, match=r'round 1, row 1 .* expected \{"harmful": number, "helpful": number\}'):
        resolve_condition("attributes").label(table)


# ---------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("phrase", r"kind is 'phrase', expected one of \['attributes', 'categories'"),
        ({"quantiles": 5}, "kind is None"),
        ({"kind": ["text"]}, r"kind is \['text'\]"),
        (5, "condition is 5, expected"),
        (
            {"kind": "phrases", "n": 5},
            r"phrases has no option 'n'; it has \['form', 'quantiles', 'per_prompt', 'ties', 'phrases'",
        ),
        ({"kind": "phrases", "form": "{condition}"}, r"has \{prompt\} 0 times, expected once"),
        ({"kind": "phrases", "form": "{condition} {condition} {prompt}"}, r"has \{condition\} 2 times, expected once"),
        ({"kind": "phrases", "form": None}, r"The form None has"),
        ({"kind": "phrases", "phrases": "colours"}, r"'phrases' is 'colours', .* one of \['quality', 'toxicity'\]"),
        ({"kind": "phrases", "phrases": ["one"]}, "at least 2 different texts"),
        ({"kind": "phrases", "phrases": ["a", "a"]}, "at least 2 different texts"),
        ({"kind": "phrases", "phrases": ["a", " "]}, "not empty"),
        ({"kind": "phrases", "phrases": ["a", 2]}, "'phrases' is"),
        ({"kind": "phrases", "quantiles": 3}, "'quantiles' is 3 for 5 phrases"),
        ({"kind": "quantile_tokens", "quantiles": 1}, "'quantiles' is 1, expected an int, at least 2"),
        ({"kind": "quantile_tokens", "quantiles": "5"}, "'quantiles' is '5'"),
        ({"kind": "quantile_tokens", "quantiles": True}, "'quantiles' is True"),
        ({"kind": "quantile_tokens", "per_prompt": "no"}, "'per_prompt' is 'no', expected true or false"),
        ({"kind": "quantile_tokens", "token": "<q>"}, r"'token' is '<q>', expected a text with \{i\} once"),
        ({"kind": "categories", "categories": "kind"}, r"one of \['harmless_helpful'\]"),
        ({"kind": "categories", "categories": ["x"]}, "'categories' is"),
        ({"kind": "text", "exemplars": "good"}, "'exemplars' is 'good', expected a list of different texts"),
        ({"kind": "attributes", "attributes": {}}, "'attributes' is {}, expected wanted values"),
        ({"kind": "attributes", "attributes": {"helpful": "2"}}, "expected wanted values"),
        ({"kind": "attributes", "attributes": ["helpful"]}, "expected wanted values"),
    ],
)
def test_errors_of_a_spec(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_condition(spec)


def test_a_folder_without_or_with_a_damaged_condition(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no condition\.json"):
        Condition.load(tmp_path)
    for text, message in (("{", "Expecting.*Save the condition again"), ('{"kind": "text", "x": 1}', "option 'x'")):
        (tmp_path / "condition.json").write_text(text)
        with pytest.raises(ValueError, match=rf"condition\.json.*{message}"):
            Condition.load(tmp_path)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    resolve_condition("phrases").save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_condition("categories").save(tmp_path)
    assert Condition.load(tmp_path).kind == "phrases" and len(list(tmp_path.iterdir())) == 1
