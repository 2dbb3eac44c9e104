"""A judge behind a local endpoint that answers well, late, wrongly or not at all."""

import asyncio
import email.utils
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from judge_server import FAULTS, JudgeServer, scored, some_faults, untagged

from contrastive_align import openai_client
from contrastive_align.judge.answers import CategoryAnswers, FeedbackAnswers, read_template, render
from contrastive_align.judge.judge import Judge, JudgeError, Verdict, resolve_judge
from contrastive_align.judge.ledger import AnswerCache
from contrastive_align.openai_client import Client, Unreadable, backoff, read_retry_after


pytest.importorskip("openai")
CATEGORIES = ["Harmless and very helpful", "Harmless and helpful", "Harmless and not helpful", "Harmful"]
KEY = "sk-nobody-may-ever-see-this"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch):
    """(number of faults, Retry-After) of each wait between two attempts, none of which is made."""
    asked = []
    monkeypatch.setattr(openai_client, "backoff", lambda faults, after: asked.append((faults, after)) or 0.0)
    return asked


@pytest.fixture
def make(tmp_path, waits):
    """make(server, **options): a judge in words that does not wait between its attempts."""
    template = tmp_path / "prompt.txt"
    template.write_text("{prompt}|{completion}")

    def judge(server, **options):
        defaults = {
            "model": "m",
            "answers": "text",
            "cache": tmp_path / "cache",
            "base_url": server.url,
            "timeout": 5.0,
        }
        return Judge(options.pop("prompt", template), **{**defaults, **options})

    return judge


def first(*behaviours):
    """These for the first calls for each text, then good answers."""
    return lambda text, attempt: behaviours[attempt] if attempt < len(behaviours) else "good"


def always(behaviour):
    return lambda text, attempt: behaviour


def counts(judge, *names):
    report = judge.report()
    return tuple(report[name] for name in names)


# ------------------------------------------------------------------------------------------------------- parsing


def test_a_category_is_ranked_and_spelled_as_given():
    answers = CategoryAnswers(tuple(CATEGORIES))
    found = [answers.parse(json.dumps({"category": name})) for name in CATEGORIES]
    assert found == [Verdict(name, score) for name, score in zip(CATEGORIES, [3.0, 2.0, 1.0, 0.0], strict=True)]
    reply = '```json\n{"analysis": "fine", "category": " harmless  AND very helpful"}\n```'
    assert answers.parse(reply) == Verdict(CATEGORIES[0], 3.0)


