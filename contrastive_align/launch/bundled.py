"""The YAML files and accelerate configs that come with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from contrastive_align.launch.usage import UsageError, nearest


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"yamls": "YAML file", "accelerate_configs": "accelerate config"}
FORMER_NAMES = {"deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3", "deepspeed_zero3_offload": "zero3_offload"}
FORMER_NAMES |= {"fsdp": "fsdp2"}


def bundled(folder: str) -> dict[str, Path]:
    """Return the names and paths of one of ``FOLDERS``."""
    return {path.stem: path for path in sorted((ROOT / folder).glob("*.yaml"))}


def find_yaml(name: str, folder: str) -> str:
    """Return the path of a file that is there, or else of the bundled one of that name.

    The bundled ones are found by name (``reward_qlora``), and by their path in the repository
    (``yamls/reward_qlora.yaml``), too.

    Raises:
        UsageError: neither is there.
    """
    path, known = Path(name).expanduser(), bundled(folder)
    if path.is_file():
        return str(path)
    stem = FORMER_NAMES.get(path.stem, path.stem)
    if stem in known and path.suffix in ("", ".yaml") and path.parent.name in ("", folder):
        return str(known[stem])
    hint = nearest(path.stem, known) if name == path.stem else ""
    raise UsageError(
        f"no {FOLDERS[folder]} '{name}' (looked in {Path.cwd()}){hint or '.'} Bundled are {', '.join(known)}."
    )
