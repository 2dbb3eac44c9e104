"""Temperature, top-k and top-p in training: importance weights are exact, on a space whose probabilities are known."""

import logging

import pytest
import test_encoder_decoder
import torch
from test_fdpg_trainer import (
    LENGTH,
    PROMPTS,
    SPACE,
    build,
    exact_logps,
    has_a,
    make_tokenizer,
    moment_target,
    options,
    trained,
)

from contrastive_align import FDPGTrainer
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.trainers import fdpg as trainer_module


N = 2048
CHANGES = [
    {"temperature": 1.7},
    {"top_k": 2, "temperature": 3.0},
    {"top_p": 0.6},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.7},
]
PLACE = {tuple(ids): i for i, ids in enumerate(SPACE)}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make(model, tokenizer, folder, **changes):
    target = moment_target()
    target.fit(torch.tensor([has_a(SPACE)]).T)
    args = options(folder, num_generations=N, per_device_train_batch_size=N, **changes)
    return FDPGTrainer(
        model, args=args, train_dataset=PROMPTS.select([0] * 8), processing_class=tokenizer, target=target
    )


def exact_proposal(model, prompt, changes, encoder_decoder=False):
    """log q of all of the space by the definition: each prefix's next-token distribution, changed; -inf outside."""
    found = torch.zeros(len(SPACE), dtype=torch.float64)
    for n in range(1, LENGTH + 1):
        rows = [i for i, ids in enumerate(SPACE) if len(ids) == n]
        ids = torch.tensor([SPACE[i] for i in rows])
        with torch.no_grad():
            if encoder_decoder:
                start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
                inputs = {"decoder_input_ids": torch.cat([start, ids[:, :-1]], 1)}
                logits = model(input_ids=torch.tensor([prompt] * len(rows)), **inputs).logits
            else:
                whole = torch.cat([torch.tensor([prompt] * len(rows)), ids], 1)
                logits = model(input_ids=whole).logits[:, len(prompt) - 1 : -1]
        changed = Adjustment(**changes).apply(logits.flatten(0, 1)).view(logits.shape).double().log_softmax(-1)
        found[rows] = changed.gather(2, ids[..., None])[..., 0].sum(1)
    return found


def drawn_by(trainer):
    """What is drawn for training: the places of the samples in the space, and the batch."""
    seen = []
    features = trainer._features
    trainer._features = lambda rows, ids, **more: (seen.extend(ids[0]), features(rows, ids, **more))[1]
    trainer.model.train()
    (batch,) = trainer.draw_groups([{"prompt": "a b"}] * N, training=True)
    return torch.tensor([PLACE[tuple(ids)] for ids in seen]), batch


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*(("shared", each) for each in CHANGES), ("padded", CHANGES[-1]), ("t5", CHANGES[-1])],
    ids=str,
)
def test_importance_weights_are_exact(kind, changes, tokenizer, tmp_path):
    seq2seq = kind == "t5"
    # float32 for T5, whose norms compute in it.
    model = test_encoder_decoder.build() if seq2seq else build(initializer_range=0.5).double()
    prompt = tokenizer("a b")["input_ids"]
    trainer = make(model, tokenizer, tmp_path, **changes, **({} if seq2seq else {"layout": kind}))
    exact = exact_proposal(model.eval(), prompt, changes, seq2seq)
    own = test_encoder_decoder.exact_logps(model, prompt) if seq2seq else exact_logps(model, prompt)
    place, batch = drawn_by(trainer)
    close = 2e-5 if seq2seq else 1e-9
    assert float(exact.exp().sum()) == pytest.approx(1, abs=close)
    inside = exact > -torch.inf
    if "temperature" not in changes or "top_k" in changes:
        assert 0 < int((~inside).sum()) < len(SPACE)
    log_q = batch["proposal_logps"][0]
    assert torch.allclose(log_q, exact[place], atol=close)
    # Every sample stands for one of the space: their own q, each counted once, sum to the mass that was seen.
    first = {int(i): q for i, q in zip(place, log_q.exp(), strict=True)}
    assert sum(first.values()) == pytest.approx(float(exact[list(first)].exp().sum()), abs=close)
    with torch.no_grad():
        log_pi = trainer._completion_logps(trainer.model, batch)[0]
    assert torch.allclose(log_pi, own[place], atol=close)
    # The weighted mean of any function estimates its sum over the support under the policy.
    weights = (log_pi - log_q).exp()
    for f in (torch.ones(len(SPACE)).double(), torch.tensor(has_a(SPACE)).double()):
        values, wanted = weights * f[place], float((own.exp() * f)[inside].sum())
        assert abs(float(values.mean()) - wanted) < 4 * float(values.std()) / N**0.5 + close