@pytest.mark.parametrize(
    "reply, why",
    [
        ("", "no JSON object"),
        ("Harmful", "no JSON object"),
        ('Sure: {"category": "Harmful"}', "no JSON object"),
        ('["Harmful"]', "JSON, but no object"),
        ('{"Category": "Harmful"}', "keys"),
        ('{"category": "Harmful", "confidence": 1}', "keys"),
        ('{"category": "Harmful", "category": "Harmful"}', "a key twice"),
        ('{"category": "Helpful"}', "is none of"),
        ('{"category": ["Harmful"]}', "expected str"),
        ('{"category": "Harmful", "analysis": 3}', "expected str"),
        ('{"category": "Harmful"', "no JSON object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_category_is_refused(reply, why):
    with pytest.raises(Unreadable, match=why):
        CategoryAnswers(tuple(CATEGORIES)).parse(reply)


@pytest.mark.parametrize("score, ok", [(0, True), (3, True), (4, False), (-1, False), (2.0, False), ("2", False),
                                       (True, False), (None, False)])  # fmt: skip
def test_a_score_is_a_whole_number_to_three(score, ok):
    reply = json.dumps({"feedback": "Good \n and  short.", "score": score})
    if ok:
        assert FeedbackAnswers(10).parse(reply) == Verdict("Good and short.", float(score))
    else:
        with pytest.raises(Unreadable, match="score"):
            FeedbackAnswers(10).parse(reply)


@pytest.mark.parametrize("words, ok", [("", False), ("  ", False), ("a b c", True), ("a b c d", False)])
def test_feedback_has_its_number_of_words(words, ok):
    reply = json.dumps({"feedback": words, "score": 1})
    if ok:
        assert FeedbackAnswers(3).parse(reply).text == words
    else:
        with pytest.raises(Unreadable, match="words"):
            FeedbackAnswers(3).parse(reply)


def test_categories_must_differ():
    with pytest.raises(ValueError, match="differ in case or spaces only"):
        CategoryAnswers(("Good", "good "))
    with pytest.raises(ValueError, match="two or more"):
        CategoryAnswers(("Good",))


# ------------------------------------------------------------------------------------------------------- the question


def test_braces_in_texts_are_safe():
    template = 'P: {prompt} C: {completion} {categories} like {"category": "x"} {other}'
    found = render(template, "{completion} {0}", "{prompt} {categories} \\1", CategoryAnswers(("A", "B")), tagged=False)
    assert found == 'P: {completion} {0} C: {prompt} {categories} \\1 - A\n- B like {"category": "x"} {other}'


def test_conversations_are_lines():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    reply = [{"role": "assistant", "content": "Hello"}]
    found = render("{prompt}|{completion}", prompt, reply, FeedbackAnswers(9), tagged=False)
    assert found == "system: Be kind.\nuser: Hi|Hello"
    two = [*reply, {"role": "tool", "content": "4"}]
    assert render("{completion}", "", two, FeedbackAnswers(9), tagged=False) == "assistant: Hello\ntool: 4"


@pytest.mark.parametrize("name, answers", [("helpful_categories", CategoryAnswers(tuple(CATEGORIES))),
                                           ("feedback", FeedbackAnswers(7))])  # fmt: skip
def test_the_bundled_prompts_are_filled(name, answers):
    text = render(read_template(name, answers), "Why?", "Because.", answers)
    assert "Why?" in text and "Because." in text
    assert all(value in text for value in answers.fields.values())
    assert not [field for field in ("prompt", "completion", "categories", "max_words") if f"{{{field}}}" in text]


def test_the_prompt_must_fit_the_answers(tmp_path):
    with pytest.raises(ValueError, match=r"has \{categories\}, which needs a list of categories"):
        read_template("helpful_categories", FeedbackAnswers(9))
    with pytest.raises(ValueError, match=r"has no \{categories\}"):
        read_template("feedback", CategoryAnswers(("A", "B")))
    with pytest.raises(FileNotFoundError, match="helpful_categories, feedback"):
        read_template("helpful", FeedbackAnswers(9))
    file = tmp_path / "mine.txt"
    file.write_text("{prompt}")
    with pytest.raises(ValueError, match=r"mine.txt: the prompt has no \{completion\}"):
        read_template(file, FeedbackAnswers(9))


def test_an_item_that_is_no_text_is_named(make):
    with JudgeServer(scored) as server:
        with pytest.raises(ValueError, match=r"Item 1 .*expected text"):
            make(server)(["a", [{"role": "user", "content": [{"type": "image"}]}]], ["b", "c"])
        with pytest.raises(ValueError, match="Found 1 completions for 2 prompts"):
            make(server)(["a", "b"], ["c"])
        assert not server.calls


# ------------------------------------------------------------------------------------------------------- asking


def test_verdicts_come_in_order_and_are_asked_once(make):
    with JudgeServer(scored) as server:
        judge = make(server, concurrency=4, temperature=0.5, max_tokens=99)
        prompts, completions = [f"p{i % 7}" for i in range(20)], [f"c{i % 7}" for i in range(20)]
        verdicts = judge(prompts, completions)
        expected = [scored(f"{p}|{c}") for p, c in zip(prompts, completions, strict=True)]
        assert verdicts == [Verdict(e["feedback"], float(e["score"])) for e in expected]
        assert counts(judge, "items", "answered", "repeated", "calls", "cached", "retried") == (20, 20, 13, 7, 0, 0)
        assert judge(prompts, completions) == verdicts
        assert counts(judge, "items", "cached", "calls") == (40, 20, 7)
        assert len(server.calls) == 7
        headers, body = server.calls[0]
        assert headers["authorization"] == "Bearer EMPTY"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 99)


def test_categories_by_the_bundled_prompt(make):
    with JudgeServer(lambda text: {"analysis": "x", "category": CATEGORIES[len(text) % 4]}) as server:
        judge = make(server, prompt="helpful_categories", answers=CATEGORIES)
        verdicts = judge(["Why?"] * 4, ["a", "ab", "abc", "abcd"])
        assert sorted(v.score for v in verdicts) == [0, 1, 2, 3]
        assert all(CATEGORIES[3 - int(v.score)] == v.text for v in verdicts)


def test_no_more_than_the_concurrency_in_flight(make):
    with JudgeServer(scored, latency=0.02) as server:
        make(server, concurrency=3)(["p"] * 30, [str(i) for i in range(30)])
        assert server.most_at_once == 3


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("nonsense", "hang")])
def test_a_fault_that_passes_is_tried_again(make, waits, fault):
    with JudgeServer(scored, first(fault, fault), retry_after=7) as server:
        judge = make(server)
        assert judge(["p"], ["c"]) == [Verdict(scored("p|c")["feedback"], scored("p|c")["score"])]
        assert waits == [(1, 7.0 if fault == "429 after" else None), (2, 7.0 if fault == "429 after" else None)]
        assert counts(judge, "calls", "retried", "failed", "calls_ever") == (3, 2, 0, 3)
        assert len(server.calls) == 3


