"""``contrastive-align merge ADAPTER --output_dir=FOLDER``: whole weights of base and adapter, proven on rows."""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from contrastive_align.conditions import Condition
from contrastive_align.conditions.conditions import FILE
from contrastive_align.conditions.tokens import load_with_condition_tokens
from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.published import published_copy
from contrastive_align.demo.task import all_prompts
from contrastive_align.launch.common import command_line
from contrastive_align.launch.past_run import chats, read_summary
from contrastive_align.launch.quiet import quiet_run
from contrastive_align.launch.step_files import read_rows
from contrastive_align.launch.usage import UsageError, UsageParser
from contrastive_align.models.loading import (
    adapter_config_path,
    base_is_named,
    base_of,
    check_exists,
    hash_of_adapter,
    is_missing_folder,
    merge_notes,
    named,
)
from contrastive_align.report.card import Card, complete_card, results_section
from contrastive_align.report.page import SAMPLES_FILE
from contrastive_align.report.summary import wrap
from contrastive_align.trainers.base import name_and_licence
from contrastive_align.versions import SUPPORTED


LINEAGE = "lineage.json"
ROWS = 32  # of the proof
MOST = {torch.float32: 1e-3}  # nats per token, on average, above which a merge is refused
MOST_16_BIT = 0.1
# Files of a run that go with the merged model.
KEPT = ("summary.json", "report.html", SAMPLES_FILE, "log.jsonl", FILE)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Merge, prove that log-probs stay, save model, card and lineage; return the lineage."""
    args = build_parser().parse_args(argv)
    adapter, output = args.adapter, Path(args.output_dir)
    quiet_run(on_cpu=torch.accelerator.current_accelerator() is None)
    check_exists(adapter)
    config_path = adapter_config_path(adapter)
    if config_path is None:
        raise UsageError(
            f"{named(adapter)} is no adapter (no adapter_config.json): there is nothing to merge. Give the output_dir "
            "of a run with --use_peft, or the hub id of an adapter."
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir: '{output}' is a file, expected a folder, or a new name.")
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"--output_dir: {output} is not empty. Give another, or remove it.")
    if args.push_to_hub and not args.hub_model_id:
        raise UsageError("--push_to_hub needs --hub_model_id=owner/name.")
    config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    summary = read_summary(adapter)
    base_name = base_of(config.get("base_model_name_or_path"), adapter)
    revision, four_bit = config.get("revision") or "main", _four_bit(args, summary)
    base = Base(base_name, revision, args.dtype, args.trust_remote_code, four_bit)

    model, tokenizer = base.with_adapter(adapter)
    rows, dtype = proof_rows(adapter, args.rows, tokenizer), model.dtype
    doubled = not four_bit and computes_in_double(model)
    before = token_logps(model.double() if doubled else model, rows)
    if four_bit:  # packed weights would round what is merged
        del model
        gc.collect()
        model, tokenizer = base.with_adapter(adapter, dequantised=True)
        dtype = model.dtype
    merged = model.merge_and_unload(safe_merge=True)
    merged = merged.float() if doubled else merged
    aside = output.with_name(f"{output.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_whole(merged, tokenizer, aside)
        del merged, model
        gc.collect()
        plain = base.auto().from_pretrained(aside, dtype=dtype, trust_remote_code=args.trust_remote_code).eval()
        after = token_logps(plain.double() if doubled else plain, rows)
        gap = (after - before).abs()
        found = {"mean_nats_per_token": gap.mean().item(), "max_nats_per_token": gap.max().item(), "tokens": len(gap)}
        _check(found, dtype, four_bit, adapter)
        computed_in = "float64" if doubled else str(dtype).removeprefix("torch.")
        lineage = {
            **origin(adapter, base_name, revision, summary),
            "base_quantisation": "4-bit, dequantised before the merge" if four_bit else None,
            "data": {"name": summary.get("data", {}).get("train", {}).get("name")}
            | {"hash": summary.get("facts", {}).get("data_hash")},
            "dtype": str(dtype).removeprefix("torch."),
            "parity": {"rows": len(rows), "computed_in": computed_in, **found},
            "versions": {package: version(package) for package in [*SUPPORTED, "contrastive_align"]},
            "command": command_line("merge", list(argv)),
        }
        (aside / LINEAGE).write_text(json.dumps(lineage, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in KEPT:
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, aside / name)
        _write_card(aside, args, lineage, summary, plain, tokenizer)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    said = f"log-probs of {found['tokens']} tokens moved by {found['mean_nats_per_token']:.2g} nats on average, "
    why = ["the base computed in 4 bits, and the merged model does not"] if four_bit else []
    why += ["computed in float64"] if doubled else []
    why += [f"{lineage['dtype']} rounds the merged weights; --dtype=float32 does not"] if dtype.itemsize < 4 else []
    said += f"{found['max_nats_per_token']:.2g} at most" + (f" ({'; '.join(why)})" if why else "")
    print("\n".join(wrap(f"{output}: {lineage['dtype']}, {said}")))
    print(f'load with  {base.auto().__name__}.from_pretrained("{output}")')
    if args.push_to_hub:
        push(output, args.hub_model_id, private=args.hub_private_repo)
    return lineage


def origin(adapter: str, base: str, revision: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a merged model was made from, for its lineage.

    Args:
        adapter: the adapter that is merged.
        base, revision: the model that it is merged into, which may be the result of earlier merges.
        summary: of the adapter's run; empty if there is none.

    Returns:
        ``base`` and ``base_revision`` of the model before all merges; ``adapters``, the merged ones in order, each with
        its ``sha256``; ``start_adapter``, the one that the last run began from, or None, and whether that run
        ``continued`` it, so that its weights became those of ``adapter``. An adapter whose files are gone has a
        ``note``, and the hash that was taken when it was merged, or None.
    """
    notes, model = merge_notes(base), summary.get("model", {})
    start, start_base, of_start = model.get("start_adapter"), model.get("start_base"), model.get("revision")
    continued = start is not None and start_base == base
    if start is not None and not continued and not notes:  # the merged base has lost its note
        notes = [{"base": start_base, "base_revision": None, "adapter": start, "adapter_revision": of_start}]
    merged = [_with_hash(note["adapter"], note["adapter_revision"], note.get("adapter_sha256")) for note in notes]
    return {
        "base": notes[0]["base"] if notes else base,
        "base_revision": (notes[0]["base_revision"] or "main") if notes else revision,
        "adapters": [*merged, _with_hash(adapter, None)],
        "start_adapter": _with_hash(start, of_start) if continued else merged[-1] if merged else None,
        "continued": continued,
    }


