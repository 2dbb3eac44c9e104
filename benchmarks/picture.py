"""The picture of docs/losses.md: the best completion's log-prob under NCA, InfoNCA and DPO on the bundled demo.

python benchmarks/picture.py [docs/best_completion.png]          (needs matplotlib; about a minute on 2 cores)
"""

from __future__ import annotations

import sys
import tempfile

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo


LOSSES = {"nca": "NCA", "info_nca": "InfoNCA", "dpo": "DPO"}
COLOURS = {"nca": "#1b7837", "info_nca": "#762a83", "dpo": "#e08214"}


def trajectory(loss: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, and the mean change of log-prob of the best and of the other completions on held-out groups."""
    data = demo.load_reward_dataset()
    args = ContrastiveConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type=loss,
        temperature_alpha=1e-4,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
    )
    trainer = ContrastiveTrainer(demo.MODEL_PATH, args=args, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    points = [e for e in trainer.state.log_history if "eval_logps/best_delta" in e]
    best = [e["eval_logps/best_delta"] for e in points]
    rest = [e["eval_logps/rest_delta"] for e in points]
    return [0, *(e["step"] for e in points)], [0.0, *best], [0.0, *rest]


def main(path: str) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(7.2, 3.4), dpi=150)
    for loss, label in LOSSES.items():
        steps, best, rest = trajectory(loss)
        axis.plot(steps, best, color=COLOURS[loss], lw=2.2, label=f"{label}: best completion")
        axis.plot(steps, rest, color=COLOURS[loss], lw=1.4, ls=":", label=f"{label}: the others")
        print(f"{label}: best {best[-1]:+.2f}, others {rest[-1]:+.2f} nats")
    axis.axhline(0, color="0.7", lw=0.8, zorder=0)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("change of log-prob (nats)")
    axis.set_title("Held-out groups of the bundled demo, same settings", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/best_completion.png")
