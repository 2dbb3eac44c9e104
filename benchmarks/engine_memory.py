"""Peak memory of a training step under ZeRO-3 and FSDP2 with an untied head of 128,000 words, beside TRL's own.

    python benchmarks/engine_memory.py

Full fine-tuning on pairs with a live reference: TRL's DPOTrainer, and ContrastiveTrainer with the DPO loss, in two
processes each (gloo, CPU), on the same rows. The peak of a process is the most it held in the third and fourth step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engines


WORDS, WIDTH = 128_000, 256
HEAD_MB = WORDS * WIDTH * 4 / 2**20


def write_model(folder: Path) -> None:
    """Write a Llama of one layer whose two matrices of words are nearly all of it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from contrastive_align import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(cell: engines.Cell, model: Path, output: Path) -> Any:
    """Return the trainer: TRL's, or this package's."""
    import trl

    import contrastive_align as ca
    from contrastive_align import demo

    rows = demo.load_preference_dataset()["train"].select(range(16))
    options = {
        "output_dir": str(output), "max_steps": 4, "per_device_train_batch_size": 2, "gradient_checkpointing": False,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "loss_type": "sigmoid" if cell.trainer == "TRL" else "DPO", "use_cpu": False,
    }  # fmt: skip
    if cell.trainer == "TRL":
        return trl.DPOTrainer(str(model), args=trl.DPOConfig(**options), train_dataset=rows)
    return ca.ContrastiveTrainer(str(model), args=ca.ContrastiveConfig(layout="padded", **options), train_dataset=rows)


def work(cell: engines.Cell, model: Path, output: Path, **_: Any) -> None:
    """Train on this process, and write the peak of the last two steps in MB."""
    from transformers import TrainerCallback

    engines.engines_on_cpu()

    class Peak(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now

    trainer = build(cell, model, output)
    trainer.add_callback(Peak())
    trainer.train()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    (output / f"result-{os.environ['RANK']}.json").write_text(json.dumps({"peak": int(peak.split()[1]) / 1024}))
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", ACCELERATE_MIXED_PRECISION="no", HF_HUB_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    wrong = 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        write_model(folder / "model")
        for engine in ("ZeRO-3", "FSDP2"):
            peaks = {}
            for trainer in ("TRL", "contrastive"):
                cell, output = engines.Cell(trainer, "full", engine), folder / "run"
                ended = engines.run(cell, folder / "model", output, 2, work=work)
                if ended.statuses != [0, 0]:
                    print(f"{engine} {trainer}: exit {ended.statuses}{engines.tail(output)}")
                    return 1
                peaks[trainer] = ended.result["peak"]
            above = (peaks["contrastive"] - peaks["TRL"]) / HEAD_MB
            wrong += above > 1
            print(
                f"{engine}: TRL {peaks['TRL']:.0f} MB, here {peaks['contrastive']:.0f} MB: {above:+.2f} heads",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
