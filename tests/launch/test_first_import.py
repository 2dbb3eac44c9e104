"""How the command imports torch."""

import gc
import os
import subprocess
import sys

import pytest

from contrastive_align.launch.imports import uncollected, wait_briefly


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_the_user_says_how(monkeypatch, given, found):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what it sets stays here
    wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == found


def test_the_collector_is_as_it_was_also_after_an_error():
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError("a package that is missing")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_first_import_is_not_searched_for_garbage_until_the_end():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import atexit, gc, os, sys\n"
            "from contrastive_align.launch import cli\n"
            "cli.main(['--version'])\n"
            "atexit.register(lambda: print('frozen at the end:', gc.get_freeze_count()))\n"
            "cli._load('report', 'main')\n"
            "assert 'torch' not in sys.modules and os.environ['GOMP_SPINCOUNT'] == '1000'\n"
            "cli._load('usage', 'UsageError')\n"
            "assert gc.isenabled() and gc.get_freeze_count() > 1000",
        ],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")},
    )
    assert not found.returncode, found.stderr
    assert found.stdout.endswith("frozen at the end: 0\n")