def test_what_is_lost_is_said_and_the_rest_is_reached(tokenizer, tmp_path, caplog):
    base, prompt = build(initializer_range=0.5), tokenizer("a b")["input_ids"]
    before, changes = exact_logps(base, prompt), {"top_k": 3, "temperature": 1.3}
    inside = exact_proposal(base, prompt, changes) > -torch.inf
    phi = torch.tensor([has_a(SPACE)], dtype=torch.float64).T
    target = moment_target(0.6)
    target.fit(phi, log_weights=before, min_ess=0)
    scores = target.log_scores(before, phi)
    lost = float(scores.softmax(0)[~inside].sum())
    assert 0.02 < lost < 0.5
    with caplog.at_level(logging.WARNING):
        trainer = trained(
            tokenizer, tmp_path, target, model=base, data=PROMPTS.select([0] * 8), max_steps=12, learning_rate=1e-3,
            num_generations=256, per_device_train_batch_size=256, per_device_eval_batch_size=256, **changes,
        )  # fmt: skip
    (line,) = [r.getMessage() for r in caplog.records if "of the target's mass lies outside" in r.getMessage()]
    told, error = (float(x) for x in line.split("top_k=3: ")[1].split(" of the target")[0].split(" +- "))
    assert abs(told - lost) < 4 * error + 1e-3
    # On what can be drawn, the policy approaches the target.
    after = exact_logps(trainer.model.eval(), prompt)

    def distance(logps):
        return float((logps[inside].softmax(0) - scores[inside].softmax(0)).abs().sum() / 2)

    assert distance(after) < 0.5 * distance(before)
    entry = trainer.state.log_history[-2]
    kept = float(after[inside].exp().sum())
    assert entry["sampling/importance_weight/mean"] == pytest.approx(kept, abs=0.1)
    assert 0.5 < entry["sampling/importance_weight/ess"] < 1
    assert entry["sampling/logp_gap/max"] < 1e-4
    # An evaluation samples from the policy as it is, and measures what its own support leaves of the target.
    found = trainer.evaluate(PROMPTS.select([0] * 16))
    inside = exact_proposal(trainer.model.eval(), prompt, changes) > -torch.inf
    lost, error = (found[f"eval_sampling/target_mass_lost{end}"] for end in ("", "/se"))
    assert abs(lost - float(scores.softmax(0)[~inside].sum())) < 4 * error + 1e-3
    assert "eval_sampling/importance_weight/mean" not in found


def test_a_support_of_one_completion_is_said_once(tokenizer, tmp_path, caplog):
    """Nothing is learnt from it: all samples are equal, and importance weights cannot bring back what is not drawn."""
    with caplog.at_level(logging.WARNING):
        small = {"num_generations": 8, "per_device_train_batch_size": 8, "max_steps": 2}
        trainer = trained(tokenizer, tmp_path, moment_target(), top_k=1, **small)
    (line,) = [r.getMessage() for r in caplog.records if "the only completion of their prompt" in r.getMessage()]
    assert line.startswith("100% of the samples of step 0") and "top_k=1 leaves of the policy" in line
    logged = [entry["sampling/certain"] for entry in trainer.state.log_history if "sampling/certain" in entry]
    assert logged == [1.0, 1.0]


def test_a_token_outside_its_support_is_counted_and_named(tokenizer, tmp_path, monkeypatch):
    real = trainer_module.draw

    def wrong(*args, **options):
        drawn = real(*args, **options)
        if drawn.supports is not None:
            drawn.completion_ids[0][0][0] = next(iter({3, 4} - set(drawn.supports[0][0].ids.tolist())))
        return drawn

    monkeypatch.setattr(trainer_module, "draw", wrong)
    trainer = make(build(), tokenizer, tmp_path, top_k=1)
    with pytest.raises(RuntimeError, match=r"1 of \d+ tokens are not among those .*\(top_k=1\).*'[ab]' \(id [34]\)"):
        drawn_by(trainer)


def test_the_policy_itself_is_scored_at_temperature_1_by_trl_too(tokenizer, tmp_path):
    trainer = make(build(), tokenizer, tmp_path, temperature=0.5)
    assert (trainer.temperature, trainer.args.temperature) == (1.0, 0.5)  # TRL's head divides logits by its own


@pytest.mark.parametrize(
    "more", [{"use_vllm": True}, {"use_transformers_continuous_batching": True}, {"proposal": "kept"}], ids=str
)
def test_where_it_has_no_meaning_it_is_refused(more, tmp_path):
    with pytest.raises(ValueError, match=f"temperature=0.7, top_k=5 with {next(iter(more))}="):
        options(tmp_path, temperature=0.7, top_k=5, **more)


def test_killed_and_resumed_is_not_killed(tokenizer, tmp_path):
    same = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "steps_per_generation": 2, "top_p": 0.9}
    whole = trained(tokenizer, tmp_path / "whole", moment_target(), **same)
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")  # between the two steps on one draw
    resumed = trained(tokenizer, tmp_path / "resumed", moment_target(), resume=checkpoint, **same)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
