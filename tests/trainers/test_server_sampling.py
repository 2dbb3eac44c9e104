"""Sampling from a local server that speaks as vLLM does, well or badly."""

import logging

import pytest
from safetensors.torch import save_file
from sampling_server import SamplingServer, text_of
from torch import ones

from contrastive_align import openai_client
from contrastive_align.openai_client import CallError
from contrastive_align.sampling.server import SEEDS, Completion, ServerSampler


pytest.importorskip("openai")
KEY = "sk-nobody-may-ever-see-this"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """(number of faults, Retry-After) of each wait between two attempts, none of which is made."""
    asked = []
    monkeypatch.setattr(openai_client, "backoff", lambda faults, after: asked.append((faults, after)) or 0.0)
    return asked


def sampler(server, **options):
    return ServerSampler(server.url, "base", **{"timeout": 5.0, **options})


def adapter(folder, value=1.0):
    folder.mkdir(exist_ok=True)
    save_file({"weight": ones(2) * value}, folder / "adapter_model.safetensors")
    return folder


def first(*answers, path="/v1/completions"):
    """These for the first requests to a path with the same body, then good ones."""
    return lambda found, body, attempt: answers[attempt] if found == path and attempt < len(answers) else "good"


# -------------------------------------------------------------------------------------------------------- completions


def test_every_prompt_gets_its_own_completions_in_order():
    prompts, seeds = ["a", [5, 7, 9], "c"], [3, 2**40 + 5, 3]
    with SamplingServer() as server:
        found = sampler(server)(prompts, per_prompt=3, max_tokens=4, seeds=seeds, temperature=0.7, top_p=0.9)
        bodies = {str(body["prompt"]): body for _, _, body in server.calls}
    for prompt, seed, group in zip(prompts, seeds, found, strict=True):
        words = [text_of("base", prompt, seed % SEEDS, i).split(" ") for i in range(3)]
        assert group == [Completion(" ".join(w[:4]), len(w) <= 4) for w in words]
    assert {c.finished for group in found for c in group} == {True, False}
    body = bodies["[5, 7, 9]"]
    assert (body["n"], body["max_tokens"], body["temperature"], body["top_p"]) == (3, 4, 0.7, 0.9)
    # what a generation config may have set is switched off
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)


def test_extra_body_replaces_the_options_beside_openais_own():
    with SamplingServer() as server:
        sampler(server, extra_body={})(["a"], per_prompt=1, max_tokens=9, seeds=[0])
        assert set(server.calls[0][2]) == {"model", "prompt", "n", "max_tokens", "seed", "temperature", "top_p"}


def test_no_prompts_and_missing_seeds():
    ask = ServerSampler("http://127.0.0.1:9/v1", "base")  # nobody is there
    assert ask([], per_prompt=2, max_tokens=4, seeds=[]) == []
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        ask(["a", "b"], per_prompt=2, max_tokens=4, seeds=[1])


def test_no_more_requests_at_once_than_allowed():
    with SamplingServer() as server:
        sampler(server, concurrency=2)(["p"] * 12, per_prompt=1, max_tokens=4, seeds=range(12))
        assert server.most_at_once <= 2 and len(server.calls) == 12


@pytest.mark.parametrize(
    "bad",
    [
        (429, "slow down"),
        (503, "loading"),
        "close",
        {"choices": []},
        {"choices": [{"index": 0, "text": "x", "finish_reason": "abort"}]},
        {"choices": [{"index": 0, "text": None, "finish_reason": "stop"}]},
        {"nothing": 1},
    ],
)
def test_what_may_pass_is_tried_again(bad, waits, caplog):
    with SamplingServer(first(bad, bad)) as server:
        ask = sampler(server)
        assert ask(["a"], per_prompt=1, max_tokens=9, seeds=[1]) == [[Completion(text_of("base", "a", 1, 0), True)]]
        assert waits == [(1, None), (2, None)] and len(server.calls) == 3
    assert "2 requests failed and were made again" in caplog.text


def test_a_prompt_that_always_fails_is_an_error_that_names_it():
    def behaviour(path, body, attempt):
        return (500, "out of memory") if body["prompt"] == "b" else "good"

    with SamplingServer(behaviour) as server:
        with pytest.raises(CallError, match=r"Prompt 1: .* failed 3 times, the last: status 500: 'out of memory'"):
            sampler(server, max_retries=2)(["a", "b"], per_prompt=1, max_tokens=4, seeds=[1, 2])


def test_what_will_not_pass_is_refused_at_once():
    with SamplingServer(models=("another",)) as server:
        with pytest.raises(CallError, match=r"Prompt 0: .*status 404: .*`base` does not exist.* Check base_url"):
            sampler(server)(["a"], per_prompt=1, max_tokens=4, seeds=[1])
        assert len(server.calls) == 1