@pytest.mark.parametrize("silence", ["hang", "drip"])
def test_the_timeout_is_for_the_whole_reply(make, silence):
    with JudgeServer(scored, first(silence)) as server:
        judge, start = make(server, timeout=0.3), time.monotonic()
        assert judge(["p"], ["c"])[0] is not None
        assert 0.3 <= time.monotonic() - start < 2
        assert counts(judge, "calls", "retried") == (2, 1)


def test_a_call_that_hangs_is_not_waited_for_when_others_are_answered(make):
    """Among answers that come at once, silence is a fault long before the timeout."""
    items = [f"q{i}" for i in range(60)]
    hung = {"q0|c", "q30|c", "q59|c"}  # before anything is known of the others, in the middle, last

    def behaviour(text, attempt):
        return "hang" if text in hung and attempt < 2 else "good"

    with JudgeServer(scored, behaviour, latency=0.01) as server:
        judge, start = make(server, timeout=20.0, concurrency=4), time.monotonic()
        assert None not in judge(items, ["c"] * 60)
        assert time.monotonic() - start < 8
        assert counts(judge, "calls", "retried", "answered") == (66, 6, 60)
        assert server.served["hang"] == 6


@pytest.mark.parametrize(("retries", "calls"), [(5, 43), (1, 41)])
def test_an_answer_that_takes_long_is_waited_for_in_the_end(make, retries, calls):
    """Cancelled early at first; then given twice as long each time, or, at the last attempt, the whole timeout."""

    class Slow(JudgeServer):
        def behaviour_of(self, headers, body):
            found = super().behaviour_of(headers, body)
            self.wait(1.1 if found[0] == "slow|c" else 0)
            return found

    with Slow(scored) as server:
        judge = make(server, timeout=20.0, concurrency=1, max_retries=retries)
        assert None not in judge([*(f"q{i}" for i in range(39)), "slow"], ["c"] * 40)
        assert counts(judge, "calls", "answered", "failed") == (calls, 40, 0)


def test_a_server_that_becomes_slow_is_not_asked_everything_twice(make):
    """The slower answers lengthen what later calls are given."""

    class Slowing(JudgeServer):
        def behaviour_of(self, headers, body):
            found = super().behaviour_of(headers, body)
            self.wait(0.01 if len(self.calls) <= 40 else 1.0)
            return found

    with Slowing(scored) as server:
        judge = make(server, timeout=20.0, concurrency=8)
        assert None not in judge([f"q{i}" for i in range(72)], ["c"] * 72)
        asked_again = counts(judge, "retried")[0]
        assert 1 <= asked_again <= 31  # 96 if each of 32 slow answers were cancelled after 0.2, 0.4 and 0.8 s
        assert counts(judge, "calls", "failed") == (72 + asked_again, 0)


def test_the_last_attempt_and_a_lone_call_have_the_whole_timeout():
    hung, failed = openai_client.Fault("", hung=True), openai_client.Fault("")
    client = Client("http://127.0.0.1:9/v1", 30.0, max_retries=9, cancel_hung=True)
    assert client._seconds_for([]) == client._seconds_for([hung] * 3) == 30.0
    client._recent.extend([0.01] * 99 + [7.0])
    assert [client._seconds_for([hung] * n) for n in range(9)] == pytest.approx([0.2 * 2**n for n in range(8)] + [30.0])
    assert client._seconds_for([failed] * 8) == 0.2 and client._seconds_for([failed] * 9) == 30.0
    client._recent.extend([2.0] * 200)  # the server got slower
    assert client._seconds_for([]) == 8.0
    assert Client("http://127.0.0.1:9/v1", 30.0, max_retries=9)._seconds_for([]) == 30.0


