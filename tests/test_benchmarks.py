"""The benchmarks on tiny models: their tables have their rows, and the floor is what a hand counts."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contrastive_align import demo


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """benchmarks/ is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(FOLDER)
    import floor
    import measure
    import speed
    import workloads

    yield speed, measure, workloads, floor
    for name in ("floor", "measure", "speed", "workloads"):
        sys.modules.pop(name)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("reference", ["uncached", "cached"])
def test_the_table_has_its_rows_and_columns(benchmarks, reference):
    speed, *_ = benchmarks
    flags = ["--tiny", "--workload", "synthetic", "--steps", "1", "--groups", "2", "--reference", reference]
    tasks = speed.tasks_of(speed.parse([*flags, "--k", "2", "4"]))
    rows = speed.measured(tasks, memory=False, apart=False)

    header, _, *lines = cells(speed.table(rows))
    assert tuple(header) == speed.HEADER
    wanted = [("trl", "2"), ("padded", "2"), ("shared", "2"), ("padded", "4"), ("shared", "4")]
    assert [(line[6], line[7]) for line in lines] == wanted
    for line in lines:
        assert line[:6] == ["synthetic", "fp32", reference, "full", "no", "default"]
        seconds, tokens, peak, over_trl, share, share_now = line[8:]
        assert float(seconds) > 0 and float(tokens) > 0 and float(over_trl) > 0 and 0 <= float(share) < 1
        assert 0 <= float(share_now) < 1
        assert peak == ""  # was not asked for
    assert lines[0][11] == "1.00"

    header, _, *lines = cells(speed.growth(rows))
    assert tuple(header) == speed.GROWTH_HEADER
    assert lines == []  # nothing beyond K = 4


def test_growth_compares_with_4_completions_and_layouts_at_each_length(benchmarks):
    speed, *_ = benchmarks
    same = {
        "precision": "fp32",
        "reference": "cached",
        "tuning": "full",
        "compile": "no",
        "malloc": "default",
        "run": 0,
    }
    rows = [
        {**same, "workload": "qa", "layout": "shared", "k": k, "median": t[1], "seconds": t, "tokens": n}
        for k, t, n in (
            (2, [1.0, 1.5, 8.0], [80, 90, 100]),
            (4, [1.5, 2.0, 9.0], [100, 100, 100]),
            (16, [4.5, 7.0, 18.0], [150, 200, 300]),  # 3, 3.5 and 2 times the time for 1.5, 2 and 3 times the tokens
        )
    ]
    rows += [
        {**same, "workload": f"fixed:{p}:64:256", "layout": layout, "k": 4, "median": t, "seconds": [t], "tokens": [p]}
        for p, layout, t in ((64, "padded", 4.0), (64, "shared", 3.0), (128, "padded", 10.0), (128, "shared", 5.0))
    ]
    _, _, *lines = cells(speed.growth(rows))
    assert [line[1:] for line in lines] == [
        ["K = 4", "K = 16", "2", "7", "3.00", "2.00", "1.75"],
        ["prompts of 64", "prompts of 128", "4", "10", "2.50", "2.00", "1.25"],
        ["prompts of 64", "prompts of 128", "3", "5", "1.67", "2.00", "0.83"],
        ["padded", "shared", "4", "3", "0.75", "1.00", "0.75"],
        ["padded", "shared", "10", "5", "0.50", "1.00", "0.50"],
    ]
    assert lines[0][0] == "qa, fp32, cached, full, shared"
    rows[2]["run"] = 1  # a process of its own: the ratio of the medians
    assert cells(speed.growth(rows))[2][1:] == ["K = 4", "K = 16", "2", "7", "3.50", "2.00", "1.75"]


def test_floor_against_a_hand_made_count(benchmarks):
    *_, floor = benchmarks
    counts = floor.Counts(body=1000, head=100, embedding=100, adapters=0, attention=8)
    group = {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6], [7] * 50]}
    # K = 2: 6 unique tokens, 3 of them in completions. Pairs: 1 + 2 + 3 in the prompt, 4 + 5 and 4 in the completions.
    products = 2 * 1000 * 6 + 2 * 100 * 3
    attention = 2 * 2 * 8 * (6 + 9 + 4)
    full = 3 * (products + attention)
    assert floor.floor_flop([group], 2, counts, "full", "cached") == full
    assert floor.floor_flop([group], 2, counts, "full", "uncached") == pytest.approx(full * 4 / 3)
    counts.adapters = 10
    lora = 2 * products + 3 * attention + 6 * 10 * 6
    assert floor.floor_flop([group], 2, counts, "lora", "cached") == lora
    assert floor.floor_flop([group, group], 2, counts, "lora", "uncached") == 2 * (lora + products + attention)


