"""Load a model to start from, with its tokenizer; add rows for new tokens; verify what was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file, logging

from contrastive_align.data.atomic import why_not_written
from contrastive_align.trl_seam import create_model_from_path


logger = logging.get_logger(__name__)


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece")  # how their names begin
MERGED_BASE = "merged_base"
MERGE_NOTE = "merged_from.json"
# Mean change of log-probs, in nats per token, that counts as rounding when an adapter is merged.
MERGE_TOLERANCE = 1e-3
MERGE_TOLERANCE_16_BIT = 0.1


@dataclass
class Start:
    """The model a run starts from, which is also its reference."""

    model: str | PeftModel  # an id or folder without an adapter; on a 4-bit or 8-bit base, a model with its adapter
    description: str  # one line with model, revision and adapter, and whether the adapter was merged
    tokenizer_source: str  # model id or folder
    base: str  # without the adapter
    adapter: str | None = None


def adapter_config_path(model_id: str, revision: str | None = None) -> str | None:
    """Return the path of the ``adapter_config.json`` of a folder or hub id, or None if it has none."""
    return find_adapter_config_file(model_id, revision=revision)


def placement() -> dict[str, None]:
    """Return the options for loading where each process holds a copy, or a part, on its own device, as in TRL."""
    state = PartialState()
    alone = state.num_processes == 1 and state.distributed_type != DistributedType.DEEPSPEED
    return {} if alone else {"device_map": None}


def resolve_start(
    model_id: str,
    *,
    output_dir: str,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    allow_pickled_adapter: bool = False,
) -> Start:
    """Resolve a model id or folder, which may be an adapter, to the model that training starts from.

    - No adapter: the id itself.
    - Adapter on a base in full precision: base and adapter are merged and written to ``<output_dir>/merged_base``. That
      folder is both the initial policy and the reference, and a new LoRA saved on top of it names it as its base.
    - Adapter on a 4-bit or 8-bit base, where merging would lose precision: the adapter is kept and trained further; TRL
      keeps a frozen copy of it as the reference.

    Args:
        model_id: a folder, or a hub id whose revision is in ``model_init_kwargs``, which are as in TRL's configs.
        output_dir: the folder of the run.
        quantization_config: of the base.
        trust_remote_code: whether code from the hub may run.
        allow_pickled_adapter: whether adapter weights may be a pickle, which can run code when it is read.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the adapter's base cannot be loaded.
        ValueError: the adapter is a pickle and ``allow_pickled_adapter`` is False, or merging it changes the model.
    """
    kwargs = dict(model_init_kwargs or {})
    revision = kwargs.get("revision")
    check_exists(model_id)
    config_path = adapter_config_path(model_id, revision)
    revision_note = f" (revision {revision})" if revision and revision != "main" else ""
    if config_path is None:
        return Start(model_id, f"{model_id}{revision_note}", model_id, model_id)

    _check_adapter_weights(model_id, revision, allow_pickled_adapter)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    kwargs.pop("revision", None)  # of the adapter; its config names the base's
    config = PeftConfig.from_pretrained(model_id, revision=revision)
    if config.is_prompt_learning:
        raise ValueError(
            f"{model_id} is a {config.peft_type.value} adapter: virtual tokens, which cannot be merged into weights. "
            "Start from a LoRA or from a whole model."
        )
    base_id = base_of(config.base_model_name_or_path, model_id)
    tokenizer_source = model_id if _has_tokenizer(model_id, revision, trust_remote_code) else base_id
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    with base_is_named(base_id, model_id):
        base_config = AutoConfig.from_pretrained(base_id, revision=config.revision, trust_remote_code=trust_remote_code)
    if kwargs.get("quantization_config") is not None or hasattr(base_config, "quantization_config"):
        kwargs |= placement()
        with base_is_named(base_id, model_id):
            base = create_model_from_path(base_id, revision=config.revision, **kwargs)
        if tokenizer_source == model_id:
            _add_adapter_rows(base, load_tokenizer(model_id, revision=revision, trust_remote_code=trust_remote_code))
        model = PeftModel.from_pretrained(base, model_id, is_trainable=True, revision=revision)
        description = f"{base_id}, quantised, + adapter {model_id}{revision_note}, kept"
        return Start(model, description, tokenizer_source, base_id, model_id)

    merged = Path(output_dir) / MERGED_BASE
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _merge(model_id, revision, base_id, config.revision, merged, tokenizer_source, kwargs)
    description = f"{base_id} + adapter {model_id}{revision_note}, merged into {merged}"
    return Start(str(merged.resolve()), description, str(merged.resolve()), base_id, model_id)


def merge_notes(base: str) -> list[dict[str, Any]]:
    """Return the notes of the merges that a base is the result of, the first merge first; none of a plain model.

    A note has ``base``, ``base_revision``, ``adapter``, ``adapter_revision`` and ``adapter_sha256``.
    """
    notes: list[dict[str, Any]] = []
    while (note := Path(base) / MERGE_NOTE).is_file():
        notes.insert(0, json.loads(note.read_text()))
        base = notes[0]["base"]
    return notes


def unmerged(base: str) -> str:
    """Return the model that a base was merged from, and from which that one was, to the first."""
    notes = merge_notes(base)
    return notes[0]["base"] if notes else base


def card_of(model_id: str) -> str | None:
    """Return the model card of a folder or hub id, or None if it has none that can be read."""
    file = file_of(model_id, "README.md")
    return None if file is None else Path(file).read_text(encoding="utf-8", errors="replace")


def _merge(
    adapter: str, adapter_revision, base_id: str, base_revision, merged: Path, tokenizer_source: str, model_init_kwargs
) -> None:
    dtype = model_init_kwargs.get("dtype", "float32")
    note = {
        "base": base_id,
        "base_revision": base_revision,
        "adapter": adapter,
        "adapter_revision": adapter_revision,
        "adapter_sha256": hash_of_adapter(adapter, adapter_revision),
        "dtype": str(dtype).removeprefix("torch."),
    }
    note_path = merged / MERGE_NOTE
    if note_path.is_file() and json.loads(note_path.read_text()) == note:
        return  # a resumed run reuses its merged base
    if merged.exists():
        was = json.loads(note_path.read_text()) if note_path.is_file() else {}
        differs = [f"{k}: {was.get(k)} there, {v} here" for k, v in note.items() if was.get(k) != v]
        raise ValueError(
            f"{merged} holds another merged base ({'; '.join(differs)}). Choose another output_dir, or remove that "
            "folder if nothing needs it any more."
        )
    with base_is_named(base_id, adapter):
        base = create_model_from_path(base_id, revision=base_revision, **{**model_init_kwargs, "device_map": None})
    revision = adapter_revision if tokenizer_source == adapter else base_revision
    trust = model_init_kwargs["trust_remote_code"]
    tokenizer = load_tokenizer(tokenizer_source, revision=revision, trust_remote_code=trust)
    _add_adapter_rows(base, tokenizer)
    model = PeftModel.from_pretrained(base, adapter, revision=adapter_revision).eval()
    before = _probe_logps(model)
    model = model.merge_and_unload(safe_merge=True)
    aside = merged.with_name(merged.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside)
        del model, base
        _check_merge(before, create_model_from_path(str(aside), dtype=dtype, device_map=None), adapter)
        tokenizer.save_pretrained(aside)
        (aside / MERGE_NOTE).write_text(json.dumps(note, indent=2))
        aside.rename(merged)
    except Exception as error:
        if (cause := why_not_written(error, aside)) is None:
            raise
        way_out = "Make room or give another folder."
        raise OSError(cause.errno, f"{merged} was not written: {cause.strerror}. {way_out}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _add_adapter_rows(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the rows of an adapter's own tokens (such as conditions), which its base lacks."""
    give_rows(base, max(tokenizer.get_vocab().values()) + 1, fresh=[], old=len(tokenizer), seed=42)


