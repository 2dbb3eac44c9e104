"""The versions this package works with, checked when it is imported.

A trainer that overrides methods of another library must not run on a version it was never tried on: an override that is
no longer called raises no error by itself.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet


# The same ranges as in pyproject.toml (a test compares them).
SUPPORTED = {
    "accelerate": ">=1.10",
    "datasets": ">=4.0",
    "jinja2": ">=3.1",
    "numpy": ">=1.26",
    "peft": ">=0.20",
    "pyarrow": ">=15",
    "rich": ">=13",
    "torch": ">=2.6",
    "transformers": ">=5.19,<6",
    "trl": ">=1.16,<1.17",
}


class WrongVersion(ImportError):
    """A package that is missing, or of another version; a process that ends by it prints the sentence alone."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        otherwise = sys.excepthook

        def say(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if isinstance(error, WrongVersion):
                print(f"error: {error}", file=sys.stderr)
            else:
                otherwise(kind, error, trace)

        sys.excepthook = say  # no command could catch it: the package is not imported yet


def check_versions(supported: dict[str, str] = SUPPORTED) -> None:
    """Raise :class:`WrongVersion` where an installed version is outside its range."""
    for package, wanted in supported.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise WrongVersion(f"contrastive_align needs {package}{wanted}. pip install '{package}{wanted}'") from error
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            raise WrongVersion(
                f"contrastive_align works with {package}{wanted}, found {package}=={found}. pip install "
                f"'{package}{wanted}', or look for a contrastive_align release made for it."
            )
