"""Write files whole or not at all: under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes ``path`` when the block ends without an error.

    A process killed in the block leaves ``path`` as it was, and a temporary file that :func:`leftovers` finds.

    Raises:
        OSError: with the cause's errno, the path and the way out: the disk is full, the folder takes no files, ...
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
