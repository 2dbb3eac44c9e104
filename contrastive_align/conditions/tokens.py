"""Give a model special tokens that condition a prompt, train their rows with LoRA, and load an adapter with them."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from contrastive_align.models.loading import give_rows


def add_condition_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, seed: int
) -> list[int]:
    r"""Give a model special tokens to be conditioned on, such as one for each quantile (Quark, arXiv 2205.13636).

    The tokenizer never splits them, and ``decode(..., skip_special_tokens=True)`` leaves them out. The embedding grows
    only where their ids do not fit into the rows that there are: many models have more rows than tokens. Every new row,
    in the input embedding and (untied) in the head and its bias, is drawn around the rows of the old tokens:

    .. math:: e_d \sim \mathcal{N}(\mu_d, \sigma_d^2), \quad \mu_d, \sigma_d \text{ the mean and spread of dimension } d

    in float32 at least, from ``seed`` alone: the global random state is neither read nor moved. Old rows stay as they
    are, bit for bit. Tokens that the tokenizer has already keep their rows: a second call changes nothing, nor does a
    call for a model that was trained with the tokens. Where the tokenizer has the tokens and the model lacks their
    rows, as with an adapter's tokenizer and the published base, the rows are made.

    Args:
        model: without an adapter, on one device.
        tokenizer: changed in place.
        tokens: their texts, such as ``<quantile_0>``.
        seed: the same model, tokens and seed give the same rows.

    Returns:
        The tokens' ids, in the order of ``tokens``.

    Raises:
        ValueError: a text is empty, repeated, or an ordinary token of the vocabulary; the model has an adapter; its
            weights are quantised or partitioned.
    """
    tokens = list(tokens)
    _check_texts(tokens, tokenizer)
    old_tokens, vocabulary = len(tokenizer), tokenizer.get_vocab()
    new = [token for token in tokens if token not in vocabulary]
    _check_no_adapter(model)
    if not new and max((vocabulary[token] for token in tokens), default=-1) < _rows(model):
        return [vocabulary[token] for token in tokens]
    _check_weights(model)
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    ids: Any = tokenizer.convert_tokens_to_ids(tokens)
    give_rows(model, max(ids, default=-1) + 1, fresh=tokenizer.convert_tokens_to_ids(new), old=old_tokens, seed=seed)
    return ids


def with_trainable_rows(peft_config: PeftConfig, model: PreTrainedModel, token_ids: Sequence[int]) -> PeftConfig:
    """Return a copy of a LoRA config that trains the rows of ``token_ids`` and saves them with the adapter.

    Fused heads multiply the hidden states with ``lm_head.weight`` itself, so that the head must stay a plain matrix:

    - untied embeddings: ``trainable_token_indices`` on the input embedding. Only these rows are trained, in float32,
      and saved. Their rows in the head, which give a condition's probability as the next token, stay as they are.
    - tied embeddings: ``modules_to_save`` with ``ensure_weight_tying``, one matrix for input and head. **All of its
      rows** are trained, in the model's own precision, and saved. A learning rate made for LoRA moves them too.

    Args:
        peft_config: not changed. Its ``modules_to_save`` and ``trainable_token_indices`` are kept in the copy.
        model: the model of the config, with the rows (``add_condition_tokens``), without an adapter.
        token_ids: the rows. With none (the model was trained with its conditions before), the copy is equal.

    Raises:
        ValueError: the config is not LoRA, has LoRA on the embedding, or has ``trainable_token_indices`` with tied
            embeddings; or a tied head has a bias, which PEFT would drop.
    """
    config = copy.deepcopy(peft_config)
    if not token_ids:
        return config
    _check_weights(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{type(config).__name__} cannot train the rows of new tokens, expected a LoraConfig. Use LoRA, or train "
            "the whole model."
        )
    if _targets(config.target_modules, name):
        raise ValueError(
            f"target_modules has the embedding {name!r}: LoRA on it does not train single rows. Remove it from "
            "target_modules; the condition tokens' rows are trained without it."
        )
    saved = list(config.modules_to_save or ())
    rows = config.trainable_token_indices
    if head is not None and head.weight is embedding.weight:
        if rows:
            raise ValueError(
                f"trainable_token_indices={rows} with tied embeddings ({name}), which PEFT does not train "
                "beside the whole matrix. Remove trainable_token_indices: all rows are trained here."
            )
        if getattr(head, "bias", None) is not None:
            raise ValueError(
                f"{type(model).__name__} ties its head to {name} and has a bias in it, which PEFT drops when it trains "
                "the two together. Train the whole model, or condition by phrases instead of tokens."
            )
        # PEFT recognises embeddings to tie by its standard name, and adds the module's own name itself.
        config.modules_to_save = saved + [n for n in dict.fromkeys((name, EMBEDDING_LAYER_NAMES[0])) if n not in saved]
        config.ensure_weight_tying = True
        return config
    if not _targets(saved, name):
        if not isinstance(rows, dict):
            rows = {name: rows or []}
        key = next((key for key in rows if _targets([key], name)), name)
        config.trainable_token_indices = {**rows, key: sorted({*rows.get(key, ()), *token_ids})}
    return config


def load_with_condition_tokens(
    model: PreTrainedModel,
    adapter: str | os.PathLike,
    *,
    tokens: Sequence[str] = (),
    seed: int = 42,
    is_trainable: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter that was trained with condition tokens onto its published base.

        base = AutoModelForCausalLM.from_pretrained("the/base")
        model, tokenizer = load_with_condition_tokens(base, "output_dir")

    The base gets the rows that the adapter's tokenizer needs, and the adapter then sets those that were trained.

    Args:
        model: the base, which is changed in place and wrapped.
        adapter: a folder with the adapter and its tokenizer.
        tokens: the condition tokens. They matter only where the base has more rows than tokens, and only for the
            conditions' own probability as the next token: their rows are then made anew too.
        seed: the training run's. It makes the same rows of an untied head, which the adapter does not contain.
        is_trainable: whether the adapter is trained further.

    Returns:
        The model with its adapter, and the tokenizer.

    Raises:
        ValueError: as ``add_condition_tokens``; or the adapter's tokenizer lacks a token.
    """
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"The tokenizer of {adapter} has no token {missing[0]!r}: it was not trained with it.")
    _check_no_adapter(model)
    _check_weights(model)
    rows = max(tokenizer.get_vocab().values()) + 1
    fresh = tokenizer.convert_tokens_to_ids(list(tokens))
    give_rows(model, rows, fresh=fresh, old=rows, seed=seed)
    return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable), tokenizer


