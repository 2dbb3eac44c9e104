"""What the package overrides and reads of TRL's trainers is still there, and TRL still calls it."""

import ast
import inspect
import re
import sys
import textwrap

import pytest
from safetensors.torch import load_file, save_file
from small_trainers import COLUMNS
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from contrastive_align import demo, trl_seam
from contrastive_align.rounds import measures


NEVER = {"predict", "push_to_hub"}  # one raises, of the other there is a test of its own
NOT_ENTERED = {
    "contrastive": NEVER,
    "fdpg": NEVER,
    "fdpg-encoder-decoder": NEVER,
    "conditional": NEVER | {"evaluation_loop"},  # whose evaluate has no loop over batches
}
OF_TRL_ALONE = ("compute_loss", "_compute_loss", "_generate_and_score_completions")  # these must not run


def private(name):
    return name.startswith("_") and not name.startswith("__")


def seam_classes(column):
    return [cls for cls in column.trainer.__mro__ if cls.__module__ == trl_seam.__name__]


def overrides(column, *, seam):
    """(class, name) of the methods that the trainer's classes, of the seam or outside it, put before TRL's.

    All private methods of the seam are such: its own are public.
    """
    ours = [cls for cls in column.trainer.__mro__ if cls.__module__.startswith("contrastive_align.")]
    return {
        (cls, name)
        for cls in ours
        if (cls in seam_classes(column)) == seam
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("__")
        if hasattr(column.trl_trainer, name) or (seam and private(name))
    }


def calls_in_a_run(column, folder):
    """(class, name) of the overrides entered in a step, an evaluation and a save; and of those that TRL entered."""
    entered, by_trl = set(), set()
    with pytest.MonkeyPatch.context() as patch:
        for cls, name in overrides(column, seam=True) | overrides(column, seam=False):
            method = vars(cls)[name]

            def spy(self, *args, _key=(cls, name), _method=method, **kwargs):
                entered.add(_key)
                if sys._getframe(1).f_globals["__name__"].split(".")[0] in ("trl", "transformers"):
                    by_trl.add(_key)
                return _method(self, *args, **kwargs)

            patch.setattr(cls, name, spy)
        for name in OF_TRL_ALONE:
            if name in vars(column.trl_trainer):
                patch.setattr(column.trl_trainer, name, lambda *_, **__: pytest.fail("TRL's own loss or samples ran"))
        patch.setattr(measures, "draw_round", lambda *_: None)
        options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        options["remove_unused_columns"] = True  # which TRL's online trainers do not by default
        for cached in (True, False) if column.is_contrastive else (None,):
            more = {} if cached is None else {"precompute_ref_log_probs": cached}
            trainer = column.make(folder, told={"eval_dataset": column.rows(4)}, **options, **more)
            trainer.train()
            trainer._load_from_checkpoint(str(trainer.checkpoint_folder()))
            trainer.end()
    return entered, by_trl


@pytest.fixture(params=COLUMNS, ids=str, scope="module")
def column(request):
    return request.param


@pytest.fixture(scope="module")
def calls(column, tmp_path_factory):
    return calls_in_a_run(column, tmp_path_factory.mktemp(column.name))


def test_trl_has_every_method_that_the_seam_overrides(column):
    found = overrides(column, seam=True)
    assert {(trl_seam.SavesModels, "save_model"), (trl_seam.SavesState, "_save_checkpoint")} < found
    for cls, name in found:
        assert callable(getattr(column.trl_trainer, name, None)), (
            f"{column.trl_trainer.__name__} has no {name} any more"
        )
        assert getattr(column.trainer, name) is not getattr(column.trl_trainer, name), f"{cls.__name__} is behind TRL"


def test_trl_calls_every_method_that_the_seam_overrides(column, calls):
    _, by_trl = calls
    assert overrides(column, seam=True) - by_trl == set()


def test_every_other_override_is_entered(column, calls):
    """An override that is called no longer raises nothing by itself."""
    entered, _ = calls
    expected = overrides(column, seam=False)
    assert {"compute_loss", "train", "create_model_card"} <= {name for _, name in expected}
    assert {name for _, name in expected - entered} == NOT_ENTERED[column.name]


def test_a_tied_weight_is_not_missing_in_a_checkpoint(tmp_path, monkeypatch):
    class Tied(trl_seam.LoadsTiedWeights, Trainer):
        pass

    said = []
    monkeypatch.setattr(trl_seam.trainer_module.logger, "warning", said.append)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    assert model.config.tie_word_embeddings
    trainer = Tied(model, TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True))
    trainer.save_model(str(tmp_path / "whole"))
    trainer._load_from_checkpoint(str(tmp_path / "whole"))
    assert said == []
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.norm.weight"]
    (tmp_path / "lost").mkdir()
    save_file(weights, tmp_path / "lost" / "model.safetensors")
    trainer._load_from_checkpoint(str(tmp_path / "lost"))
    assert said == ["There were missing keys in the checkpoint model loaded: ['model.norm.weight']."]


def private_members_read(cls):
    """The private attributes of ``self`` in a class of the seam."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return {n.attr for n in nodes if n.value.id == "self" and private(n.attr)}


def test_trl_has_every_private_member_that_the_seam_reads(column):
    mro = [cls for cls in column.trl_trainer.__mro__ if cls is not object]
    theirs = {name for cls in mro for name in re.findall(r"self\.(_\w+)", inspect.getsource(cls))}
    theirs |= set(dir(column.trl_trainer))
    read = {name for cls in seam_classes(column) for name in private_members_read(cls)}
    assert {"_metrics", "_get_output_dir", "_signature_columns"} <= read
    assert read - theirs == set()


def test_a_trainer_is_trls_with_the_same_arguments(column):
    """In the same places; what a trainer adds is given by name."""
    assert issubclass(column.trainer, column.trl_trainer) and issubclass(column.config, column.trl_config)
    theirs = inspect.signature(column.trl_trainer.__init__).parameters
    ours = inspect.signature(column.trainer.__init__).parameters
    assert [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY] == list(theirs)
    assert all(p.default is not p.empty for p in ours.values() if p.kind is p.KEYWORD_ONLY)
