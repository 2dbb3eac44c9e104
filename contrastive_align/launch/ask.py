"""``run_conditional.py --best="a prompt"``: sample a trained model under its best condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from contrastive_align.conditions import Condition
from contrastive_align.conditions.tokens import load_with_condition_tokens
from contrastive_align.data.formats import Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch.arguments import Arguments, UsageError
from contrastive_align.launch.common import print_on_main
from contrastive_align.models import load_tokenizer
from contrastive_align.models.loading import adapter_config_path, base_of
from contrastive_align.sampling.decode import draw, seed_of


# The flags that --best accepts.
FLAGS = {
    "best", "model_name_or_path", "dtype", "attn_implementation", "trust_remote_code", "num_generations",
    "max_completion_length", "temperature", "top_p", "seed", "use_cpu", "log_level",
}  # fmt: skip


def ask_best(args: Arguments) -> list[str]:
    """Print the conditioned prompt and samples; return the samples.

    Raises:
        UsageError: a flag that has no effect with ``--best``.
        ValueError, FileNotFoundError: the folder does not exist, or conditional training did not write it.
    """
    if unused := sorted(args.given - FLAGS):
        raise UsageError(f"--{unused[0]} means nothing beside --best, which samples and trains nothing. Leave it out.")
    folder = args.model.model_name_or_path
    if folder is None:
        raise UsageError("--best needs the folder of a trained model: --model_name_or_path=output_dir.")
    condition, training = Condition.load(folder), args.training
    run = _summary(folder)
    text: Text = args.script.best
    if run.get("data", {}).get("train", {}).get("conversational"):
        text = [{"role": "user", "content": text}]
    asked = condition.apply_best(text)
    model, tokenizer = load_trained(
        folder,
        dtype=args.model.dtype,
        attn_implementation=args.model.attn_implementation,
        trust_remote_code=training.trust_remote_code,
    )
    model = model.to(training.device).eval()
    ids = tokenise_prompt(asked, tokenizer)
    print_on_main(f"asked    {tokenizer.decode(ids)!r}")
    at_most = run.get("method", {}).get("max_completion_length", training.max_completion_length)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    with torch.no_grad():
        drawn = draw(
            model,
            [ids],
            per_prompt=training.num_generations if "num_generations" in args.given else 1,
            max_new_tokens=training.max_completion_length if "max_completion_length" in args.given else at_most,
            eos_token_ids=list(dict.fromkeys([tokenizer.eos_token_id, *ends])),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            seeds=[seed_of(training.seed, "best", 0)],
            temperature=training.temperature,
            top_p=training.top_p,
            suppress_ids=tokenizer.convert_tokens_to_ids(condition.tokens),
        )
    found = [tokenizer.decode(row, skip_special_tokens=True) for row in drawn.completion_ids[0]]
    for completion in found:
        print_on_main(f"sampled  {completion!r}")
    return found


def load_trained(folder: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load model and tokenizer of conditional training, saved whole or as an adapter with condition tokens."""
    trust = kwargs.get("trust_remote_code", False)
    config = adapter_config_path(folder)
    if config is None:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has a condition.json, but no model: expected config.json and weights.")
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs), load_tokenizer(folder, trust_remote_code=trust)
    found = json.loads(Path(config).read_text())
    name = base_of(found.get("base_model_name_or_path"), folder)
    base = AutoModelForCausalLM.from_pretrained(name, revision=found.get("revision") or "main", **kwargs)
    return load_with_condition_tokens(base, folder)


def _summary(folder: str) -> dict[str, Any]:
    """Read the summary of the run; {} for a model without one, such as a checkpoint."""
    path = Path(folder) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
