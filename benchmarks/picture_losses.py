"""The picture of docs/losses.md: the loss of a pair against the implied rewards of its two completions.

python benchmarks/picture_losses.py [docs/losses.png]          (needs matplotlib; a second)
"""

from __future__ import annotations

import sys

import matplotlib
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from contrastive_align.losses import LOSSES


CURVES = {  # loss -> label, colour, line
    "nca": ("NCA", "#1b7837", "-"),
    "biased_nca": ("biased NCA", "#5aae61", ":"),
    "info_nca": ("InfoNCA", "#762a83", "-"),
    "dpo": ("DPO (equal to InfoNCA)", "#e08214", "--"),
}


def loss_at(name: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the loss at implied rewards ``chosen`` and ``rejected``, (B,) each."""
    rewards = torch.stack([chosen, rejected], -1)
    scores = torch.tensor([[1.0, 0.0]]).expand_as(rewards)
    return LOSSES[name](rewards, scores, beta=1.0, temperature_alpha=1e-4)


def main(path: str) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (together, apart) = plt.subplots(1, 2, figsize=(8.4, 3.4), dpi=130, sharey=True)
    x = torch.linspace(-4, 4, 161)
    for name, (label, colour, line) in CURVES.items():
        together.plot(x, loss_at(name, x + 0.5, x - 0.5), line, color=colour, lw=2, label=label)
        apart.plot(x, loss_at(name, x / 2, -x / 2), line, color=colour, lw=2)
    together.set_xlabel("mean of both implied rewards (their margin is 1)")
    apart.set_xlabel("margin between the implied rewards (their mean is 0)")
    together.set_ylabel("loss of a pair")
    together.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/losses.png")
