"""Write files whole or not at all, and say why one could not be written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes ``path`` when the block ends without an error.

    It has another name until it is flushed to the disk. A process killed in the block leaves ``path`` as it was, and a
    temporary file that :func:`leftovers` finds.

    Raises:
        OSError: with the cause's errno, the path and the way out: the disk is full, the folder takes no files, ...
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")  # of this process alone, on any host
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno,
            f"{path} was not written: {error.strerror or error}. Make room or give another folder. The earlier "
            "file is unchanged.",
        ) from error
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename reaches the disk later
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def leftovers(folder: Path, pattern: str) -> list[Path]:
    """Return the temporary files that killed writers of files of this pattern left."""
    return sorted(folder.glob(f"{pattern}.*.tmp"))


# Of a disk or of a folder, not of a connection to the hub, whose errors are OSErrors, too.
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE)


def why_not_written(error: BaseException, folder: Path) -> OSError | None:
    """Return the OSError that kept a file from being written to ``folder``, or None where the error is of another kind.

    Its text is the cause and the room that is left. For a full disk safetensors raises a SafetensorError, tokenizers an
    Exception (both with the words of Rust, "os error 28"), and torch a RuntimeError.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    elif isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)):
        number = errno.ENOSPC  # it says no more than that bytes are missing
    if number not in _OF_A_DISK:
        return None
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    room = f"{disk.free / 1e6:.1f} MB of {disk.total / 1e6:.1f} MB are free"
    return OSError(number, f"{os.strerror(number)}; {room}")


def give_usual_mode(files: Iterable[Path]) -> None:
    """Give files the mode that ``open`` gives new ones; safetensors' can be read by their owner alone."""
    for file in files:
        probe = file.with_name(f"{file.name}.{secrets.token_hex(6)}.tmp")
        try:
            probe.touch(exist_ok=False)
            file.chmod(probe.stat().st_mode & 0o777)
        finally:
            probe.unlink(missing_ok=True)
