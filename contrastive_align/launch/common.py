"""What every run script does the same way: check the model's flags, load it, describe it, save it."""

from __future__ import annotations

import contextlib
import logging as std_logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config, get_quantization_config

from contrastive_align import demo
from contrastive_align.launch.arguments import Arguments, UsageError
from contrastive_align.models.loading import ADAPTER_CONFIG
from contrastive_align.report import Summary
from contrastive_align.versions import SUPPORTED


def check_model_flags(args: Arguments) -> None:
    """Refuse LoRA and quantisation flags that would have no effect, and folders that are not there or not folders."""
    lora = sorted(name for name in args.given if name.startswith(("lora_", "use_rslora", "use_dora")))
    quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(args.model, name)]
    alone = quantised or ([] if "use_peft" in args.given else lora)
    if alone and not args.model.use_peft:
        raise UsageError(f"--{alone[0]} is given without --use_peft, which it needs. Add --use_peft.")
    resume = str(args.training.resume_from_checkpoint or "")
    if resume.lower() not in ("", "true", "false", "none") and not Path(resume).is_dir():
        raise UsageError(f"--resume_from_checkpoint: no folder '{resume}' (looked in {Path.cwd()}).")
    name = str(args.model.model_name_or_path or "")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UsageError(f"No folder '{name}' for --model_name_or_path (looked in {Path.cwd()}).")
    if Path(name).is_file():
        raise UsageError(f"--model_name_or_path: '{name}' is a file, expected a folder or a hub id.")
    asks = getattr(args.script, "best", None) is not None  # looks for itself, and for more
    if (
        name
        and not asks
        and Path(name).is_dir()
        and not any((Path(name) / f).is_file() for f in ("config.json", ADAPTER_CONFIG))
    ):
        raise UsageError(f"--model_name_or_path: '{name}' holds no model: neither config.json nor {ADAPTER_CONFIG}.")
    if args.training.output_dir and Path(args.training.output_dir).is_file():
        raise UsageError(f"--output_dir: '{args.training.output_dir}' is a file, expected a folder, or a new name.")


def checkpoint_of(args: Arguments) -> str | bool | None:
    """What ``trainer.train`` takes for ``--resume_from_checkpoint``."""
    resume = args.training.resume_from_checkpoint
    resume = {"true": True, "false": None, "none": None}.get(str(resume).lower(), resume)
    if resume is True and get_last_checkpoint(args.training.output_dir) is None:
        raise UsageError(f"--resume_from_checkpoint=true, but {args.training.output_dir} holds no checkpoint.")
    return resume


@contextlib.contextmanager
def as_usage_error(*more: type[Exception]) -> Iterator[None]:
    """What the user can mend is a message, not a traceback; of ``more`` kinds of errors than Python's own, too."""
    try:
        yield
    except (ValueError, OSError, AttributeError, ImportError, *more) as error:
        from_us = not isinstance(error, AttributeError) or "has no function" in str(error)
        if not from_us or std_logging.getLogger("transformers").isEnabledFor(std_logging.DEBUG):
            raise
        raise UsageError(f"{error}\n(--log_level=debug shows where)") from error


def model_arguments(args: Arguments) -> dict[str, Any]:
    """The keywords of a trainer that say which model is trained, and how."""
    model, training = args.model, args.training
    init = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    if model.model_name_or_path == demo.MODEL_PATH:
        init.pop("revision")
    training.model_init_kwargs = init
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        model.lora_target_modules = [
            model.lora_target_modules
        ]  # TRL unpacks a single name, which peft reads as a regex
    return {
        "model": model.model_name_or_path,
        "args": training,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def ignore_bias_buffers(trainer: Any) -> None:
    """As TRL's scripts: DDP trips over boolean buffers of some models."""
    trainer.model._ddp_params_and_buffers_to_ignore = [
        name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
    ]


def model_entry(args: Arguments, trainer: Any, name: str, *, start: str) -> dict[str, Any]:
    """The ``model`` of ``summary.json``."""
    model = args.model
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    size = f"{_millions(parameters)} parameters, {_millions(trained)} trained"
    bits = "4-bit " if model.load_in_4bit else "8-bit " if model.load_in_8bit else ""
    adapted = f", LoRA r={model.lora_r}" if is_peft_model(trainer.model) else ""
    return {
        "line": f"{name} ({size}{adapted}, {bits}{str(trainer.model.dtype).removeprefix('torch.')})",
        "name_or_path": model.model_name_or_path,
        "revision": model.model_revision,
        "start": start,
        "quantisation": bits.strip() or None,
        "peft": is_peft_model(trainer.model),
        "parameters": parameters,
        "trained_parameters": trained,
    }


def save(args: Arguments, trainer: Any, summary: Summary, dataset_name: str | None) -> None:
    """Write model and model card, and tell the summary where they are."""
    output_dir = args.training.output_dir
    trainer.save_model(output_dir)
    trainer.create_model_card(model_name=Path(output_dir).name, dataset_name=dataset_name)
    head = "Seq2SeqLM" if trainer.model.config.is_encoder_decoder else "CausalLM"
    auto = "peft.AutoPeftModelFor" if is_peft_model(trainer.model) else "transformers.AutoModelFor"
    summary.saved = {
        "saved": output_dir,
        "summary": f"{output_dir}/summary.json",
        "load with": f'{auto}{head}.from_pretrained("{output_dir}")',
    }


def versions() -> dict[str, str]:
    """The packages that a result depends on."""
    return {package: version(package) for package in [*SUPPORTED, "contrastive_align"]}


def print_on_main(text: str) -> None:
    """Print once, however many processes there are."""
    if PartialState().is_main_process:
        print(f"\n{text}" if "\n" in text else text, flush=True)


def _millions(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"
