"""Features by spec and as TRL calls them, constraints, energies, conditional fits, saving; what is refused, and how."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from contrastive_align import demo
from contrastive_align import targets as targets_room
from contrastive_align.targets import (
    NOT_COLUMNS,
    Constraint,
    Feature,
    FeatureError,
    InfeasibleMoment,
    Target,
    columns_of,
    completion_text,
    evaluate_feature,
    evaluate_features,
    fit_lambdas,
    resolve_constraint,
    resolve_feature,
    weighted_sum,
)


F64 = torch.float64
TEXTS = ["Please, please close the door.", "Close the door!", "The arts are a party."]


def chat(text):
    return [{"role": "assistant", "content": text}]


def values(spec, texts=TEXTS, **columns):
    feature = resolve_feature(spec)
    plain = evaluate_feature(feature, ["Hi. "] * len(texts), texts, **columns)
    prompt = [{"role": "user", "content": "Hi."}]
    talk = evaluate_feature(feature, [prompt] * len(texts), [chat(text) for text in texts], **columns)
    assert torch.equal(plain, talk) and plain.dtype == F64
    return plain.tolist()


# --------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"contains": "please"}, [1, 0, 0]),
        ({"contains": "please", "case_sensitive": True}, [1, 0, 0]),
        ({"contains": "CLOSE", "case_sensitive": True}, [0, 0, 0]),
        ({"contains": "please", "count": True}, [2, 0, 0]),
        ({"contains": ["door", "party"]}, [1, 1, 1]),
        ({"contains": "art", "count": True}, [0, 0, 2]),
        ({"contains": "a.t"}, [0, 0, 0]),
        ({"words": ["art", "close"]}, [1, 1, 0]),
        ({"words": ["the", "a", "the arts"], "count": True}, [1, 1, 2]),
        ({"matches": r"!$"}, [0, 1, 0]),
        ({"matches": "(?i)PLEASE", "count": True}, [2, 0, 0]),
        ({"length": "words"}, [5, 3, 5]),
        ({"length": "characters"}, [30, 15, 21]),
        ({"length": "words", "max": 4}, [0, 1, 0]),
        ({"length": "words", "min": 5, "max": 5}, [1, 0, 1]),
        ({"product": [{"contains": "door"}, {"contains": "please"}]}, [1, 0, 0]),
        ({"sum": [[0.5, {"contains": "door"}], [2, {"length": "words"}]]}, [10.5, 6.5, 10]),
        ({"not": {"contains": "please"}}, [0, 1, 1]),
    ],
)
def test_text_specs(spec, want):
    assert values(spec) == want


def test_length_in_tokens_reads_the_ids():
    assert values({"length": "tokens"}, completion_ids=[[1], [1, 2], []]) == [1, 2, 0]
    with pytest.raises(FeatureError, match=r"length:tokens.*'completion_ids', which was not given"):
        values({"length": "tokens"})


def test_words_from_a_file(tmp_path):
    (tmp_path / "polite.txt").write_text("please\n\n  kindly \n")
    assert values({"words": str(tmp_path / "polite.txt")}) == [1, 0, 0]
    with pytest.raises(ValueError, match=r"no file 'polite'.*list: \[polite\]"):
        resolve_feature({"words": "polite"})


def test_functions_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: int\n"
        "def shout(prompts, completions, **kwargs):\n    return [Box(c.isupper()).value for c in completions]\n"
    )
    shout = resolve_feature(f"{file}:shout")
    assert shout.name == "shout" and evaluate_feature(shout, ["", ""], ["HEY", "hey"]).tolist() == [1, 0]
    assert values("contrastive_align.demo.task:contains_please") == [1, 0, 0]
    assert values({"function": "contrastive_align.demo.task:contains_please", "name": "mine"}) == [1, 0, 0]
    with pytest.raises(AttributeError, match=r"no function 'whisper'. It has: .*shout"):
        resolve_feature(f"{file}:whisper")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        resolve_feature("nowhere.py:shout")


def test_functions_as_trl_calls_them():
    """Keyword arguments, columns beside them, None in a sum of tasks, async, a callable instance."""

    def for_maths(prompts, completions, answer, completion_ids, trainer_state=None, **kwargs):
        return [None if a is None else float(a in c) for a, c in zip(answer, completions, strict=True)]

    async def for_text(prompts, completions, answer, **kwargs):
        return [None if a is not None else 0.25 for a in answer]

    class Scorer:
        def __call__(self, prompts, completions, **kwargs):
            return torch.arange(len(completions))

    both = resolve_feature({"sum": [[1.0, for_maths], [2.0, for_text]]})
    columns = {"answer": ["4", None, "5"], "completion_ids": [[1], [2], [3]]}
    got = evaluate_features([both, resolve_feature(Scorer())], ["?"] * 3, ["4", "a poem", "4"], **columns)
    assert got.tolist() == [[1.0, 0.0], [0.5, 1.0], [0.0, 2.0]]
    assert both.name == "1*for_maths+2*for_text" and resolve_feature(Scorer()).name == "Scorer"
    with pytest.raises(FeatureError, match=r"'for_maths', sample 1 .* is None, expected a number.*in a sum"):
        evaluate_feature(resolve_feature(for_maths), ["?"] * 3, ["4", "a poem", "4"], **columns)
    # A feature is itself a reward function.
    assert (
        both(prompts=["?"], completions=["4"], answer=["4"], completion_ids=[[1]]) == [1.0]
        and both.__name__ == both.name
    )


def test_columns_may_have_any_name():
    feature = resolve_feature(lambda prompts, completions, feature, self, **kwargs: feature)
    assert Target([Constraint(feature, 0.5)]).features(["", ""], ["", ""], feature=[1, 0], self=[2, 2]).tolist() == [
        [1],
        [0],
    ]


def test_the_columns_of_rows_are_those_a_reward_function_is_not_given_by_another_name():
    rows = [{**dict.fromkeys(NOT_COLUMNS, "no"), "topic": topic, "n": n} for n, topic in enumerate("ab")]
    assert columns_of(rows, 2) == {"topic": ["a", "a", "b", "b"], "n": [0, 0, 1, 1]}
    assert columns_of(rows, [0, 3]) == {"topic": ["b"] * 3, "n": [1] * 3}
    assert columns_of([{"a": 1}, {"b": 2}], [1, 2]) == {"a": [1, None, None], "b": [None, 2, 2]}  # as in a dataset
    assert columns_of([], 2) == {}


def test_messages_are_read():
    assert completion_text([*chat("Yes."), {"role": "tool", "content": "42"}, *chat("It is 42.")]) == "Yes.\nIt is 42."
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}]) == "Hi"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"contains": "a", "cases": True}, "unknown key 'cases'. 'contains' takes case_sensitive, count, name"),
        ({"contains": "a", "moment": 0.5}, "unknown key 'moment'.*belongs to a constraint"),
        ({"contain": "a"}, "no kind, expected exactly one of contains, words"),
        ({"contains": "a", "words": ["b"]}, r"has \['contains', 'words'\], expected exactly one"),
        ({"contains": True}, "contains: found True, expected a text.*quote"),
        ({"contains": []}, "contains: found"),
        ({"matches": "("}, "no regular expression"),
        ({"length": "lines"}, "length: found 'lines', expected one of words, characters, tokens"),
        ({"length": "words", "max": "20"}, "max is '20', expected a number"),
        ({"sum": [{"contains": "a"}]}, r"expected a list of \[weight, feature\]"),
        ({"sum": [["x", {"contains": "a"}]]}, r"expected a list of \[weight, feature\]"),
        ({"product": {"contains": "a"}}, "product: found .* expected a list of features"),
        ({"classifier": "some/model"}, "some/model needs a label"),
        ({"classifier": "some/model", "label": "positive", "threshold": 2}, "threshold is 2, expected a probability"),
        ({"reward_model": "some/model", "label": "x"}, "unknown key 'label'. 'reward_model' takes revision"),
        ({"reward_model": "some/model", "reads": "all"}, "reads is 'all', expected 'both'"),
        ({"contains": "a", "name": 3}, "name 3, expected a text"),
        ("contains", "kind of feature, expected what it is about"),
        (3, r"Found 3 \(int\) where a feature is wanted"),
    ],
)
def test_specs_that_are_refused(spec, match):
    with pytest.raises(ValueError, match=match):
        resolve_feature(spec)


# --------------------------------------------------------------------------------------------------- bad answers


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda n: 1 / 0, r"Feature 'bad' raised ZeroDivisionError: division by zero \(on 3 samples.*'Ask Anna'"),
        (lambda n: [0.0, math.nan, 1.0], r"'bad', sample 1 \(prompt 'Ask Bob'\) is nan, expected a finite number"),
        (lambda n: [0.0, 1.0, -math.inf], r"sample 2 .* is -inf, expected a finite"),
        (lambda n: [0.0] * (n - 1), "returned 2 values, expected a list of 3 numbers"),
        (lambda n: ["yes"] * n, r"sample 0 .* is 'yes' \(str\), expected a number"),
        (lambda n: "yes", r"returned 'yes' \(str\), expected a list of 3"),
        (lambda n: None, "returned None .*expected a list of 3"),
        (lambda n: 1.0, r"returned 1.0 \(float\), expected a list"),
        (lambda n: [None] * n, "sample 0 .* is None, expected a number"),
        (lambda n: [[1.0]] * n, r"sample 0 .* is \[1.0\] \(list\)"),
        (lambda n: torch.zeros(n, 1), r"array of shape \(3, 1\), expected a list of 3"),
        (lambda n: {"a": 1}, "returned .* expected a list of 3"),
    ],
)
def test_answers_that_are_refused(answer, match):
    def bad(prompts, completions, **columns):
        return answer(len(completions))

    prompts = ["Ask Anna", "Ask Bob", "Ask Eve"]
    for spec in (bad, {"sum": [[1.0, bad]]}) if "None, expected" not in match else (bad,):
        with pytest.raises(FeatureError, match=match):
            evaluate_feature(resolve_feature(spec), prompts, TEXTS)


def test_no_samples_are_no_values():
    assert evaluate_features([resolve_feature({"contains": "a"})] * 2, [], []).shape == (0, 2)


# --------------------------------------------------------------------------------------------------- sequence models


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    path = tmp_path_factory.mktemp("classifier")
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


PROMPTS = ["Ask Anna. ", "Tell Bob to wait. ", "Ask. "]


def test_a_reward_model_scores_as_in_trl(reward_model):
    """Its one logit on prompt + completion without special tokens, whatever shares the batch."""
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    want = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        ids = tokenizer(prompt + text, add_special_tokens=False, return_tensors="pt")
        want.append(model(**ids).logits.item())
    for spec in (
        reward_model,
        {"reward_model": reward_model, "batch_size": 2},
        {"reward_model": reward_model, "batch_size": 1},
    ):
        got = evaluate_feature(resolve_feature(spec, device="cpu"), PROMPTS, TEXTS)
        assert torch.allclose(got, torch.tensor(want, dtype=F64), atol=1e-5)
    loaded = evaluate_feature(resolve_feature(model, tokenizer=tokenizer), PROMPTS, TEXTS)
    assert torch.allclose(loaded, torch.tensor(want, dtype=F64), atol=1e-5)
    assert resolve_feature(reward_model).boolean is False
    assert resolve_feature(reward_model).name == reward_model.split("/")[-1]


def test_a_dialogue_goes_through_the_template(reward_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    feature = resolve_feature(model, tokenizer=tokenizer)
    got = evaluate_feature(feature, [[{"role": "user", "content": "Hi."}]], [chat("Please.")])
    want = evaluate_feature(feature, ["[user] Hi. "], ["[assistant] Please. "])
    assert torch.allclose(got, want)


def test_a_classifier_gives_the_probability_of_its_label(classifier):
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(classifier),
        AutoTokenizer.from_pretrained(classifier),
    )
    want = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in TEXTS]
    for label in ("positive", "POSITIVE", 1):
        assert values({"classifier": classifier, "label": label}) == pytest.approx(want, abs=1e-5)
    middle = sorted(want)[1]
    hard = resolve_feature({"classifier": classifier, "label": "positive", "threshold": middle - 1e-3})
    assert evaluate_feature(hard, PROMPTS, TEXTS).tolist() == [float(p >= middle - 1e-3) for p in want] and hard.boolean


def test_sequence_models_that_are_refused(classifier, reward_model, tmp_path):
    def refused(match, spec):
        with pytest.raises(FeatureError, match=match):
            evaluate_feature(resolve_feature(spec), PROMPTS, TEXTS)

    refused(r"does not load as a reward model with one score.*\{classifier: ", classifier)
    refused(r"no label 'neutral'. Its labels: NEGATIVE, POSITIVE", {"classifier": classifier, "label": "neutral"})
    refused("no trained weights for.*score.*without its head", demo.MODEL_PATH)
    for path in (str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(ValueError, match=r"reward_model: there is no folder '.*nothing'"):
            resolve_feature({"reward_model": path})
    with pytest.raises(ValueError, match=r"found 'rewards.py', a Python file. Name the function in it: 'rewards.py:"):
        resolve_feature("rewards.py")


def test_texts_that_are_too_long_are_counted_and_lose_their_beginning(reward_model, caplog):
    feature = resolve_feature({"reward_model": reward_model, "max_length": 4})
    with caplog.at_level("WARNING"):
        got = evaluate_feature(feature, ["x", "x"], ["Please close the door.", "Ask Anna to close the door."])
        evaluate_feature(feature, ["x"], ["Please close the door."])
    assert [record.message[:43] for record in caplog.records] == ["2 of 2 texts are longer than the 4 tokens t"]
    assert got[0].item() == pytest.approx(got[1].item(), abs=1e-6)


# ------------------------------------------------------------------------------------------------ constraints, energy


def polite(moment, **kwargs):
    return Constraint({"contains": "please"}, moment, **kwargs)


def long(moment, **kwargs):
    return Constraint({"length": "words"}, moment, **kwargs)


def unknown(prompts, completions, **columns):
    return [float(len(c) > 20) for c in completions]


def test_a_moment_of_one_is_pointwise_where_the_feature_is_boolean():
    assert polite(1.0).pointwise is True and polite(1).pointwise is True
    assert polite(0.5).pointwise is False and long(1.0).pointwise is False
    assert Constraint(unknown, 1.0).pointwise is None and Constraint(unknown, 1.0, pointwise=True).pointwise is True
    assert polite(1.0, pointwise=False).pointwise is False
    constraint = resolve_constraint({"contains": "please", "moment": 1.0, "name": "polite"})
    assert (constraint.name, constraint.moment, constraint.pointwise) == ("polite", 1.0, True)
    assert resolve_constraint({"feature": unknown, "moment": 0.5}).name == "unknown"
    assert resolve_constraint({"function": unknown, "moment": 0.5, "pointwise": False}).pointwise is False


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: polite("half"), "moment of 'contains:please' is 'half', expected a finite number"),
        (lambda: polite(math.nan), "is nan, expected a finite"),
        (lambda: polite(True), "is True, expected a finite"),
        (lambda: polite(0.5, pointwise=True), "pointwise with moment=0.5, expected moment=1.0"),
        (lambda: long(1.0, pointwise=True), "pointwise with a feature that is not boolean"),
        (lambda: polite(1.0, pointwise="yes"), "pointwise of .* is 'yes'"),
        (lambda: resolve_constraint({"contains": "please"}), "expected a constraint: a feature with its moment"),
        (lambda: resolve_constraint({"contains": "a", "moments": 1, "moment": 0.5}), "unknown key 'moments'"),
        (lambda: Target([]), "at least one constraint"),
        (lambda: Target([{"contains": "a", "moment": 0.5}]), "resolve_constraint"),
        (lambda: Target([polite(0.5), polite(0.4)]), "Two constraints are called 'contains:please'"),
        (lambda: Target.from_reward(unknown, 0.0), "beta is 0.0, expected a number above 0"),
    ],
)
def test_constraints_that_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_lambdas_are_unknown_until_fitted():
    target = Target([polite(0.5), long(4.0)])
    assert not target.fitted
    for use in (lambda: target.lambdas, lambda: target.energy(torch.zeros(1, 2))):
        with pytest.raises(RuntimeError, match=r"lambdas of 'contains:please', 'length:words' are not known.*fit"):
            use()


def test_energy_of_pointwise_constraints_is_never_nan():
    target = Target([polite(1.0), Constraint(unknown, 0.5)])
    phi = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 20)
    target.fit(phi)
    energy = target.energy(phi[:4])
    assert energy.tolist() == [0.0, -math.inf, target.lambdas[1].item(), -math.inf] and target.lambdas[0] == 0
    scores = target.log_scores(torch.tensor([-1.0, -2.0, -math.inf, -math.inf]), phi[:4])
    assert scores.tolist() == [-1.0, -math.inf, -math.inf, -math.inf] and scores.dtype == F64
    assert target.log_scores(torch.zeros(2, 2), phi[:4].reshape(2, 2, 2)).shape == (2, 2)
    only = Target([polite(1.0)])
    assert only.fitted and only.energy(phi[:2, :1]).tolist() == [0.0, -math.inf]


@pytest.mark.parametrize(
    ("phi", "match"),
    [
        (torch.tensor([[0.5, 0.0]]), "'contains:please' is pointwise, .* and 0.5 on a sample, expected 0 or 1"),
        (torch.tensor([[1.0, math.nan]]), "of 'unknown' is nan, expected a finite"),
        (torch.zeros(3, 1), r"phi has the shape \(3, 1\), expected \(..., 2\)"),
    ],
)
def test_features_that_have_no_energy(phi, match):
    target = Target([polite(1.0), Constraint(unknown, 0.5)])
    target.fit(torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 40))
    with pytest.raises(ValueError, match=match):
        target.energy(phi)


def test_log_probs_that_have_no_score():
    target = Target([polite(1.0)])
    with pytest.raises(ValueError, match=r"base_logps has the shape \(2,\)"):
        target.log_scores(torch.zeros(2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="base_logps has NaN"):
        target.log_scores(torch.tensor([math.nan]), torch.zeros(1, 1))


def test_a_reward_tilts_the_base():
    target = Target.from_reward({"length": "words"}, beta=0.25)
    phi = target.features(PROMPTS, TEXTS)
    assert target.fitted and target.reward_beta == 0.25 and target.lambdas.tolist() == [4.0]
    assert target.log_scores(torch.tensor([-1.0, -2.0, -3.0]), phi).tolist() == [19.0, 10.0, 17.0]
    assert target.names == ["length:words"] and target.moments.isnan().all()
    with pytest.raises(ValueError, match="nothing to fit: lambda = 1 / beta = 4"):
        target.fit(phi)


def test_reward_functions_are_one_weighted_sum(tmp_path):
    single = weighted_sum(unknown)
    assert single.name == "unknown" and single.function is unknown and weighted_sum([unknown], [1]) == single
    assert weighted_sum({"length": "words"}).spec == {"length": "words"}
    two = weighted_sum([{"length": "words"}, {"contains": "please"}], [0.5, -2.0], name="reward")
    assert evaluate_feature(two, PROMPTS, TEXTS).tolist() == [0.5, 1.5, 2.5] and two.name == "reward"
    assert two.spec == {"sum": [[0.5, {"length": "words"}], [-2.0, {"contains": "please"}]], "name": "reward"}
    path = Target.from_reward(two, 0.1).save(tmp_path / "target.json")
    assert Target.from_saved(path).names == ["reward"]
    assert weighted_sum([unknown] * 2).name == "1*unknown+1*unknown"
    with pytest.raises(ValueError, match=r"^reward_weights has 3 numbers for 2 reward functions\.$"):
        weighted_sum([unknown] * 2, [1.0] * 3)


@pytest.mark.parametrize("reward", [unknown, {"length": "words"}])
def test_a_single_reward_saved_as_a_sum_is_the_same_target(reward, tmp_path):
    path = Target.from_reward({"sum": [[1.0, reward]]}, 0.5).save(tmp_path / "target.json")
    target = Target.from_reward(weighted_sum(reward), 0.5)
    assert target.load(path).lambdas.tolist() == [2.0]
    Target.from_reward({"sum": [[1.0, reward]]}, 0.5).load(path)
    with pytest.raises(ValueError, match="has the features"):
        Target.from_reward({"contains": "please"}, 0.5).load(path)


# -------------------------------------------------------------------------------------------------------------- the fit


def test_the_fit_from_completions():
    texts = ["Please wait."] * 7 + ["Wait."] * 93
    target = Target([polite(0.5)])
    fit = target.fit(target.features([""] * 100, texts))
    assert target.lambdas.item() == pytest.approx(2.58669, abs=5e-6) and target.last_fit is fit
    assert target.fitted and fit.achieved.item() == pytest.approx(0.5)


def test_the_fit_by_prompt_index_is_the_fit_by_shape():
    g = torch.Generator().manual_seed(0)
    phi = torch.rand(3, 50, 2, generator=g, dtype=F64)
    weights = torch.randn(3, 50, generator=g, dtype=F64)
    index = torch.arange(3).repeat_interleave(50)
    keep = torch.randperm(150, generator=g)[:130]
    mask = torch.zeros(150, dtype=torch.bool).index_fill_(0, keep, True).reshape(3, 50)
    constraints = [Constraint(Feature(unknown, name), 0.6) for name in ("a", "b")]
    by_index, by_shape = Target(constraints), Target(constraints)
    one = by_index.fit(phi.reshape(150, 2)[keep], log_weights=weights.flatten()[keep], prompt_index=index[keep])
    two = by_shape.fit(phi, log_weights=weights, valid=mask)
    pure = fit_lambdas(phi, [0.6, 0.6], log_weights=weights, valid=mask)
    assert torch.allclose(one.lambdas, two.lambdas, atol=1e-9) and torch.allclose(one.log_z, two.log_z, atol=1e-9)
    assert torch.equal(two.lambdas, pure.lambdas) and torch.allclose(by_index.lambdas, pure.lambdas, atol=1e-9)


def test_what_is_boolean_on_the_samples_is_decided_by_the_fit():
    target = Target([Constraint(unknown, 1.0), polite(0.5)])
    phi = torch.tensor([[1.0, 0.0]] * 60 + [[1.0, 1.0]] * 30 + [[0.0, 1.0]] * 30)
    fit = target.fit(phi)
    assert target.pointwise == [True, False] and target.lambdas[0] == 0
    assert target.lambdas[1].item() == pytest.approx(math.log(2)) and fit.samples == 90
    assert fit.log_z.item() == pytest.approx(math.log(120 / 120))
    real = torch.cat([phi, torch.tensor([[1.3, 1.0]] * 120)])
    target.fit(real)
    assert target.pointwise == [False, False] and target.lambdas[0] != 0


def test_a_pointwise_constraint_nothing_satisfies():
    target = Target([polite(1.0), Constraint(unknown, 0.5)])
    with pytest.raises(InfeasibleMoment, match=r"None of 50 samples .* Z = 0: 'contains:please' by 0 of 50"):
        target.fit(torch.tensor([[0.0, 1.0], [0.0, 0.0]] * 25))
    both = Target([polite(1.0), Constraint(unknown, 1.0, pointwise=True)])
    with pytest.raises(InfeasibleMoment, match=r"together, .* 'contains:please' by 20 of 50, 'unknown' by 30 of 50"):
        both.fit(torch.tensor([[1.0, 0.0]] * 20 + [[0.0, 1.0]] * 30))


def test_prompts_that_nothing_satisfies_are_counted(caplog):
    target = Target([polite(1.0), Constraint(unknown, 0.5)])
    phi = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]).repeat(3, 25, 1)
    phi[1, :, 0] = 0
    with caplog.at_level("WARNING"):
        fit = target.fit(phi)
    assert fit.skipped == [1] and "1 of 3 prompts had no sample that satisfies" in caplog.text
    assert target.lambdas[1].item() == pytest.approx(-math.log(2)) and fit.log_z[1] == -math.inf


def test_a_moment_fitted_on_too_few_samples_of_each_prompt_is_named(tmp_path):
    rates = torch.linspace(0.01, 0.5, 64)[:, None, None]
    phi = (torch.rand(64, 512, 1, generator=torch.Generator().manual_seed(0)) < rates).double()
    target = Target([Constraint({"contains": "please"}, 0.5)])
    target.fit(phi, correct_bias=True, population=math.inf)
    assert target.unsure_moments() == []
    target.fit(phi[:, :8], correct_bias=True, population=math.inf)
    target.save(tmp_path / "target.json")
    again = Target([Constraint({"contains": "please"}, 0.5)])
    again.load(tmp_path / "target.json")
    (line,) = again.unsure_moments()
    assert "contains:please: fitted on too few samples of each prompt (8)" in line and "fit_max_samples" in line


def test_a_failed_fit_changes_nothing():
    target = Target([polite(0.5)])
    target.fit(torch.tensor([[1.0], [0.0], [0.0]] * 30))
    before = target.state_dict()
    with pytest.raises(InfeasibleMoment, match=r"'contains:please' is the constant 0 on all 90 samples"):
        target.fit(torch.zeros(90, 1))
    assert target.state_dict() == before


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"phi": torch.zeros(3)}, r"shape \(3,\), expected \(n, J\) or"),
        ({"phi": torch.zeros(0, 1)}, "no rows"),
        ({"phi": torch.zeros(3, 1), "prompt_index": torch.tensor([0, 2, 2])}, r"1 of 3 prompts have no sample.*\[1\]"),
        ({"phi": torch.zeros(3, 1), "prompt_index": torch.tensor([0, 1])}, r"prompt_index has the shape \(2,\)"),
        ({"phi": torch.zeros(3, 1), "log_weights": torch.zeros(2)}, r"log_weights has the shape \(2,\)"),
        ({"phi": torch.zeros(3, 1), "valid": torch.ones(3, dtype=torch.bool)}, "leave rows out"),
        ({"phi": torch.zeros(1, 3, 1), "prompt_index": torch.zeros(1, 3)}, "by prompt already"),
        ({"phi": torch.tensor([[1.0], [math.nan]])}, r"phi\[0, 1\] of 'contains:please' is nan"),
    ],
)
def test_samples_that_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Target([polite(0.5)]).fit(**kwargs)


# ------------------------------------------------------------------------------------------------------------- on disk


def fitted():
    target = Target([polite(0.5), Constraint(unknown, 1.0), Constraint(lambda prompts, completions, **c: [0.1], 0.3)])
    g = torch.Generator().manual_seed(0)
    phi = torch.rand(200, 3, generator=g)
    phi[:, :2] = phi[:, :2].round()
    target.fit(phi)
    return target, phi


def test_saved_and_loaded(tmp_path):
    target, phi = fitted()
    path = target.save(tmp_path / "run" / "target.json")
    assert [file.name for file in path.parent.iterdir()] == ["target.json"]
    fresh = Target(target.constraints)
    assert fresh.load(path) is fresh and fresh.state_dict() == target.state_dict()
    assert torch.equal(fresh.lambdas, target.lambdas) and fresh.pointwise == target.pointwise == [False, True, False]
    assert torch.equal(fresh.energy(phi), target.energy(phi))
    assert fresh.load(target.save(path)).fitted  # a fitted target may be loaded again
    row = json.loads(path.read_text())
    assert row["fit"]["ess"] > 30 and set(row["fit"]["lambda_se"]) == {"contains:please", "<lambda>"}
    reward = Target.from_reward({"contains": "please"}, beta=0.1)
    Target.from_reward({"contains": "please"}, beta=0.1).load(reward.save(tmp_path / "reward.json"))


def test_made_anew_from_its_file(tmp_path):
    target, phi = fitted()
    path = target.save(tmp_path / "target.json")
    functions = {"unknown": unknown, "<lambda>": lambda prompts, completions, **columns: [0.1]}
    again = Target.from_saved(path, functions)
    assert again.names == target.names and torch.equal(again.energy(phi), target.energy(phi))
    with pytest.raises(ValueError, match="'unknown' was a function of Python"):
        Target.from_saved(path)
    reward = Target.from_reward({"contains": "please"}, beta=0.1).save(tmp_path / "reward.json")
    assert Target.from_saved(reward).reward_beta == 0.1


def test_a_file_of_another_target_is_refused(tmp_path):
    target = Target([polite(0.5)])
    target.fit(torch.tensor([[1.0], [0.0], [0.0]] * 30))
    path = target.save(tmp_path / "target.json")
    for other, match in (
        (Target([polite(0.4)]), r"target.json: it has the moment 0.5 for 'contains:please', this target has 0.4"),
        (Target([long(0.5)]), r"has the features \['contains:please'\], this target has \['length:words'\]"),
        (Target([Constraint({"contains": "thanks", "name": "contains:please"}, 0.5)]), "has the spec .*please.*thanks"),
        (Target.from_reward({"contains": "please"}, 0.1), "reward's beta None, this target has 0.1"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load(path)
        assert other.fitted == (other.reward_beta is not None)
    for text in ("{}", "[]", "no json"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no saved target"):
            target.load(path)


def test_specs_with_functions_of_python_are_not_written():
    assert resolve_feature({"sum": [[1.0, unknown]]}).spec is None
    assert resolve_feature({"sum": [(1.0, {"contains": "a"})]}).spec == {"sum": [[1.0, {"contains": "a"}]]}


def test_the_room_imports_torch_and_itself():
    """At import; transformers comes with the first reward model, and no sampling or trainer ever."""
    for file in Path(targets_room.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                known = name.split(".")[0] in {"torch", *sys.stdlib_module_names}
                own = name.startswith(("contrastive_align.targets", "contrastive_align.registry"))
                assert known or own, (file, name)
