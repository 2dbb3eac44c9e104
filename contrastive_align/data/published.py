"""What of a run's folder may be published: all but what names places of the machine that it ran on."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# Options of the run, with paths, host names and tokens, as a pickle. Nothing that loads a model reads it.
LEFT_OUT = ("training_args.bin",)
_PATH = re.compile(r"(?<![\w.:/~\\])(?:~|[A-Za-z]:)?[/\\](?:[\w.@+=,~ -]+[/\\])+[\w.@+=,~-]*")


def published_copy(folder: Path, ignore: Sequence[str] = ()) -> Path:
    """Copy a folder, to be uploaded in its place, into one beside its files; the caller removes it.

    Files are linked where the disk can. In JSON files and cards a path of this machine becomes its last part: the base
    of an adapter that is a local folder is named, and the card says where to put its path. Whoever loads the copy needs
    that base; a base beside the adapter (``merged_base``) goes up with it, and without an adapter it does not.
    """
    copy = folder / f"_published.{secrets.token_hex(6)}"
    is_adapter = (folder / "adapter_config.json").is_file()
    try:
        for root, folders, names in os.walk(folder):
            inside = Path(root).relative_to(folder)
            folders[:] = [name for name in folders if not name.startswith("_published.")]
            if not is_adapter:
                folders[:] = [name for name in folders if name != "merged_base"]
            for name in names:
                path = (inside / name).as_posix()
                if name in LEFT_OUT or any(fnmatch.fnmatch(path, pattern) for pattern in ignore):
                    continue
                (copy / inside).mkdir(parents=True, exist_ok=True)
                if not _written_without_paths(Path(root, name), copy / path):
                    _link(Path(root, name), copy / path)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def without_paths(text: str) -> str:
    r"""Replace every absolute path in a text by its last part.

    >>> without_paths("base /home/me/models/llama, from https://huggingface.co/a/b, 1/2 or and/or")
    'base llama, from https://huggingface.co/a/b, 1/2 or and/or'
    >>> without_paths("~/runs/a/summary.json"), without_paths("C:\\Users\\me\\rows.jsonl")
    ('summary.json', 'rows.jsonl')
    """
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def _written_without_paths(source: Path, to: Path) -> bool:
    """Write the copy of a file that may name paths; tokenizers, whose entries are no paths, are left as they are."""
    if source.name.startswith(("tokenizer", "vocab", "special_tokens", "added_tokens")):
        return False
    if source.suffix == ".json":
        try:
            found = json.loads(source.read_text(encoding="utf-8"))
        except ValueError:
            return False
        to.write_text(json.dumps(_cleaned(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return True
    if source.suffix in (".md", ".html"):
        to.write_text(without_paths(source.read_text(encoding="utf-8")), encoding="utf-8")
        return True
    return False


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {without_paths(key): _cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_cleaned(entry) for entry in value]
    return without_paths(value) if isinstance(value, str) else value


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, to)