def test_an_error_in_a_reply_of_status_200_is_a_fault(make, waits):
    with JudgeServer(scored, first({"error": {"message": "upstream is down"}}, {"choices": []})) as server:
        judge = make(server)
        assert judge(["p"], ["c"])[0] is not None
        assert len(waits) == 2


@pytest.mark.parametrize("fault", ["429", "500", "cut", "close"])
def test_a_fault_that_stays_is_counted_and_asked_again_by_the_next_run(make, fault, caplog):
    with JudgeServer(scored, always(fault)) as server:
        judge = make(server, max_retries=2)
        with caplog.at_level(logging.WARNING):
            assert judge(["p", "p"], ["c", "c"]) == [None, None]
        assert counts(judge, "items", "failed", "calls", "retried") == (2, 2, 3, 2)
        assert "2 failed, first item 0 (3 faults, the last: " in caplog.text
        server.behaviour = always("good")
        assert None not in make(server)(["p"], ["c"])


def test_nobody_ever_there_stops_before_every_item_is_tried(make):
    with JudgeServer(scored) as server:
        judge = make(server, max_retries=1, concurrency=1)
    with pytest.raises(JudgeError, match=r"No server was reached at http://127.0.0.1:\d+/v1/ in 2 attempts .*base_url"):
        judge(["p"] * 100, [f"c{i}" for i in range(100)])
    assert counts(judge, "failed", "answered") == (0, 0) and counts(judge, "calls")[0] < 10


@pytest.mark.parametrize("kind", ["good", "close", "500"])
def test_a_server_that_was_there_and_is_gone_is_a_fault(make, kind):
    with JudgeServer(scored, lambda text, attempt: kind) as server:
        judge = make(server, max_retries=1)
        judge(["p"], ["c"])
    assert judge(["p"], ["d"]) == [None]
    assert counts(judge, "failed", "calls") == ((1, 3) if kind == "good" else (2, 4))


def test_a_missing_key_is_seen_before_anything_is_asked(make, monkeypatch):
    with JudgeServer(scored) as server:
        judge = make(server)
        judge(["p"], ["c"])
        spec = {**judge.spec, "base_url": None}
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    resolve_judge(spec).check()  # its cache has answers, which may be all that it needs
    with pytest.raises(ValueError, match="No key for the judge"):
        resolve_judge({**spec, "cache": f"{spec['cache']}-new"}).check()


def test_too_long_a_retry_after_is_not_waited_for(make, caplog):
    with JudgeServer(scored, first("429 after"), retry_after=86400) as server:
        judge = make(server)
        with caplog.at_level(logging.WARNING):
            assert judge(["p"], ["c"]) == [None]
        assert "asks to wait for 86400 s" in caplog.text and counts(judge, "failed", "calls") == (1, 1)


def test_nonsense_is_asked_once_more_with_a_reminder_then_left_out(make, caplog):
    with JudgeServer(lambda text: "no" if "bad" in text else scored(text)) as server:
        judge = make(server)
        with caplog.at_level(logging.WARNING):
            verdicts = judge(["p", "p"], ["good", "bad"])
        assert verdicts[0] is not None and verdicts[1] is None
        assert counts(judge, "answered", "unparsable", "calls", "retried") == (1, 1, 3, 1)
        assert "1 unparsable, first item 1 (no JSON object: 'no')" in caplog.text
        asked = [untagged(body["messages"][0]["content"]) for _, body in server.calls if "bad" in str(body)]
        assert asked[0] == "p|bad" and asked[1].startswith("p|bad\n\n") and "at most 10 words" in asked[1]

        again = make(server)
        assert again(["p", "p"], ["good", "bad"]) == verdicts
        assert counts(again, "cached", "unparsable", "calls") == (2, 1, 0)


def test_the_second_answer_to_nonsense_counts(make):
    with JudgeServer(lambda text: scored(text) if "single JSON" in text else "no") as server:
        assert make(server)(["p"], ["c"])[0] is not None


def test_an_answer_cut_at_max_tokens_says_so(make, caplog):
    message = {"message": {"content": '{"feedback": "Go'}, "finish_reason": "length"}
    with JudgeServer(scored, always({"choices": [message]})) as server, caplog.at_level(logging.WARNING):
        assert make(server, max_tokens=3)(["p"], ["c"]) == [None]
    assert "cut at max_tokens=3; raise it" in caplog.text


