"""TRL's contract for reward functions, the same wherever one is called: training, fitting, measuring, QRS, rounds.

Rounds are those of conditional training and of groups of own samples.
"""

import asyncio

import pytest
import torch
from judge_server import JudgeServer, scored
from small_trainers import COLUMNS, OWN_SAMPLES, TEXTS, saved_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, TrainerState

from contrastive_align.judge import Judge
from contrastive_align.judge.judge import JudgeReward
from contrastive_align.launch.measure import measure
from contrastive_align.targets import Constraint, FeatureError, Target, resolve_feature


FDPG, CONDITIONAL = (next(c for c in COLUMNS if c.name == name) for name in ("fdpg", "conditional"))


def value(completion_ids):
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def plain(prompts, completions, completion_ids, **columns):
    return value(completion_ids)


def with_state(completion_ids, trainer_state, **columns):
    assert isinstance(trainer_state, TrainerState)
    return value(completion_ids)


def with_metric(completion_ids, log_metric, **columns):
    log_metric("share", 0.25)
    return value(completion_ids)


def with_extra(completion_ids, log_extra, **columns):
    log_extra("size", [len(ids) for ids in completion_ids])
    return value(completion_ids)


def all_by_name(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, topic):
    assert len(topic) == len(prompts) == len(completions) == len(completion_ids)
    return torch.tensor(value(completion_ids))


def columns_alone(prompts, completions, completion_ids, topic):
    return value(completion_ids)


class Client:
    """An async function whose client belongs to the event loop of its first call."""

    loop = None

    async def __call__(self, completion_ids, **columns):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop() and not self.loop.is_closed()
        await asyncio.sleep(0)
        return value(completion_ids)


async def of_some(completion_ids, **columns):
    return [None if i % 2 else v for i, v in enumerate(value(completion_ids))]


@pytest.fixture
def reward_model(tmp_path):
    """The folder of a random classifier with one output, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(saved_model())
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1, **shape)
    for part in (LlamaForSequenceClassification(config), tokenizer):
        part.save_pretrained(tmp_path / "reward_model")
    return str(tmp_path / "reward_model")


@pytest.fixture
def file(tmp_path):
    """A function in a file, as the command line names it."""
    (tmp_path / "rewards.py").write_text(
        "def ids(completion_ids, **columns):\n    return [float(sum(ids) % 7) / 7 for ids in completion_ids]\n"
    )
    return f"{tmp_path / 'rewards.py'}:ids"


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A judge's scores, from a server that answers as an API does."""
    pytest.importorskip("openai")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with JudgeServer(scored) as server:
        options = {"answers": "text", "cache": tmp_path / "judged", "base_url": server.url}
        yield JudgeReward(Judge("feedback", model="judge", **options))
        assert server.calls


# As a user gives them; built with the fixture of the same name, where there is one.
FORMS = {
    "plain": lambda: plain,
    "trainer_state": lambda: with_state,
    "log_metric": lambda: with_metric,
    "log_extra": lambda: with_extra,
    "named": lambda: all_by_name,
    "without trl's": lambda: columns_alone,
    "async": Client,
    "file": lambda function: {"function": function},
    "reward_model": lambda folder: {"reward_model": folder},
    "judge": lambda function: function,
    "a sum with None": lambda: {"sum": [[1.0, of_some], [0.5, with_metric]]},
}


def rows(column):
    return column.rows(8).add_column("topic", ["x", "y"] * 4)


def rounds(folder, reward):
    """A round of each trainer that makes rounds; yields what was logged of it."""
    for column in (CONDITIONAL, OWN_SAMPLES):
        told = {"train_dataset": rows(column), "reward_funcs": reward}
        options = {"max_steps": -1, "num_generations": 12 if reward is of_some else 5}
        if column is CONDITIONAL:
            trainer = column.make(folder / "c", told={**told, "condition": "phrases"}, num_train_epochs=1, **options)
        else:
            trainer = column.make(folder / "o", told=told, **{**options, "num_rounds": 1})
        trainer.begin_round(1)
        yield trainer.state.log_history


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_reward_runs_everywhere(form, tmp_path, request):
    given = [request.getfixturevalue(form)] if form in ("file", "reward_model", "judge") else []
    reward, wanted = FORMS[form](*given), form in ("log_metric", "a sum with None")
    name = f"moment/{resolve_feature(reward).name}"
    told = {"train_dataset": rows(FDPG), "reward_funcs": reward}
    trainer = FDPG.make(tmp_path / "f", told=told, max_steps=2, log_completions=form == "log_extra")
    trainer.train()
    columns, *_ = measure(trainer, list(rows(FDPG))[:2], samples=100, acceptance=0.5, seed=1)
    assert "tuned+QRS" in columns
    assert [entry["share"] for entry in trainer.state.log_history if "share" in entry] == [0.25, 0.25] * wanted
    fitted = Target([Constraint(reward, columns["base"][name].value)])
    fitting = FDPG.make(tmp_path / "t", told={**told, "reward_funcs": None, "target": fitted}, fit_samples=256)
    fitting.fit_target()
    assert fitted.fitted
    for history in rounds(tmp_path, reward):
        assert [entry["share"] for entry in history if "share" in entry] == [0.25] * wanted


def test_what_a_reward_leaves_unscored_is_counted_in_rounds_and_refused_in_a_target(tmp_path):
    for history in rounds(tmp_path, of_some):
        (found,) = [entry for entry in history if "round/number" in entry]
        assert found["round/unscored"] == found["round/samples"] / 2
    with pytest.raises(FeatureError, match=r"sample 1 .*is None, expected a number"):
        FDPG.make(tmp_path / "f", told={"train_dataset": rows(FDPG), "reward_funcs": of_some}).train()


def test_columns_that_rewards_log_stand_beside_their_completions(tmp_path, capsys):
    def repeated(completions, log_extra, **columns):
        log_extra("again", [f"<{text}>" for text in completions])
        return [float(len(text)) for text in completions]

    FDPG.make(tmp_path, told={"reward_funcs": repeated}, log_completions=True).train()
    lines = [line.split("\u2502") for line in capsys.readouterr().out.splitlines() if "<" in line]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    answered = [row for row in cells if row[-1] != "<>"]
    assert answered and all(f"<{row[1]}>" == row[-1] for row in answered)


def test_async_functions_run_together_in_one_loop():
    here, there = asyncio.Event(), asyncio.Event()

    async def first(completions, **columns):
        here.set()
        await asyncio.wait_for(there.wait(), 5)
        return [0.25] * len(completions)

    async def second(completions, **columns):
        there.set()
        await asyncio.wait_for(here.wait(), 5)
        return [0.5] * len(completions)

    both = resolve_feature({"sum": [[1.0, first], [1.0, second]]})
    assert both(prompts=["a"], completions=["b"]) == [0.75]
    pair = Target([Constraint(first, 0.5), Constraint(second, 0.5)])
    here.clear(), there.clear()
    assert pair.features(["a"], ["b"]).tolist() == [[0.25, 0.5]]


def test_what_none_means_is_what_the_message_says():
    nothing, one = (lambda completions, **_: [None] * len(completions)), (lambda completions, **_: [1.0])
    for spec in (nothing, {"sum": [[1.0, nothing], [2.0, nothing]]}):
        with pytest.raises(FeatureError, match="combine it in a sum with a function that answers"):
            Target.from_reward(spec, 1.0).features([TEXTS[0]], [TEXTS[1]])
    assert Target.from_reward({"sum": [[1.0, nothing], [2.0, one]]}, 1.0).features(["a"], ["b"]).tolist() == [[2.0]]
