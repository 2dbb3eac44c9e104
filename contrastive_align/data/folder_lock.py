"""Let one run at a time write into a folder, on one host or on several that share it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # no such locks on this system: the heartbeat decides
    fcntl = None

logger = logging.get_logger(__name__)

LOCK_FILE = "_run.lock"  # Trainer's push to the hub leaves out names that begin with _
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which an owner is gone
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[tuple[int, Path]] = set()  # process, folder; a forked child holds nothing


class FolderInUse(ValueError):
    """Another run writes into the folder."""


@contextmanager
def folder_held(folder: str | os.PathLike) -> Iterator[str]:
    """Hold a folder, which is made if it is missing, against other processes; a process that holds it may ask again.

    The lock is the operating system's, which ends with its process. Where the file system has none, and where the last
    owner was on another host, with which the lock may not be shared, a heartbeat decides: the time of the lock file,
    compared with that of another new file in the folder, so that the clocks of the hosts do not matter.

    Yields:
        A sentence on the owner that is gone and whose lock was taken over, or "".

    Raises:
        FolderInUse: another process holds the folder.
        OSError: the folder takes no files.
    """
    place = Path(folder).resolve()
    key = (os.getpid(), place)
    if key in _held:
        yield ""
        return
    missing = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        file, taken_over = _acquire(place / LOCK_FILE)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} takes no files: {error.strerror or error}. Make it writable and make room, or give another "
            "output_dir.",
        ) from error
    ended = threading.Event()
    threading.Thread(target=_beat, args=(place / LOCK_FILE, ended), daemon=True).start()
    _held.add(key)
    try:
        yield taken_over
    finally:
        ended.set()
        _held.discard(key)
        with suppress(OSError):
            (place / LOCK_FILE).unlink()  # before it is closed: who opened it before finds that it is no longer there
        file.close()
        with suppress(OSError):
            for made in missing:
                made.rmdir()  # where nothing was written


def _acquire(path: Path) -> tuple[BinaryIO, str]:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            locked, owner = _lock(file), _read(file)
            if locked is False:
                raise FolderInUse(_in_use(path.parent, owner))
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.close()  # its owner ended, and removed it, after it was opened here
                continue
            if owner and not _is_gone(owner, locked) and _beats(path, owner):
                raise FolderInUse(_in_use(path.parent, owner))
            _write_owner(file, path)
        except BaseException:
            file.close()
            raise
        gone = f"{path.parent} was held by {_owner(owner)}, which is gone: its lock is taken over."
        return file, gone if owner else ""


def _lock(file: BinaryIO) -> bool | None:
    """Whether the operating system gives the lock; None where it has none."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its children do not hold it
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _read(file: BinaryIO) -> dict:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:  # empty: new, or its owner is about to write
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(file: BinaryIO, path: Path) -> None:
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    owner["token"] = secrets.token_hex(8)
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner).encode())
    file.flush()
    if fcntl is None or _lock(file) is None:  # of two that write at the same time, the later one has it
        time.sleep(0.5)
        if (now := _read(file)) != owner:
            raise FolderInUse(_in_use(path.parent, now))


def _is_gone(owner: dict, locked: bool | None) -> bool:
    """Whether an owner on this host is known to have ended."""
    if owner.get("host") != socket.gethostname() or fcntl is None:
        return False
    if locked:
        return True
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return False


def _beats(path: Path, owner: dict) -> bool:
    """Whether the lock file's time moves within ``SILENCE`` of its last sign of life."""
    last = path.stat().st_mtime_ns
    with tempfile.TemporaryFile(dir=path.parent) as new:
        silent = (os.fstat(new.fileno()).st_mtime_ns - last) / 1e9
    if (wait := SILENCE - silent) <= 0:
        return False
    logger.warning(f"{path.parent} is held by {_owner(owner)}: waiting up to {wait:.0f} s for a sign of life of it.")
    until = time.monotonic() + wait
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENCE / 10))
        if path.stat().st_mtime_ns != last:
            return True
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _owner(owner: dict) -> str:
    return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')}"


def _in_use(folder: Path, owner: dict) -> str:
    since = f", since {owner['since']}" if "since" in owner else ""
    return (
        f"{folder} is in use by {_owner(owner)}{since}. Two runs in one folder would mix their files: wait for that "
        "one, stop it, or give another output_dir."
    )
