"""Tables that installed distributions declare: entry points of the group `layerzero.tables`."""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache

GROUP = "layerzero.tables"

# The slug of the device, the module that holds its table, and the distribution that declares it.
DeclaredTable = tuple[str, str, str]


def declared_tables() -> tuple[DeclaredTable, ...]:
    """What the installed distributions declare, in the order of `sys.path`; an entry point is `slug = module`.

    The metadata folders that installers write on `sys.path` are read as `importlib.metadata` reads them (of several
    distributions of one name the first counts), but without its import, which costs more than a first selection should.
    Answers are kept until `sys.path` changes.
    """
    return _declared_on(tuple(sys.path))


@lru_cache(maxsize=1)
def _declared_on(places: tuple[str, ...]) -> tuple[DeclaredTable, ...]:
    found: list[DeclaredTable] = []
    seen: set[str] = set()
    for place in places:
        try:
            entries = sorted(os.listdir(place or "."))
        except OSError:
            continue
        for entry in entries:
            # pip renames what it is about to remove, so that it begins with "~".
            if not entry.endswith((".dist-info", ".egg-info")) or entry.startswith("~"):
                continue
            name, _, version = entry.rpartition(".")[0].partition("-")
            distribution = re.sub("[-_.]+", "-", name).lower()
            if distribution in seen:
                continue
            seen.add(distribution)
            text = _entry_points(os.path.join(place, entry, "entry_points.txt"))
            label = f"{distribution} {version}".rstrip()
            found += [(slug, module, label) for slug, module in _of_group(text)]
    return tuple(found)


def _entry_points(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):  # most have none
        return ""


def _of_group(text: str) -> list[tuple[str, str]]:
    """Name and value of the entry points of the group (packaging.python.org, "Entry points specification")."""
    if GROUP not in text:
        return []
    found, section = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == GROUP and "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            found.append((name.strip(), value.strip()))
    return found