@pytest.mark.parametrize("content", [None, [{"type": "text"}]])
def test_a_reply_without_text_is_unparsable(make, content):
    with JudgeServer(scored, always({"choices": [{"message": {"content": content}}]})) as server:
        judge = make(server)
        assert judge(["p"], ["c"]) == [None] and counts(judge, "unparsable", "calls") == (1, 2)


@pytest.mark.parametrize("status, hint", [(400, "max_tokens"), (401, "OPENAI_API_KEY"), (403, "may use"), (404, "/v1"),
                                          (422, "base_url")])  # fmt: skip
def test_a_refusal_is_raised_at_once(make, waits, status, hint):
    with JudgeServer(scored, lambda text, n: (status, "because of that") if "bad" in text else "good") as server:
        judge = make(server, concurrency=1)
        with pytest.raises(
            JudgeError, match=f"Item 1: {server.url}/ refuses .* {status}: 'because of that'[.] .*{hint}"
        ):
            judge(["p"] * 3, ["good", "bad", "never asked"])
        assert len(server.calls) == 2 and not waits
        assert counts(judge, "items", "answered", "calls") == (3, 1, 2)
        assert counts(make(server), "calls_ever") == (2,)
        again = make(server)
        again(["p"], ["good"])
        assert counts(again, "cached") == (1,)


def test_used_up_credit_is_not_waited_for(make):
    error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
    with JudgeServer(scored, always((429, error))) as server:
        with pytest.raises(JudgeError, match=r"exceeded your quota.*credit"):
            make(server)(["p"], ["c"])
        assert len(server.calls) == 1


# ------------------------------------------------------------------------------------------------------- the cache


def test_a_rerun_makes_no_call_and_another_question_does(make):
    with JudgeServer(scored) as server:
        items = (["p"] * 5, list("abcde"))
        verdicts = make(server)(*items)
        rerun = make(server)
        assert rerun(*items) == verdicts and counts(rerun, "calls", "cached") == (0, 5)
        assert len(server.calls) == 5
        changes = [{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"max_words": 8}]
        changes += [{"prompt": "feedback"}]
        for change in changes:
            other = make(server, **change)
            other(*items)
            assert counts(other, "calls", "cached") == (5, 0), change
        same = make(server, timeout=4, concurrency=2, max_retries=1)
        same(*items)
        assert counts(same, "calls") == (0,)


def test_a_rerun_needs_neither_key_nor_server(make, monkeypatch):
    with JudgeServer(scored) as server:
        verdicts = make(server)(["p"], ["c"])
    assert make(server, base_url=None)(["p"], ["c"]) == verdicts
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        make(server, base_url=None)(["p"], ["another"])


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_kill_in_the_middle_of_a_line_loses_that_line_only(make, tmp_path, lost):
    with JudgeServer(scored) as server:
        items = (["p"] * 4, list("abcd"))
        verdicts = make(server, concurrency=1)(*items)
        file = tmp_path / "cache" / "answers.jsonl"
        file.write_bytes(file.read_bytes()[:-lost])
        again = make(server)
        assert again(*items) == verdicts
        cached = 4 if lost == 1 else 3  # without its line's end it is still whole
        assert counts(again, "cached", "calls") == (cached, 4 - cached)
        third = make(server)
        assert third(*items) == verdicts and counts(third, "cached") == (4,)


def test_damage_elsewhere_is_told_and_asked_again(make, tmp_path, caplog):
    with JudgeServer(scored) as server:
        make(server, concurrency=1)(["p"] * 3, list("abc"))
        file = tmp_path / "cache" / "answers.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], "\0\0\0", lines[2]]) + "\n")
        with caplog.at_level(logging.WARNING):
            judge = make(server)
        assert "1 lines cannot be read (line 2 first)" in caplog.text
        judge(["p"] * 3, list("abc"))
        assert counts(judge, "cached", "calls") == (2, 1)


