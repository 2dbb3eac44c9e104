"""Which model is the start, which is the reference, and whether what was saved loads again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path, hash_module


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
MERGED_BASE = "merged_base"
MERGE_NOTE = "merged_from.json"


@dataclass
class Start:
    """The model a run starts from, which is also its reference.

    Args:
        model: a model id or folder without an adapter, or (4-bit and 8-bit bases) a model with its adapter kept.
        description: one line: model, revision, adapter, what was done.
        tokenizer_source: where its tokenizer is.
    """

    model: str | PeftModel
    description: str
    tokenizer_source: str


def adapter_config_path(model_id: str, revision: str | None = None) -> str | None:
    """The ``adapter_config.json`` of a folder or hub id, or None where there is none."""
    if os.path.isdir(model_id):
        path = os.path.join(model_id, ADAPTER_CONFIG)
        return path if os.path.isfile(path) else None
    return find_adapter_config_file(model_id, revision=revision, _raise_exceptions_for_missing_entries=False)


def resolve_start(
    model_id: str,
    *,
    output_dir: str,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    allow_pickled_adapter: bool = False,
) -> Start:
    """Resolve a model id or folder, which may be an adapter, to what training starts from.

    - no adapter: the id itself.
    - adapter on a base in full precision: base and adapter are merged and written to ``<output_dir>/merged_base``.
      That folder is start and reference, so that nothing can mistake the bare base for either, and a new LoRA saved on
      top of it names it as its base.
    - adapter on a 4-bit or 8-bit base, where a merge would lose precision: the adapter is kept and goes on training;
      TRL keeps a frozen copy of it as the reference.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: the adapter is a pickle and ``allow_pickled_adapter`` is False.
    """
    kwargs = dict(model_init_kwargs or {})
    revision = kwargs.get("revision")
    _check_exists(model_id)
    config_path = adapter_config_path(model_id, revision)
    revision_note = f" (revision {revision})" if revision and revision != "main" else ""
    if config_path is None:
        return Start(model_id, f"{model_id}{revision_note}", model_id)

    _refuse_pickle(model_id, revision, allow_pickled_adapter)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    kwargs.pop("revision", None)  # the adapter's; the base has its own
    config = PeftConfig.from_pretrained(model_id, revision=revision)
    base_id = _base_of(config, model_id)
    tokenizer_source = model_id if _has_tokenizer(model_id, revision, trust_remote_code) else base_id
    if quantization_config is not None:
        if PartialState().num_processes > 1:
            kwargs["device_map"] = None  # as TRL: each process holds its own copy, on its own device
        base = create_model_from_path(
            base_id, quantization_config=quantization_config, revision=config.revision, **kwargs
        )
        model = PeftModel.from_pretrained(base, model_id, is_trainable=True, revision=revision)
        bits = "4-bit" if quantization_config.load_in_4bit else "8-bit"
        description = f"{base_id} in {bits} + adapter {model_id}{revision_note}, kept; a frozen copy is the reference"
        return Start(model, description, tokenizer_source)

    merged = Path(output_dir) / MERGED_BASE
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _merge(model_id, revision, base_id, config.revision, merged, tokenizer_source, kwargs)
    return Start(
        str(merged.resolve()),
        f"{base_id} + adapter {model_id}{revision_note}, merged into {merged}",
        str(merged.resolve()),
    )


def _merge(
    adapter: str,
    adapter_revision: str | None,
    base_id: str,
    base_revision: str | None,
    merged: Path,
    tokenizer_source: str,
    model_init_kwargs: dict[str, Any],
) -> None:
    base = create_model_from_path(base_id, revision=base_revision, **{**model_init_kwargs, "device_map": None})
    model = PeftModel.from_pretrained(base, adapter, revision=adapter_revision)
    note = {
        "base": base_id,
        "base_revision": base_revision,
        "adapter": adapter,
        "adapter_revision": adapter_revision,
        "weights": hash_module(model),
    }
    note_path = merged / MERGE_NOTE
    if note_path.is_file() and json.loads(note_path.read_text()) == note:
        return  # a resumed run finds its own
    if merged.exists():
        raise ValueError(
            f"{merged} holds another merged base than {base_id} + {adapter}. Choose another output_dir, or remove that "
            "folder if nothing needs it any more."
        )
    model = model.merge_and_unload(safe_merge=True)
    aside = merged.with_name(merged.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_source,
        revision=adapter_revision if tokenizer_source == adapter else base_revision,
        trust_remote_code=model_init_kwargs["trust_remote_code"],
    )
    tokenizer.save_pretrained(aside)
    (aside / MERGE_NOTE).write_text(json.dumps(note, indent=2))
    aside.rename(merged)


def _base_of(config: PeftConfig, adapter: str) -> str:
    base = config.base_model_name_or_path
    beside = os.path.join(adapter, MERGED_BASE)
    if not base:
        raise ValueError(
            f"{adapter}/{ADAPTER_CONFIG} names no base model (base_model_name_or_path). Fill it in with the model the "
            "adapter was trained on."
        )
    if os.path.isabs(base) and not os.path.isdir(base) and os.path.isdir(beside):
        return beside  # the folder was moved; its base moved with it
    _check_exists(base)
    return base


def _check_exists(model_id: str) -> None:
    looks_local = os.path.isabs(model_id) or model_id.startswith((".", "~")) or model_id.count("/") > 1
    if looks_local and not os.path.isdir(model_id):
        raise FileNotFoundError(f"No folder {model_id!r}. Give a folder with a model or an adapter, or a hub id.")


def _refuse_pickle(model_id: str, revision: str | None, allowed: bool) -> None:
    if os.path.isdir(model_id):
        names = set(os.listdir(model_id))
    else:
        from huggingface_hub import list_repo_files

        names = set(list_repo_files(model_id, revision=revision))
    if ADAPTER_WEIGHTS in names or allowed:
        return
    if PICKLED_WEIGHTS in names:
        raise ValueError(
            f"{model_id} holds its weights as a pickle ({PICKLED_WEIGHTS}), which can run code when it is read. Ask "
            f"for {ADAPTER_WEIGHTS}, or set allow_pickled_adapter=True if you trust it (it is then read with "
            "weights_only=True)."
        )
    raise FileNotFoundError(
        f"{model_id} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. The adapter was not saved whole."
    )


def _has_tokenizer(model_id: str, revision: str | None, trust_remote_code: bool) -> bool:
    if os.path.isdir(model_id):
        return os.path.isfile(os.path.join(model_id, "tokenizer_config.json"))
    try:
        disable_progress_bars()
        AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False
    finally:
        enable_progress_bars()
    return True


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer of a model, with a padding token (EOS where it has none, as TRL does)."""
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    with_pad_token(tokenizer)
    return tokenizer


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def verify_saved(folder: str | os.PathLike) -> None:
    """Read back every weight file of a saved model or adapter.

    Raises:
        ValueError: no weights, or an empty, NaN or infinite tensor (ZeRO-3 can save empty adapters).
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"Nothing was saved: {folder} has no *.safetensors.")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if not tensor.numel():
                    raise ValueError(f"{file}: '{name}' is empty, expected weights. The save lost them; do not use it.")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{file}: '{name}' has NaN or infinite entries. Training diverged: lower the learning rate."
                    )
