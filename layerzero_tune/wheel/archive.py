"""A wheel's bytes (packaging.python.org, "Binary distribution format"): a zip whose RECORD lists every file.

No build backend is asked: it would want a project on disk, and its version would decide the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import stat
import time
import zipfile
from collections.abc import Mapping
from io import BytesIO

from layerzero_tune.wheel.errors import WheelError

# The times that a zip can tell, 1980 to 2107, in seconds since 1970.
EARLIEST, LATEST = 315532800, 4354819199


def archive(files: Mapping[str, bytes], metadata_folder: str, modified: int = EARLIEST) -> bytes:
    """The wheel with these files in the order given, and its RECORD; equal files give equal bytes.

    Args:
        files: contents by path within the wheel.
        metadata_folder: name of the `.dist-info` folder.
        modified: the time that all files carry, in seconds since 1970; one before `EARLIEST` becomes that.

    Raises:
        WheelError: the time is after `LATEST`.
    """
    if modified > LATEST:
        raise WheelError(f"SOURCE_DATE_EPOCH is {modified}, allowed: at most {LATEST}, the end of 2107")
    record = f"{metadata_folder}/RECORD"
    lines = [*(f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()), f"{record},,"]
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for path, data in {**files, record: "".join(f"{line}\n" for line in lines).encode()}.items():
            wheel.writestr(_entry(path, modified), data, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _entry(path: str, modified: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(path, time.gmtime(max(modified, EARLIEST))[:6])
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
