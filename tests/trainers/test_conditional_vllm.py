"""Rounds drawn by vLLM: TRL's own VLLMGeneration runs, over stand-ins for vLLM's client and engine."""

import copy
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import vllm_stand_in
from datasets import Dataset
from peft import LoraConfig
from test_conditional_trainer import PROMPTS, build, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import RLOOConfig
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm_worker import run

from contrastive_align import ConditionalConfig, ConditionalTrainer
from contrastive_align.conditions.tokens import add_condition_tokens
from contrastive_align.rounds.samplers import base_kept
from contrastive_align.sampling.server import ServerSampler
from contrastive_align.trainers.configs import option_of


SERVER = {"use_vllm": True, "vllm_mode": "server", "condition": "phrases"}


@pytest.fixture(autouse=True)
def adapters_may_start_elsewhere(monkeypatch):
    monkeypatch.setattr(ConditionalTrainer, "reference_is_proven", True)


def lora(**options):
    """One that changes the model from the start."""
    options = {"init_lora_weights": False, "target_modules": ["q_proj", "down_proj"], **options}
    return LoraConfig(r=4, lora_alpha=32, **options)


def held_out(n=2):
    return Dataset.from_dict({"prompt": PROMPTS[:n]})


def merged(trainer):
    """The weights of the policy, under the names of the base."""
    model = copy.deepcopy(trainer.model)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return dict(model.named_parameters())


def same(engine, weights):
    assert engine.parameters.keys() == weights.keys()
    return all(torch.equal(p, weights[name]) for name, p in engine.parameters.items())


def counted(engine):
    return [engine.history.count(what) for what in ("weights", "generate")]


@pytest.fixture
def install(monkeypatch):
    def put(path, **options):
        set_attribute = lambda place, name, value: monkeypatch.setattr(place, name, value, raising=False)  # noqa: E731
        return vllm_stand_in.install(path, set_attribute, **options)

    return put


@pytest.fixture(scope="session")
def ending(tiny_llama, tmp_path_factory):
    """A model that ends some of its completions, and not all."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama(seed=1)),
        AutoTokenizer.from_pretrained(tiny_llama()),
    )
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 5
    path = tmp_path_factory.mktemp("ending")
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return str(path)


# ------------------------------------------------------------------------------------------- what is expected of TRL


def test_trl_has_what_is_used_of_it(tiny_llama, tmp_path, monkeypatch):
    """Every argument is given, but the one that is no option here: a new one of TRL's is to be thought about."""
    given = {}
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", lambda **arguments: given.update(arguments))
    build(tiny_llama(), tmp_path, **SERVER)
    assert set(inspect.signature(VLLMGeneration).parameters) - set(given) == {"structured_outputs_regex"}
    assert set(given) <= set(inspect.signature(VLLMGeneration).parameters)
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert vars(vllm_generation)["VLLMClient"] is VLLMClient


@pytest.mark.parametrize(
    "method", ["__init__", "init_communicator", "update_named_params", "reset_prefix_cache", "generate"]
)
def test_the_stand_in_takes_what_trls_client_takes(method):
    real, ours = (inspect.signature(getattr(c, method)).parameters for c in (VLLMClient, vllm_stand_in.Client))
    assert [(p.name, p.default) for p in real.values()] == [(p.name, p.default) for p in ours.values()]


def test_the_options_are_trls():
    theirs = {f.name: f for f in fields(RLOOConfig)}
    ours = [f for f in fields(ConditionalConfig) if "vllm" in f.name]
    types = [get_type_hints(config) for config in (ConditionalConfig, RLOOConfig)]
    assert len(ours) == 12
    for f in ours:
        assert (types[0][f.name], f.default, f.metadata["help"]) == (
            types[1][f.name],
            theirs[f.name].default,
            theirs[f.name].metadata["help"],
        )
    with pytest.raises(TypeError, match="RLOOConfig has no option 'vllm_speed'"):
        option_of(RLOOConfig, "vllm_speed")


# --------------------------------------------------------------------------------------------------------- a server


