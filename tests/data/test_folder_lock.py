"""A folder is held by one process: the others are refused, and an owner that is gone or silent is followed."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from folder_holder import held_by_another

from contrastive_align.data import folder_lock
from contrastive_align.data.folder_lock import LOCK_FILE, FolderInUse, folder_held


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "SILENCE", 0.6)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def refused(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refused)


def owner_file(folder, **changes):
    folder.mkdir(exist_ok=True)
    owner = {"process": os.getpid(), "host": "elsewhere", "since": "2026-01-01 00:00:00", "token": "x"}
    (folder / LOCK_FILE).write_text(json.dumps(owner | changes))


def test_another_process_is_refused_by_name_until_the_first_ends(tmp_path):
    with held_by_another(tmp_path / "run") as holder:
        said = rf"run is in use by process {holder.pid} on .*, since .* another output_dir"
        with pytest.raises(FolderInUse, match=said):
            folder_held(tmp_path / "run").__enter__()
    with folder_held(tmp_path / "run") as taken_over:
        assert f"was held by process {holder.pid} on" in taken_over and "which is gone" in taken_over
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_one_process_may_hold_a_folder_twice_and_its_children_do_not_hold_it(tmp_path):
    place = tmp_path / "run"
    with folder_held(place), folder_held(f"{place}/../run") as again:
        assert again == "" and (place / LOCK_FILE).exists()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], close_fds=False)
    try:
        with folder_held(place) as taken_over:
            assert taken_over == ""
    finally:
        child.kill()
        child.wait()


def test_what_was_not_there_is_not_there_afterwards_unless_it_was_written_to(tmp_path):
    with folder_held(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with folder_held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file"]
    with folder_held(tmp_path / "a"):
        pass
    assert (tmp_path / "a").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("locks", [True, False])
def test_an_owner_on_another_host_is_followed_once_it_is_silent(tmp_path, locks, request):
    if not locks:
        request.getfixturevalue("no_locks")
    owner_file(tmp_path / "run")
    began = time.monotonic()
    with folder_held(tmp_path / "run") as taken_over:
        assert "on elsewhere, which is gone" in taken_over and time.monotonic() - began > 0.3
    owner_file(tmp_path / "run")
    long_ago = time.time() - 100
    os.utime(tmp_path / "run" / LOCK_FILE, (long_ago, long_ago))
    began = time.monotonic()
    with folder_held(tmp_path / "run"):
        assert locks is False or time.monotonic() - began < 0.3


@pytest.mark.usefixtures("quick", "no_locks")
def test_without_locks_a_heartbeat_refuses(tmp_path, monkeypatch):
    with folder_held(tmp_path / "run"):
        monkeypatch.setattr(folder_lock, "_held", set())  # as in another process of another host
        monkeypatch.setattr(folder_lock.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on "):
            folder_held(tmp_path / "run").__enter__()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_of_this_host_that_has_ended_is_followed_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner_file(tmp_path / "run", host=folder_lock.socket.gethostname(), process=ended.pid)
    with folder_held(tmp_path / "run") as taken_over:
        assert f"process {ended.pid} on" in taken_over


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"process": "x"}'])
def test_a_lock_file_that_says_nothing_holds_nothing(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    with folder_held(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run takes no files: .*another output_dir"):
        folder_held(tmp_path / "file" / "run").__enter__()
