"""Tables as a wheel: which files it has, and what its metadata says of them."""

from __future__ import annotations

from collections.abc import Sequence

import layerzero_runtime
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.tables.declared_tables import GROUP
from layerzero_runtime.tables.table_files import OWN_DISTRIBUTION
from layerzero_tune.evaluate.summary import SUMMARY_COLUMNS
from layerzero_tune.wheel.archive import EARLIEST, archive
from layerzero_tune.wheel.naming import WheelName
from layerzero_tune.wheel.table_folder import TableFolder

REQUIRED_PYTHON = ">=3.11"


def build_wheel(name: WheelName, tables: Sequence[TableFolder], modified: int = EARLIEST) -> bytes:
    """The bytes of a pure wheel with these tables, each in a package of its device below `name.package`.

    Its entry points tell the runtime which module holds which device's table; beside data it holds no code. Equal
    tables give equal bytes (with one release of this project and one zlib).

    Raises:
        WheelError: `modified`, in seconds since 1970, is a time that no zip can tell.
    """
    folder = f"{name.stem}.dist-info"
    files = {f"{name.package}/__init__.py": f'"""Kernel tables of {name.name}."""\n'.encode()}
    for table in tables:
        files |= {f"{name.package}/{table.slug}/{file}": data for file, data in sorted(table.files.items())}
    entry_points = "".join(f"{table.slug} = {name.package}.{table.slug}\n" for table in tables)
    files[f"{folder}/METADATA"] = _metadata(name, tables).encode()
    files[f"{folder}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: layerzero-tune {layerzero_runtime.__version__}\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n"
    ).encode()
    files[f"{folder}/entry_points.txt"] = f"[{GROUP}]\n{entry_points}".encode()
    return archive(files, folder, modified)


def _metadata(name: WheelName, tables: Sequence[TableFolder]) -> str:
    """Core metadata 2.1; the description is the provenance."""
    devices = ", ".join(dict.fromkeys(_plain(table.table.device.name) for table in tables))
    head = (
        f"Metadata-Version: 2.1\nName: {name.name}\nVersion: {name.version}\n"
        f"Summary: Measured kernel choices for {devices}\n"
        f"Requires-Python: {REQUIRED_PYTHON}\nRequires-Dist: {OWN_DISTRIBUTION}\n"
        "Description-Content-Type: text/markdown\n"
    )
    intro = (
        f"# {name.name}\n\nMeasured kernel choices, compiled by `layerzero-tune`. `layerzero_runtime` finds them where "
        "they are installed; `layerzero-tune doctor` shows which table serves.\n"
    )
    return "\n".join((head, intro, *(_provenance(name, table) for table in tables)))


def _provenance(name: WheelName, folder: TableFolder) -> str:
    device, provenance = folder.table.device, folder.table.provenance
    versions = ", ".join(f"{library} {version}" for library, version in sorted(provenance["versions"].items()))
    keys = sum(map(len, folder.table.entries.values()))
    lines = [
        f"## {_plain(device.name)}\n",
        f"- device: {_traits(device)}",
        f"- module: `{name.package}.{folder.slug}`, {keys} static keys of {', '.join(sorted(folder.table.entries))}",
        f"- results: {provenance['results']}, {provenance['measurements']} measurements, "
        f"{provenance['measured_from']} to {provenance['measured_to']}",
        f"- versions: {versions}",
    ]
    if folder.evaluation is not None:
        lines += [
            f"\nOn held-out shapes, measured {folder.evaluation.measured_to}:\n",
            _row(SUMMARY_COLUMNS),
            _row(["---"] * len(SUMMARY_COLUMNS)),
            *map(_row, folder.evaluation.rows),
        ]
    return "\n".join(lines) + "\n"


def _traits(device: DeviceSpec) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_plain(str(value))}" for name, value in device.to_dict().items())


def _plain(text: str) -> str:
    """One line: a header ends at a line break."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