@pytest.mark.parametrize("peft", [False, True])
def test_every_round_is_drawn_from_the_weights_of_its_step(tiny_llama, ending, tmp_path, install, peft):
    engine = install(tiny_llama())  # other weights than the policy's: none of them may be left
    adapter = lora() if peft else None
    trainer = build(ending, tmp_path, **SERVER, vllm_server_port=8123, vllm_group_port=5, vllm_server_timeout=7.0,
                    more={"peft_config": adapter}, temperature=0.9, top_k=9, top_p=0.95)  # fmt: skip
    assert engine.history == [("connect", "http://0.0.0.0:8123", 5, 7.0), "communicator"]
    begin, seen = trainer.begin_round, []

    def watched(number):
        begin(number)
        seen.append({name: p.clone() for name, p in engine.parameters.items()})
        assert same(engine, merged(trainer))

    trainer.begin_round = watched
    trainer.train()
    assert engine.history[2:] == ["weights", "reset", "generate"] * 2  # once a round
    assert any(not torch.equal(p, seen[1][name]) for name, p in seen[0].items())

    found, encode = samples(trainer), trainer.encode
    for number, (prompts, n, params) in enumerate(engine.calls):
        assert n == 5 and params == {
            "repetition_penalty": 1.0, "temperature": 0.9, "top_p": 0.95, "top_k": 9, "min_p": 0.0, "max_tokens": 6,
            "logprobs": None, "stop_token_ids": trainer.eos_token_ids,
        }  # fmt: skip
        rows = found[20 * number : 20 * number + 20]
        best = trainer.condition.apply_best if number else (lambda prompt: prompt)
        assert prompts == [encode(best(s.prompt)) for s in rows[::5]]
        assert [s.sample_index for s in rows] == list(range(5)) * 4
    eos = set(trainer.eos_token_ids)
    assert [s.finished for s in found] == [s.completion_ids[-1] in eos for s in found]
    assert {s.finished for s in found} == {True, False}
    assert all(len(s.completion_ids) == 6 and not eos.intersection(s.completion_ids) for s in found if not s.finished)


def test_what_is_drawn_is_what_that_prompt_was_answered(tiny_llama, tmp_path, install):
    engine = install(tiny_llama())
    trainer = build(tiny_llama(), tmp_path, **SERVER)
    found = trainer.generate(PROMPTS[:3], 4, [0] * 3)
    engine.asked.clear()
    ids = [trainer.encode(prompt) for prompt in PROMPTS[:3]]
    assert [[c["ids"] for c in group] for group in found] == engine.draw(ids, 4, engine.calls[0][2])
    assert trainer.generate([], 4, []) == []
    assert len({tuple(c["ids"]) for group in found for c in group}) > 6


def test_an_evaluation_is_handed_the_weights_once(tiny_llama, tmp_path, install):
    engine = install(tiny_llama())
    trainer = build(tiny_llama(), tmp_path, **SERVER)
    trainer.evaluate(held_out())
    assert counted(engine) == [1, 6]  # five conditions and none
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)  # as where the best checkpoint is loaded: the step is the same
    trainer.evaluate(held_out())
    assert counted(engine) == [2, 12] and same(engine, merged(trainer))


def test_every_draw_of_ones_own_has_the_present_weights(tiny_llama, tmp_path, install):
    engine = install(tiny_llama())
    trainer = build(tiny_llama(), tmp_path, **SERVER)
    trainer.begin_round(1)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    trainer.generate(PROMPTS[:1], 1, [0])
    assert counted(engine) == [2, 2] and same(engine, merged(trainer))


def test_a_round_that_the_pool_has_is_not_drawn_again(tiny_llama, tmp_path, install):
    engine = install(tiny_llama())
    build(tiny_llama(), tmp_path, **SERVER).begin_round(1)
    again = build(tiny_llama(), tmp_path, **SERVER)
    again.begin_round(1)
    assert counted(engine) == [1, 1] and len(samples(again)) == 20


@pytest.mark.parametrize("guarded", [True, False])
def test_merging_lora_leaves_the_base_as_it_was(tiny_llama, tmp_path, install, guarded):
    """In bfloat16 it does not by itself, which is why it is guarded."""
    path = tiny_llama()
    install(path)
    trainer = build(
        path,
        tmp_path,
        **SERVER,
        more={"peft_config": lora()},
        model_init_kwargs={"dtype": "bfloat16"},
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    for _ in range(5):
        if guarded:
            trainer.generate(PROMPTS[:1], 1, [0])
        else:
            trainer.vllm.generation.sync_weights()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert not changed if guarded else changed and all("base_layer" in name for name in changed)


def test_the_base_is_kept_when_handing_over_fails(tiny_llama, tmp_path, install):
    install(tiny_llama())
    trainer = build(tiny_llama(), tmp_path, **SERVER, more={"peft_config": lora()})
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="gone"), base_kept(trainer.model):
        trainer.model.merge_adapter()
        raise RuntimeError("the server is gone")
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


