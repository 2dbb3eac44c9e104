"""The licences of dependencies: how one is read, and that none of those installed here forbids commercial use."""

import importlib
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest


@pytest.fixture
def licences(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("licences")


def package(*fields):
    message = Message()
    for name, value in fields:
        message[name] = value
    return message


@pytest.mark.parametrize(
    ("fields", "file", "licence"),
    [
        ([("License-Expression", "MIT"), ("Classifier", "License :: Other/Proprietary License")], [], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License"), ("License", "x")], [], "BSD License"),
        ([("Classifier", "License :: OSI Approved"), ("License", "=====\n  Apache 2.0\n more")], [], "Apache 2.0"),
        ([("License", "UNKNOWN")], ["", "----", "MIT License"], "MIT License"),
        ([("Classifier", "Topic :: Software")], [], ""),
    ],
)
def test_a_licence_is_read_where_it_stands(licences, fields, file, licence):
    assert licences.licence_of(package(*fields), file) == licence


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("Apache-2.0 WITH LLVM-exception", ""),
        ("MPL-2.0 AND MIT", "weak copyleft"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "weak copyleft"),
        ("GNU General Public License v3 (GPLv3)", "GPL"),
        ("MIT AND GPL-2.0-only", "GPL"),
        ("MIT OR GPL-2.0-only", ""),
        ("GPL-3.0-only AND (MIT OR BSD-3-Clause)", "GPL"),
        ("(GPL-3.0-only OR MIT) AND MPL-2.0", "weak copyleft"),
        ("GNU Affero General Public License v3", "AGPL"),
        ("CC-BY-NC-4.0", "forbids commercial use"),
        ("PolyForm Noncommercial 1.0.0", "forbids commercial use"),
        ("MIT AND CC-BY-NC-SA-4.0", "forbids commercial use"),
        ("Apache 2.0 with Commons Clause", "forbids commercial use"),
        ("BUSL-1.1", "forbids commercial use"),
        ("Free for research use only", "forbids commercial use"),
        ("NVIDIA Proprietary Software", ""),
        ("Copyright (c) 2024 Somebody", "unknown"),
        ("MIT AND LicenseRef-Own", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_kind_of_a_licence(licences, licence, kind):
    assert licences.kind_of(licence) == kind


def test_none_of_the_dependencies_forbids_commercial_use(licences, capsys):
    assert licences.main([]) == 0
    found = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {"torch", "trl", "openai", "ruff", "jiter", "mpmath"} <= found  # needed, by extras, by others


def test_a_package_that_forbids_it_or_is_missing_is_named(licences, monkeypatch, capsys):
    class Installed:
        version, files = "1", []

        def __init__(self, licence, *requires):
            self.metadata, self.requires = package(("License", licence), ("Provides-Extra", "x")), requires

    world = {
        "top": Installed("MIT", "a", "absent; extra == 'x'", "never; extra == 'y'", "win; sys_platform == 'none'"),
        "a": Installed("CC BY-NC 4.0", "top", "B_c[z]"),
        "b-c": Installed("MIT", "d; extra == 'z'"),
        "d": Installed("GPLv3"),
    }

    def distribution(name):
        if name not in world:
            raise metadata.PackageNotFoundError(name)
        return world[name]

    monkeypatch.setattr(licences.metadata, "distribution", distribution)
    monkeypatch.setattr(licences.metadata, "metadata", lambda name: world[name].metadata)
    assert licences.main(["top"]) == 1
    out = capsys.readouterr().out
    assert (
        "5 packages: 2 permissive, 1 not installed, 1 GPL, 1 forbids commercial use. Not looked at absent. Look at a."
        in out
    )
    rows = [line.split()[:2] for line in out.splitlines()[1:6]]
    assert rows == [["a", "1"], ["absent", "not"], ["b-c", "1"], ["d", "1"], ["top", "1"]]
