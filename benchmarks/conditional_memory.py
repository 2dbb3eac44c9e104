"""Peak memory of one step of conditional training above its model: a vocabulary of 128k beside one of 32k.

python benchmarks/conditional_memory.py                 # token_loss, and full logits beside it
python benchmarks/conditional_memory.py --loss chunks   # token_loss alone

A step is the reference's pass, the policy's loss and the backward pass, on a body of one layer, its head not tied. Each
cell is a process of its own, since a process never shows less than it ever took. What grows with the vocabulary
whatever the loss is are the gradients of the head and of the input embedding, as large as their weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

WIDTH, PROMPT, ROWS, COMPLETION = 512, 32, 16, 128
VOCABULARIES = (32_000, 128_000)
LIMIT = 1.3
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("chunks", "full", "both"), default="both")
    parser.add_argument("--direction", choices=("reverse", "forward"), default="forward")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the vocabulary of the process that measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.loss, args.direction)))
        return
    kinds = ("chunks", "full") if args.loss == "both" else (args.loss,)
    peaks = {kind: [in_own_process(v, kind, args.direction) for v in VOCABULARIES] for kind in kinds}
    print(table(peaks))
    small, large = peaks[kinds[0]]
    grown = large["gradients"] - small["gradients"]
    limit = LIMIT * small["step"] + grown
    met = "within" if large["step"] <= limit else "ABOVE"
    print(
        f"\n{kinds[0]}: {large['step'] / MB:.0f} MB at {VOCABULARIES[1]:,} words, "
        f"{met} {LIMIT} x {small['step'] / MB:.0f} + {grown / MB:.0f} = {limit / MB:.0f} MB"
    )
    if met == "ABOVE":
        sys.exit(1)


def in_own_process(vocabulary: int, loss: str, direction: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--one", str(vocabulary), "--loss", loss, "--direction", direction]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(peaks: dict[str, list[dict[str, int]]]) -> str:
    lines = [
        f"{ROWS * COMPLETION:,} completion tokens, width {WIDTH}, float32; MB above the model",
        "| loss | vocabulary | peak of a step | of it the gradients of head and embedding | the rest | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for kind, cells in peaks.items():
        for v, cell in zip(VOCABULARIES, cells, strict=True):
            step, gradients = cell["step"] / MB, cell["gradients"] / MB
            lines.append(
                f"| {kind} | {v:,} | {step:.0f} | {gradients:.0f} | {step - gradients:.0f} | {cell['s']:.1f} |"
            )
    return "\n".join(lines)


def measure(vocabulary: int, loss: str, direction: str) -> dict[str, float]:
    """Bytes of resident memory at the peak of one step beyond the models, and the CPU seconds of a second one."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from contrastive_align.data import GroupCollator
    from contrastive_align.losses import conditional
    from contrastive_align.models.head import add_head
    from contrastive_align.models.logps import completion_objective
    from contrastive_align.models.token_loss import token_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False)
    for model in (policy, reference):
        add_head(model)
    rows = [
        {
            "prompt_ids": torch.randint(vocabulary, (PROMPT,)).tolist(),
            "completion_ids": [torch.randint(vocabulary, (COMPLETION,)).tolist()],
            "scores": [0.0],
        }
        for _ in range(ROWS)
    ]
    batch = GroupCollator(pad_token_id=0)(rows)
    terms = {"kl_coef": 0.05, "entropy_coef": 0.06, "kl_direction": direction}
    head = reference.get_output_embeddings().weight
    mean = torch.full((ROWS * COMPLETION,), 1 / (ROWS * COMPLETION))

    def in_chunks(hidden, labels, weight, bias, scale, softcap):
        return token_loss(hidden, weight, bias, labels, reference=(known, head, None), weights=mean, **terms).loss

    def in_full(hidden, labels, weight, bias, scale, softcap):
        with torch.no_grad():
            ref_logits = known @ head.T
        return (mean * conditional(hidden @ weight.T, labels, reference_logits=ref_logits, **terms).loss).sum()

    before = resident()
    for repeat in range(2):  # the second one is timed; the peak is that of the first
        start = time.process_time()
        with torch.no_grad():
            known = completion_objective(reference, batch, lambda hidden, *_: hidden)
        completion_objective(policy, batch, in_chunks if loss == "chunks" else in_full).backward()
        seconds = time.process_time() - start
        if repeat == 0:
            step = peak() - before
            policy.zero_grad(set_to_none=True)
    return {"step": step, "gradients": 2 * vocabulary * WIDTH * 4, "s": seconds}


def resident() -> int:
    """Bytes now. The highest ever so far must be no more than these, or the peak of a step would hide below it."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * resource.getpagesize()
    if peak() > 1.05 * now + 64 * MB:
        raise RuntimeError(
            f"{peak() / MB:.0f} MB were in use before the step, {now / MB:.0f} MB are now: no measurement."
        )
    return max(now, peak())


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
