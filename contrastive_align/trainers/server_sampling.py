"""A round's completions from a server that holds the policy's adapter, in place of the policy itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from trl import SFTTrainer

from contrastive_align.data.formats import Text


FOLDER = "sampling_adapter"


def check_sampler(trainer: Any) -> None:
    """Raise ValueError where a server cannot be given the weights that are trained, or is never asked."""
    if not trainer.online:
        raise ValueError("sampler is given and nothing is sampled: the data has its completions. Leave it out.")
    if not is_peft_model(trainer.model):
        raise ValueError(
            "sampler is given and the whole model is trained: a server can be handed an adapter while it runs, and not "
            "a whole model. Train LoRA (peft_config), or leave sampler out."
        )
    if trainer.condition.tokens:
        raise ValueError(
            f"sampler is given and the condition '{trainer.condition.kind}' adds tokens to the vocabulary, whose rows "
            "a server does not take with an adapter. Use condition='phrases', which adds none, or leave sampler out."
        )
    trainer.pushed = None  # the adapter that the server has of this run


def generate_on_server(trainer: Any, prompts: list[Text], per_prompt: int, seeds: list[int]) -> list[list[dict]]:
    """As ``trainer.generate``. Texts are encoded again: an EOS follows where the server says that it ended.

    Every process calls this, also one without prompts: the adapter is saved by all of them together.
    """
    _push_adapter(trainer)
    args, tokenizer = trainer.args, trainer._tokenizer
    drawn = trainer.sampler(
        [trainer.encode(prompt) for prompt in prompts],
        per_prompt=per_prompt,
        max_tokens=args.max_completion_length,
        seeds=seeds,
        temperature=args.temperature,
        top_p=args.top_p,
    )

    def row(text: str, finished: bool) -> dict[str, Any]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        finished = finished or not ids  # nothing but special tokens: an end
        return {"ids": ids + [tokenizer.eos_token_id] * finished, "text": text, "finished": finished}

    return [[row(c.text, c.finished) for c in group] for group in drawn]


def _push_adapter(trainer: Any) -> None:
    """Let the server have the present weights. The adapter's name says whose they are, of which step, and which."""
    folder = Path(trainer.args.output_dir) / FOLDER
    SFTTrainer.save_model(trainer, str(folder), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    named = [None]
    if trainer.accelerator.is_main_process:
        run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        # A step alone does not: at the end of training the best checkpoint may be loaded (load_best_model_at_end).
        content = hashlib.sha256((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()[:8]
        named = [f"{Path(trainer.args.output_dir).name}-{run}-step-{trainer.state.global_step}-{content}"]
        if trainer.pushed != named[0]:
            trainer.sampler.set_adapter(named[0], folder)
    broadcast_object_list(named)
    trainer.sampler.adapter = trainer.pushed = named[0]
