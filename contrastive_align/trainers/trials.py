"""What options name is tried before a model is loaded: folder, reports, optimiser, schedule, attention, mappings.

Each trial raises an error that names the option, so that nothing of this is found out after an hour of loading.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from inspect import isclass, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
    is_deepspeed_available,
)
from transformers.trainer_pt_utils import AcceleratorConfig


MANY_STEPS = 1_000_000  # of a schedule whose length is not known yet
FROM_FILE = ("accelerator_config", "fsdp_config", "deepspeed")
_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
MAPPINGS = (
    *FROM_FILE, *_CHECKPOINTING, "lr_scheduler_kwargs", "model_init_kwargs", "generation_kwargs",
    "chat_template_kwargs", "dataset_kwargs", "transformers_continuous_batching_config",
)  # fmt: skip
_POSITIONAL = ("function", "args", "kwargs")
KEYS = {
    "accelerator_config": [field.name for field in fields(AcceleratorConfig)],
    **{name: [key for key in signature(checkpoint).parameters if key not in _POSITIONAL] for name in _CHECKPOINTING},
}


def try_options(args: TrainingArguments) -> None:
    """Try precision, output_dir, reports, optimiser, schedule and compilation.

    Raises:
        ValueError: the option, its value and what is wrong.
    """
    asked = args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
    if asked and args.device.type == "cpu":
        raise ValueError(
            "fp16 is true on a CPU, which would compute in float32 all the same. Leave it out, or set bf16."
        )
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError("load_best_model_at_end is true, and eval_strategy is no: no evaluation says which is best.")
    if args.should_save:
        _try_folder(args.output_dir)
    _try_reports(args.report_to)
    optimiser = _try_optimiser(args)
    _try_schedule(args, optimiser)
    if args.torch_compile:
        try:
            torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(
                f"torch_compile_backend is {args.torch_compile_backend!r} and torch_compile_mode "
                f"{args.torch_compile_mode!r}, which cannot be used: {error}"
            ) from error


def _try_folder(output_dir: str) -> None:
    """Write a file where the run will; folders that were made for it go again."""
    if not output_dir:
        raise ValueError("output_dir is empty, expected a folder or a new name.")
    folder = Path(output_dir).expanduser()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"output_dir is {output_dir!r}, where nothing can be written: {error.strerror}. Choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # another process writes into it already
            for place in made:
                place.rmdir()


def _try_reports(names: Any) -> None:
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ValueError(f"report_to is {names}: {error} 'none' reports nowhere.") from error
    if missing := [name for name in names or () if name not in get_available_reporting_integrations()]:
        raise ValueError(
            f"report_to is {missing[0]!r}, and its package is not installed. Install it (pip install {missing[0]}), or "
            "set report_to=none."
        )


def _try_optimiser(args: TrainingArguments) -> torch.optim.Optimizer:
    """Build the optimiser over one parameter; another in its place where it reads the model's own modules."""
    parameter = nn.Parameter(torch.zeros(1))
    stand_in = torch.optim.SGD([parameter], lr=args.learning_rate or 1.0)
    if args.optim_target_modules is not None or "lomo" in args.optim:
        return stand_in
    try:
        found, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isclass(found) and issubclass(found, torch.optim.Optimizer)):
            return stand_in
        optimiser = found([parameter], **options)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        given = f" with optim_args {args.optim_args!r} (name=value, name=value)" if args.optim_args else ""
        raise ValueError(f"optim is '{args.optim.value}'{given}, which cannot be built: {error}") from error
    for argument in (args.optim_args or "").replace(" ", "").split(","):
        if argument and not _is_read(argument, args, options):
            raise ValueError(
                f"optim_args is {args.optim_args!r}, and optim='{args.optim.value}' reads no "
                f"'{argument.partition('=')[0]}'. Leave it out."
            )
    return optimiser


def _is_read(argument: str, args: TrainingArguments, options: Mapping[str, Any]) -> bool:
    """Whether another value of one of ``optim_args`` gives the optimiser other options, or is refused."""
    changed = copy.copy(args)
    for value in ("0.123", "1", "true"):
        others = [a for a in args.optim_args.replace(" ", "").split(",") if a != argument]
        changed.optim_args = ",".join([*others, f"{argument.partition('=')[0]}={value}"])
        try:
            if repr(Trainer.get_optimizer_cls_and_kwargs(changed)[1]) != repr(options):
                return True
        except (ValueError, TypeError, AttributeError):
            return True
    return False


