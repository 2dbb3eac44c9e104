"""Steps over JSONL files: parts that make the same whole, files that are whole or not there, and what each refuses."""

import itertools
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from judge_server import JudgeServer, scored
from sampling_server import SamplingServer, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrastive_align.conditions import resolve_condition
from contrastive_align.conditions.scored_rows import read_scored
from contrastive_align.conditions.tokens import add_condition_tokens
from contrastive_align.demo import MODEL_PATH
from contrastive_align.demo.task import all_prompts
from contrastive_align.judge.judge import resolve_judge
from contrastive_align.launch import ask, cli, step_commands
from contrastive_align.launch.conditional import ConditionalRun
from contrastive_align.launch.step_commands import convert, main
from contrastive_align.launch.step_files import part_rows
from contrastive_align.launch.usage import UsageError
from contrastive_align.sampling.decode import seed_of
from contrastive_align.sampling.server import SEEDS


PROMPTS = all_prompts()[::151][:7]
CONVERSATION = [{"role": "user", "content": "Ask Anna to close the door."}]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": p, "topic": i} for i, p in enumerate(PROMPTS)])


def sample(prompts, output="gen.jsonl", *flags, model=MODEL_PATH):
    main(
        ["sample", f"--model_name_or_path={model}", f"--prompts={prompts}", f"--output={output}", "--num_generations=3",
         "--max_completion_length=12", *flags]
    )  # fmt: skip


def refused(match, *argv):
    with pytest.raises(UsageError) as error:
        main([str(a) for a in argv])
    assert re.search(match, error.value.message), error.value.message
    assert error.value.code == 2


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("total", [1, 2, 3, 7, 9])
def test_parts_are_disjoint_contiguous_and_all_there(total):
    parts = [list(part_rows(k, total, 7)) for k in range(total)]
    assert list(itertools.chain(*parts)) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("total", [3, 11])
