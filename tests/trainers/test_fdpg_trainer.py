"""FDPGTrainer against an enumerable space: four tokens of a vocabulary of six, every completion's probability known."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contrastive_align import Constraint, FDPGConfig, FDPGTrainer, Target
from contrastive_align.losses import divergence_value
from contrastive_align.targets import FeatureError, InfeasibleMoment


WORDS = ["<pad>", "<bos>", "<eos>", "a", "b", "c"]
EOS, A, B, LENGTH = 2, 3, 4, 4


def has_a(completion_ids, **columns):
    return [float(A in ids) for ids in completion_ids]


def has_b(completion_ids, **columns):
    return [float(B in ids) for ids in completion_ids]


def make_tokenizer():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def build(seed=0, **shape):
    torch.manual_seed(seed)
    given = dict(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**given | shape))


def everything() -> list[list[int]]:
    """All completions: they end with EOS, or at the limit."""
    rest = [t for t in range(len(WORDS)) if t != EOS]
    short = [[*body, EOS] for n in range(LENGTH) for body in itertools.product(rest, repeat=n)]
    return short + [list(body) for body in itertools.product(rest, repeat=LENGTH)]


SPACE = everything()


@torch.no_grad()
def exact_logps(model, prompt: list[int]) -> torch.Tensor:
    """log pi of every completion, by plain forwards of the model."""
    total = torch.zeros(len(SPACE), dtype=torch.float64)
    for n in range(1, LENGTH + 1):
        rows = [i for i, ids in enumerate(SPACE) if len(ids) == n]
        ids = torch.tensor([prompt + SPACE[i] for i in rows])
        log_p = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        total[rows] = log_p.gather(2, ids[:, len(prompt) :, None])[..., 0].sum(1)
    return total


def options(folder, **changes):
    given = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 5e-3,
        "num_generations": 32, "per_device_train_batch_size": 64, "max_completion_length": LENGTH, "max_steps": 4,
        "logging_steps": 1, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "save_strategy": "no",
        "fit_samples": 512, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    return FDPGConfig(**{**given, **changes})


PROMPTS = Dataset.from_list([{"prompt": text} for text in ("a b", "c", "b b c", "a", "c a", "b", "c c", "a c")] * 8)


def moment_target(moment=0.5):
    return Target([Constraint(has_a, moment)])


def trained(
    tokenizer, folder, target, model=None, data=PROMPTS, resume=None, peft_config=None, trainer=FDPGTrainer, **changes
):
    args = options(folder, **changes)
    trainer = trainer(
        model or build(), args=args, train_dataset=data, processing_class=tokenizer, target=target,
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train(resume)
    return trainer


# What ends within 0.02 of the target. Forty small steps only bring the policy near.
WHOLE = {"max_steps": 240, "num_generations": 128, "per_device_train_batch_size": 128, "learning_rate": 3e-3}
SHORT = {"max_steps": 40, "num_generations": 64, "per_device_train_batch_size": 64, "learning_rate": 7e-3}


@pytest.mark.parametrize(
    ("divergence", "changes", "near"),
    [("js", WHOLE, 0.02), ("kl", WHOLE, 0.02), ("alpha:0.5", SHORT, 0.1), ("alpha:-1", SHORT, 0.1)],
)
def test_the_policy_becomes_the_target(divergence, changes, near, tokenizer, tmp_path):
    base = build()
    prompt = tokenizer("a b")["input_ids"]
    base_logps = exact_logps(base, prompt)
    assert base_logps.exp().sum().item() == pytest.approx(1, abs=1e-5)
    phi = torch.tensor([has_a(SPACE)], dtype=torch.float64).T
    target = moment_target(0.4)
    target.fit(phi, log_weights=base_logps, min_ess=0)
    log_p = target.log_scores(base_logps, phi)
    log_p = log_p - log_p.logsumexp(0)
    assert (log_p.exp() @ phi).item() == pytest.approx(0.4, abs=1e-6)

    trainer = trained(
        tokenizer, tmp_path, target, model=base, data=PROMPTS.select([0] * 8), divergence=divergence,
        lr_scheduler_type="linear", logging_steps=10, **changes,
    )  # fmt: skip
    log_pi = exact_logps(trainer.model, prompt)
    before = divergence_value("tv", base_logps, log_p).item()
    assert before > 0.39
    assert divergence_value("tv", log_pi, log_p).item() < near
    last = [entry for entry in trainer.state.log_history if "js_target" in entry][-1]
    assert last["moment/has_a"] == pytest.approx(0.4, abs=0.08)
    assert last["log_z"] == pytest.approx(target.log_scores(base_logps, phi).logsumexp(0).item(), abs=0.05)


def test_the_first_gradient_is_that_of_the_divergence(tokenizer, tmp_path):
    """From very many samples the gradient of a step is that of D_f, differentiated over all completions."""
    model = build()
    prompt = tokenizer("a b")["input_ids"]
    phi = torch.tensor([has_a(SPACE)], dtype=torch.float64).T
    target = moment_target(0.8)
    base_logps = exact_logps(model, prompt)
    target.fit(phi, log_weights=base_logps, min_ess=0)
    log_p = target.log_scores(base_logps, phi).log_softmax(0)
    exact = build()
    logs = torch.zeros(len(SPACE), dtype=torch.float64)
    for n in range(1, LENGTH + 1):
        rows = [i for i, ids in enumerate(SPACE) if len(ids) == n]
        ids = torch.tensor([prompt + SPACE[i] for i in rows])
        lp = exact(input_ids=ids).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        logs = logs.index_add(0, torch.tensor(rows), lp.gather(2, ids[:, len(prompt) :, None])[..., 0].sum(1))
    divergence_value("reverse_kl", logs, log_p).backward()
    want = torch.cat([p.grad.flatten() for p in exact.parameters()])

    args = options(tmp_path, num_generations=4096, per_device_train_batch_size=4096, divergence="reverse_kl")
    trainer = FDPGTrainer(
        model, args=args, train_dataset=PROMPTS.select([0] * 8), processing_class=tokenizer, target=target
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, [{"prompt": "a b"}] * 4096, None)
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert torch.nn.functional.cosine_similarity(found, want, dim=0).item() > 0.99
    assert (found.norm() / want.norm()).item() == pytest.approx(1, abs=0.1)


def test_rewards_alone_are_the_target_of_kl_control(tokenizer, tmp_path):
    data = PROMPTS.add_column("completions", ["not the samples"] * len(PROMPTS))  # which a feature must not be given
    trainer = FDPGTrainer(
        build(), reward_funcs=[has_a, has_b], args=options(tmp_path, reward_weights=[1.0, -2.0], beta=0.5),
        train_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    phi = trainer.target.features(["a"], ["x"], completion_ids=[[A, B]])
    assert trainer.target.energy(phi).tolist() == pytest.approx([-1.0 / 0.5])
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert f"## Objective\n\n- divergence: `js`\n- target: `base * exp({trainer.target.names[0]} / 0.5)`\n\n##" in card


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_every_importance_weight_is_one(dtype, layout, tokenizer, tmp_path):
    """What is drawn is scored as the loss scores it; what the sampler's own log-probs differ by is logged."""
    gaps = []

    class Watched(FDPGTrainer):
        def _completion_logps(self, model, batch):
            found = super()._completion_logps(model, batch)
            if found.requires_grad:
                gaps.append((found - batch["proposal_logps"]).abs().max().item())
            return found

    args = options(tmp_path, max_steps=3, gradient_accumulation_steps=1, layout=layout, max_completion_length=24)
    model = build(hidden_size=64, num_hidden_layers=4, initializer_range=0.2).to(dtype)
    prompts = Dataset.from_dict({"prompt": ["a b", "c a b a", "b"] * 8})
    data = {"train_dataset": prompts, "processing_class": tokenizer, "target": moment_target()}
    trainer = Watched(model, args=args, **data)
    trainer.train()
    assert len(gaps) == 3 and max(gaps) == 0
    told = [entry["sampling/logp_gap/max"] for entry in trainer.state.log_history if "loss" in entry]
    assert (min(told) > 1e-4) == (dtype == torch.bfloat16), told