def _check_texts(tokens: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if not token or token != token.strip():
            raise ValueError(f"Condition token {i} is {token!r}, expected a text without spaces around it.")
        if token in tokens[:i]:
            raise ValueError(f"Condition token {i} is {token!r}, which is given before. Give each its own text.")
        if token in vocabulary and token not in tokenizer.all_special_tokens:
            raise ValueError(
                f"Condition token {i} is {token!r}, an ordinary token of the vocabulary (id {vocabulary[token]}): "
                "texts may hold it. Choose a text that no token has, such as '<quantile_0>'."
            )


def _rows(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # of which ZeRO-3 keeps a part here


def _check_no_adapter(model: PreTrainedModel) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model has an adapter already, which was made for the rows it has. Add the condition tokens to the "
            "base, then the adapter; load_with_condition_tokens does this for a saved one."
        )


def _check_weights(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for what, module in (("input embedding", embedding), ("head", head)):
        if module is None:
            continue
        weight: nn.Parameter | None = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f"The {what} of {type(model).__name__} is quantised ({type(module).__name__}), and tokens cannot be "
                "added to it. Leave it out of the quantisation, or condition by phrases instead of tokens."
            )
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(
                f"The {what} of {type(model).__name__} has the shape {tuple(weight.shape)}, expected (tokens, width): "
                "it may be partitioned (ZeRO-3). Add the tokens, save the model, and start from what was saved."
            )


def _targets(names: Sequence[str] | str | None, name: str) -> bool:
    """Return whether PEFT matches the module's name with one of these names, or with this regular expression.

    >>> _targets(["q_proj", "embed_tokens"], "model.embed_tokens"), _targets("all-linear", "model.embed_tokens")
    (True, False)
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == given or name.endswith(f".{given}") for given in names or ())
