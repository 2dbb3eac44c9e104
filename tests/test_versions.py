"""The supported versions are stated, checked at import, and the same everywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import contrastive_align.versions as versions


ROOT = Path(__file__).parents[1]


def test_pyproject_states_the_same_ranges():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"\ndependencies = \[\n(.*?)\n\]", text, re.S).group(1)
    stated = dict(re.findall(r'"([a-z]+2?)([^"]*)"', block))
    assert stated == versions.SUPPORTED


def test_constraints_are_inside_the_ranges():
    pinned = dict(re.findall(r"^([a-z]+2?)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package, wanted in versions.SUPPORTED.items():
        assert pinned[package] in SpecifierSet(wanted)


@pytest.mark.parametrize("found", ["1.15.3", "1.17.0", "2.0.0"])
def test_another_trl_fails_at_import_with_a_clear_message(monkeypatch, found):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda package: found if package == "trl" else real(package))
    with pytest.raises(ImportError, match=rf"works with trl>=1.16,<1.17, found trl=={found}"):
        versions.check_versions()


def test_a_process_that_it_ends_says_so_in_a_sentence():
    code = "from contrastive_align.versions import check_versions; check_versions({'torch': '<1'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: contrastive_align works with torch<1, found torch==")
        and "Trace" not in done.stderr
    )