def test_killed_and_resumed_is_not_killed(tokenizer, tmp_path):
    """Also in the middle of samples drawn for several steps."""
    same = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "steps_per_generation": 2, "seed": 3}
    whole = trained(tokenizer, tmp_path / "whole", moment_target(), **same)
    trained(tokenizer, tmp_path / "killed", moment_target(), **{**same, "max_steps": 3})
    resumed = trained(
        tokenizer, tmp_path / "killed", moment_target(), resume=str(tmp_path / "killed" / "checkpoint-3"), **same
    )
    assert torch.equal(whole.target.lambdas, resumed.target.lambdas)
    assert whole.log_z.state_dict() == resumed.log_z.state_dict()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_in_a_later_epoch(step, tokenizer, tmp_path):
    """At its beginning and in its middle; an epoch has two steps."""
    four = PROMPTS.select(range(4))
    same = {"max_steps": 6, "save_steps": step, "save_strategy": "steps", "data": four}
    whole = trained(tokenizer, tmp_path / "whole", moment_target(), **same)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    resumed = trained(tokenizer, tmp_path / "resumed", moment_target(), resume=checkpoint, **same)
    assert whole.log_z.state_dict() == resumed.log_z.state_dict()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_lora_has_one_model_in_memory_and_its_base_is_the_adapter_switched_off(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(FDPGTrainer, "reference_is_proven", True)  # the adapter below is not zero at the start
    model = build()
    start = {name: p.clone() for name, p in model.named_parameters()}
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = trained(tokenizer, tmp_path, moment_target(), model=model, peft_config=lora, max_steps=2)
    assert trainer.reference is None and trainer.ref_model is None
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(frozen[name], p) for name, p in start.items())
    ids = tokenizer("a b")["input_ids"]
    batch = trainer.collate([{"prompt_ids": ids, "completion_ids": SPACE[:50], "scores": [0.0] * 50}])
    plain = build()
    plain.load_state_dict(start)
    assert torch.allclose(trainer._logps(batch, reference=True)[0], exact_logps(plain, ids)[:50], atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_both_layouts_train_the_same(layout, tokenizer, tmp_path):
    # Adam would make a step of a gradient that is rounding alone.
    plain = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    a = trained(tokenizer, tmp_path / "a", moment_target(), layout="auto", **plain)
    b = trained(tokenizer, tmp_path / "b", moment_target(), layout=layout, **plain)
    assert (a.layout, b.layout) == ("shared", layout)
    moved = [
        not torch.allclose(p, q, atol=1e-3) for p, q in zip(a.model.parameters(), build().parameters(), strict=True)
    ]
    assert any(moved)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_sampling_is_plain_whatever_the_checkpoint_says(tokenizer, tmp_path):
    model = build()
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=True, repetition_penalty=3.0)
    altered = trained(tokenizer, tmp_path / "a", moment_target(), model=model, max_steps=2)
    plain = trained(tokenizer, tmp_path / "b", moment_target(), max_steps=2)
    for p, q in zip(altered.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_leaves_training_alone(tokenizer, tmp_path):
    evaluated = trained(tokenizer, tmp_path / "a", moment_target(), max_steps=3)
    plain = trained(tokenizer, tmp_path / "b", moment_target(), max_steps=3)
    args = options(
        tmp_path / "c", max_steps=3, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=64,
    )  # fmt: skip
    trainer = FDPGTrainer(
        build(), args=args, train_dataset=PROMPTS, eval_dataset=PROMPTS.select(range(3)), processing_class=tokenizer,
        target=moment_target(),
    )  # fmt: skip
    trainer.train()
    assert any("eval_js_target" in entry for entry in trainer.state.log_history)
    for p, q, r in zip(*(t.model.parameters() for t in (evaluated, plain, trainer)), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert trainer.log_z.state_dict() == plain.log_z.state_dict()


def test_a_pointwise_constraint(tokenizer, tmp_path):
    target = Target([Constraint(has_a, 1.0, pointwise=True)])
    trainer = trained(tokenizer, tmp_path, target, max_steps=60, divergence="kl", lr_scheduler_type="linear")
    history = [entry["moment/has_a"] for entry in trainer.state.log_history if "moment/has_a" in entry]
    assert history[0] < 0.9 and sum(history[-10:]) / 10 > 0.96  # 640 samples at a learning rate that went to 0
    with pytest.raises(ValueError, match="js"):  # KL(pi||p) is infinite where p is 0
        trained(tokenizer, tmp_path, Target([Constraint(has_a, 1.0, pointwise=True)]), divergence="reverse_kl")


def wrong(kind):
    def feature(completions, **columns):
        if kind == "raises":
            raise KeyError("no such column")
        return {
            "nan": [float("nan")] * len(completions),
            "few": [1.0],
            "text": ["yes"] * len(completions),
        }[kind]

    return feature


@pytest.mark.parametrize("kind", ["raises", "nan", "few", "text"])
def test_bad_features_are_named(kind, tokenizer, tmp_path):
    with pytest.raises(FeatureError, match="feature"):
        trained(tokenizer, tmp_path, Target([Constraint(wrong(kind), 0.5)]))


def test_bad_input_is_refused(tokenizer, tmp_path):
    with pytest.raises(InfeasibleMoment, match="never"):
        trained(tokenizer, tmp_path, Target([Constraint({"contains": "zebra", "name": "never"}, 0.5)]))
    with pytest.raises(ValueError, match="No prompt of train_dataset is short enough"):
        trained(tokenizer, tmp_path, moment_target(), data=Dataset.from_list([{"prompt": "a " * 70}] * 8))
    with pytest.raises(ValueError, match="Nothing to train towards"):
        FDPGTrainer(build(), args=options(tmp_path), train_dataset=PROMPTS, processing_class=tokenizer)
    with pytest.raises(ValueError, match="expected one"):
        FDPGTrainer(build(), has_a, options(tmp_path), PROMPTS, processing_class=tokenizer, target=moment_target())
    for name, value in {
        "min_p": 0.1, "repetition_penalty": 1.2, "num_iterations": 2,
        "epsilon": 0.3, "normalize_advantages": True, "mask_truncated_completions": True, "sync_ref_model": True,
        "reward_clip_range": (-1.0, 1.0), "generation_kwargs": {"num_beams": 2},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            options(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="num_generations"):
        options(tmp_path, num_generations=7)
    with pytest.raises(ValueError, match="alpha"):
        options(tmp_path, divergence="hellinger")


def test_completions_as_long_as_the_context_leave_room_for_prompts(tokenizer, tmp_path, caplog):
    told = {"train_dataset": PROMPTS, "processing_class": tokenizer, "target": moment_target()}
    trainer = FDPGTrainer(build(), args=options(tmp_path, max_completion_length=64), **told)
    assert "max_completion_length=64 leaves no token of the model's context (64) to a prompt" in caplog.text
    assert trainer.max_completion_length == 32 and len(trainer.train_dataset) == len(PROMPTS)


def test_long_prompts_are_left_out_before_training_and_counted(tokenizer, tmp_path, caplog):
    long = [{"prompt": "a " * 70}]
    rows = Dataset.from_list([*PROMPTS.select(range(5)), *long, *PROMPTS.select(range(5, 8))])
    trainer = FDPGTrainer(
        build(), args=options(tmp_path, max_steps=8, per_device_train_batch_size=32), train_dataset=rows,
        processing_class=tokenizer, target=moment_target(), eval_dataset={"a": rows},
    )  # fmt: skip
    assert "1 of 9 prompts of train_dataset are longer than 60 tokens" in caplog.text and "[5]" in caplog.text
    assert trainer.data_report == {"rows": 9, "too_long": 1} and len(trainer.eval_dataset["a"]) == 8
    trainer.train()
    assert trainer.state.global_step == 8
    with pytest.raises(ValueError, match="context of 64"):
        trainer.prompt_ids_of(["a " * 70])
    with pytest.raises(ValueError, match=r"1 rows .* for 2 at once"):  # of what is left
        trained(tokenizer, tmp_path, moment_target(), data=Dataset.from_list([{"prompt": "a"}, *long]))


def test_too_few_prompts_for_a_step_are_refused(tokenizer, tmp_path):
    rows = [{"prompt": text} for text in ("a", "a", "b")]
    with pytest.raises(ValueError, match=r"3 rows \(2 distinct prompts\).* for 4 at once.*\* 2\)"):
        trained(tokenizer, tmp_path, moment_target(), data=Dataset.from_list(rows), steps_per_generation=2)
    trainer = trained(
        tokenizer, tmp_path, moment_target(), data=Dataset.from_list(rows * 2), steps_per_generation=2, max_steps=2
    )
    assert trainer.state.global_step == 2


def test_two_processes_equal_one(tmp_path):
    """The samples of a group depend on its place in the step alone; log Z counts what all processes drew."""
    found = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        out = tmp_path / f"on_{processes}.pt"
        done = subprocess.run(
            [sys.executable, *launch, str(Path(__file__).with_name("fdpg_worker.py")), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(torch.load(out))
    for way in ("plain", "kept", "resumed"):
        check_equal(found[0][way], found[1][way])
    for run in found:
        assert all(torch.equal(run["resumed"]["weights"][name], p) for name, p in run["kept"]["weights"].items())
    assert found[0]["kept"]["replacements"] == found[1]["kept"]["replacements"] >= 1
    assert found[0]["kept"]["baseline"] == pytest.approx(found[1]["kept"]["baseline"], abs=1e-5)
    for name, one in found[0]["gradients"].items():
        two, plain = found[1]["gradients"][name], one["plain"]
        assert plain.norm() > 1e-3
        assert (two["plain"] - plain).norm() <= 1e-4 * plain.norm(), name
        for run in (one, two):  # an override of the loss keeps its scale, however a step is divided
            for way in ("tripled", "tripled_accumulated"):
                assert (run[way] - 3 * plain).norm() <= 1e-4 * (3 * plain).norm(), (name, way)


def check_equal(one, two):
    assert max((one["weights"][n] - p).abs().max().item() for n, p in two["weights"].items()) < 5e-6
    assert one["log_z"].keys() == two["log_z"].keys()
    for key, (log_sum, n) in one["log_z"].items():
        assert two["log_z"][key] == [pytest.approx(log_sum, abs=1e-5), n]
    assert two["kl_target"] == pytest.approx(one["kl_target"], rel=1e-4)


def test_trl_counts_the_micro_batches_it_asks_for(tokenizer, tmp_path, monkeypatch):
    calls = []
    for name in ("_prepare_inputs", "compute_loss"):
        ours = getattr(FDPGTrainer, name)
        monkeypatch.setattr(
            FDPGTrainer, name, lambda self, *a, _f=ours, _n=name, **k: calls.append(_n) or _f(self, *a, **k)
        )
    trainer = trained(tokenizer, tmp_path, moment_target(), max_steps=2)
    assert calls == ["_prepare_inputs", "compute_loss"] * 2
    assert trainer._step == 2 and len(trainer._buffered_inputs) == 1