# --------------------------------------------------------------------------------------------------- condition tokens


@pytest.fixture
def with_tokens(tiny_llama, tmp_path):
    """A model that was trained with condition tokens before."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama()), AutoTokenizer.from_pretrained(tiny_llama())
    ids = add_condition_tokens(model, tokenizer, [f"<quantile_{i}>" for i in range(5)], seed=0)
    with torch.no_grad():
        model.lm_head.weight[ids] = model.lm_head.weight.mean(0) * 0 + 0.5  # likely enough to be drawn
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def test_tokens_that_the_start_has_are_never_drawn(with_tokens, tmp_path, install):
    engine = install(with_tokens)
    trainer = build(with_tokens, tmp_path / "out", **{**SERVER, "condition": "quantile_tokens"})
    trainer.train()
    ids = set(trainer.condition_ids)
    assert engine.calls[0][2]["logit_bias"] == dict.fromkeys(trainer.condition_ids, -100.0)
    assert all(prompt[0] in ids or prompt[1] in ids for prompt in engine.calls[1][0])
    assert not any(ids.intersection(s.completion_ids) for s in samples(trainer))


def test_tokens_that_are_drawn_all_the_same_are_an_error(with_tokens, tmp_path, install):
    install(with_tokens, heeds_bias=False)
    trainer = build(with_tokens, tmp_path / "out", **{**SERVER, "condition": "quantile_tokens"})
    with pytest.raises(RuntimeError, match=r"vLLM drew the condition token \d+, against its logit_bias"):
        trainer.generate(PROMPTS, 20, [0] * 8)


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: [[], *ids[1:]], lambda ids: [[1] * 7, *ids[1:]]])
def test_what_vllm_may_not_return_is_an_error(tiny_llama, tmp_path, install, change):
    install(tiny_llama())
    trainer = build(tiny_llama(), tmp_path, **SERVER)
    generate = trainer.vllm.generation.vllm_client.generate
    trainer.vllm.generation.vllm_client.generate = lambda **options: (
        lambda found: {**found, "completion_ids": change(found["completion_ids"])}
    )(generate(**options))
    with pytest.raises(RuntimeError, match=r"returned 3 completions, expected 2 x 2|of 0 tokens|of 7 tokens"):
        trainer.generate(PROMPTS[:2], 2, [0, 0])


# ------------------------------------------------------------------------------------------------- beside the trainer


@pytest.mark.parametrize("sleep", [False, True])
def test_beside_the_trainer(tiny_llama, tmp_path, install, sleep, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    engine = install(tiny_llama())
    trainer = build(tiny_llama(seed=1), tmp_path, condition="phrases", use_vllm=True, rows_at_once=40,
                    vllm_enable_sleep_mode=sleep, vllm_max_model_length=64, more={"peft_config": lora()})  # fmt: skip
    options = trainer.vllm.generation.llm.options
    assert options["model"] == tiny_llama(seed=1) and options["max_num_seqs"] == 40
    assert (options["max_model_len"], options["gpu_memory_utilization"], options["model_impl"]) == (64, 0.3, "vllm")
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if "base_layer" in n}
    trainer.train()
    trainer.evaluate(held_out())
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert counted(engine) == ([2 + 6, 2 + 6] if sleep else [2 + 1, 2 + 6])
    assert sleep or same(engine, merged(trainer))
    prompts, n, params = engine.calls[0]
    assert n == 1 and len(prompts) == 20 and prompts[0] == prompts[4] != prompts[5]
    assert "seed" not in params  # it would make the five completions of a prompt one
    groups = [samples(trainer)[i : i + 5] for i in range(0, 40, 5)]
    assert all(len({s.prompt_index for s in group}) == 1 for group in groups)
    assert sum(len({tuple(s.completion_ids) for s in group}) > 1 for group in groups) > 4


def test_prompts_leave_room_in_what_vllm_was_given(tiny_llama, tmp_path, install, caplog):
    install(tiny_llama())
    lengths = sorted(len(AutoTokenizer.from_pretrained(tiny_llama())(p)["input_ids"]) for p in PROMPTS)
    with pytest.raises(ValueError, match="No prompt of train_dataset is short enough"):
        build(tiny_llama(), tmp_path, condition="phrases", use_vllm=True, vllm_max_model_length=lengths[0])
    assert f"vllm_max_model_length={lengths[0]}" in caplog.text
    build(tiny_llama(), tmp_path / "server", **SERVER, vllm_max_model_length=lengths[0])  # the server has its own


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "more", "match"),
    [
        ({}, {"sampler": ServerSampler("http://127.0.0.1:9/v1", "base")}, "use_vllm is set and sampler is given"),
        ({"reward_funcs": None}, {}, "use_vllm is set and nothing is sampled"),
        ({}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "use_vllm with a quantised model"),
        ({"condition": "quantile_tokens"}, {}, "the model lacks its token '<quantile_0>'.*condition='phrases'"),
        ({"vllm_mode": "servr"}, {}, "vllm_mode is 'servr', expected one of server, colocate"),
        ({"temperature": 2.5}, {}, r"temperature is 2.5 with use_vllm, which takes 0.01 to 2"),
        ({"temperature": 0.001}, {}, r"temperature is 0.001 with use_vllm"),
    ],
)
def test_refused_before_the_model_is_loaded(tiny_llama, tmp_path, install, monkeypatch, options, more, match):
    engine = install(tiny_llama())
    monkeypatch.setattr("contrastive_align.trainers.base.create_model_from_path", None)
    with pytest.raises(ValueError, match=match):
        build(tiny_llama(), tmp_path, **{**SERVER, **options}, more=more)
    assert not engine.history


def test_without_vllm_the_way_to_install_it_is_said(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install trl\[vllm\]"):
        build(tiny_llama(), tmp_path, **SERVER)


@pytest.mark.parametrize(
    ("adapter", "condition", "match"),
    [
        (lora(), "quantile_tokens", "'quantile_tokens' and LoRA"),
        (lora(trainable_token_indices=[3]), "phrases", "trainable_token_indices"),
    ],
)
def test_rows_of_tokens_beside_lora_are_refused(with_tokens, tmp_path, install, adapter, condition, match):
    engine = install(with_tokens)
    with pytest.raises(ValueError, match=match):
        build(with_tokens, tmp_path / "out", **{**SERVER, "condition": condition}, more={"peft_config": adapter})
    assert not engine.history


def test_rows_that_the_model_lacks_are_refused(tiny_llama, with_tokens, tmp_path, install):
    install(tiny_llama())
    more = {"processing_class": AutoTokenizer.from_pretrained(with_tokens)}  # it knows them, the model does not
    with pytest.raises(ValueError, match="lacks its token '<quantile_0>'"):
        build(tiny_llama(), tmp_path / "out", **{**SERVER, "condition": "quantile_tokens"}, more=more)


def test_a_model_without_a_name_cannot_be_loaded_a_second_time(tiny_llama, tmp_path, install):
    install(tiny_llama())
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_llama()).config)
    model.config._name_or_path = model.name_or_path = ""
    more = {"processing_class": AutoTokenizer.from_pretrained(tiny_llama())}
    with pytest.raises(ValueError, match=r"this one has none.*vllm_mode='server'"):
        build(model, tmp_path, condition="phrases", use_vllm=True, more=more)
    build(model, tmp_path, **SERVER, more=more)


# -------------------------------------------------------------------------------------------------- several processes


def test_two_processes_draw_what_one_does(tiny_llama, tmp_path, install):
    path, out = tiny_llama(), tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = Path(__file__).with_name("vllm_worker.py")
    two = subprocess.Popen([*launch, worker, path, out, tmp_path / "two"], stderr=subprocess.PIPE, text=True)
    engine = install(path)
    _, one = run(path, tmp_path / "one", 1)
    _, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors[-2000:]
    found = json.loads(out.read_text())
    places = [(s["round"], s["prompt_index"], s["sample_index"]) for s in found["samples"]]
    assert len(set(places)) == len(places) == 50
    assert found["samples"] == one["samples"]
    assert found["given"].keys() == one["given"].keys()
    for name, value in found["given"].items():
        assert value == pytest.approx(one["given"][name])
    assert counted(engine)[1] == 8 and [len(prompts) for prompts, _, _ in engine.calls] == [5, 5, *[1] * 6]
    assert found["generated"] == [8, 0]  # the main process asks for all
    assert found["asked"] == [6, 6, *[2] * 6]  # as many prompts from each, those that are lacking drawn in vain
