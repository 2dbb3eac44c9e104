"""Plain sampling: ``draw`` beside ``generate``, in turns, in one process.

python benchmarks/sampling.py                       # a random Llama of 5M parameters
python benchmarks/sampling.py --model some/folder   # a trained one, which ends its completions
"""

from __future__ import annotations

import argparse
import os
import statistics
import time


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from contrastive_align.sampling import draw


SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 688, "tie_word_embeddings": True}
PAD = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: a random model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest; the shortest has half of them")
    parser.add_argument("--per-prompt", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        eos = [AutoTokenizer.from_pretrained(args.model).eos_token_id]
    else:
        model, eos = LlamaForCausalLM(LlamaConfig(**SHAPE)), []
    model.eval()
    step = args.prompt_tokens // 2 / max(1, args.prompts - 1)
    lengths = [args.prompt_tokens - round(i * step) for i in range(args.prompts)]
    prompts = [torch.randint(8, model.config.vocab_size, (n,)).tolist() for n in lengths]
    repeated = [ids for ids in prompts for _ in range(args.per_prompt)]
    width = max(lengths)
    inputs = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in repeated])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in repeated])
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
        pad_token_id=PAD, eos_token_id=eos or None,
    )  # fmt: skip
    model.generation_config = config

    def ours(round_: int) -> int:
        drawn = draw(
            model, prompts, per_prompt=args.per_prompt, max_new_tokens=args.max_new_tokens, eos_token_ids=eos,
            pad_token_id=PAD, seeds=[round_ * args.prompts + i for i in range(args.prompts)],
        )  # fmt: skip
        return sum(len(ids) for row in drawn.completion_ids for ids in row)

    def theirs(round_: int) -> int:
        torch.manual_seed(round_)
        out = model.generate(inputs, attention_mask=mask, generation_config=config)[:, width:]
        ended = torch.isin(out, torch.tensor(eos)).int().cumsum(1)
        return int((ended - torch.isin(out, torch.tensor(eos)).int() == 0).sum())

    seconds: dict[str, list[float]] = {"draw": [], "generate": []}
    tokens: dict[str, list[int]] = {"draw": [], "generate": []}
    for round_ in range(-1, args.rounds):
        for name, run in (("draw", ours), ("generate", theirs)):
            start = time.perf_counter()
            n = run(round_ + 1)
            if round_ >= 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(n)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {args.prompts} prompts x "
        f"{args.per_prompt} samples x {args.max_new_tokens} tokens, {torch.get_num_threads()} threads"
    )
    for name in seconds:
        s, n = statistics.median(seconds[name]), statistics.median(tokens[name])
        print(f"{name:9} {s:7.3f} s (from {min(seconds[name]):.3f} to {max(seconds[name]):.3f}), {n:.0f} tokens")
    ratios = [g / d for d, g in zip(seconds["draw"], seconds["generate"], strict=True)]
    print(f"generate takes {statistics.median(ratios):.2f} times as long")


if __name__ == "__main__":
    main()