def _try_schedule(args: TrainingArguments, optimiser: torch.optim.Optimizer) -> None:
    steps = args.max_steps if args.max_steps > 0 else MANY_STEPS
    named, given = f"lr_scheduler_type is '{args.lr_scheduler_type.value}'", args.lr_scheduler_kwargs
    named += f" with lr_scheduler_kwargs {given}" if given else ""
    if given and args.lr_scheduler_type in ("constant", "constant_with_warmup"):
        raise ValueError(f"{named}, and that schedule takes none. Leave them out, or choose another.")
    for key, value in (given or {}).items():
        if isinstance(value, float) and not math.isfinite(value):  # cosine turns it into a learning rate of 0
            raise ValueError(f"lr_scheduler_kwargs[{key!r}] is {value}, expected a finite number.")
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimiser,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=given,
        )
        rates = [factor(step) for factor in getattr(schedule, "lr_lambdas", ()) for step in (0, 1, steps // 2, steps)]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{named}, which cannot be built: {error}") from error
    if bad := [rate for rate in rates if not 0 <= rate < math.inf]:
        raise ValueError(f"{named}, which makes the learning rate {bad[0]} times what it is, expected 0 or more.")


def try_attention(config: PreTrainedConfig, attention: str | None, *, trust_remote_code: bool) -> None:
    """Build the model without its weights where an attention is asked for.

    Raises:
        ValueError: there is no such attention, its package is not installed, or the model does not take it.
    """
    if attention is None:
        return
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            asked = copy.deepcopy(config)  # which takes the attention over
            auto.from_config(asked, attn_implementation=attention, trust_remote_code=trust_remote_code)
        except (ValueError, ImportError) as error:
            try:
                auto.from_config(config, trust_remote_code=trust_remote_code)
            except Exception:  # not the attention: loading says what is wrong
                return
            raise ValueError(
                f"attn_implementation is {attention!r}, which cannot be used: {error} Leave it out for the model's own."
            ) from error


def check_mappings(config: TrainingArguments) -> None:
    """Read the options that are mappings, their JSON text or, some of them, a JSON file, before TRL does.

    Raises:
        ValueError: one is none of these or has keys that nothing reads, or its package is not installed.
    """
    found = {name: _read_mapping(name, getattr(config, name, None)) for name in MAPPINGS}
    for name, known in KEYS.items():
        if unknown := sorted(map(str, set(found[name]) - set(known))):
            raise ValueError(f"{name} has the key {unknown[0]!r}, expected keys among {', '.join(known)}.")
    if "torch_dtype" in found["model_init_kwargs"]:
        raise ValueError("model_init_kwargs has the key 'torch_dtype', which TRL does not read. Name it 'dtype'.")
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    if found["fsdp_config"] and not (config.fsdp or launched):
        raise ValueError("fsdp_config is given without fsdp, which it belongs to. Set fsdp, or leave it out.")
    if config.deepspeed:
        zero = found["deepspeed"].get("zero_optimization", {})
        if not isinstance(zero, Mapping) or zero.get("stage", 0) not in (0, 1, 2, 3):
            raise ValueError(
                f"deepspeed has zero_optimization {zero}, expected a mapping with a stage of 0, 1, 2 or 3."
            )
        if not is_deepspeed_available():
            raise ValueError(
                "deepspeed is given, and the package is not installed. pip install deepspeed, or leave it out."
            )


def _read_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not value or isinstance(value, AcceleratorConfig):
        return {}
    expected = "a mapping, or JSON text such as '{\"key\": 1}'" + (", or a JSON file" if name in FROM_FILE else "")
    found = value
    if isinstance(value, str) and (value.startswith("{") or name in FROM_FILE):
        try:
            found = json.loads(value if value.startswith("{") else Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}, which cannot be read ({error}), expected {expected}.") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} is {value!r}, expected {expected}.")
    return found
