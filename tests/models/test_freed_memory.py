import os
import subprocess
import sys

import pytest
from datasets import Dataset

from contrastive_align import ContrastiveConfig, ContrastiveTrainer
from contrastive_align.models.cpu import freed_memory


# For every argument, one after the other: what is resident of a block of 256 MB that was freed, as a fraction.
PROBE = """
import contextlib, runpy, sys

module = runpy.run_path(sys.argv[1])
freed_memory_kept, keep_freed_memory = module["freed_memory_kept"], module["keep_freed_memory"]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def freed():
    before = resident()
    block = b"x" * 2**28
    if what == "step":
        above.append(b"x" * 2**17)  # as a step leaves it: the end of the heap is in use
    del block
    return (resident() - before) / 2**28

before, asked, above = resident(), False, []
for what in sys.argv[2:]:
    if what == "keep":
        asked = keep_freed_memory()
        print(asked, freed())
    elif what == "leave":
        print(asked, freed())
    else:
        with freed_memory_kept("cuda" if what == "elsewhere" else "cpu", hand_back=what == "inside"):
            with freed_memory_kept("cpu") if what == "inside" else contextlib.nullcontext():
                pass
            print(asked, freed())
    print((resident() - before) / 2**28)
"""


def probe(*arguments: str, **environment: str) -> list[tuple[str, float, float]]:
    """(whether it was asked for good, the fraction of a freed block that stayed, how many such blocks then) each."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", PROBE, freed_memory.__file__, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    return [(a, float(b), float(c)) for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True)]


glibc = pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc's"
)


@glibc
def test_freed_blocks_stay_for_good_where_a_program_asks():
    (asked, kept, after), (_, again, _), (_, inside, then) = probe("keep", "leave", "inside")
    assert asked == "True" and kept > 0.9 and after > 0.9
    assert abs(again) < 0.1 and abs(inside) < 0.1 and then > 0.9  # the same pages, which no scope gives back


@glibc
def test_freed_blocks_stay_for_a_while():
    before, elsewhere, inside, after = probe("leave", "elsewhere", "inside", "leave")
    assert before[1] < 0.1 and elsewhere[1] < 0.1
    assert inside[1] > 0.9 and inside[2] < 0.2  # then handed back
    assert after[1] < 0.1


@glibc
def test_what_a_step_keeps_serves_the_next_one():
    first, others, second, last = probe("step", "leave", "step", "inside")
    assert first[1] > 0.9 and first[2] > 0.9
    assert others[1] < 0.1
    assert abs(second[1]) < 0.1 and second[2] > 0.9
    assert last[2] < 0.2


@pytest.mark.parametrize(
    "name, value", [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_environment_comes_first(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert freed_memory.keep_freed_memory() is False
    (asked, kept, _), (_, inside, _) = probe("keep", "inside", **{name: value})
    assert asked == "False" and kept < 0.1 and inside < 0.1


@glibc
def test_a_trainer_keeps_it_in_its_steps_and_evaluations(tiny_llama, tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    told, held = [], {}
    monkeypatch.setattr(freed_memory, "_requests", 0)
    monkeypatch.setattr(freed_memory, "_set_malloc_options", lambda options: told.append(options) or True)

    class Watched(ContrastiveTrainer):
        def compute_loss(self, model, *args, **kwargs):
            held.setdefault("step" if model.training else "evaluation", set()).add(freed_memory._requests)
            return super().compute_loss(model, *args, **kwargs)

        def compute_ref_log_probs(self, *args):
            held.setdefault("reference", set()).add(freed_memory._requests)
            return super().compute_ref_log_probs(*args)

    rows = Dataset.from_list([{"prompt": "a", "completions": [" b", " c"], "scores": [1.0, 0.0]}] * 4)
    args = ContrastiveConfig(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", eval_strategy="steps", eval_steps=1,
        per_device_train_batch_size=2, precompute_ref_log_probs=True,
    )  # fmt: skip
    trainer = Watched(tiny_llama(), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert held["step"] == {2} and held["evaluation"] == {2}  # train and the step; train and the evaluation
    assert min(held["reference"]) >= 1
    assert freed_memory._requests == 0 and told[-1] == freed_memory._RESTORE
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    assert 1 in held["step"] and freed_memory._requests == 0