def test_the_same_samples_come_out_however_the_work_is_divided(prompts, tmp_path, total):
    sample(prompts, "whole.jsonl")
    for k in reversed(range(total)):
        sample(prompts, "gen.jsonl", f"--split_number={k}", f"--total_splits={total}", "--rows_at_once=4")
    main(["merge", "--inputs=gen.*.jsonl", "--output=gen.jsonl"])
    assert (tmp_path / "gen.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = read(tmp_path / "gen.jsonl")
    assert [(r["prompt"], r["topic"], r["prompt_index"]) for r in rows] == [(p, i, i) for i, p in enumerate(PROMPTS)]
    assert all(len(r["generations"]) == len(r["finished"]) == 3 for r in rows)
    texts = [t for r in rows for t in r["generations"]]
    assert len(set(texts)) > len(texts) // 2
    assert {end for r in rows for end in r["finished"]} == {True, False}


def test_another_seed_draws_something_else(prompts, tmp_path):
    sample(prompts, "a.jsonl")
    sample(prompts, "b.jsonl", "--seed=43")
    assert read(tmp_path / "a.jsonl")[0]["generations"] != read(tmp_path / "b.jsonl")[0]["generations"]


def generated(numbers):
    return [{"prompt": "p", "prompt_index": i, "generations": ["x"]} for i in numbers]


def test_parts_are_merged_by_number_not_by_name(tmp_path):
    for k in range(11):
        write(tmp_path / f"gen.{k}-of-11.jsonl", generated([k]))
    main(["merge", "--inputs", str(tmp_path / "gen.*.jsonl"), "--output=all.jsonl"])
    assert [r["prompt_index"] for r in read(tmp_path / "all.jsonl")] == list(range(11))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "no file matches"),
        ({"gen.0-of-3": [0], "gen.2-of-3": [2]}, r"of 3 parts, \[1\] are missing"),
        ({"gen.0-of-2": [0], "gen.1-of-2": [1], "gen.1-of-3": [1]}, r"parts of \[2, 3\] are mixed"),
        ({"gen.0-of-1": [0], "gen.old.0-of-1": [0]}, "part 0 of 1 is there twice"),
        ({"gen.0-of-1": [0], "gen.1-of-1": [1]}, "part 1 of 1, which are numbered 0 to 0"),
        ({"gen.first": [0]}, "is no part"),
        ({"gen.0-of-2": [0, 1], "gen.1-of-2": [3]}, "gen.1-of-2.jsonl: found prompt_index 3 where 2 follows"),
        (
            {"gen.0-of-3": [0, 1], "gen.1-of-3": [2, 3], "gen.2-of-3": [4, 5, 6]},
            r"\[2, 2, 3\] rows, expected \[3, 2, 2\]",
        ),
    ],
)
def test_what_does_not_make_a_whole_is_not_merged(tmp_path, files, match):
    for name, numbers in files.items():
        write(tmp_path / f"{name}.jsonl", generated(numbers))
    refused(match, "merge", "--inputs=gen.*.jsonl", "--output=all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------ outputs


def test_an_output_is_not_overwritten_unless_told(prompts, tmp_path):
    (tmp_path / "gen.jsonl").write_text("mine")
    with pytest.raises(UsageError) as error:
        sample(prompts)
    assert "is there already" in error.value.message and (tmp_path / "gen.jsonl").read_text() == "mine"
    sample(prompts, "gen.jsonl", "--overwrite")
    assert len(read(tmp_path / "gen.jsonl")) == 7


def stopped(monkeypatch, prompts, after):
    """A run that ends, as by a kill, before its call number ``after`` of draw."""
    draw, calls = ask.draw, itertools.count()

    def dies(*args, **kwargs):
        if next(calls) == after:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(ask, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(prompts, "gen.jsonl", "--rows_at_once=1")
    monkeypatch.setattr(ask, "draw", draw)


def test_a_run_that_was_stopped_is_gone_on_with(prompts, tmp_path, monkeypatch):
    sample(prompts, "whole.jsonl")
    stopped(monkeypatch, prompts, after=3)
    partial = tmp_path / "gen.jsonl.partial"
    assert not (tmp_path / "gen.jsonl").exists() and len(partial.read_text().splitlines()) == 1 + 3
    partial.write_bytes(partial.read_bytes()[:-9])  # and the last line was cut in the middle
    drawn, draw = [], ask.draw
    monkeypatch.setattr(ask, "draw", lambda m, ids, **k: drawn.extend(ids) or draw(m, ids, **k))
    sample(prompts)
    assert len(drawn) == 7 - 2 and not partial.exists()
    assert (tmp_path / "gen.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_is_not_gone_on_with_under_other_settings(prompts, tmp_path, monkeypatch):
    stopped(monkeypatch, prompts, after=2)
    with pytest.raises(UsageError) as error:
        sample(prompts, "gen.jsonl", "--temperature=0.5")
    assert "temperature=1.0, now 0.5" in error.value.message
    write(prompts, [{"prompt": "another"}])
    with pytest.raises(UsageError) as error:
        sample(prompts)
    assert "prompts=" in error.value.message
    sample(prompts, "gen.jsonl", "--overwrite")
    assert [r["prompt"] for r in read(tmp_path / "gen.jsonl")] == ["another"]


def test_rows_of_another_run_in_between_are_noticed(prompts, tmp_path, monkeypatch):
    stopped(monkeypatch, prompts, after=2)
    partial = tmp_path / "gen.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + partial.read_bytes().splitlines(keepends=True)[-1])
    with pytest.raises(UsageError) as error:
        sample(prompts)
    assert "two runs may have written it at once" in error.value.message and not (tmp_path / "gen.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- bad lines


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "in.jsonl, line 3: not JSON"),
        ("[1]", "line 3: a JSON list"),
        ('{"text": "x"}', r"line 3: 'prompt' is 'None'.*\['text'\]"),
        ('{"prompt": 3}', "line 3: 'prompt' is '3'"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "line 3: 'prompt'.*up to the user's"),
        ('{"prompt": "p"}', "line 3: 'generations' is 'None'"),
        ('{"prompt": "p", "generations": []}', "line 3: 'generations'"),
        ('{"prompt": "p", "generations": ["a", 3]}', "line 3: 'generations'"),
        (
            '{"prompt": "p", "generations": ["a"], "rewards": [1, 2]}',
            "line 3: 'rewards' has 2 entries for 1 generations",
        ),
        ('{"prompt": "p", "generations": ["a"], "scores": 1}', "line 3: 'scores' has no list, 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, match):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "p", "generations": ["a"]}\n\n' + line + "\n")
    refused(match, "score", f"--input={file}", "--output=o.jsonl", "--reward={length: words}")
    assert not (tmp_path / "o.jsonl").exists()


def test_what_is_not_there_or_unknown_is_said(tmp_path, prompts):
    model = f"--model_name_or_path={MODEL_PATH}"
    given = ["sample", model, f"--prompts={prompts}", "--output=o.jsonl"]
    refused("no file 'none.jsonl'", "sample", model, "--prompts=none.jsonl", "--output=o.jsonl")
    refused("unknown '--temprature=1'", *given, "--temprature=1")
    refused("split_number is 4 of total_splits 4", *given, "--split_number=4", "--total_splits=4")
    refused("--num_generations is 0, expected a whole number of 1 or more", *given, "--num_generations=0")
    refused("has no condition.json", *given, "--condition=best")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("empty.jsonl has no rows", "sample", model, "--prompts=empty.jsonl", "--output=o.jsonl")
    write(tmp_path / "part.jsonl", [{"prompt": "p", "prompt_index": 5}])
    refused("prompt_index 5, expected 0", "sample", model, "--prompts=part.jsonl", "--output=o.jsonl")
    write(tmp_path / "gen.jsonl", generated([0]))
    refused("no YAML file", "judge", "--input=gen.jsonl", "--output=o.jsonl", "--judge=none.yaml")
    refused("required: step", *[])


# --------------------------------------------------------------------------------------------------------- conditions


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """The bundled model with five quantile tokens, as conditional training saves it."""
    from contrastive_align.conditions import QuantileTokens

    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = (a.from_pretrained(MODEL_PATH) for a in (AutoModelForCausalLM, AutoTokenizer))
    condition = QuantileTokens()
    add_condition_tokens(model, tokenizer, condition.tokens, seed=0)
    for part in (model, tokenizer, condition):
        (part.save_pretrained if part is not condition else part.save)(folder)
    return folder


def test_a_trained_model_is_asked_under_its_conditions(prompts, tmp_path, conditioned, monkeypatch):
    seen, draw = [], ask.draw

    def watched(model, ids, **options):
        seen.append((ids[0][:2], options["suppress_ids"]))
        return draw(model, ids, **options)

    monkeypatch.setattr(ask, "draw", watched)
    for wanted in (None, "best", "<quantile_4>"):
        flags = [] if wanted is None else [f"--condition={wanted}"]
        sample(prompts, f"{wanted}.jsonl", *flags, model=conditioned)
    tokenizer = AutoTokenizer.from_pretrained(conditioned)
    best, worst = tokenizer.convert_tokens_to_ids(["<quantile_0>", "<quantile_4>"])
    heads = [ids for ids, _ in seen]
    assert best not in heads[0] and best in heads[1] and worst in heads[2]
    assert all(len(never) == 5 for _, never in seen)
    rows = [read(tmp_path / f"{name}.jsonl")[0] for name in ("None", "best", "<quantile_4>")]
    assert [r.get("condition") for r in rows] == [None, "<quantile_0>", "<quantile_4>"]
    assert {r["prompt"] for r in rows} == {PROMPTS[0]}  # without the condition
    with pytest.raises(UsageError) as error:
        sample(prompts, "o.jsonl", "--condition=worst", model=conditioned)
    assert "expected 'best' or one of ['<quantile_0>'" in error.value.message


# ------------------------------------------------------------------------------------------------------------- server


def test_a_server_is_sampled_with_the_seed_of_each_row(prompts, tmp_path, conditioned):
    pytest.importorskip("openai")
    tokenizer = AutoTokenizer.from_pretrained(conditioned)
    with SamplingServer(models=("served",)) as server:
        flags = [f"--server={server.url}", "--server_model=served", "--condition=best"]
        for k in range(2):
            sample(prompts, "gen.jsonl", *flags, f"--split_number={k}", "--total_splits=2", model=conditioned)
        bodies = [body for _, _, body in server.calls]
    main(["merge", "--inputs=gen.*.jsonl", "--output=gen.jsonl"])
    for i, row in enumerate(read(tmp_path / "gen.jsonl")):
        ids = tokenizer("<quantile_0>" + PROMPTS[i])["input_ids"]
        texts = [text_of("served", ids, seed_of(42, "sample", i) % SEEDS, k) for k in range(3)]
        assert row["generations"] == texts and row["finished"] == [True] * 3
    # tokens that condition are not to be drawn
    assert all(set(body["logit_bias"].values()) == {-100} and len(body["logit_bias"]) == 5 for body in bodies)


def test_a_server_that_refuses_is_a_message(prompts, tmp_path):
    pytest.importorskip("openai")
    with SamplingServer() as server, pytest.raises(UsageError) as error:
        sample(prompts, "gen.jsonl", f"--server={server.url}", "--server_model=none")
    assert "`none` does not exist" in error.value.message and not (tmp_path / "gen.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- score and judge


def test_rewards_are_computed_with_the_columns_of_the_rows(tmp_path):
    rows = [
        {"prompt": "p", "generations": ["a", "bb"], "topic": 3},
        {"prompt": CONVERSATION, "generations": ["ccc"], "topic": 7},
    ]
    (tmp_path / "r.py").write_text(
        "def reward(prompts, completions, topic, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [None if text == 'bb' else len(text) * t for text, t in zip(texts, topic)]\n"
    )
    main(["score", f"--input={write(tmp_path / 'gen.jsonl', rows)}", "--output=s.jsonl", "--reward=r.py:reward"])
    found = read(tmp_path / "s.jsonl")
    assert [r["rewards"] for r in found] == [[3.0, None], [21.0]]
    assert [{k: v for k, v in r.items() if k != "rewards"} for r in found] == rows
    refused("no function", "score", "--input=gen.jsonl", "--output=t.jsonl", "--reward=r.py:none")


def test_verdicts_of_a_judge(tmp_path):
    pytest.importorskip("openai")
    rows = [{"prompt": "p", "generations": ["good", "bad"]}, {"prompt": CONVERSATION, "generations": ["so"]}]
    write(tmp_path / "gen.jsonl", rows)
    (tmp_path / "prompt.txt").write_text("{prompt}|{completion}")

    def behaviour(text, attempt):
        return "nonsense" if "bad" in text else "good"

    with JudgeServer(scored, behaviour) as server:
        (tmp_path / "judge.yaml").write_text(f"prompt: prompt.txt\nmodel: m\nbase_url: {server.url}\n")
        main(["judge", "--input=gen.jsonl", "--output=j.jsonl", "--judge=judge.yaml"])
        calls = len(server.calls)
        main(["judge", "--input=gen.jsonl", "--output=j.jsonl", "--judge=judge.yaml", "--overwrite"])
        assert len(server.calls) == calls  # its answers were kept
    first, second = read(tmp_path / "j.jsonl")
    good, turn = scored("p|good"), scored("user: Ask Anna to close the door.|so")
    assert first["feedbacks"] == [good["feedback"], None] and first["scores"] == [good["score"], None]
    assert first["analysis"] == ["short", None]
    assert (second["feedbacks"], second["scores"]) == ([turn["feedback"]], [turn["score"]])
    assert (tmp_path / "judge").is_dir()  # the cache, beside what is written
    (tmp_path / "judge.yaml").write_text("prompt: prompt.txt\n")
    refused("model is missing", "judge", "--input=gen.jsonl", "--output=k.jsonl", "--judge=judge.yaml")


# -------------------------------------------------------------------------------------------------------------- train


def test_columns_of_the_trainer():
    row = {"prompt": "p", "generations": ["a", "b"], "finished": [True, False], "analysis": ["x", "y"]}
    verdicts = {"feedbacks": ["good", None], "scores": [3.0, None]}
    assert convert([row | verdicts], None, where="f") == [
        {"prompt": "p", "completions": ["a", "b"], "finished": [True, False], **verdicts}
    ]
    both = [row | verdicts | {"rewards": [0.5, 0.1]}]
    assert convert(both, "rewards", where="f")[0]["scores"] == [0.5, 0.1]
    with pytest.raises(ValueError, match="f has both 'rewards' and 'scores'"):
        convert(both, None, where="f")
    with pytest.raises(ValueError, match="f has no 'rewards'"):
        convert([row | verdicts], "rewards", where="f")
    with pytest.raises(ValueError, match="nothing to learn from"):
        convert([row], None, where="f")
    with pytest.raises(ValueError, match="f, row 1: no 'scores'"):
        convert([row | verdicts, row], None, where="f")


@pytest.mark.parametrize("prompt", ["Ask Anna to close the door.\n", CONVERSATION])
def test_a_completion_that_was_cut_when_it_was_sampled_has_no_end(prompt):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    texts = ["Please close the door.", "Please close", "Anna", ""]
    data = {"prompt": [prompt], "completions": [texts], "scores": [[1.0] * 4], "finished": [[True, False, None, True]]}
    samples, report = read_scored(Dataset.from_dict(data), tokenizer)
    whole, _ = read_scored(
        Dataset.from_dict({**data, "completions": [[*texts[:3], "x"]], "finished": [[None] * 4]}), tokenizer
    )
    eos = [tokenizer.eos_token_id]
    assert all(s.completion_ids[-1:] == eos for s in whole)
    assert [s.finished for s in samples] == [True, False, True, True] and report["cut"] == 0
    assert samples[1].completion_ids + eos == whole[1].completion_ids
    assert [samples[k].completion_ids for k in (0, 2)] == [whole[k].completion_ids for k in (0, 2)]
    assert samples[3].completion_ids == eos  # it ended at once


def test_an_empty_completion_that_does_not_say_that_it_ended_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    for finished in ([True, None], [True, False]):
        data = {"prompt": ["p"], "completions": [["a", ""]], "scores": [[1.0, 0.0]], "finished": [finished]}
        with pytest.raises(ValueError, match=r"row 0: 'completions'\[1\] is empty"):
            read_scored(Dataset.from_dict(data), tokenizer)


def test_training_is_run_conditional_on_the_converted_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: argv)
    rows = [{"prompt": "p", "generations": ["a", "b"], "rewards": [1.0, 0.0]}]
    argv = main(
        ["train", f"--input={write(tmp_path / 's.jsonl', rows)}", "--output_dir=out", "yamls/x.yaml", "--max_steps=3"]
    )
    written = ["--dataset_name=out/scored_completions.jsonl", "--output_dir=out"]
    assert argv == ["conditional", "yamls/x.yaml", "--max_steps=3", *written]
    assert read(tmp_path / "out" / "scored_completions.jsonl") == convert(rows, None, where="")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rewards": [1.0, "high"]}, r"line 1: 'rewards'\[1\] is 'high', expected a number or null"),
        ({"scores": [True, 1]}, r"line 1: 'scores'\[0\] is 'True', expected a number or null"),
        ({"scores": [1, None], "feedbacks": ["good", 3]}, r"line 1: 'feedbacks'\[1\] is '3', expected text or null"),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_anything_is_written(tmp_path, entries, message):
    rows = write(tmp_path / "s.jsonl", [{"prompt": "p", "generations": ["a", "b"], **entries}])
    with pytest.raises(UsageError) as raised:
        main(["train", f"--input={rows}", "--output_dir=out"])
    assert re.search(message, raised.value.message) and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ recipes

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("conditional_*"))


def commands(readme, script):
    """The arguments of every command of a README's that runs this script."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if script in line]
    return [shlex.split(line.split(script, 1)[1]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_commands_of_a_recipe_parse(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parent.parent)
    run = commands(recipe / "README.md", "run_conditional.py ")
    steps = commands(recipe / "README.md", "contrastive_align.steps ")
    assert run and steps
    for argv in run:
        ConditionalRun.parse(argv)
    for argv in steps:
        if "..." not in argv:
            argv = [arg.replace("$k", "3") for arg in argv]
            args, rest = step_commands.build_parser().parse_known_args(argv)
            assert args.step == "train" or not rest
            if rest:
                ConditionalRun.parse(rest)


def test_the_judge_of_the_dialogue_recipe(tmp_path):
    spec = yaml.safe_load((RECIPES[0].parent / "conditional_dialogue" / "judge.yaml").read_text())
    judge = resolve_judge({**spec, "cache": str(tmp_path / "cache")})
    assert judge.spec["answers"] == list(resolve_condition("categories").categories)


def test_prompts_of_the_toxicity_recipe():
    folder = RECIPES[0].parent / "conditional_toxicity"
    made = runpy.run_path(str(folder / "prompts.py"))["split_prompts"]
    rows = [{"prompt": {"text": t, "toxicity": x}} for t, x in (("a", 0.1), ("b", 0.2), ("c", 0.9), ("d", None))]
    assert made(rows, 1) == (["a", "c", "d"], ["b"]) and made(rows, 0) == (["a", "b", "c", "d"], [])
    assert made(rows, 9) == (["c", "d"], ["a", "b"])


def test_a_step_that_fails_at_once_leaves_nothing_that_stands_in_the_way(tmp_path, capsys):
    rows = tmp_path / "gen.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "generations": ["a", "bb"]}) + "\n")
    code = "def few(completions, **_):\n    return [1.0]\n\n\n"
    code += "def length(completions, **_):\n    return [len(c) for c in completions]\n"
    (tmp_path / "rewards.py").write_text(code)
    before, out = sorted(tmp_path.iterdir()), tmp_path / "scored.jsonl"
    with pytest.raises(UsageError):
        main(["score", f"--input={rows}", f"--reward={tmp_path}/rewards.py:few", f"--output={out}"])
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before
    main(["score", f"--input={rows}", f"--reward={tmp_path}/rewards.py:length", f"--output={out}"])
    assert json.loads(out.read_text())["rewards"] == [1, 2]


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ('{"prompt": "Hi", "generations": ["a"], "rewards": [NaN]}', (), "line 1: not JSON: NaN is no number .* null"),
        ('{"prompt": "Hi", "generations": ["a"]}', ("--output={}/gen.jsonl/x.jsonl",), "gen.jsonl cannot be made"),
        (
            '{"prompt": "Hi", "generations": ["a"], "finished": [1]}',
            (),
            r"'finished'\[0\] is '1', expected true, false or",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, row, flags, message):
    rows = tmp_path / "gen.jsonl"
    rows.write_text(row + "\n")
    (tmp_path / "r.py").write_text("def f(completions, **_):\n    return [1.0 for _ in completions]\n")
    flags = [flag.format(tmp_path) for flag in flags] or [f"--output={tmp_path}/out.jsonl"]
    with pytest.raises(UsageError) as raised:
        main(["score", f"--input={rows}", f"--reward={tmp_path}/r.py:f", *flags])
    assert re.search(message, raised.value.message)


def test_a_precision_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError) as raised:
        main(["sample", f"--model_name_or_path={MODEL_PATH}", "--prompts=p", "--output=o", "--dtype=foo"])
    assert "--dtype is 'foo', expected one of auto, bfloat16" in raised.value.message
