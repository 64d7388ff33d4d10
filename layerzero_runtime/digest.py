"""What a snapshot selects by, as short texts that processes can compare: a digest, and the parts that it is made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerzero_runtime.kernel import Kernel
    from layerzero_runtime.snapshot import Snapshot
    from layerzero_runtime.tables.table import Table

# Where a rule was written decides nothing: ranks may read one policy from different files.
_NOT_COMPARED = frozenset({"origin"})


def digest_parts(snapshot: Snapshot) -> dict[str, str]:
    """By name, what the selections of a snapshot follow from on the device of this process.

    Kernels are compared by their declarations, libraries by the version digits that matter, by what is missing and by
    the kernels' sources, tables by their files, those of approximately matching devices among them.
    """
    from layerzero_runtime.device import detect_device
    from layerzero_runtime.tables.staleness import version_that_matters

    device = detect_device()
    kernels = sorted(snapshot.registry, key=lambda kernel: kernel.kernel_id)
    missing = [kernel.kernel_id for kernel in kernels if snapshot.live.missing(kernel) is not None]
    versions = {kernel.spec.library: version_that_matters(kernel) for kernel in kernels}
    installed = ", ".join(f"{library} {version}" for library, version in sorted(versions.items()) if version)
    implemented = [(kernel.kernel_id, version_that_matters(kernel), _source(kernel)) for kernel in kernels]
    own = snapshot.tables.of(device)
    return {
        "kernels": _labelled(f"{len(kernels)} kernels", [kernel.spec for kernel in kernels]),
        "policy": _labelled(f"{len(snapshot.policy.rules())} rules", snapshot.policy),
        "broken": _listed((*snapshot.broken, *(f"{kernel_id} (half-open)" for kernel_id in snapshot.half_open))),
        "table": _labelled(
            "no table" if own is None else own.device.slug, [_content(table) for table in snapshot.tables.alike(device)]
        ),
        "device": device.slug,
        "libraries": _labelled(f"{installed or 'none'}, missing for {_listed(missing)}", (implemented, missing)),
    }


def digest_of(parts: Mapping[str, str]) -> str:
    """One hash over all parts."""
    return _hashed(parts)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _labelled(label: str, content: object) -> str:
    return f"{label} [{_hashed(content)[:12]}]"


def _hashed(content: object) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    """A text of a value, the same in every process: that of a set depends on no hash, that of a rule on no path."""
    if is_dataclass(value):
        parts = (f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value) if f.name not in _NOT_COMPARED)
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_text(key)}: {_text(item)}' for key, item in value.items()))}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"({', '.join(map(_text, value))})"
    return repr(value)


def _source(kernel: Kernel) -> str:
    from layerzero_runtime.tables.staleness import kernel_source_hash

    try:
        return kernel_source_hash(kernel)
    except (ValueError, SyntaxError):  # what defined a user's function is no file of Python source
        return ""


def _content(table: Table) -> tuple[object, ...]:
    """What a table is: its provenance, and the files of its decisions and of its evidence."""
    from layerzero_runtime.tables.table_evidence import EVIDENCE_FILE

    if table.path is None:
        return (table.device.slug, table.provenance)
    evidence = os.path.join(os.path.dirname(table.path), EVIDENCE_FILE)
    return (table.device.slug, table.provenance, _file_hash(table.path), _file_hash(evidence))


def _file_hash(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