def test_a_server_that_hangs_is_given_up_after_the_timeout():
    import threading

    hang = threading.Event()
    with SamplingServer(write=lambda *_: (hang.wait(3) and "") or "late") as server:
        with pytest.raises(CallError, match=r"no answer within 0\.1 s"):
            sampler(server, timeout=0.1, max_retries=0)(["a"], per_prompt=1, max_tokens=4, seeds=[1])
        hang.set()


def test_the_key_comes_from_the_environment_and_is_never_seen(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with SamplingServer(lambda *_: (401, f"Incorrect key {KEY}")) as server:
        ask = sampler(server)
        with pytest.raises(CallError, match=r"Incorrect key \[key\].*OPENAI_API_KEY") as raised:
            ask(["a"], per_prompt=1, max_tokens=4, seeds=[1])
        assert server.calls[0][1]["authorization"] == f"Bearer {KEY}"
    seen, error = [caplog.text, repr(vars(ask))], raised.value
    while error is not None:
        seen += [repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    assert not [text for text in seen if KEY in text]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base_url": "localhost:8000"}, "base_url: found 'localhost:8000'"),
        ({"base_url": "http://me:secret@host/v1"}, "a user name, a password"),
        ({"model": ""}, "model: found ''"),
        ({"concurrency": 0}, "concurrency: found 0"),
        ({"timeout": 0}, "timeout: found 0"),
        ({"max_retries": -1}, "max_retries: found -1"),
    ],
)
def test_options_without_meaning_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ServerSampler(**{"base_url": "http://127.0.0.1:9/v1", "model": "base", **options})


# ----------------------------------------------------------------------------------------------------------- adapters


