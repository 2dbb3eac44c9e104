"""report.html works offline, escapes what users and judges wrote, and stays small whatever was logged."""

import html.parser
import json
import re
import time
import tracemalloc
from dataclasses import asdict

import pytest

from contrastive_align.launch import report
from contrastive_align.launch.usage import UsageError
from contrastive_align.report import TargetChange
from contrastive_align.report.curves import charts_of_run, charts_of_runs
from contrastive_align.report.history import LOG_FILE, History, read_history
from contrastive_align.report.page import SAMPLES_FILE, RunView, charts_beside, render, write_page
from contrastive_align.report.summary import UNFINISHED_FILE, show
from contrastive_align.report.words import interval


EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>&lt;{{ 7*7 }}\u202e\x1b[31m"


class Tags(html.parser.HTMLParser):
    """Every tag, attribute and address of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def summary(**more):
    found = {
        "method": {"line": f"nca {EVIL}", "beta": 0.1, "learning_rate": 3e-4},
        "model": {"line": EVIL},
        "reference": EVIL,
        "data": {"train": {"line": EVIL, "notes": [EVIL], "groups": 4, "no_signal": 3}},
        "metrics": {EVIL: {"before": 0.0, "after": None, "se": None, "n": 8, "before_se": None, "after_se": None}},
        "metrics_on": EVIL,
        "state": EVIL,
        "preflight": {EVIL: EVIL},
        "command": EVIL,
        "versions": {EVIL: EVIL},
        "engine": {"line": EVIL},
    }
    return found | more


def samples():
    stage = {"name": EVIL, "step": 0, "texts": [EVIL], "rewards": [0.5], "lengths": [3], "ended": [False]}
    after = {**stage, "texts": [f"{EVIL} and <b>more</b>"], "rewards": [None]}
    group = {"prompt": EVIL, "margin": 1.0, "completions": [{"score": 1.0, "moved": 0.5, "text": EVIL}]}
    found = {"about": EVIL, "prompts": [EVIL], "reward_name": EVIL, "stages": [stage, after], "moved": {EVIL: [group]}}
    return found


def evil_run(name=EVIL):
    entries = [{"step": s, "loss": 1.0 / s, f"moment/{EVIL}": 0.1, "round/reward/<q>": 0.1} for s in (1, 2, 3)]
    return RunView(name, summary(), History(entries), samples())


@pytest.mark.parametrize("several", [False, True])
def test_nothing_that_users_wrote_is_markup(several):
    page = render([evil_run(), evil_run("other")] if several else [evil_run()])
    tags = Tags(page)
    assert "script" not in tags.tags and "img" not in tags.tags and "b" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "\u202e" not in page and "\x1b" not in page and "{{ 7*7 }}" in page
    assert page.count("&lt;script&gt;") > 10


def test_the_page_asks_for_nothing():
    page = render([evil_run()])
    tags = Tags(page)
    assert not tags.tags & {"script", "link", "iframe", "object", "img", "a", "form", "base"}
    assert not [value for name, value in tags.attributes if name in ("src", "href", "action", "data")]
    assert not re.findall(r"url\(|@import", page)
    (policy,) = [value for name, value in tags.attributes if value and value.startswith("default-src")]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_a_long_run_has_a_small_page_in_little_time(tmp_path):
    rows = 5_000
    with (tmp_path / LOG_FILE).open("w") as file:
        for step in range(rows):
            file.write(
                json.dumps(
                    {"step": step, "loss": 1 / (1 + step), "rewards/margins": step / rows}
                    | {f"rewards/rank_{k}": k + step / rows for k in range(4)}
                )
                + "\n"
            )
    tracemalloc.start()
    started = time.perf_counter()
    path = write_page([RunView("long", summary(), read_history(tmp_path), {})], tmp_path / "report.html")
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 200_000 and peak < 30e6 and seconds < 20
    assert "polygon" in path.read_text()  # the band of what is joined


def test_what_was_marked_is_what_is_new():
    page = render([evil_run()])
    assert "<ins>" in page and "&lt;b&gt;more&lt;/b&gt;</ins>" in page


def test_the_interval_in_the_table_is_that_of_the_words():
    change = TargetChange(0.1, 0.5, se=0.01, n=15_000, target=0.5, prompts=4)
    (row,) = RunView("run", {"metrics": {"moment/x": asdict(change)}}).metrics
    low, high = interval(change)
    assert row == ("moment/x", "0.1000", "0.5000", "0.4000", f"{show(low)} to {show(high)}", "15000")
    assert low < 0.37  # over four prompts, not 15,000 samples


def ticks_of(metric, *values):
    (chart,) = charts_of_run(History({"step": step, metric: value} for step, value in enumerate(values)))
    return re.findall('class="t e m">(.*?)<', chart.svg())


def test_an_axis_ends_where_values_end():
    assert ticks_of("samples/eos_rate", 1.0, 1.0)[-1] == "1"
    assert ticks_of("samples/eos_rate", 0.93, 1.0)[-1] == "1"
    assert ticks_of("samples/kl", -3e-7, 4.0)[0] == "0"
    assert [float(tick) for tick in ticks_of("round/no_signal", 0.0, 0.0)] == [0, 0.5, 1]


def test_each_method_is_told_what_its_own_loss_should_do():
    said = {}
    for name in ("eval_loss", "kl_target", "round/resampled"):
        charts = charts_of_run(History({"step": step, "loss": 1.0, name: 1.0} for step in range(3)))
        said[name] = next(chart.about for chart in charts if chart.title == "Loss")
    assert "together" in said["eval_loss"] and "need not fall" in said["kl_target"]
    assert "within a round" in said["round/resampled"]


def test_print_overrules_the_screen():
    page = render([evil_run()])
    styles = page[: page.index("</style>")]
    assert styles.rindex("@media print") > styles.rindex("@media (max-width") > styles.rindex("\nbody{")


def test_the_command_rebuilds_one_page_and_compares_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, beta in (("one", 0.1), ("two", 0.5)):
        (tmp_path / name).mkdir()
        written = summary(method={"line": "nca", "beta": beta, "seed": 1})
        (tmp_path / name / "summary.json").write_text(json.dumps(written))
        (tmp_path / name / SAMPLES_FILE).write_text(json.dumps(samples()))
        (tmp_path / name / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert report.main(["one"]) == tmp_path.joinpath("one/report.html").relative_to(tmp_path)
    both = report.main(["one", "two", "--output=both.html"]).read_text()
    assert "Settings that differ" in both and ">0.5<" in both and "method seed" not in both
    assert "Samples beside each other" in both
    assert "WARNING (no_signal)" in capsys.readouterr().out
    for argv, said in (
        (["none"], "no folder 'none'"),
        (["one", "--output=x.txt"], "expected a name that ends in .html"),
    ):
        with pytest.raises(UsageError) as error:
            report.main(argv)
        assert said in error.value.message


def test_a_trainer_without_a_command_has_a_page_too(tmp_path):
    state = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    assert "<h3>Loss</h3>" in report.main([str(tmp_path)]).read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.main([str(tmp_path / "empty")])


def test_the_last_checkpoint_is_that_of_the_last_step(tmp_path):
    for step in (10, 9):  # the earlier one is written last
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "log_history": [{"step": s, "loss": 1.0} for s in range(1, step + 1)]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert read_history(tmp_path)["loss"].n == 10


def test_a_rebuilt_page_counts_what_was_not_finite(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.0}\n')
    page = report.main([str(tmp_path)]).read_text()
    assert "training (1 not finite)" in page and "<h3>Diverged</h3>" in page and "nothing wrong" not in page


def test_console_and_page_say_alike_what_could_not_look(tmp_path, capsys):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    page = report.main([str(tmp_path)]).read_text()
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "1 of 16 rules could look, and found nothing wrong." and said in page
    assert "Not measured here: Likelihood displacement, " in page


def test_the_page_of_a_run_that_was_broken_off_keeps_what_is_known(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    (tmp_path / UNFINISHED_FILE).write_text(json.dumps(summary(unfinished="0 of 40")))
    page = report.main([str(tmp_path)]).read_text()
    assert "The run is at step 2 of 40" in page and "Before the first step" in page


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", '{"met', "is cut or no JSON"),
        (SAMPLES_FILE, '{"prompts": ["a', "is cut or no JSON"),
        (UNFINISHED_FILE, "", "is cut or no JSON"),
        ("checkpoint-2/trainer_state.json", "{", "is cut or no JSON"),
        ("summary.json", "[1, 2]", "holds a list, expected a mapping"),
        ("summary.json", '{"method": {"name": "nca"}}', r"expected 'method' to be a mapping with \['line'\], found"),
        ("summary.json", '{"metrics": {"accuracy": 0.9}}', "expected 'metrics' to be a mapping of mappings with"),
        ("summary.json", '{"metrics": [0.9]}', "expected 'metrics' to be a mapping of mappings with"),
        ("summary.json", '{"facts": "none"}', "expected 'facts' to be a mapping, found none"),
        (SAMPLES_FILE, '{"stages": [{"name": "before"}]}', "expected 'stages' to be a list of mappings with"),
        (SAMPLES_FILE, json.dumps({**samples(), "prompts": ["a", "b"]}), "expected 2 samples in stage"),
    ],
)
def test_a_file_that_is_not_of_a_run_is_named(tmp_path, name, text, said):
    (tmp_path / "checkpoint-2").mkdir()
    if "checkpoint" not in name:
        (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        RunView.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name} ") and " away to see the rest." in str(error.value)


def test_ranks_are_in_the_order_of_their_numbers():
    history = History({"step": step} | {f"rewards/rank_{k}": 1.0 for k in (0, 1, 10, 11, 2)} for step in (1, 2))
    (chart,) = charts_of_run(history)
    assert [line.label for line in chart.lines] == ["rank 0", "rank 1", "rank 2", "rank 10", "rank 11"]


def fdpg_view(goal, *, errors=True):
    entries = [{"step": s, "moment/x": 0.1 * s, **({"moment/x/se": 0.05} if errors else {})} for s in (1, 2, 3)]
    change = {"before": 0.1, "after": 0.3, "se": 0.01, "n": 9, "target": goal}
    tradeoff = [{"rate": r, "kl": 0.1, "tvd": 0.1, "kl_se": 0.0, "tvd_se": 0.0} for r in (0.1, 0.5)]
    return RunView("run", {"metrics": {"moment/x": change}, "tradeoff": tradeoff}, History(entries))


def test_several_runs_have_the_bands_the_aims_and_the_acceptance_of_each():
    moments, *acceptance = charts_beside({"a": fdpg_view(0.5), "b": fdpg_view(0.9)})
    assert moments.wanted == [("wanted by a: 0.5", 0.5, 0), ("wanted by b: 0.9", 0.9, 1)]
    assert all(point.low < point.mean < point.high for line in moments.lines for point in line.points)
    assert [chart.title for chart in acceptance] == ["Acceptance and divergence: a", "Acceptance and divergence: b"]
    alike, *_ = charts_beside({"a": fdpg_view(0.5), "b": fdpg_view(0.5)})
    assert alike.wanted == [("wanted: 0.5", 0.5, 0)]


def test_a_chart_of_several_runs_says_of_each_what_holds_for_it():
    log = [{"step": s, "loss": 1.0, **({"eval_loss": 1.0} if s == 3 else {})} for s in (1, 2, 3)]
    (loss,) = charts_of_runs(
        {"a": History(log), "b": History([{**entry, "kl_target": 1.0} for entry in log[:1]] + log)}
    )
    assert loss.title == "Loss: training"  # and none of single dots
    assert loss.about.startswith("a: Training and evaluation") and " b: Only its gradient means" in loss.about


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("first/reward", "second/reward"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    page = report.main(["first/reward", "second/reward"]).read_text()
    assert "<strong>reward (2)</strong> (<code>second/reward</code>)" in page
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["reward", "reward (2)"]