@torch.no_grad()
def _probe_logps(model: PreTrainedModel | PeftModel) -> Tensor:
    """Compute the log-probs of a fixed sequence of 32 tokens."""
    vocabulary = model.get_input_embeddings().weight.size(0)
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    log_probs = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(2, ids[:, 1:, None])[0, :, 0].cpu()


def _check_merge(before: Tensor, merged: PreTrainedModel, adapter: str) -> None:
    """Raise if merging moved the log-probs."""
    gap = (_probe_logps(merged.eval()) - before).abs().mean().item()
    tolerance = MERGE_TOLERANCE if merged.dtype == torch.float32 else MERGE_TOLERANCE_16_BIT
    if not gap <= tolerance:
        raise ValueError(
            f"Merging {adapter} into its base moves log-probs by {gap:.3g} nats per token (expected at most "
            f"{tolerance:g}). An adapter on tied embeddings does that. "
            "Instead, load model = PeftModel.from_pretrained(base, adapter, is_trainable=True), and pass this model to "
            "the trainer, which keeps a frozen copy of the adapter as the reference."
        )


def hash_of_adapter(adapter: str, revision: str | None) -> str:
    """Hash the weights and the config of an adapter."""
    name = ADAPTER_WEIGHTS if file_of(adapter, ADAPTER_WEIGHTS, revision) else PICKLED_WEIGHTS
    digest = hashlib.sha256(Path(file_of(adapter, name, revision)).read_bytes())
    digest.update(Path(adapter_config_path(adapter, revision)).read_bytes())
    return digest.hexdigest()


