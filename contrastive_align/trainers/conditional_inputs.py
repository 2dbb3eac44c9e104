"""What a ConditionalTrainer makes of its arguments."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from contrastive_align.conditions.conditions import Condition
from contrastive_align.pool.files import Sample
from contrastive_align.targets.evaluate import Feature
from contrastive_align.targets.features import resolve_feature
from contrastive_align.trainers.conditional_config import ConditionalConfig


def feature_of(reward_funcs: Any, judge: Any, args: ConditionalConfig) -> Feature | None:
    if judge is not None and reward_funcs is not None:
        raise ValueError("Both reward_funcs and judge are given, expected one of them.")
    if reward_funcs is None:
        if args.reward_weights is not None:
            raise ValueError("reward_weights weighs reward_funcs, and none are given. Leave it out.")
        return None
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward functions.")
    if len(functions) == 1 and weights == [1.0]:
        return resolve_feature(functions[0], trust_remote_code=args.trust_remote_code)
    return resolve_feature(
        {"sum": [[w, f] for w, f in zip(weights, functions, strict=True)]}, trust_remote_code=args.trust_remote_code
    )


def refuse_given(**given: Any) -> None:
    ways = {
        "data_collator": "rows are collated in two forms, with and without condition",
        "compute_loss_func": "the loss is this class's; subclass it and override compute_loss",
        "compute_metrics": "no logits are built; read trainer.evaluate()'s metrics",
        "preprocess_logits_for_metrics": "no logits are built; read trainer.evaluate()'s metrics",
        "formatting_func": "prompts and completions are told apart by their columns; map the dataset before",
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is not supported by ConditionalTrainer: {ways[name]}.")


def freeze_lower_layers(model: PreTrainedModel, ratio: float, adapter: bool) -> None:
    if adapter:
        raise ValueError(
            "unfrozen_layers_ratio freezes layers of a whole model, and here an adapter is trained. Give LoRA its "
            "layers with layers_to_transform."
        )
    decoder = model.get_decoder()
    layers = next(
        (m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers),
        None,
    )
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that unfrozen_layers_ratio could be a share of."
        )
    for layer in layers[: len(layers) - max(1, round(ratio * len(layers)))]:
        layer.requires_grad_(False)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference, where it is not the policy without its adapter."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def keep_as_reference(model: PeftModel) -> None:
    """A frozen copy of the adapter that a model came with, as in TRL: the reference is the start, not its base."""
    config = model.peft_config[model.active_adapter]
    if config.modules_to_save or getattr(config, "trainable_token_indices", None):
        raise ValueError(
            "The model's adapter trains whole modules or rows of tokens (modules_to_save, trainable_token_indices), of "
            "which no frozen copy can stand beside it. Merge it first, or set kl_coef=0, which needs no reference."
        )
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", f".{model.active_adapter}.")).data)


def keep_rows_precise(model: nn.Module) -> None:
    """Whole modules and rows that train beside a LoRA on a quantised base: in the precision of what they stand for.

    TRL casts all that trains there to bfloat16, in which an embedding does not move at usual learning rates (its
    relative step is 2^-8), and which a forward pass without autocast cannot multiply with float32.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(module.original_module.weight.dtype)
        elif isinstance(module, TrainableTokensLayer):
            for rows in module.trainable_tokens_delta.values():
                rows.data = rows.data.to(module.get_base_layer().weight.dtype)


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the tokenizer's EOS and those of the generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = [] if found is None else found if isinstance(found, list) else [found]
    return list(dict.fromkeys([tokenizer.eos_token_id, *found]))


def fingerprint(samples: list[Sample], condition: Condition) -> str:
    digest = hashlib.sha256(json.dumps(condition.spec, sort_keys=True).encode())
    for s in samples:
        digest.update(repr((s.prompt, s.completion_ids, s.score, s.feedback)).encode())
    return digest.hexdigest()[:12]
