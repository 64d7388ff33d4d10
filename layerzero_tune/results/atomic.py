"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a name of this process's own beside `path`, force it to disk and rename it to `path`.

    A reader sees the old file or the new one. After a kill the temporary file (a leading dot, `TEMPORARY_SUFFIX`) is
    left over; after an exception, Ctrl-C included, it is not.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # The name lives in the directory. Not every system lets a directory be opened or synced; the file itself is safe.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
