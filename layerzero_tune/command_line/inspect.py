"""`layerzero-tune doctor` and `layerzero-tune kernels`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import library_version
from layerzero_runtime.selection.live_selector import LiveSelector
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.staleness import StaleEntry, stale_entries, stale_message, stale_reasons
from layerzero_runtime.tables.table_candidates import TableCandidate, table_candidates
from layerzero_tune.command_line.options import (
    JsonOption,
    KernelsOption,
    OpsOption,
    operations_named,
    registry_with,
    split_list,
)
from layerzero_tune.command_line.output import console, print_json, print_table


def doctor_command(
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "auto",
    kernels: KernelsOption = "",
    json: JsonOption = False,
) -> None:
    """Show the device, which table serves it and why others do not, libraries, and kernels that are not available."""
    spec = detect_device(device)
    registry = registry_with(split_list(kernels))
    snapshot = Snapshot(registry, CounterGroup())
    table = snapshot.tables.of(spec)
    candidates = table_candidates(spec)
    reasons = {} if table is None else stale_reasons(table, registry)
    stale = () if table is None else stale_entries(table, reasons)
    libraries = {name: library_version(name) for name in sorted({kernel.spec.library for kernel in registry})}
    unavailable = {
        kernel.kernel_id: reason for kernel in registry if (reason := _unavailable_reason(kernel, spec)) is not None
    }
    if json:
        print_json(
            {
                "device": spec.to_dict(),
                "slug": spec.slug,
                "table": None if table is None else {"name": table.name, "path": table.path, **table.provenance},
                "tables": [_table_facts(candidate) for candidate in candidates],
                "stale": [_stale_record(entry) for entry in stale],
                "libraries": libraries,
                "kernels": len(registry),
                "unavailable": unavailable,
            }
        )
        return
    console.print(f"device    {spec.name} ({spec.slug})", soft_wrap=True)
    described = ", ".join(
        f"{name} {value}" for name, value in spec.to_dict().items() if name not in ("name", "platform")
    )
    console.print(f"          {described}", soft_wrap=True)
    if table is None:
        console.print(
            "table     none for this device: every call misses until one is tuned and compiled", soft_wrap=True
        )
    else:
        console.print(
            f"table     {table.name}, measured {table.provenance['measured_to']}, {table.path}", soft_wrap=True
        )
        if reasons:
            console.print(f"stale     {stale_message(table, reasons)}", soft_wrap=True)
            counts = Counter((entry.kernel_id, entry.operation, entry.reason) for entry in stale)
            rows = [(*names, str(count)) for names, count in sorted(counts.items())]
            print_table("Stale entries", ("kernel", "operation", "why", "entries"), rows)
    _print_tables(candidates)
    print_table("", ("library", "version"), [(name, version or "not installed") for name, version in libraries.items()])
    available = len(registry) - len(unavailable)
    console.print(f"{available} of {len(registry)} kernels are available here", soft_wrap=True)
    if unavailable:
        print_table("Not available", ("kernel", "why"), list(unavailable.items()))


def _table_facts(candidate: TableCandidate) -> dict[str, Any]:
    table = candidate.table
    return {
        "name": candidate.name,
        "origin": candidate.origin,
        "slug": candidate.slug,
        "standing": candidate.standing,
        "reason": candidate.reason,
        "measured_to": None if table is None else table.provenance["measured_to"],
        "operations": [] if table is None else sorted(table.entries),
    }


def _print_tables(candidates: Sequence[TableCandidate]) -> None:
    if not candidates:
        return
    console.print("\nTables that are there, in the order in which they are asked")
    for candidate in candidates:
        console.print(f"  {candidate.standing:<13} {candidate.name} ({candidate.origin})", soft_wrap=True)
        console.print(f"  {'':<13} {candidate.reason}", soft_wrap=True)
        if candidate.table is not None:
            operations = ", ".join(sorted(candidate.table.entries))
            console.print(
                f"  {'':<13} measured {candidate.table.provenance['measured_to']}: {operations}", soft_wrap=True
            )
    console.print()


def _stale_record(entry: StaleEntry) -> dict[str, Any]:
    return asdict(entry) | {"static_key": repr(entry.static_key)}


def _unavailable_reason(kernel: Kernel, device: DeviceSpec) -> str | None:
    """Why the kernel cannot run on the device, None if it can."""
    spec = kernel.spec
    if device.platform not in spec.platforms:
        return f"runs on {', '.join(spec.platforms)}, the device is {device.platform}"
    capability = device.compute_capability
    if refused := [limit.required for limit in spec.limits if limit.field == "sm" and not limit.accepts(capability)]:
        return f"runs on compute capabilities {refused[0]}, the device has {capability}"
    return LiveSelector.missing(kernel)


def kernels_command(ops: OpsOption = "", kernels: KernelsOption = "", json: JsonOption = False) -> None:
    """List the registered kernels with their limits."""
    operations = operations_named(ops)
    found = [
        kernel
        for kernel in registry_with(split_list(kernels))
        if any(name in operations for name in kernel.spec.operations)
    ]
    if json:
        print_json(
            [
                {
                    "kernel_id": kernel.kernel_id,
                    "operations": kernel.spec.operations,
                    "library": kernel.spec.library,
                    "priority": kernel.spec.priority,
                    "limits": [
                        {"field": limit.field, "kind": limit.kind, "bound": limit.bound} for limit in kernel.spec.limits
                    ],
                }
                for kernel in found
            ]
        )
        return
    print_table(
        f"{len(found)} kernels",
        ("kernel", "operations", "limits"),
        [
            (
                kernel.kernel_id,
                ", ".join(name for name in kernel.spec.operations if name in operations),
                "; ".join(f"{limit.field} {limit.required}" for limit in kernel.spec.limits),
            )
            for kernel in found
        ],
    )
