"""A proposal that is kept: when it is replaced, what it leaves alone, and that the target is still reached."""

import math

import pytest
import torch
from peft import LoraConfig
from test_fdpg_trainer import PROMPTS, SPACE, WHOLE, build, exact_logps, has_a, make_tokenizer, moment_target, trained

from contrastive_align.losses import RunningLogZ, divergence_value
from contrastive_align.trainers import fdpg as trainer_module
from contrastive_align.trainers.adaptive_proposal import AdaptiveProposal


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def atoms(seed=0):
    """Policy, proposal and target of two prompts over nine atoms; and samples of the proposal, all atoms as often."""
    generator = torch.Generator().manual_seed(seed)
    policy, target = torch.randn(2, 2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    return policy, torch.full_like(policy, -math.log(9)), target + 1.5


def known_log_z(target, proposal):
    log_z = RunningLogZ()
    log_z.add(zip(("one", "two"), target - proposal, strict=True))
    return log_z


@pytest.mark.parametrize("criterion", ["kl", "tv", "js"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_that_of_the_enumerated_divergences(criterion, seed):
    policy, proposal, target = atoms(seed)
    kept, model = AdaptiveProposal(criterion, 2), torch.nn.Linear(2, 2)
    log_z = known_log_z(target, proposal)
    keys = ["one", "two"]
    assert kept.compare(model, keys, policy, proposal, target, log_z) is None  # one of two
    found = kept.compare(model, keys[::-1], policy.flip(0), proposal, target.flip(0), log_z)
    log_p = target - 1.5
    values = [divergence_value(criterion, logs, log_p).mean().item() for logs in (proposal, policy)]
    assert found.gap == pytest.approx(values[0] - values[1], abs=1e-9)
    assert found.replaced == (values[0] > values[1]) == (not kept.is_base)
    assert kept.replacements == int(found.replaced)


def test_a_replacement_copies_and_empties_the_window():
    _, proposal, target = atoms()
    kept, model = AdaptiveProposal("kl", 1), torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    logs = (target - 1.5, proposal, target, known_log_z(target, proposal))  # a policy that is the target
    assert kept.compare(model, ["one", "two"], *logs).replaced
    assert kept.weights.keys() == {"weight"}  # what is not trained is not copied
    with torch.no_grad():
        model.weight.add_(1.0)
    own, was, grad = model.weight.data, kept.weights["weight"].clone(), torch.ones(2, 2)
    model.weight.grad = grad
    with kept.in_place_of(model):
        assert torch.equal(model.weight, was)
    assert model.weight.data_ptr() == own.data_ptr() and torch.equal(own, was + 1.0)
    assert model.weight.grad is grad
    with pytest.raises(KeyError), kept.in_place_of(model):
        raise KeyError
    assert model.weight.data_ptr() == own.data_ptr()
    two = AdaptiveProposal("kl", 2)
    assert two.compare(model, ["one", "two"], *logs) is None
    assert two.compare(model, ["one", "two"], *logs).replaced
    assert two.compare(model, ["one", "two"], *logs) is None


def test_prompts_without_mass_say_nothing():
    policy, proposal, target = atoms()
    target[0] = -torch.inf
    kept = AdaptiveProposal("tv", 1)
    found = kept.compare(torch.nn.Linear(1, 1), ["one", "two"], policy, proposal, target, known_log_z(target, proposal))
    log_p = target[1] - 1.5
    want = divergence_value("tv", proposal[1], log_p) - divergence_value("tv", policy[1], log_p)
    assert found.gap == pytest.approx(want.item(), abs=1e-9)


def test_the_policy_becomes_the_target(tokenizer, tmp_path):
    base, prompt = build(), tokenizer("a b")["input_ids"]
    base_logps, phi = exact_logps(base, prompt), torch.tensor([has_a(SPACE)], dtype=torch.float64).T
    target = moment_target(0.4)
    target.fit(phi, log_weights=base_logps, min_ess=0)
    log_p = target.log_scores(base_logps, phi).log_softmax(0)
    trainer = trained(
        tokenizer, tmp_path, target, model=base, data=PROMPTS.select([0] * 8), proposal="kept", proposal_criterion="js",
        lr_scheduler_type="linear", logging_steps=15, **WHOLE,
    )  # fmt: skip
    assert divergence_value("tv", exact_logps(trainer.model, prompt), log_p).item() < 0.02
    assert trainer.adaptive_proposal.replacements >= 1
    history = [entry for entry in trainer.state.log_history if "proposal/replaced" in entry]
    assert sum(entry["proposal/replaced"] for entry in history) * 15 == pytest.approx(
        trainer.adaptive_proposal.replacements
    )
    assert history[-1]["log_z"] == pytest.approx(target.log_scores(base_logps, phi).logsumexp(0).item(), abs=0.05)
    assert history[-1]["moment/has_a"] == pytest.approx(0.4, abs=0.05)  # of the policy, not of the samples


def test_samples_are_the_proposals_and_weighed_by_it(tokenizer, tmp_path):
    """After a replacement and further steps: recorded log-probs are those of the copy, not of the policy."""
    trainer = trained(
        tokenizer, tmp_path, moment_target(), proposal="kept", proposal_window=2, max_steps=8, proposal_criterion="js"
    )
    kept = trainer.adaptive_proposal
    assert kept.replacements >= 1
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.train()
    prompt = tokenizer("a b")["input_ids"]
    drawn = trainer._draw([prompt], 64, [7])
    ids, logps = drawn.completion_ids, drawn.logps
    batch = trainer.collate([{"prompt_ids": prompt, "completion_ids": ids[0], "scores": [0.0] * 64}])
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    policy = trainer._logps(batch)
    with kept.in_place_of(trainer.model):
        proposal = trainer._logps(batch)
    assert torch.allclose(logps, proposal, atol=1e-5)
    assert not torch.allclose(logps, policy, atol=1e-2)
    trainer.model.eval()
    drawn = trainer._draw([prompt], 64, [7])  # an evaluation is of the policy
    ids, logps = drawn.completion_ids, drawn.logps
    batch = trainer.collate([{"prompt_ids": prompt, "completion_ids": ids[0], "scores": [0.0] * 64}])
    assert torch.allclose(logps, trainer._logps(batch), atol=1e-5)


def test_log_z_weighs_samples_by_what_drew_them(tokenizer, tmp_path, monkeypatch):
    seen, real = [], trainer_module.fdpg
    monkeypatch.setattr(trainer_module, "fdpg", lambda *a, **k: seen.append((*a[:3], k["log_z"])) or real(*a, **k))
    trained(
        tokenizer, tmp_path, moment_target(), data=PROMPTS.select([0] * 8), proposal="kept", proposal_window=2,
        max_steps=6, per_device_train_batch_size=32,
    )  # fmt: skip
    weights = []
    for _, proposal, target, log_z in seen:
        weights.append((target - proposal).exp())
        assert log_z.item() == pytest.approx(torch.cat(weights).mean().log().item(), abs=1e-9)
    policy, proposal = seen[-1][:2]
    assert not torch.allclose(policy.detach(), proposal, atol=1e-2)


@pytest.mark.parametrize("lora", [False, True])
def test_killed_and_resumed_is_not_killed(lora, tokenizer, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    same = {
        "max_steps": 9, "save_steps": 7, "save_strategy": "steps", "proposal": "kept", "proposal_window": 2,
        "peft_config": config, "learning_rate": 2e-2 if lora else 5e-3, "seed": 2,
    }  # fmt: skip
    whole = trained(tokenizer, tmp_path / "whole", moment_target(), **same)
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    assert (checkpoint / "proposal.pt").is_file()
    resumed = trained(tokenizer, tmp_path / "resumed", moment_target(), resume=str(checkpoint), **same)
    a, b = whole.adaptive_proposal, resumed.adaptive_proposal
    assert a.replacements == b.replacements and a.weights.keys() == b.weights.keys()
    assert all("lora" in name for name in a.weights) == lora
    assert all(torch.allclose(a.weights[name], b.weights[name], atol=1e-6) for name in a.weights)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    if not lora:
        (checkpoint / "proposal.pt").unlink()
        with pytest.raises(ValueError, match="not whole"):
            trained(tokenizer, tmp_path / "broken", moment_target(), resume=str(checkpoint), **same)
        weights = {"another": torch.zeros(1)}
        with pytest.raises(ValueError, match="1 trained weights"):
            b.load_state_dict(a.state_dict(), weights, resumed.model)


def test_bad_options_are_refused(tokenizer, tmp_path):
    for wrong, match in (
        ({"proposal": "old"}, "policy, kept"),
        ({"proposal_criterion": "chi2"}, "kl, tv, js"),
        ({"proposal_window": 0}, "proposal_window"),
        ({"proposal": "kept", "use_transformers_continuous_batching": True}, "continuous_batching"),
    ):
        with pytest.raises(ValueError, match=match):
            trained(tokenizer, tmp_path, moment_target(), **wrong)