def file_of(model_id: str, name: str, revision: str | None = None) -> str | None:
    """Return the path of a file in a folder or (cached) hub repository, or None if it has none."""
    try:
        return cached_file(model_id, name, revision=revision)
    except OSError:
        return None


def check_output_dir(output_dir: str | os.PathLike, *, adapter: bool) -> None:
    """Raise ValueError if ``output_dir`` is a file or holds weights of the other kind (whole model or adapter).

    Loading such a folder would mix the two.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir {str(output_dir)!r} is a file, expected a folder or a new name.")
    whole = [f for f in ("model.safetensors", "model.safetensors.index.json") if (folder / f).is_file()]
    if adapter and whole:
        raise ValueError(
            f"{output_dir} holds a whole model ({whole[0]}), and this run saves an adapter. Choose another output_dir."
        )
    if not adapter and (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{output_dir} holds an adapter ({ADAPTER_CONFIG}), which would be loaded on top of the whole model that "
            "this run saves. Choose another output_dir."
        )


def base_of(base: str | None, adapter: str) -> str:
    """Return the base that an adapter's config names, or the merged base beside the adapter if the run was moved.

    Raises:
        ValueError: the config names no base.
        FileNotFoundError: the folder that it names does not exist.
    """
    # The merged base moves with the run's folder; for a checkpoint it is one folder up.
    beside = [os.path.join(folder, MERGED_BASE) for folder in (adapter, os.path.dirname(os.path.abspath(adapter)))]
    if not base:
        raise ValueError(
            f"{adapter}/{ADAPTER_CONFIG} names no base model (base_model_name_or_path). Fill it in with the model the "
            "adapter was trained on."
        )
    if os.path.isabs(base) and not os.path.isdir(base):
        base = next((folder for folder in beside if os.path.isdir(folder)), base)
    if is_missing_folder(base):
        raise FileNotFoundError(
            f"No folder {base!r}, the base of the adapter {adapter} (base_model_name_or_path in its {ADAPTER_CONFIG}). "
            "Put the base there, or name a folder or hub id that holds it in a copy of that file."
        )
    return base


@contextmanager
def base_is_named(base_id: str, adapter: str) -> Iterator[None]:
    """Name base, adapter and way out in an OSError: transformers names no model when the hub is out of reach."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{adapter} is an adapter, and its base {base_id!r} cannot be loaded: {_first_line(error)} "
            f"Download the base, or set base_model_name_or_path in {ADAPTER_CONFIG} of a copy of the adapter to a "
            "folder that holds it."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}."


def named(model_id: str) -> str:
    """Quote a model's name and, where it is no folder, say where it was looked for: it may be misspelled."""
    return f"{model_id!r}" if os.path.isdir(model_id) else f"{model_id!r} (no such folder in {os.getcwd()})"


def is_missing_folder(model_id: str) -> bool:
    """Return whether a model id looks like a folder, and there is none of this name."""
    looks_local = os.path.isabs(model_id) or model_id.startswith((".", "~")) or model_id.count("/") > 1
    return looks_local and not os.path.isdir(model_id)


def check_exists(model_id: str) -> None:
    """Raise FileNotFoundError where a model id looks like a folder that is not there."""
    if is_missing_folder(model_id):
        raise FileNotFoundError(f"No folder {model_id!r}. Give a folder with a model or an adapter, or a hub id.")


