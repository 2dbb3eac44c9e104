"""A loss, a divergence, a feature and a condition of the user's own: trained, mixed, resumed, named, refused."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small_trainers import COLUMNS
from transformers.trainer_utils import get_last_checkpoint

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, FDPGConfig, demo
from contrastive_align.conditions import CONDITIONS, Condition, resolve_condition
from contrastive_align.launch import cli
from contrastive_align.launch.usage import UsageError
from contrastive_align.losses import (
    DIVERGENCES,
    LOSSES,
    canonical_divergence_name,
    divergence_value,
    fdpg,
    group_loss,
    info_nca,
    register_divergence,
    register_loss,
)
from contrastive_align.registry import hash_of_user, source_hash
from contrastive_align.targets import register_feature, resolve_feature


SOURCE = """
def margin(log_ratios, labels, beta, scale=1.0):
    return -scale * beta * ((labels - 1 / labels.size(-1)) * log_ratios).sum(-1)

def scalar(log_ratios, valid):
    return log_ratios.mean()

def constant(scores):
    return 0 * scores[:, 0]

def asks(log_ratios, weather):
    return log_ratios.sum(-1)
"""
_, FDPG, _, CONDITIONAL = COLUMNS
OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    yield
    for registry in (LOSSES, DIVERGENCES, CONDITIONS):
        for name in registry.hashes.copy():
            del registry[name]


def my_cross_entropy(log_ratios, labels, valid, beta):
    r = (beta * log_ratios).masked_fill(~valid, -torch.inf)
    return -(labels * r.log_softmax(-1).masked_fill(~valid, 0.0)).sum(-1)


def trainer_of(tiny_llama, folder, **options):
    args = ContrastiveConfig(output_dir=str(folder), **{**OPTIONS, "max_steps": 2, "save_steps": 1, **options})
    return ContrastiveTrainer(
        tiny_llama(), args=args, train_dataset=demo.load_reward_dataset()["train"].select(range(16))
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ----------------------------------------------------------------------------------------------------------- losses


def test_a_loss_of_ones_own_is_what_the_packages_is(tiny_llama, tmp_path):
    """Info-NCA written anew trains to the same weights, given in each of the ways."""
    register_loss("Cross Entropy", my_cross_entropy)
    trained = []
    for loss in ("info_nca", "cross-entropy", my_cross_entropy, f"{__file__}:my_cross_entropy"):
        trainer = trainer_of(tiny_llama, tmp_path / "run", loss_type=loss, save_strategy="no", temperature_alpha=0.3)
        trainer.train()
        trained.append(weights(trainer))
    assert all(torch.allclose(found, trained[0], atol=1e-6) for found in trained[1:])


def test_it_is_given_what_it_names():
    generator = torch.Generator().manual_seed(0)
    log_ratios, scores = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    given = {"log_ratios": log_ratios, "scores": scores, "beta": 0.5, "temperature_alpha": 0.7}
    given |= {
        "valid": torch.ones(3, 4, dtype=torch.bool),
        "policy_logps": scores,
        "ref_logps": scores,
        "lengths": scores,
    }
    register_loss("mine", my_cross_entropy)
    assert torch.allclose(group_loss("mine", **given), info_nca(log_ratios, scores, beta=0.5, temperature_alpha=0.7))
    seen = {}
    register_loss("all", lambda log_ratios, **rest: seen.update(rest) or log_ratios.sum(-1))
    group_loss("all", **given)
    assert seen.keys() == given.keys() - {"log_ratios"} | {"labels"}
    register_loss("scaled", partial(my_cross_entropy, beta=2.0))
    assert torch.allclose(group_loss("scaled", **given), info_nca(log_ratios, scores, beta=2.0, temperature_alpha=0.7))


@pytest.mark.parametrize("loss", ["mine.py:margin", my_cross_entropy], ids=["file", "callable"])
def test_a_mixture_resumes_as_if_it_had_not_stopped(tiny_llama, tmp_path, loss):
    options = {"loss_type": ["nca", loss], "loss_weights": [1.0, 0.5], "max_steps": 4, "save_steps": 2}
    whole = trainer_of(tiny_llama, tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(tiny_llama, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    assert f"loss/{resumed.loss_types[1]}" in whole.state.log_history[0]


def test_another_loss_is_not_resumed_with(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path / "run", loss_type="mine.py:margin", max_steps=1)
    trainer.train()
    checkpoint = get_last_checkpoint(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"trained with loss_type mine.py:margin, and this run has nca"):
        trainer_of(tiny_llama, tmp_path / "run", loss_type="nca").train(resume_from_checkpoint=checkpoint)
    Path("mine.py").write_text(SOURCE.replace("scale=1.0", "scale=2.0"))
    with pytest.raises(ValueError, match=r"the source of mine.py:margin has changed since"):
        trainer_of(tiny_llama, tmp_path / "run", loss_type="mine.py:margin").train(resume_from_checkpoint=checkpoint)
    Path("mine.py").write_text("# only a line above\n" + SOURCE)
    trainer_of(tiny_llama, tmp_path / "run", loss_type="mine.py:margin").train(resume_from_checkpoint=checkpoint)
    (Path(checkpoint) / "functions.json").unlink()  # as in an older checkpoint
    trainer_of(tiny_llama, tmp_path / "run", loss_type="nca").train(resume_from_checkpoint=checkpoint)


def test_the_config_stays_text(tmp_path):
    args = ContrastiveConfig(output_dir="out", loss_type=["nca", my_cross_entropy], **OPTIONS)
    name = f"{__name__}.my_cross_entropy"
    assert args.loss_type == ["nca", name]
    assert json.loads(args.to_json_string())["loss_type"] == ["nca", name] and args.to_sanitized_dict()
    again = pickle.loads(pickle.dumps(args))
    assert again.loss_type == args.loss_type
    (tmp_path / "pickled").write_bytes(pickle.dumps(args))
    code = (
        "import pickle, sys; sys.path[:0] = sys.argv[1:]; args = pickle.load(open('pickled', 'rb'));"
        "from contrastive_align import ContrastiveConfig; from contrastive_align.losses import LOSSES;"
        "new = ContrastiveConfig(output_dir='out', loss_type=args.loss_type, use_cpu=True, bf16=False);"
        "assert new.loss_type == args.loss_type and LOSSES[new.loss_type[1]].__name__ == 'my_cross_entropy'"
    )
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("mine.py:scalar", r"The loss mine.py:scalar \(mine.py:5\) returned \(\), expected a tensor of shape \(2,\)"),
        ("mine.py:constant", r"mine.py:constant \(mine.py:8\) returned a tensor without a gradient"),
        ("mine.py:asks", r"The loss mine.py:asks \(mine.py:11\) reads 'weather', expected parameters among log_ratios"),
        ("mine.py:margn", "mine.py has no function 'margn'. It has: margin, scalar"),
        ("yours.py:f", "No file 'yours.py'"),
        ("no.such.loss", "is not registered in this process and cannot be imported"),
        ("mine", "Unknown loss_type 'mine'.*One of your own is 'file.py:function'"),
    ],
)
def test_what_is_no_loss_is_refused(tiny_llama, tmp_path, loss, said):
    with pytest.raises((ValueError, AttributeError, FileNotFoundError), match=said):
        trainer_of(tiny_llama, tmp_path, loss_type=loss, per_device_train_batch_size=2, save_strategy="no").train()


def test_a_name_of_the_packages_is_not_taken():
    with pytest.raises(ValueError, match="The loss 'nca' is the package's own"):
        register_loss("nca", my_cross_entropy)


def test_a_lambda_trains_and_says_that_its_name_does_not_find_it(tiny_llama, tmp_path, caplog):
    loss = lambda log_ratios, labels: -(labels * log_ratios).sum(-1)  # noqa: E731
    trainer_of(tiny_llama, tmp_path, loss_type=loss, save_strategy="no").train()
    assert "cannot be found by its name" in caplog.text and "test_own_functions.py" in caplog.text


def test_from_the_command_line_into_header_card_and_summary(capsys):
    small = ["--max_train_samples=16", "--max_eval_samples=4", "--max_steps=1", "--output_dir=out"]
    cli.main(["reward", "--loss_type", "mine.py:margin", "nca", *small])
    assert "mine.py:margin (mine.py:2) + 1 nca" in capsys.readouterr().out
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["method"]["loss_type"] == ["mine.py:margin", "nca"]
    assert summary["method"]["own_losses"] == {"mine.py:margin": "mine.py:margin (mine.py:2)"}
    assert "mine.py:margin (mine.py:2)" in Path("out/README.md").read_text()
    for wrong in ("mine.py:margn", "mine.py:asks", "yours.py:f"):
        with pytest.raises(UsageError):
            cli.main(["reward", f"--loss_type={wrong}", *small])


# -------------------------------------------------------------------------------- divergences, features, conditions


def test_a_divergence_of_ones_own_is_what_the_packages_is():
    generator = torch.Generator().manual_seed(0)
    policy, target = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    target[0, 0] = -torch.inf
    register_divergence("mine", lambda log_t: 2 * (torch.nn.functional.logsigmoid(log_t)) - 1)
    policy.requires_grad_()
    found = []
    for divergence in ("js", "mine"):
        fdpg(policy, policy - 0.1, target, log_z=torch.ones(2, dtype=torch.float64), divergence=divergence,
             baseline="leave_one_out").sum().backward()  # fmt: skip
        found.append(policy.grad.clone())
        policy.grad = None
    assert torch.allclose(2 * found[0], found[1], rtol=1e-10)  # twice js, and a constant that does not matter
    assert FDPGConfig(output_dir="out", divergence="Mine", **OPTIONS).divergence == "mine"


GENERATORS = {
    "kl": lambda t: -t.log() + t - 1,
    "reverse_kl": lambda t: t * t.log(),
    "js": lambda t: t * t.log() - (1 + t) * ((1 + t) / 2).log(),
    "tv": lambda t: (t - 1).abs() / 2,
    "chi2": lambda t: 1 / t - 1 + t - 1,
    "reverse_chi2": lambda t: (t - 1) ** 2,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generators_slope_and_value_are_those_of_the_package(name):
    register_divergence("mine", GENERATORS[name])
    log_t = torch.tensor([-30.0, -2.0, 0.0, 0.5, 9.0, torch.inf], dtype=torch.float64)
    slope, expected = DIVERGENCES["mine"], DIVERGENCES[name]
    constant = slope(log_t[2:3]) - expected(log_t[2:3])  # which has no effect on the gradient
    assert torch.allclose(slope(log_t), expected(log_t) + constant, rtol=1e-9, atol=1e-9)
    assert slope(log_t, torch.tensor(-torch.inf).expand(6))[-1] == 0
    generator = torch.Generator().manual_seed(0)
    log_pi, log_p = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    cut = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for sides in ((log_pi, log_p), ((log_pi + cut).log_softmax(-1), log_p), (log_pi, (log_p + cut).log_softmax(-1))):
        value = divergence_value(name, *sides) * (2 if name == "js" else 1)
        assert torch.allclose(divergence_value("mine", *sides), value, rtol=1e-8)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda t: 1 - t**2, "has the slope .* Expected the slope of a convex f"),
        (lambda t: t**2, r"has f\(1\) = 1, expected 0"),
        (lambda log_t: -log_t, "has the slope 4.9 at t = 0.007447, after 5"),
        (lambda log_t: log_t.masked_fill(log_t == torch.inf, -1.0), "has the slope -1 at t = inf, after 5"),
        (lambda log_t: log_t - log_t.masked_fill(log_t < torch.inf, 0.0), "has the slope nan at t = inf"),
        (lambda log_t: 1 / log_t.clamp(min=0), "has the slope inf at t = 0.006738"),
        (lambda log_t: log_t.sum(), r"returned \(\) for numbers of shape \(102,\)"),
    ],
)
def test_what_is_no_divergence_is_refused_with_name_and_line(function, said):
    with pytest.raises(ValueError, match=rf"The divergence mine \(test_own_functions.py:\d+\) {said}"):
        register_divergence("mine", function)
    assert "mine" not in DIVERGENCES


def test_a_feature_and_a_condition_of_ones_own():
    function = register_feature("shouts", lambda completions, **_: [float(c.isupper()) for c in completions])
    for spec in ("shouts", {"function": "shouts"}):
        assert resolve_feature(spec)(prompts=["", ""], completions=["HI", "hi"]) == [1.0, 0.0]
    assert hash_of_user(resolve_feature("shouts").function) == source_hash(function)
    both = resolve_feature({"sum": [[1, "shouts"], [2, {"contains": "a"}]]})
    assert hash_of_user(both.function) and hash_of_user(resolve_feature({"contains": "a"}).function) is None
    with pytest.raises(ValueError, match="is a kind"):
        register_feature("words", function)
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom contrastive_align.conditions import Phrases\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Stars(Phrases):\n    kind = 'stars'\n"
    )
    assert resolve_condition("mine.py:Stars").kind == "stars" == resolve_condition("stars").kind
    Path("mine.py").write_text(Path("mine.py").read_text().replace("kind = 'stars'", "pass"))
    with pytest.raises(
        ValueError, match=r"mine.py:Stars \(mine.py:3\) is no subclass of Condition with a kind of its own"
    ):
        resolve_condition("mine.py:Stars")
    with pytest.raises(ValueError, match="The condition 'phrases' is the package's own"):
        type("Mine", (Condition,), {"kind": "phrases"})


def test_a_divergence_and_a_feature_resume_with_the_same_source_alone(tmp_path):
    Path("mine.py").write_text("def le_cam(t):\n    return (t - 1) ** 2 / (t + 1) / 2\n")
    longer = "def longer(completion_ids, **columns):\n    return [float(len(ids)) for ids in completion_ids]\n"
    Path("yours.py").write_text(longer)

    def run(resume=None, feature="yours.py:longer", **options):
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "divergence": "mine.py:le_cam"}
        trainer = FDPG.make(tmp_path / "run", told={"reward_funcs": feature}, **{**saving, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, checkpoint = run(), str(tmp_path / "run" / "checkpoint-1")
    assert torch.equal(weights(whole), weights(run(checkpoint)))
    assert whole.objective()["divergence"] == "mine.py:le_cam (mine.py:1)"
    with pytest.raises(ValueError, match=r"was trained with divergence mine.py:le_cam, and this run has js"):
        run(checkpoint, divergence="js")
    with pytest.raises(ValueError, match=r"it has the features .*longer.*this target has"):
        run(checkpoint, feature=lambda completion_ids, **columns: [0.0 for _ in completion_ids])
    Path("yours.py").write_text(longer.replace("len(ids)", "2 * len(ids)"))
    with pytest.raises(ValueError, match=r"the source of .*longer.* has changed since"):
        run(checkpoint)
    Path("yours.py").write_text(longer)
    Path("mine.py").write_text("def le_cam(t):\n    return (t - 1) ** 2 / (t + 1)\n")
    with pytest.raises(ValueError, match=r"the source of mine.py:le_cam has changed since"):
        run(checkpoint)


def test_a_condition_and_a_reward_resume_with_the_same_source_alone(tmp_path):
    stars = (
        "from dataclasses import dataclass\nfrom contrastive_align.conditions import Phrases\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Rated(Phrases):\n    kind = 'rated'\n"
    )
    Path("mine.py").write_text(stars)

    def lengths(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    def run(resume=None, reward=lengths):
        told = {"condition": "mine.py:Rated", "reward_funcs": reward}
        trainer = CONDITIONAL.make(tmp_path / "run", told=told, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, checkpoint = run(), str(tmp_path / "run" / "checkpoint-1")
    assert torch.equal(weights(whole), weights(run(checkpoint)))
    with pytest.raises(ValueError, match="was trained with reward lengths, and this run has <lambda>"):
        run(checkpoint, reward=lambda completion_ids, **columns: [0.0 for _ in completion_ids])
    Path("mine.py").write_text(stars + "    def text(self, *args):\n        return super().text(*args) + '!'\n")
    with pytest.raises(ValueError, match=r"the source of .* has changed since"):
        run(checkpoint)


def test_a_divergences_file_is_read_by_the_config_and_not_by_every_step():
    Path("mine.py").write_text("print('read')\ndef slope(log_t):\n    return log_t\n")
    name = FDPGConfig(output_dir="out", divergence="mine.py:slope", **OPTIONS).divergence
    before = DIVERGENCES[name]
    Path("mine.py").write_text("def slope(log_t):\n    return 2 * log_t + 0\n")
    assert canonical_divergence_name(name) == name and DIVERGENCES[name] is before
    FDPGConfig(output_dir="out", divergence="mine.py:slope", **OPTIONS)
    assert DIVERGENCES[name](torch.ones(1)).item() == 2


def test_a_models_folder_runs_no_code():
    Path("evil.py").write_text("open('ran', 'w')\n")
    Path("condition.json").write_text('{"kind": "evil.py:X"}')
    with pytest.raises(ValueError, match="names code"):
        Condition.load(".")
    assert not Path("ran").exists()


def test_a_loss_that_names_no_valid_never_sees_a_column_that_is_not_there():
    register_loss("count", lambda log_ratios: (0 * log_ratios + 1).sum(-1))
    register_loss("no mask", lambda log_ratios, labels, beta: -(labels * (beta * log_ratios).log_softmax(-1)).sum(-1))
    valid = torch.tensor([[True, True, False], [True, True, True], [False, False, False], [True, True, False]])
    generator = torch.Generator().manual_seed(0)
    log_ratios, scores = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    log_ratios = log_ratios.masked_fill(~valid, 1e6).requires_grad_()
    given = {"scores": scores, "valid": valid, "lengths": valid.long(), "policy_logps": scores, "ref_logps": scores}
    given |= {"log_ratios": log_ratios, "beta": 0.5, "temperature_alpha": 0.7}
    assert group_loss("count", **given).tolist() == [2, 3, 0, 2]
    expected = info_nca(log_ratios, scores, beta=0.5, temperature_alpha=0.7, valid=valid)
    found = group_loss("no mask", **given)
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(loss.sum(), log_ratios)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients) and not gradients[0][~valid].any()


def test_two_closures_are_two_losses():
    def scaled(factor):
        return lambda log_ratios: factor * log_ratios.sum(-1)

    names = ContrastiveConfig(output_dir="out", loss_type=[scaled(1.0), scaled(2.0)], **OPTIONS).loss_type
    assert names[1] == f"{names[0]}#2" and [LOSSES[name](torch.ones(1, 2)).item() for name in names] == [2, 4]
    assert source_hash(scaled(1.0)) == source_hash(scaled(1.0)) != source_hash(scaled(2.0))
