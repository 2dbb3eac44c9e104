"""``contrastive-align ask --prompt="a prompt"``: sample a trained model under its best condition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from contrastive_align.conditions import Condition
from contrastive_align.conditions.conditions import FILE
from contrastive_align.conditions.tokens import load_with_condition_tokens
from contrastive_align.data.formats import Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch.arguments import Arguments, RunArguments, option, parse
from contrastive_align.launch.common import check_model_flags, print_on_main
from contrastive_align.launch.past_run import chats, read_summary
from contrastive_align.launch.usage import UsageError
from contrastive_align.models import load_tokenizer
from contrastive_align.models.loading import (
    adapter_config_path,
    base_of,
    check_exists,
    check_generates,
    check_weights_are_finite,
    decoder_start_token,
    eos_token_ids,
)
from contrastive_align.sampling.decode import draw, seed_of
from contrastive_align.trainers import ConditionalConfig


# The flags that count where nothing is trained.
FLAGS = {
    "prompt",
    "best",
    "model_name_or_path",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "use_cpu",
    "log_level",
}
FLAGS |= {"num_generations", "max_completion_length", "temperature", "top_k", "top_p", "seed"}


@dataclass
class AskArguments(RunArguments):
    """Name the prompt."""

    ALIASES: ClassVar[dict[str, str]] = {"best": "prompt"}

    prompt: str | None = option(None, "What the model is asked.")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Ask a trained model as the command line says (see ``README.md``); return its samples."""
    args = parse(argv, prog="contrastive-align ask", script=AskArguments, training=ConditionalConfig)
    check_model_flags(args)
    if args.script.prompt is None:
        raise UsageError("nothing is asked. Give --prompt='a prompt'.")
    return ask_best(args, args.script.prompt)


def ask_best(args: Arguments, prompt: str) -> list[str]:
    """Print the prompt, under the best condition if the model has any, and samples; return the samples."""
    if unused := sorted(args.given - FLAGS):
        raise UsageError(f"--{unused[0]} means nothing here: a model is asked, and nothing trained. Leave it out.")
    folder = args.model.model_name_or_path
    if "model_name_or_path" not in args.given:
        raise UsageError("a trained model is asked: give its folder, --model_name_or_path=output_dir.")
    training = args.training
    condition = Condition.load(folder) if (Path(folder) / FILE).is_file() else None
    run = read_summary(folder)
    model, tokenizer = load_trained(
        folder,
        dtype=args.model.dtype,
        attn_implementation=args.model.attn_implementation,
        trust_remote_code=training.trust_remote_code,
    )
    text: Text = [{"role": "user", "content": prompt}] if chats(run, tokenizer) else prompt
    ids = tokenise_prompt(text if condition is None else condition.apply_best(text), tokenizer)
    if condition is None:
        print_on_main(f"note: {folder} has no {FILE}, so the prompt is asked as it is")
    print_on_main(f"asked    {tokenizer.decode(ids)!r}")
    trained_at = run.get("method", {}).get("max_completion_length", training.max_completion_length)
    (found,), _ = sample_trained(
        model.to(training.device).eval(),
        tokenizer,
        [ids],
        [] if condition is None else condition.tokens,
        per_prompt=training.num_generations if "num_generations" in args.given else 1,
        max_new_tokens=training.max_completion_length if "max_completion_length" in args.given else trained_at,
        seeds=[seed_of(training.seed, "best", 0)],
        temperature=training.temperature,
        top_k=training.top_k,
        top_p=training.top_p,
    )
    for completion in found:
        print_on_main(f"sampled  {completion!r}")
    return found


def load_trained(folder: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load model and tokenizer of conditional training, saved whole or as an adapter with condition tokens."""
    trust = kwargs.get("trust_remote_code", False)
    check_exists(folder)
    config = adapter_config_path(folder)
    if config is None:
        if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model: expected config.json and weights.")
        known = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        check_generates(known, folder, encoder_decoder=True)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        model = _auto(known).from_pretrained(folder, **kwargs)
    else:
        found = json.loads(Path(config).read_text())
        name = base_of(found.get("base_model_name_or_path"), folder)
        revision = found.get("revision") or "main"
        known = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        base = _auto(known).from_pretrained(name, revision=revision, **kwargs)
        model, tokenizer = load_with_condition_tokens(base, folder)
    check_weights_are_finite(model, folder)
    return model, tokenizer


def _auto(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def sample_trained(
    model: Any, tokenizer: Any, prompt_ids: list[list[int]], tokens: list[str], **options: Any
) -> tuple[list[list[str]], list[list[bool]]]:
    """Sample K completions of each prompt, without condition ``tokens``; return texts, and which are finished."""
    eos = eos_token_ids(model, tokenizer)
    drawn = draw(
        model,
        prompt_ids,
        eos_token_ids=eos,
        pad_token_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_ids=tokenizer.convert_tokens_to_ids(tokens),
        **options,
    )
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in drawn.completion_ids]
    return texts, (~drawn.truncated).tolist()


@torch.no_grad()
def search_trained(
    model: Any, tokenizer: Any, prompt_ids: list[list[int]], tokens: list[str], *, per_prompt: int, **options: Any
) -> tuple[list[list[str]], list[list[bool]]]:
    """Find the best completions of beam search, prompt by prompt; return texts, and which are finished.

    Args:
        options: ``num_beams`` and ``max_new_tokens``.
    """
    eos = eos_token_ids(model, tokenizer)
    config = GenerationConfig(
        **options,
        do_sample=False,
        num_return_sequences=per_prompt,
        eos_token_id=eos,
        pad_token_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(tokens) or None,
        decoder_start_token_id=decoder_start_token(model) if model.config.is_encoder_decoder else None,
    )
    texts, finished = [], []
    for ids in prompt_ids:
        asked = torch.tensor([ids], device=model.device)
        found = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), generation_config=config)
        new = found[:, 1 if model.config.is_encoder_decoder else len(ids) :].tolist()
        texts.append(tokenizer.batch_decode(new, skip_special_tokens=True))
        finished.append([bool(set(row) & set(eos)) for row in new])
    return texts, finished