def test_a_line_holds_key_answer_verdict_and_calls(make, tmp_path):
    with JudgeServer(scored, first("500")) as server:
        (verdict,) = make(server)(["p"], ["c"])
    (row,) = map(json.loads, (tmp_path / "cache" / "answers.jsonl").read_text().splitlines())
    assert json.loads(row["answer"]) == scored("p|c") and row["calls"] == 2 and len(row["key"]) == 64
    assert row["verdict"] == {"text": verdict.text, "score": verdict.score, "analysis": verdict.analysis}


def test_a_short_write_is_an_error_and_the_next_line_is_whole(tmp_path, monkeypatch):
    cache, module = AnswerCache(tmp_path, 99), importlib.import_module("contrastive_align.judge.ledger")
    write = module.os.write
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", lambda fd, line: write(fd, line[:10]))
        with pytest.raises(OSError, match="Is the disk full"):
            cache.add("a", "x", None, 1)
    assert "a" not in cache
    cache.add("b", "x", Verdict("good", 3.0), 1)
    loaded = AnswerCache(tmp_path, 99)
    assert len(loaded) == 1 and loaded["b"] == Verdict("good", 3.0)


# ------------------------------------------------------------------------------------------------------- the budget


def test_the_budget_holds_over_restarts(make):
    with JudgeServer(scored, first("500")) as server:
        items = (["p"] * 6, list("abcdef"))
        judge = make(server, budget=5, concurrency=1)
        verdicts = judge(*items)
        answered = sum(v is not None for v in verdicts)
        assert len(server.calls) == 5 and counts(judge, "calls", "calls_ever") == (5, 5)
        assert counts(judge, "answered", "over_budget", "failed") == (answered, 6 - answered, 0)

        again = make(server, budget=5)
        assert again(*items) == verdicts and len(server.calls) == 5
        assert counts(again, "cached", "over_budget", "calls") == (answered, 6 - answered, 0)

        more = make(server, budget=50)
        assert None not in more(*items)
        assert more.report()["calls_ever"] == len(server.calls)


def test_the_budget_is_exact_among_threads(make):
    with JudgeServer(scored) as server:
        judge = make(server, budget=13, concurrency=8)
        judge(["p"] * 40, [str(i) for i in range(40)])
        assert len(server.calls) == 13 and counts(judge, "answered", "over_budget") == (13, 27)


def test_two_that_see_the_last_call_free_do_not_both_get_it(tmp_path, monkeypatch):
    cache = AnswerCache(tmp_path, 99)
    monkeypatch.setattr(AnswerCache, "calls", property(lambda self: 0))  # looked before the others wrote
    assert [cache.take_call(2) for _ in range(4)] == [True, True, False, False]


def test_a_call_is_counted_before_it_is_made(make):
    with JudgeServer(scored, always("close")) as server:
        judge = make(server, budget=2)
        assert judge(["p"], ["c"]) == [None]
        assert counts(judge, "over_budget", "calls") == (1, 2) and len(server.calls) == 2


def test_the_reason_is_kept_with_the_verdict(make):
    with JudgeServer(lambda text: {"analysis": f"because of {text}", "feedback": "good", "score": 2}) as server:
        fresh = make(server)(["p"], ["c"])
        cached = make(server)(["p"], ["c"])
    assert [v.analysis for v in (*fresh, *cached)] == ["because of p|c"] * 2 and len(server.calls) == 1


