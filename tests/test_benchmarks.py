"""The speed benchmark on a model of two layers: its table has its rows, and its floor is what a hand counts."""

import sys
from pathlib import Path

import pytest


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
    assert [(line[4], line[5]) for line in lines] == wanted
    for line in lines:
        assert line[:4] == ["synthetic", "fp32", reference, "full"]
        seconds, tokens, peak, over_trl, share = line[6:]
        assert float(seconds) > 0 and float(tokens) > 0 and float(over_trl) > 0 and 0 <= float(share) < 1
        assert peak == ""  # was not asked for
    assert lines[0][9] == "1.00"

    header, _, *lines = cells(speed.growth(rows))
    assert tuple(header) == speed.GROWTH_HEADER
    assert lines == []  # nothing beyond K = 4


def test_growth_compares_with_4_completions_and_layouts_at_each_length(benchmarks):
    speed, *_ = benchmarks
    same = {"precision": "fp32", "reference": "cached", "tuning": "full"}
    rows = [
        {**same, "workload": "qa", "layout": "shared", "k": k, "median": t, "unique_tokens": n}
        for k, t, n in ((2, 1.5, 80), (4, 2.0, 100), (16, 6.0, 200))
    ]
    rows += [
        {**same, "workload": f"fixed:{p}:64:256", "layout": layout, "k": 4, "median": t, "unique_tokens": p}
        for p, layout, t in ((64, "padded", 4.0), (64, "shared", 3.0), (128, "padded", 10.0), (128, "shared", 5.0))
    ]
    _, _, *lines = cells(speed.growth(rows))
    assert [line[1:] for line in lines] == [
        ["K = 4", "K = 16", "2", "6", "3.00", "2.00", "1.50"],
        ["prompts of 64", "prompts of 128", "4", "10", "2.50", "2.00", "1.25"],
        ["prompts of 64", "prompts of 128", "3", "5", "1.67", "2.00", "0.83"],
        ["padded", "shared", "4", "3", "0.75", "1.00", "0.75"],
        ["padded", "shared", "10", "5", "0.50", "1.00", "0.50"],
    ]
    assert lines[0][0] == "qa, fp32, cached, full, shared"


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