def _with_hash(adapter: str, revision: str | None, noted: str | None = None) -> dict[str, Any]:
    """Return an adapter's name and hash: the one that was noted when it was merged, or that of its files."""
    found: dict[str, Any] = {"adapter": adapter, "sha256": noted}
    if not is_missing_folder(adapter) and adapter_config_path(adapter, revision) is not None:
        return found | {"sha256": noted or hash_of_adapter(adapter, revision)}
    how = "the hash was taken when it was merged" if noted else "there is no hash of it"
    return found | {"note": f"its files are no longer there; {how}"}


def computes_in_double(model: Any) -> bool:
    """Return whether log-probs of the model and of the merged one are computed in float64.

    The rounding of a float32 forward pass is four times what the merge itself changes (9e-6 and 2e-6 nats at most over
    4,000 tokens of a model of 6 layers), so that in float32 the comparison would show arithmetic and not weights. Those
    of 16 bits are compared as they compute, and so are those that do not fit into memory twice.
    """
    if model.dtype != torch.float32:
        return False
    more = sum(p.numel() * p.element_size() for p in model.parameters())
    return psutil.virtual_memory().available > 1.5 * more


class Base:
    """The base of an adapter, to be loaded as it was in training, or with its packed weights in full."""

    def __init__(self, name: str, revision: str, dtype: str, trust: bool, four_bit: dict[str, Any] | None) -> None:
        self.name, self.four_bit = name, four_bit
        self.options = {"revision": revision, "dtype": dtype, "trust_remote_code": trust}

    def auto(self) -> Any:
        """Return the class that loads it."""
        options = {name: self.options[name] for name in ("revision", "trust_remote_code")}
        config = AutoConfig.from_pretrained(self.name, **options)
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    def with_adapter(self, adapter: str, *, dequantised: bool = False) -> tuple[Any, Any]:
        """Return base and adapter, not merged, and the adapter's tokenizer."""
        quantised = {}
        if self.four_bit:
            quantised["quantization_config"] = BitsAndBytesConfig(**self.four_bit)
        with base_is_named(self.name, adapter):
            model = self.auto().from_pretrained(self.name, **self.options, **quantised)
        if dequantised:
            model = model.dequantize()
            if self.options["dtype"] == "auto":
                model = model.to(torch.bfloat16 if model.dtype == torch.float16 else model.dtype)
        if (Path(adapter) / "tokenizer_config.json").is_file():
            model, tokenizer = load_with_condition_tokens(model, adapter)
        else:
            model = PeftModel.from_pretrained(model, adapter)
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.options["revision"])
        return model.eval(), tokenizer