# ------------------------------------------------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_seen(make, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def behaviour(text, attempt):
        if "refused" in text:
            return (401, f"Incorrect key {KEY}")
        return (500, f"upstream got {KEY}") if attempt == 0 or "failed" in text else "good"

    with JudgeServer(lambda text: {"feedback": f"as {KEY} says", "score": 2}, behaviour) as server:
        judge = make(server)
        verdicts = judge(["p"] * 2, ["good", "failed"])
        assert verdicts[0].text == "as [key] says" and verdicts[1] is None
        with pytest.raises(JudgeError, match=r"Incorrect key \[key\]") as raised:
            judge(["p"], ["refused"])
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers, _ in server.calls)

    seen = [repr(judge), str(judge.spec), str(judge.report()), str(verdicts), caplog.text, *capfd.readouterr()]
    seen += [repr(vars(judge)), yaml.safe_dump(judge.spec), pickle.dumps(judge).decode("latin1")]
    error = raised.value
    while error is not None:  # also what it was raised from
        seen += [repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    seen += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [text for text in seen if KEY in text]
    assert any("upstream got [key]" in text for text in seen)


def test_a_key_in_the_address_is_refused(make):
    for address in (f"http://user:{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}"):
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as raised:
            Judge("feedback", model="m", answers="text", cache="unused", base_url=address)
        assert KEY not in str(raised.value)


def test_without_the_client_the_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with JudgeServer(scored) as server, pytest.raises(ImportError, match=r"contrastive-align\[judge\]"):
        make(server)(["p"], ["c"])


# ------------------------------------------------------------------------------------------------------- spec, reward


def test_spec_and_pickle_give_the_same_judge(make):
    with JudgeServer(scored) as server:
        judge = make(server, budget=9)
        verdicts = judge(["p"], ["c"])
        for other in (resolve_judge(yaml.safe_load(yaml.safe_dump(judge.spec))), pickle.loads(pickle.dumps(judge))):
            assert other.spec == judge.spec and other(["p"], ["c"]) == verdicts and other.report()["cached"] == 1
        assert resolve_judge(judge) is judge


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle": "m"}, "unknown key 'modle', expected some of prompt, model, answers, cache"),
        ({"api_key": "sk"}, "unknown key 'api_key'.*OPENAI_API_KEY"),
        ({"model": None}, "model: found None"),
        ({"answers": "texts"}, "answers: found 'texts', expected 'text' or a list"),
        ({"answers": 3}, "answers: found 3"),
        ({"answers": ["a", 1]}, "answers: found"),
        ({"concurrency": 0}, "concurrency: found 0, expected a whole number of at least 1"),
        ({"concurrency": True}, "concurrency: found True"),
        ({"max_retries": -1}, "max_retries: found -1"),
        ({"budget": 1.5}, "budget: found 1.5"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_words": 0}, "max_words: found 0"),
        ({"timeout": 0}, "timeout: found 0, expected seconds"),
        ({"timeout": float("nan")}, "timeout: found nan"),
        ({"temperature": -1}, "temperature: found -1"),
        ({"temperature": "hot"}, "temperature: found 'hot'"),
        ({"base_url": "localhost:8000"}, "base_url: found 'localhost:8000', expected an address such as"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, change, message):
    spec = {"prompt": "feedback", "model": "m", "answers": "text", "cache": str(tmp_path / "c"), **change}
    with pytest.raises(ValueError, match=message):
        resolve_judge(spec)
    assert not (tmp_path / "c").exists()


def test_a_missing_key_and_no_mapping_are_refused():
    with pytest.raises(ValueError, match=r"model, cache is missing\. Its keys: prompt, model"):
        resolve_judge({"prompt": "feedback", "answers": "text"})
    with pytest.raises(ValueError, match="found str, expected a mapping"):
        resolve_judge("feedback")


def test_a_judge_is_a_reward_function(make):
    with JudgeServer(lambda text: "no" if "bad" in text else {"feedback": "fine", "score": 2}) as server:
        reward = make(server).as_reward()
        prompts = [[{"role": "user", "content": "Hi"}]] * 2
        completions = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
        assert reward(prompts=prompts, completions=completions, completion_ids=[[1], [2]], answer=["x", "y"]) == [
            2,
            None,
        ]
        assert reward.__name__ == "judge"
        assert pickle.loads(pickle.dumps(reward))(prompts, completions) == [2, None]


# ------------------------------------------------------------------------------------------------------- waiting


def test_waits_double_up_to_their_bound_and_vary():
    waits = [[backoff(n, None) for _ in range(200)] for n in range(1, 10)]
    for n, found in enumerate(waits):
        longest = min(30.0, 0.25 * 2**n)
        assert longest / 2 <= min(found) < 0.6 * longest and 0.9 * longest < max(found) <= longest
    assert all(7 < backoff(n, 7.0) <= 7.7 for n in range(1, 10)) and backoff(9, 0.0) == 0


def test_retry_after_is_seconds_or_a_date():
    assert read_retry_after(None) is None and read_retry_after("soon") is None and read_retry_after("nan") is None
    assert read_retry_after("1.5") == 1.5 and read_retry_after("-3") == 0
    assert 55 < read_retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert read_retry_after(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0


def test_a_call_that_waits_leaves_its_slot_to_others(make, waits, monkeypatch):
    monkeypatch.setattr(openai_client, "backoff", lambda faults, after: 0.2)
    done = []

    def behaviour(text, attempt):
        done.append((text, time.monotonic()))
        return "500" if text == "p|a" and attempt == 0 else "good"

    with JudgeServer(scored, behaviour) as server:
        make(server, concurrency=1)(["p"] * 3, list("abc"))
    assert [text for text, _ in done] == ["p|a", "p|b", "p|c", "p|a"]
    start = done[0][1]
    assert done[2][1] - start < 0.15 and 0.2 <= done[3][1] - start < 0.6


def test_a_server_that_refuses_everything_is_not_shown_everything(make, monkeypatch):
    monkeypatch.setattr(openai_client, "backoff", lambda faults, after: 0.001)
    tried = []

    def behaviour(text, attempt):
        tried.append(text)
        return (401, "enough") if len(tried) > 200 else "500"

    with JudgeServer(scored, behaviour) as server, pytest.raises(JudgeError, match="enough"):
        make(server, concurrency=2, max_retries=1000)(["p"] * 100, [str(i) for i in range(100)])
    assert len(set(tried)) == 2 * openai_client.BEGUN_PER_SLOT


def test_a_refusal_ends_the_waits_of_others_and_keeps_the_answers_in_flight(make, monkeypatch):
    monkeypatch.setattr(openai_client, "backoff", lambda faults, after: 60.0)

    class Slow(JudgeServer):
        def behaviour_of(self, headers, body):
            found = super().behaviour_of(headers, body)
            self.wait({"p|waits": 0, "p|slow": 0.4, "p|bad": 0.2}[found[0]])
            return found

    def behaviour(text, attempt):
        return {"p|waits": "500", "p|bad": (401, "no")}.get(text, "good")

    with Slow(scored, behaviour) as server:
        start = time.monotonic()
        with pytest.raises(JudgeError, match="Item 2"):
            make(server)(["p"] * 3, ["waits", "slow", "bad"])
        assert 0.4 <= time.monotonic() - start < 5
        again = make(server)
        assert again(["p"], ["slow"])[0] is not None and counts(again, "cached") == (1,)


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it: a shell's background job begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_the_asking(make):
    def behaviour(text, attempt):
        if text == "p|3":
            os.kill(os.getpid(), signal.SIGINT)
        return "good"

    with JudgeServer(scored, behaviour, latency=0.05) as server:
        with pytest.raises(KeyboardInterrupt):
            make(server, concurrency=2)(["p"] * 50, [str(i) for i in range(50)])
        time.sleep(0.1)
        assert len(server.calls) <= 8


def test_a_judge_works_inside_an_event_loop(make):
    async def notebook():
        return make(server)(["p"], ["c"])

    with JudgeServer(scored) as server:
        assert asyncio.run(notebook())[0] is not None


def test_a_server_that_finds_a_call_too_early_is_asked_again(make, waits):
    with JudgeServer(scored, first((425, "too early"))) as server:
        assert make(server)(["p"], ["c"])[0] is not None and len(waits) == 1


# ------------------------------------------------------------------------------------------------------- together


def test_a_hundred_items_at_twenty_percent_faults(make):
    items = ([f"question {i}" for i in range(100)], [f"answer {i}" for i in range(100)])
    with JudgeServer(scored, some_faults(seed=0), retry_after=0, latency=0.002) as server:
        judge = make(server, concurrency=16, timeout=0.5)
        verdicts = judge(*items)
        report = judge.report()
        assert report["answered"] + report["unparsable"] + report["failed"] == 100 and report["failed"] == 0
        for prompt, completion, verdict in zip(*items, verdicts, strict=True):
            assert verdict is None or verdict.score in (
                scored(f"{prompt}|{completion}")["score"],
                scored(f"{prompt}|{completion}\n\n{judge._answers.reminder}")["score"],
            )
        assert sum(v is not None for v in verdicts) == report["answered"] >= 98
        assert report["calls"] == len(server.calls) == report["retried"] + 100 == report["calls_ever"]
        assert set(server.served) == {"good", *FAULTS} and server.most_at_once <= 16 + server.served["hang"]

        restarted = make(server, concurrency=16)
        assert restarted(*items) == verdicts
        assert len(server.calls) == report["calls"] and restarted.report()["calls"] == 0


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmark_judge", folder / "judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--items", "30", "--latency", "0.005", "--timeout", "0.5", "--retry-after", "0.05"])
    printed = capsys.readouterr().out
    assert "| items | 30 |" in printed and "| calls after a restart | 0 |" in printed