def test_the_newest_adapter_is_sampled_and_the_one_before_unloaded(tmp_path):
    with SamplingServer() as server:
        ask = sampler(server)
        drawn = [ask(["a"], per_prompt=1, max_tokens=9, seeds=[1])[0][0].text]
        for name, value in (("step-1", 1.0), ("step-2", 2.0)):
            ask.set_adapter(name, adapter(tmp_path / "adapter", value))
            assert server.loaded == {name: (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()}
            drawn.append(ask(["a"], per_prompt=1, max_tokens=9, seeds=[1])[0][0].text)
        assert server.history == ["+step-1", "+step-2", "-step-1"]
    assert drawn == [text_of(name, "a", 1, 0) for name in ("base", "step-1", "step-2")]


def test_an_adapter_of_that_name_from_an_earlier_run_is_replaced(tmp_path):
    with SamplingServer() as server:
        sampler(server).set_adapter("step-1", adapter(tmp_path / "adapter", 1.0))
        sampler(server).set_adapter("step-1", adapter(tmp_path / "adapter", 2.0))
        assert server.loaded["step-1"] == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        assert server.history == ["+step-1", "-step-1", "+step-1"]


def test_a_server_that_lost_the_older_adapter_is_fine(tmp_path):
    with SamplingServer() as server:
        ask = sampler(server)
        ask.set_adapter("step-1", adapter(tmp_path / "adapter"))
        server.loaded.clear()  # it was started anew
        ask.set_adapter("step-2", adapter(tmp_path / "adapter"))
        assert list(server.loaded) == ["step-2"] and ask.adapter == "step-2"


def test_a_server_that_takes_no_adapters_is_told_how_to_start(tmp_path):
    with SamplingServer(adapters=False) as server:
        ask = sampler(server)
        how = r"The adapter step-1: .*status 404: 'Not Found'. .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True .*--enable-lora"
        with pytest.raises(CallError, match=how):
            ask.set_adapter("step-1", adapter(tmp_path / "adapter"))
        assert ask.adapter is None


def test_an_adapter_that_the_server_cannot_use_is_refused_with_its_reason(tmp_path):
    refuse = first((400, "LoRA rank 64 is greater than max_lora_rank 16."), path="/v1/load_lora_adapter")
    with SamplingServer(refuse) as server:
        with pytest.raises(CallError, match=r"LoRA rank 64 is greater.*--max-lora-rank RANK"):
            sampler(server).set_adapter("step-1", adapter(tmp_path / "adapter"))


def test_loading_is_tried_again_too(tmp_path, waits):
    with SamplingServer(first((503, "busy"), path="/v1/load_lora_adapter")) as server:
        ask = sampler(server)
        ask.set_adapter("step-1", adapter(tmp_path / "adapter"))
        assert ask.adapter == "step-1" and waits == [(1, None)]


# ------------------------------------------------------------------------------------------------ inside the training


def train(tiny_llama, folder, sampler, *, condition="phrases", peft=True, completions=False, options=None, **more):
    from datasets import Dataset
    from peft import LoraConfig

    from contrastive_align import ConditionalConfig, ConditionalTrainer

    args = ConditionalConfig(
        str(folder), num_train_epochs=2, num_generations=5, max_completion_length=4, per_device_train_batch_size=10,
        learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        **{"save_strategy": "no", **(options or {})},
    )  # fmt: skip
    columns = {"prompt": ["Ask Anna to close the door.\n", "Tell Ben to make the tea.\n"]}
    if completions:
        columns |= {"completions": [list("abcde")] * 2, "scores": [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2}
    return ConditionalTrainer(
        tiny_llama(),
        args,
        train_dataset=Dataset.from_dict(columns),
        condition=condition,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if peft else None,
        sampler=sampler,
        **{"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions], **more},
    )


def test_every_round_samples_from_the_weights_of_its_step(tiny_llama, tmp_path):
    from safetensors.torch import load

    with SamplingServer() as server:
        trainer = train(tiny_llama, tmp_path, sampler(server))
        weights = []
        begin = trainer.begin_round

        def watched(number):
            begin(number)
            found = load(server.loaded[trainer.sampler.adapter])
            own = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if "lora" in n}
            assert found.keys() == own.keys() and all((found[n] == own[n]).all() for n in own)
            weights.append(found)

        trainer.begin_round = watched
        trainer.train()
        steps = trainer.state.global_step // 2
        names = [name.rsplit("-step-", 1)[1].split("-")[0] for name in server.history]
        assert names == ["0", str(steps), "0"] and [n[0] for n in server.history] == ["+", "+", "-"]
        bodies = [body for path, _, body in server.calls if path == "/v1/completions"]
    assert any((weights[0][n] != weights[1][n]).any() for n in weights[0])
    # The prompt's own tokens in the first round, those under the best condition in the second.
    tokenizer, best = trainer.processing_class, trainer.condition.apply_best
    prompts = trainer.prompts["prompt"]
    expected = [p for p in prompts] + [best(p) for p in prompts]
    assert sorted(body["prompt"] for body in bodies) == sorted(tokenizer(p)["input_ids"] for p in expected)
    assert (tmp_path / "sampling_adapter" / "adapter_config.json").is_file()


def test_texts_are_encoded_again_with_an_end_where_they_ended(tiny_llama, tmp_path):
    texts = ["Please close the door Anna", "Please close", "", "Anna", "the"]
    with SamplingServer(write=lambda model, prompt, seed, i: texts[i]) as server:
        trainer = train(tiny_llama, tmp_path, sampler(server))
        (group,) = trainer.generate(["Ask Anna"], 5, [1])
    tokenizer = trainer.processing_class
    assert [(c["text"], c["finished"]) for c in group] == [("Please close the door", False)] + [
        (t, True) for t in texts[1:]
    ]
    for c in group:
        ids = tokenizer(c["text"], add_special_tokens=False)["input_ids"]
        assert c["ids"] == ids + [tokenizer.eos_token_id] * c["finished"]


def test_after_the_best_weights_are_loaded_the_server_is_asked_for_these(tiny_llama, tmp_path):
    from datasets import Dataset
    from safetensors.torch import load

    rewards = iter([2.0, 1.0])  # the first round's end is the best
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "reward", "greater_is_better": True}
    with SamplingServer() as server:
        rows = Dataset.from_dict({"prompt": ["a"]})
        trainer = train(tiny_llama, tmp_path, sampler(server), options=options, eval_dataset=rows)

        def evaluate(*_, **__):
            trainer.generate(["a"], 1, [1])
            return {"eval_reward": next(rewards)}

        trainer.evaluate = evaluate
        trainer.train()
        assert trainer.state.best_global_step < trainer.state.global_step
        trainer.generate(["a"], 1, [1])
        found = load(server.loaded[server.calls[-1][2]["model"]])
        own = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if "lora" in n}
        assert all((found[n] == own[n]).all() for n in own)


def test_the_adapter_is_pushed_once_a_step(tiny_llama, tmp_path):
    with SamplingServer() as server:
        trainer = train(tiny_llama, tmp_path, sampler(server))
        trainer.generate(["a"], 1, [1])
        trainer.generate([], 1, [])
        trainer.generate(["b"], 1, [1])
        assert len(server.history) == 1
        trainer.state.global_step = 1
        trainer.generate([], 1, [])
        assert len(server.history) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"peft": False}, "the whole model is trained.*LoRA"),
        ({"condition": "quantile_tokens"}, "'quantile_tokens' adds tokens"),
    ],
)
def test_what_a_server_cannot_be_given_is_refused(tiny_llama, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        train(tiny_llama, tmp_path, ServerSampler("http://127.0.0.1:9/v1", "base"), **options)
