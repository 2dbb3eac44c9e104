"""The versions this package works with, checked when it is imported.

A trainer that overrides methods of another library must not run on a version it was never tried on: an override that is
no longer called raises no error by itself.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


# The same ranges as in pyproject.toml (a test compares them).
SUPPORTED = {
    "accelerate": ">=1.10",
    "datasets": ">=4.0",
    "numpy": ">=1.26",
    "peft": ">=0.20",
    "pyarrow": ">=15",
    "rich": ">=13",
    "torch": ">=2.6",
    "transformers": ">=5.19,<6",
    "trl": ">=1.16,<1.17",
}


def check_versions(supported: dict[str, str] = SUPPORTED) -> None:
    """Raise ImportError where an installed version is outside its range."""
    for package, wanted in supported.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise ImportError(f"contrastive_align needs {package}{wanted}. pip install '{package}{wanted}'") from error
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ImportError(
                f"contrastive_align works with {package}{wanted}, found {package}=={found}. pip install "
                f"'{package}{wanted}', or look for a contrastive_align release made for it."
            )