def _check_adapter_weights(model_id: str, revision: str | None, allow_pickle: bool) -> None:
    readable = (ADAPTER_WEIGHTS, PICKLED_WEIGHTS) if allow_pickle else (ADAPTER_WEIGHTS,)
    if any(file_of(model_id, name, revision) for name in readable):
        return
    if os.path.isdir(model_id) and not os.path.isfile(os.path.join(model_id, PICKLED_WEIGHTS)):
        raise FileNotFoundError(
            f"{model_id} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. The adapter was not saved whole."
        )
    raise ValueError(
        f"{model_id} has no {ADAPTER_WEIGHTS}. If its weights are a pickle ({PICKLED_WEIGHTS}), which can run code "
        "when it is read: ask for safetensors, or set allow_pickled_adapter=True if you trust it (it is then read with "
        "weights_only=True)."
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


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model id or folder.

    Raises:
        OSError: there is none, its files are damaged, or the hub cannot be reached and the local cache has none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises this very class
        reason = _first_line(error)
        if os.path.isdir(source) and not any(name.startswith(TOKENIZER_FILES) for name in os.listdir(source)):
            reason = "the folder has no tokenizer.json and no tokenizer_config.json."
        elif not isinstance(error, OSError | ValueError):
            reason = f"its files are damaged ({type(error).__name__}: {reason})"
        raise OSError(
            f"The tokenizer of {named(source)} cannot be loaded: {reason} Give a folder that holds it, or a hub id "
            "that can be downloaded."
        ) from error


def check_generates(config: PreTrainedConfig, name: str, *, encoder_decoder: bool = False) -> None:
    """Raise ValueError where a config is not of a causal language model, or of an encoder-decoder where that is taken.

    A class that transformers does not have, which a repository brings, or that is not named, is passed over.
    """
    if config.is_encoder_decoder:
        if encoder_decoder:  # a checkpoint may name the class without its head
            return
        raise ValueError(
            f"{name} is an encoder-decoder, expected a causal language model. FDPGTrainer takes encoder-decoders."
        )
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None)
    if found is not None and not found.can_generate():
        raise ValueError(
            f"{name} is of the class {named} (architectures in its config.json), expected a model that generates text, "
            "such as LlamaForCausalLM."
        )


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of tensors with NaN or infinite entries; those of 8 bits or less, or not here, are passed over.

    Of a weight that DeepSpeed or FSDP shards, the part of this process is looked at.

    >>> not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, torch.nan])), ("c", None)])
    ['b']
    """
    parts = ((name, getattr(t, "ds_tensor", t)) for name, t in tensors if t is not None)
    parts = ((name, t.to_local() if isinstance(t, DTensor) else t) for name, t in parts)
    present = ((name, t) for name, t in parts if t.is_floating_point() and not t.is_meta)
    return [name for name, t in present if t.dtype.itemsize > 1 and not torch.isfinite(t).all()]


def check_weights_are_finite(model: nn.Module, name: str, everywhere: Callable[[list[str]], list[str]] = list) -> None:
    """Raise ValueError where a loaded weight is NaN or infinite, before anything is computed with it.

    Args:
        name: what the model is called.
        everywhere: where it is sharded, gathers the names that any process finds.
    """
    if bad := everywhere(not_finite(model.named_parameters())):
        raise ValueError(
            f"'{bad[0]}' of {name} has NaN or infinite entries ({len(bad)} such weights), expected numbers: its file "
            "is damaged, or the run that wrote it diverged. Download it again, or take another model or checkpoint."
        )


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set EOS as the padding token of a tokenizer that has none, as TRL does."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def context_length(model: nn.Module) -> int | None:
    """Return the number of tokens that the model's positions are made for, or None if its config names none.

    >>> from types import SimpleNamespace
    >>> from transformers import LlamaConfig, MambaConfig
    >>> context_length(SimpleNamespace(config=LlamaConfig(max_position_embeddings=4096)))
    4096
    >>> context_length(SimpleNamespace(config=MambaConfig())) is None
    True
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def embedding_rows(model: str | nn.Module) -> int | None:
    """Return how many tokens a model, or the one that a name stands for, has an embedding of; None if it is unknown."""
    if isinstance(model, nn.Module):
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
        return rows if isinstance(rows, int) and rows > 0 else None
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError):  # a name that needs further arguments, which the trainer gives when it loads it
        return None
    return getattr(config, "vocab_size", None)


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's EOS, then those of the generation config.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7]))
    >>> eos_token_ids(model, SimpleNamespace(eos_token_id=7)), eos_token_ids(model, SimpleNamespace(eos_token_id=None))
    ([7, 2], [2, 7])
    """
    generated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(generated if isinstance(generated, list) else [generated])]
    return list(dict.fromkeys(token for token in found if token is not None))


def decoder_start_token(model: PreTrainedModel) -> int:
    """Return the token the decoder begins with.

    Raises:
        ValueError: neither the config nor the generation config names one.
    """
    for config in (model.config, model.generation_config):
        if getattr(config, "decoder_start_token_id", None) is not None:
            return config.decoder_start_token_id
    raise ValueError(
        f"{type(model).__name__} names no decoder_start_token_id. Set model.config.decoder_start_token_id."
    )


@torch.no_grad()
def give_rows(model: PreTrainedModel, rows: int, *, fresh: list[int], old: int, seed: int) -> None:
    """Resize embedding and head to at least ``rows`` rows; draw new rows, and those numbered ``fresh``, like old ones.

    Each dimension of a new row is normal, with the mean and standard deviation of the first ``old`` rows.
    """
    embedding = model.get_input_embeddings()
    had = embedding.weight.size(0)
    if rows > had:
        devices = [embedding.weight.device] if embedding.weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the resizing draws rows of its own
            model.resize_token_embeddings(rows, mean_resizing=False)
    fresh = sorted({*fresh, *range(had, rows)})
    if not fresh:
        return
    known = min(old, had, fresh[0])  # new tokens come after all the old ones
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    of_head = [] if head is None else [head.weight, getattr(head, "bias", None)]
    for weight in [embedding.weight, *(w for w in of_head if w is not None and w is not embedding.weight)]:
        weight[fresh] = _rows_like(weight[:known], len(fresh), generator).to(weight)


def _rows_like(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n rows with the mean and standard deviation of the given ones in each dimension."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    noise = torch.randn(n, *rows.shape[1:], generator=generator).to(rows)
    return rows.mean(0) + rows.std(0, correction=0) * noise


def verify_saved(folder: str | os.PathLike, *, may_be_sharded: bool = False) -> None:
    """Read back every weight file of a saved model or adapter, and raise if one is missing or not finite.

    With ``may_be_sharded`` warn, rather than raise, if there are no weight files: DeepSpeed and FSDP may write
    checkpoints in formats of their own.

    Raises:
        ValueError: no weights, a file missing, or an empty, NaN or infinite tensor (ZeRO-3 can save empty adapters).
    """
    folder = Path(folder)
    files = {file.name for file in folder.glob("*.safetensors")}
    if not files and may_be_sharded:
        logger.warning(f"{folder} has a sharded checkpoint and no *.safetensors: consolidate it before loading it.")
        return
    for index in folder.glob("*.safetensors.index.json"):
        files |= set(json.loads(index.read_text())["weight_map"].values())
    if not files:
        raise ValueError(f"Nothing was saved: {folder} has no *.safetensors.")
    for file in sorted(folder / name for name in files):
        if not file.is_file():
            raise ValueError(f"{file} is named in the index but is not there. The save lost it; do not use it.")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if not tensor.numel():
                    raise ValueError(f"{file}: '{name}' is empty, expected weights. The save lost them; do not use it.")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{file}: '{name}' has NaN or infinite entries. Training diverged: lower the learning rate."
                    )


@torch.no_grad()
def undo_rounding(model: nn.Module) -> None:
    """Give what trains on a quantised model the dtype of the weights that are not quantised.

    TRL casts it to bfloat16, in which an embedding does not move at usual learning rates (its relative step is 2^-8),
    and which a forward pass without autocast cannot multiply with float32. Modules to save and token rows whose values
    are the base's but for this rounding become the base's own, so that training starts from it.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    dtype = next(frozen, torch.bfloat16)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            for saved in module.modules_to_save.values():
                for name, weight in saved.named_parameters():
                    _become(weight, own[name])
        elif isinstance(module, TrainableTokensLayer):
            own_rows = module.get_base_layer().weight
            for adapter, rows in module.trainable_tokens_delta.items():
                _become(rows, own_rows[module.token_indices[adapter]])
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype == torch.bfloat16:
            weight.data = weight.to(dtype)


def _become(weight: Tensor, own: Tensor) -> None:
    """Make a weight what it was before it was rounded, where that is the base's."""
    if own.is_floating_point() and torch.equal(weight.to(torch.bfloat16), own.to(weight.device, torch.bfloat16)):
        weight.data = own.to(weight.device, copy=True)