def _four_bit(args: argparse.Namespace, summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of ``BitsAndBytesConfig`` that the base was trained with; None for weights in full."""
    found = summary.get("model", {}).get("quantisation_options")
    if args.load_in_4bit and not found:
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    return found


def proof_rows(adapter: str, file: str | None, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Return rows to compare log-probs on: token ids, and how many of them are the prompt's.

    They are ``file``'s (JSONL with ``prompt`` and ``generations``), or else what the run sampled (``samples.json``), or
    sentences of the bundled task where it sampled nothing.

    Raises:
        UsageError: the file has no generation with a token.
    """
    samples = Path(adapter) / SAMPLES_FILE
    pairs: list[tuple[str, str]] = []
    if file is not None:
        found = [(row["prompt"], text) for row in read_rows(file, generations=True) for text in row["generations"]]
        pairs = [(p if isinstance(p, str) else "\n".join(m["content"] for m in p), text) for p, text in found]
    elif samples.is_file():
        sampled = json.loads(samples.read_text(encoding="utf-8"))
        pairs = [pair for stage in sampled["stages"] for pair in zip(sampled["prompts"], stage["texts"], strict=True)]
    rows = _as_ids(pairs, tokenizer)
    if not rows and file is not None:
        raise UsageError(f"--rows: {file} has no generation with a token to compare log-probs on. Give another file.")
    return rows or _as_ids([(prompt, prompt) for prompt in all_prompts()], tokenizer)


def _as_ids(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], int]]:
    rows = []
    for prompt, text in pairs[:ROWS]:
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) > max(1, len(start)):
            rows.append((ids[:1024], max(1, len(start))))
    return rows


@torch.no_grad()
def token_logps(model: Any, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Return the log-prob of every token after the prompts, in nats, all in one vector."""
    found = []
    for ids, start in rows:
        tokens = torch.tensor([ids], device=model.device)
        if model.config.is_encoder_decoder:
            logits, labels = model(input_ids=tokens[:, :start], labels=tokens[:, start:]).logits, tokens[:, start:]
        else:
            logits, labels = model(input_ids=tokens).logits[:, start - 1 : -1], tokens[:, start:]
        logps = logits.double().log_softmax(-1).gather(2, labels.unsqueeze(2))
        found.append(logps.flatten().cpu())
    return torch.cat(found)


def _check(found: dict[str, Any], dtype: torch.dtype, four_bit: Any, adapter: str) -> None:
    most = MOST_16_BIT if four_bit else MOST.get(dtype, MOST_16_BIT)
    if not found["mean_nats_per_token"] <= most:
        raise ValueError(
            f"Merging {adapter} moves log-probs by {found['mean_nats_per_token']:.3g} nats per token, expected at most "
            f"{most:g}. An adapter on tied embeddings does that: use base and adapter as they are."
        )


def save_whole(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer; what was dequantised says so no more."""
    folder.mkdir(parents=True)
    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_card(
    folder: Path, args: argparse.Namespace, lineage: dict, summary: dict, model: Any, tokenizer: Any
) -> None:
    earlier = Path(args.adapter) / "README.md"
    text = earlier.read_text(encoding="utf-8") if earlier.is_file() else "---\nlibrary_name: transformers\n---\n"
    with atomic_write(folder / "README.md") as file:
        file.write(text.encode())
    condition = None
    if (folder / FILE).is_file():
        kept = Condition.load(folder)
        condition = (kept.kind, str(next(iter(kept.askable().values()), "")))
    data = summary.get("data", {}).get("train", {}).get("name")
    sections = re.findall(r"^## Objective\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[:1]
    sections += [results_section(summary)] if summary.get("table") else []
    base, licence = name_and_licence(lineage["base"])
    complete_card(
        folder / "README.md",
        Card(
            title=(args.hub_model_id or Path(args.output_dir).name).split("/")[-1],
            folder=args.hub_model_id or ".",
            base=base,
            base_licence=licence,
            start_adapter=lineage["start_adapter"] and lineage["start_adapter"]["adapter"],
            continued=lineage["continued"],
            data=(data,) if data else (),
            condition=condition,
            encoder_decoder=model.config.is_encoder_decoder,
            chat=chats(summary, tokenizer),
            tokenizer_options="",
        ),
        [section.strip() for section in sections],
        summary=summary,
    )


def push(folder: Path, repo: str, *, private: bool | None) -> None:
    """Upload the folder; what goes up names no path of this machine."""
    api, copy = HfApi(), published_copy(folder)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        print(api.upload_folder(repo_id=repo, folder_path=copy, commit_message="Merged with contrastive-align"))
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    p = UsageParser(prog="contrastive-align merge", description=__doc__, allow_abbrev=False)
    p.add_argument("adapter", metavar="ADAPTER", help="The folder or hub id of an adapter.")
    p.add_argument("--output_dir", required=True, help="Folder that the whole model is written to; new or empty.")
    p.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="Dtype of the weights."
    )
    p.add_argument(
        "--rows",
        help="JSONL with prompt and generations, on which log-probs are compared; by default the run's samples.",
    )
    p.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="The adapter was trained on a base in 4 bits. Runs of this package have that on record.",
    )
    p.add_argument("--push_to_hub", action="store_true", help="Upload the merged model.")
    p.add_argument("--hub_model_id", help="Name of the upload on the hub: owner/name.")
    p.add_argument("--hub_private_repo", action="store_true", default=None, help="Make the upload private.")
    p.add_argument("--trust_remote_code", action="store_true", help="Run code of the model's repository.")
    return p
