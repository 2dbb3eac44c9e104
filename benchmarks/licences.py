"""The licence of every package that this one needs, with all extras and through all others, as installed here.

python benchmarks/licences.py                # of contrastive-align
python benchmarks/licences.py transformers   # of another package, with all of its extras

A licence is read from License-Expression, else the classifiers, else the License field, else the first line of the
licence file. The exit status is 1 where one is unknown, a package is missing, or a licence forbids commercial use. GPL
and AGPL allow it, and are named because of what they ask of programs that are made with them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


# Kinds of licences, the least demanding first; a licence is of the last kind whose pattern it has.
FREE, COPYLEFT, GPL, AGPL, UNKNOWN, FORBIDS = "", "weak copyleft", "GPL", "AGPL", "unknown", "forbids commercial use"
ABSENT = "not installed"  # of an extra: looked at where it is
KINDS = {
    FREE: r"\b(0?BSD|MIT|Academic Free|Apache|Boost|BSL-1|CC0|CNRI|HPND|ISCL?|PSF|Python Software Foundation|"
    r"Public Domain|Unlicense|Unicode|Zlib|ZPL|Zope|NVIDIA)\b",  # NVIDIA's: not free, but for commercial use, too
    COPYLEFT: r"\b(LGPL|Lesser General Public|Library General Public|MPL|Mozilla|EPL|Eclipse)",
    GPL: r"\bGPL|(?<!Lesser )(?<!Library )(?<!Affero )General Public License",
    AGPL: r"\bAGPL|Affero",
    FORBIDS: r"non-?commercial|no commercial|\bBY-NC\b|"
    r"(research|academic|evaluation|educational)( use| purposes)? only|commons clause|\bBUSL|business source",
}
BADNESS = [FREE, ABSENT, COPYLEFT, GPL, AGPL, UNKNOWN, FORBIDS]


@dataclass(frozen=True)
class Package:
    """A package that is needed, and the first that needs it."""

    name: str
    needed_by: str
    version: str = ABSENT
    licence: str = ""

    @property
    def kind(self) -> str:
        return ABSENT if self.version == ABSENT else kind_of(self.licence)


def main(argv: Sequence[str] | None = None) -> int:
    names = list(sys.argv[1:] if argv is None else argv) or ["contrastive-align"]
    found = sorted(needed_by(names), key=lambda package: package.name)
    rows = [(p.name, p.version, p.licence or "-", p.kind, p.needed_by) for p in found]
    rows = [("package", "version", "licence", "note", "needed by"), *rows]
    widths = [min(60, max(len(row[i]) for row in rows)) for i in range(5)]
    for row in rows:
        print("  ".join(cell[:60].ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    bad = [p.name for p in found if p.kind in (UNKNOWN, FORBIDS)]
    kinds = {kind: sum(p.kind == kind for p in found) for kind in BADNESS}
    counts = ", ".join(f"{n} {kind or 'permissive'}" for kind, n in kinds.items() if n)
    absent = [p.name for p in found if p.kind == ABSENT]
    said = {"Not looked at": absent, "Look at": bad}
    print(
        f"\n{len(found)} packages: {counts}.", *(f"{what} {', '.join(names)}." for what, names in said.items() if names)
    )
    return int(bool(bad))


def needed_by(names: Sequence[str]) -> Iterator[Package]:
    """Yield what the packages need, through all others; their own extras are all taken."""
    todo = [(canonicalize_name(name), "", tuple(_extras(name))) for name in names]
    seen, shown = set(), set()
    while todo:
        name, by, extras = todo.pop(0)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            installed = None
        if by and name not in shown:
            shown.add(name)
            yield (
                Package(name, by)
                if installed is None
                else Package(name, by, installed.version, licence_of(installed.metadata, _first_lines(installed)))
            )
        for line in (installed.requires if installed else None) or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((canonicalize_name(need.name), name, tuple(sorted(need.extras))))


def _extras(name: str) -> list[str]:
    return metadata.metadata(name).get_all("Provides-Extra") or []


def _first_lines(installed: metadata.Distribution) -> Iterator[str]:
    for file in installed.files or []:
        if re.match(r"(licen[cs]e|copying)", file.name, re.IGNORECASE):
            yield from file.read_text(encoding="utf-8").splitlines()


def licence_of(found: Message, file: Iterator[str] | Sequence[str] = ()) -> str:
    """Read a licence from a package's metadata, else from the lines of its licence file; "" where there is none."""
    classifiers = [
        line.split(" :: ")[-1] for line in found.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    fields = [found.get("License-Expression"), " AND ".join(c for c in classifiers if c != "OSI Approved")]
    fields += [_first_line((found.get("License") or "").splitlines()), _first_line(file)]
    return next((field for field in fields if field and field.upper() != "UNKNOWN"), "")


def _first_line(lines: Iterator[str] | Sequence[str]) -> str:
    return next((line.strip() for line in lines if re.search(r"\w", line)), "")


def kind_of(licence: str) -> str:
    """Return the kind of a licence or of an expression: the worst of what AND joins, the best of what OR does."""
    parts = re.findall(r"\(|\)|\bAND\b|\bOR\b|(?:(?!\bAND\b|\bOR\b)[^()])+", licence)
    parts = [part.strip() for part in parts if part.strip()]
    return _either(parts) if {"AND", "OR"} & set(parts) else _kind(licence)


def _either(parts: list[str]) -> str:
    kinds = [_both(parts)]
    while parts and parts[0] == "OR":
        parts.pop(0)
        kinds.append(_both(parts))
    return min(kinds, key=BADNESS.index)


def _both(parts: list[str]) -> str:
    kinds = [_one(parts)]
    while parts and parts[0] == "AND":
        parts.pop(0)
        kinds.append(_one(parts))
    return max(kinds, key=BADNESS.index)


def _one(parts: list[str]) -> str:
    part = parts.pop(0) if parts else ""
    if part != "(":
        return _kind(part)
    inside = _either(parts)
    if parts and parts[0] == ")":
        parts.pop(0)
    return inside


def _kind(licence: str) -> str:
    return next((k for k in reversed(KINDS) if re.search(KINDS[k], licence, re.IGNORECASE)), UNKNOWN)


if __name__ == "__main__":
    sys.exit(main())
