"""What a model is, as a reader of a report needs it: its size, its adapter, its precision."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Count the weights, or those that are trained; the frozen copy of an adapter (``ref``) is none of the model's.

    4-bit weights are packed two to a byte, or more, and a weight that ZeRO-3 holds elsewhere is empty here: counted is
    what they stand for.
    """
    return sum(
        _size(p) for name, p in model.named_parameters() if ".ref." not in name and (p.requires_grad or not trained)
    )


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else math.prod(state.shape)


def describe_adapter(model: nn.Module) -> dict[str, Any] | None:
    """Return type, rank and scale of the adapter that is trained, with ``line`` for a table; None without one."""
    if not is_peft_model(model):
        return None
    config: Any = model.peft_config[model.active_adapter]
    kind = "DoRA" if getattr(config, "use_dora", False) else str(getattr(config.peft_type, "value", config.peft_type))
    found: dict[str, Any] = {"type": {"LORA": "LoRA"}.get(kind, kind)}
    line = found["type"]
    if (rank := getattr(config, "r", None)) is not None:
        found |= {"r": rank, "alpha": getattr(config, "lora_alpha", getattr(config, "alpha", None))}
        line += f" r={rank}"
        if pattern := dict(getattr(config, "rank_pattern", None) or {}):
            found["rank_pattern"] = pattern
            line += f" ({', '.join(f'{name}: r={value}' for name, value in pattern.items())})"
    return {**found, "line": line}


def quantisation_of(model: nn.Module) -> str | None:
    """Return "4-bit", "8-bit" or the name of another quantisation of the weights; None for weights in full.

    >>> from types import SimpleNamespace
    >>> quantisation_of(SimpleNamespace(is_loaded_in_4bit=True)), quantisation_of(SimpleNamespace())
    ('4-bit', None)
    """
    for bits in ("4", "8"):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"{bits}-bit"
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def four_bit_options(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of ``BitsAndBytesConfig`` that a model's weights were quantised with, as JSON can hold them.

    None for weights in full, and for other quantisations, which a config of the base itself asks for.
    """
    bits = quantisation_of(model)
    if bits == "8-bit":
        return {"load_in_8bit": True}
    if bits != "4-bit":
        return None
    config: Any = model.config.quantization_config
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
    }
