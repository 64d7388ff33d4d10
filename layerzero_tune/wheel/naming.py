"""What a wheel is called: distribution, version, and the package that its modules live in."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from layerzero_tune.wheel.errors import WheelError

# Import names and distributions that are taken: a wheel with one of these would overwrite what is installed.
_OWN = frozenset({"layerzero_runtime", "layerzero_tune", "layerzero_tables", "layerzero_dispatch"})


@dataclass(frozen=True)
class WheelName:
    """A distribution's name as it was given, its version (PEP 440, normalised) and its package."""

    name: str
    version: str
    package: str

    @property
    def stem(self) -> str:
        """What the file and the metadata folder begin with (binary distribution format: no hyphens within a part)."""
        return f"{self.package}-{self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.stem}-py3-none-any.whl"


def wheel_name(name: str, version: str) -> WheelName:
    """The names that follow from those of a distribution and its version.

    Raises:
        WheelError: the name is no valid one (PEP 503, PEP 508) or cannot be imported as a package of its own, or the
            version is none of PEP 440.
    """
    try:
        package = canonicalize_name(name, validate=True).replace("-", "_")
    except InvalidName:
        raise WheelError(
            f"--name is {name!r}, allowed: letters, digits, '-', '_' and '.', with a letter or digit at both ends"
        ) from None
    problem = ""
    if not package.isidentifier() or keyword.iskeyword(package):
        problem = "is no name that Python can import"
    elif package in sys.stdlib_module_names or package in _OWN:
        problem = "exists already"
    if problem:
        raise WheelError(f"--name is {name!r}, whose package {package} {problem}; choose another, such as my-tables")
    try:
        return WheelName(name, str(Version(version)), package)
    except InvalidVersion:
        raise WheelError(f"--version is {version!r}, required a version of PEP 440 such as 1.2 or 2026.3.1") from None


def version_of_results(measured_to: Iterable[str]) -> str:
    """The day of the newest results as a version: "2026.3.1". Newer results give a greater version.

    Args:
        measured_to: UTC times, ISO 8601.

    Raises:
        WheelError: a time is none.
    """
    newest = max(measured_to)
    try:
        day = datetime.fromisoformat(newest)
    except ValueError:
        raise WheelError(f"the results end at {newest!r}, which is no time; give a version with --version") from None
    return f"{day.year}.{day.month}.{day.day}"