def test_counts_of_a_model(benchmarks, tiny_llama):
    from transformers import AutoModelForCausalLM

    *_, floor = benchmarks
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    found = floor.Counts.of(model, model.config)
    vocabulary = model.config.vocab_size
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32  # q, o; k, v; MLP; norms
    assert found == floor.Counts(2 * layer + 32, 32 * vocabulary, 32 * vocabulary, 0, 2 * 32)


def test_the_pool_is_measured_in_each_of_its_states(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    pool = importlib.import_module("pool")
    flags = ["--samples=400", "--rounds=2", "--draws=300", "--drop-factor=0.5"]
    monkeypatch.setattr(sys, "argv", ["pool.py", *flags])
    pool.main()
    sys.modules.pop("pool")
    lines = capsys.readouterr().out.splitlines()
    states = ["before", "400 samples written in 2 rounds", "reopened", "labelled, ", "300 draws", "read, 256 at a time"]
    table = [line for line in lines if "anonymous +" in line]
    assert len(table) == 6 and all(line.startswith(state) for line, state in zip(table, states, strict=True))
    kept = int(table[3].split()[1])
    assert 290 <= kept <= 310  # of the first round's 200 half stay, label by label
    assert int(next(line for line in lines if "on disk" in line).split()[4]) > 100  # bytes a sample


def test_temperatures_are_compared_seed_by_seed(monkeypatch, capsys, tmp_path):
    """Of runs that are there already: the mean of the differences, and its standard error."""
    monkeypatch.syspath_prepend(FOLDER)
    temperature = importlib.import_module("temperature")
    for loss in temperature.LOSSES:
        for seed in (0, 1):
            for alpha, reward in (("1e-4", 0.5 + seed), ("auto", 0.7 + 2 * seed)):
                found = {"measure": reward, "best": -seed, "alpha": 0.25}
                (tmp_path / f"demo-{loss}-{alpha}-{seed}.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["temperature.py", "--data", "demo", "--seeds", "0", "1", "--out", str(tmp_path)])
    temperature.main()
    for name in ("temperature", "real_data"):
        sys.modules.pop(name)
    header, _, *rows = cells(capsys.readouterr().out)
    assert tuple(header) == temperature.HEADER and [row[:2] for row in rows] == [["demo", "NCA"], ["demo", "InfoNCA"]]
    change = ["1.000", "1.700", "+0.700 +- 0.500", "-0.500", "-0.500", "+0.000 +- 0.000"]
    assert rows[0][2:] == ["0.25", "mean reward", *change]


def test_synthetic_lengths(benchmarks):
    _, _, workloads, _ = benchmarks
    groups = workloads.groups_of("synthetic", 300, None)
    prompts = sorted(len(g["prompt_ids"]) for g in groups)
    completions = sorted(len(c) for g in groups for c in g["completion_ids"])
    assert (prompts[0], prompts[-1], completions[-1]) == (16, 480, 500) and completions[0] >= 16
    assert 140 < prompts[150] < 180 and 245 < completions[2400] < 275


def test_no_gpu_is_said(benchmarks, monkeypatch, capsys):
    speed, *_ = benchmarks
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed.main(["--gpu"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ f-DPG


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/, by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    names = []

    def load(name):
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(6)))
    return str(path)


def test_a_step_of_each_contender_on_the_same_work(script, questions, tmp_path, capsys, monkeypatch):
    step = script("fdpg_step")
    monkeypatch.setattr(step.warnings, "simplefilter", lambda *_: None)
    monkeypatch.setattr(step.logging, "disable", lambda *_: None)
    flags = ["--prompts", "2", "--k", "4", "--new-tokens", "16", "--steps", "1", "--json", str(tmp_path / "step.json")]
    step.main(["--model", demo.MODEL_PATH, "--data", questions, *flags])

    said = capsys.readouterr().out.splitlines()
    header, _, *lines = cells("\n".join(said[1:6]))
    assert [line[0] for line in lines] == ["ours", "trl", "floor"]
    found = json.loads((tmp_path / "step.json").read_text())
    for line, row in zip(lines, found["rows"].values(), strict=True):
        assert line[header.index("tokens a completion")] == "16.0"  # nothing ends a completion
        assert len(row["seconds"]["total"]) == 1  # the warm-up is not counted
        parts = {name: row["seconds"][name][0] for name in step.PARTS}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(row["seconds"]["total"][0])
    medians = {name: row["median"]["total"] for name, row in found["rows"].items()}
    assert found["trl_over_ours"] == medians["trl"] / medians["ours"]
    assert found["ours_over_floor"] == medians["ours"] / medians["floor"]


def test_a_step_needs_its_prompts_and_its_model(script, questions, monkeypatch, capsys):
    step = script("fdpg_step")
    with pytest.raises(SystemExit, match="has 6 prompts, and 4 steps of 2 need 8"):
        step.prompts_of(Path(questions), 4, 2)
    assert [len(prompts) for prompts in step.prompts_of(Path(questions), 3, 2)] == [2, 2, 2]
    monkeypatch.delenv("CONTRASTIVE_ALIGN_MODELS", raising=False)
    with pytest.raises(SystemExit):
        step.parse(["--data", questions])
    assert "give --model, or set CONTRASTIVE_ALIGN_MODELS" in capsys.readouterr().err


def summary_of(moment: float) -> str:
    names = {"KL(p||pi)": 0.1, "KL(pi||p)": 0.2, "TV": 0.3, "KL(pi||base)": 0.4, "distinct-2": 0.5}
    column = {"moment/contains:please": moment} | names
    tuned = {name: {"value": value, "se": 0.0} for name, value in column.items()}
    target = {name: tuned[name] for name in ("moment/contains:please", "KL(pi||base)")}
    return json.dumps({"distributions": {"base": tuned, "target": target, "tuned": tuned}})


def test_divergences_runs_what_is_missing_and_averages_over_seeds(script, tmp_path, monkeypatch, capsys):
    divergences, ran = script("divergences"), []

    def fake(command, **kwargs):
        flags = dict(flag.removeprefix("--").split("=") for flag in command[2:])
        ran.append((flags["divergence"], flags["seed"], flags["max_steps"]))
        moment = {"1": 0.4, "2": 0.6}[flags["seed"]]
        (Path(flags["output_dir"]) / "summary.json").write_text(summary_of(moment))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(divergences.subprocess, "run", fake)
    flags = ["--divergences", "js", "alpha:0.5", "--steps", "3", "--out", str(tmp_path), "--json", f"{tmp_path}/t.json"]
    divergences.main([*flags, "--seeds", "1"])
    assert ran == [("js", "1", "3"), ("alpha:0.5", "1", "3")]
    capsys.readouterr()
    divergences.main([*flags, "--seeds", "1", "2"])
    assert ran[2:] == [("js", "2", "3"), ("alpha:0.5", "2", "3")]  # the others were there

    header, _, *lines = cells(capsys.readouterr().out)
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert list(rows) == ["base", "target", "js", "alpha:0.5"]
    assert (rows["base"]["runs"], rows["js"]["runs"]) == ("4", "2")
    assert rows["js"]["moment"] == "0.5000 +- 0.1414" and rows["js"]["TV"] == "0.3000 +- 0.0000"
    assert rows["target"]["distinct-2"] == "" and rows["target"]["KL(pi, base)"] == "0.4000 +- 0.0000"
    saved = {row["row"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert saved["js"]["moment"]["values"] == [0.4, 0.6]


def test_a_run_that_fails_is_told_with_its_log(script, tmp_path, monkeypatch):
    divergences = script("divergences")
    monkeypatch.setattr(divergences.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    with pytest.raises(SystemExit, match=r"run_fdpg\.py.* failed; its output is in .*js-seed1/run\.log"):
        divergences.main(["--divergences", "js", "--seeds", "1", "--out", str(tmp_path)])


def conditional_summary(gain: float) -> str:
    def change(after: float) -> dict:
        return {"before": 0.5, "after": after, "se": 0.1, "n": 9}

    given = {"good": 0.5 + gain, "fair": 0.6, "bad": 0.4, "nothing": 0.55}
    metrics = {"mean_reward": change(0.5 + gain)} | {f"reward_given/{k}": change(v) for k, v in given.items()}
    rounds = [{"round/reference_perplexity": 1.5, "round/distinct_2": 0.1}]
    training = {"seconds": 60, "seconds_measuring": 5, "kl": 0.2, "rounds": rounds}
    return json.dumps({"metrics": metrics, "training": training})


def test_conditional_training_is_compared_in_two_tables(script, tmp_path, monkeypatch, capsys):
    conditional, ran = script("conditional"), []

    def fake(command, **kwargs):
        flags = dict(flag.removeprefix("--").split("=") for flag in command[2:])
        ran.append((flags.get("kl_direction", flags.get("score_column", "")), flags["seed"]))
        gain = {"1": 0.3, "2": 0.05}[flags["seed"]]  # the second is not in order
        (Path(flags["output_dir"]) / "summary.json").write_text(conditional_summary(gain))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(conditional.subprocess, "run", fake)
    flags = ["--runs", "tokens", "scored data", "forward", "--out", str(tmp_path), "--json", f"{tmp_path}/t.json"]
    conditional.main([*flags, "--seeds", "1"])
    capsys.readouterr()
    conditional.main([*flags, "--seeds", "1", "2"])
    assert ran == [(flag, seed) for seed in ("1", "2") for flag in ("", "scores", "forward")]
    kinds, directions = capsys.readouterr().out.split("\n\n")
    assert [row[0].split(", ")[-1] for row in cells(directions.strip())[2:]] == ["reverse", "forward"]
    header, _, tokens, scored = cells(kinds)
    found = dict(zip(header, tokens, strict=True))
    assert scored[0] == "tokens, scored data" and found["runs"] == "2" and found["ordered"] == "1 of 2"
    assert found["best"] == "0.675 +- 0.177" and found["start"] == "0.500 +- 0.000"
    assert found["gain / se"] == "1.8 +- 1.8"
    saved = json.loads((tmp_path / "t.json").read_text())
    assert saved["forward"]["KL"] == {"mean": 0.2, "spread": 0.0}
    monkeypatch.setattr(conditional.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    with pytest.raises(SystemExit, match=r"run_conditional\.py.* failed; its output is in .*tokens-seed3/run\.log"):
        conditional.main(["--seeds", "3", "--out", str(tmp_path)])


def test_a_target_fitted_on_sorted_prompts_has_its_moment_on_all_of_them(script):
    """One small repeat of a benchmark; the same fit on the head of the file is far off."""
    sorted_prompts = script("sorted_prompts")
    variant = sorted_prompts.variants()["by topic"]
    small = {"prompts": 60, "per_prompt": 8, "fit_samples": 512, "fit_max_samples": 512}
    found, of_head = (sorted_prompts.repeat(variant, 0, head=head, **small) for head in (False, True))
    assert abs(found["moment"] - 0.5) <= 3 * found["se"] < 0.4
    assert 0.5 - of_head["moment"] > 3 * of_head["se"]
    assert sorted_prompts.row_of("by topic", [found, of_head]).count("1 of 2") == 1


def test_architectures_are_compared_with_their_own_forward(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import architectures

    layout, *gaps = architectures.compare("mistral")
    assert layout == "shared" and all(0 < gap < architectures.FAULT for gap in gaps)
    assert architectures.compare("bloom") == ("padded", None, None, None)
    monkeypatch.setattr(architectures, "choose_layout", lambda model, _: model.set_attn_implementation("shared_prompt"))
    assert architectures.compare("phimoe")[1] > architectures.FAULT  # its window is lost where the check is left out


# -------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("seed", [1, 3, 4, 5, 6])
def test_a_reference_is_told_from_one_that_moved(script, tmp_path, monkeypatch, seed):
    """A twentieth of the configurations that the benchmark looks at."""
    reference_check = script("reference_check")
    monkeypatch.setattr(reference_check.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    configuration = reference_check.Configuration.drawn(seed)
    for _ in range(1 + configuration.cached):
        assert reference_check.stopped(configuration, move=False) is None
    assert "policy and reference differ" in reference_check.stopped(configuration, move=True)


# -------------------------------------------------------------------------------------------------------------- GPU


def test_every_row_of_the_gpu_table_runs_in_miniature(script, capsys):
    gpu = script("gpu")
    gpu.main(["--tiny"])
    header, _, *lines = cells(capsys.readouterr().out.split("\n\n")[1].strip())
    assert tuple(header) == gpu.HEADER and sorted({line[0] for line in lines}) == sorted(gpu.ROWS)
    assert all(line[2] for line in lines)
    assert [line[2] for line in lines if line[1].startswith("auto")] == ["shared"]
    assert [line[2] for line in lines if line[1].startswith("leak")] == ["0.0e+00"]
    unlike = [line for line in lines if "not what this package computes" in line[1] or "Error" in line[2]]
    assert all("FlexAttention does not support backward on CPU" in line[2] for line in unlike)


def test_a_row_that_fails_is_told_and_the_others_go_on(script, monkeypatch):
    gpu = script("gpu")

    def fails(scale):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(gpu, "ROWS", {"A": fails, "B": lambda scale: iter([gpu.Line("B", "x", 2.0, 1.0)])})
    scale = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(gpu.torch.cuda, "empty_cache", lambda: None)
    found = [line.cells() for line in gpu.measured(scale, ["A", "B"], seconds=60)]
    assert found[0][:3] == ("A", "failed", "RuntimeError: out of memory")
    assert found[1] == ("B", "x", "2e+03 ms", "1e+03 ms", "50%", "")
    assert [line.what for line in gpu.measured(scale, ["A", "B"], seconds=-1)] == ["left out"] * 2


def test_a_gpu_is_asked_for(script, monkeypatch, capsys):
    gpu = script("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--tiny" in capsys.readouterr().err
