"""Small tables of any device and day, packed as wheels and installed into a folder as pip would."""

from __future__ import annotations

import importlib
import json
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.wheel.build import build_wheel
from layerzero_tune.wheel.naming import wheel_name
from layerzero_tune.wheel.table_folder import read_table, read_tables
from tests.tune.synthetic_results import Times, grid, measured, norm

NAMED = "torch.rms_norm.fused"
OTHER = "torch.rms_norm.vector_norm"
OTHER_DEVICE = DeviceSpec("cpu", "Other CPU", "avx2", physical_cores=4, threads=4)


def norm_rows(device: DeviceSpec, day: str = "2026-03-01", fastest: str = NAMED) -> list[Measurement]:
    """Norms on which one kernel takes half the default's time, as if measured on the device with what is installed."""

    def model(context: SelectionContext) -> Times:
        return {"torch.rms_norm": 2000.0, fastest: 1000.0}

    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    return [
        replace(
            row,
            device=device.to_dict(),
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(kernels[row.kernel_id]),
            measured_at=f"{day}T10:00:00+00:00",
        )
        for row in measured(grid(norm, (1, 8, 64), (512, 1024)), model)
    ]


def write_norm_table(folder: Path, device: DeviceSpec, day: str = "2026-03-01", fastest: str = NAMED) -> Path:
    """The device's folder below `folder`, with a table of those norms."""
    return emit(compile_table(norm_rows(device, day, fastest), builtin_kernels())).write(folder)


def evaluation_of(folder: Path) -> str:
    """What `evaluate --json` prints, in short."""
    figures = {
        "n": 48,
        "hit_rate": 1.0,
        "efficiency_geomean": 0.991,
        "efficiency_p10": 0.97,
        "efficiency_min": 0.9,
        "speedup_vs_default_geomean": 1.25,
        "speedup_end_to_end_geomean": None,
        "slower_than_default": 0,
    }
    return json.dumps(
        {
            "provenance": dict(read_table(folder).table.provenance),
            "measured_to": "2026-03-02T00:00:00+00:00",
            "summaries": [{"operation": "norm.rms", "mode": "eager"} | figures],
        }
    )


def wheel_of(tables: Path, name: str, version: str = "1.0") -> bytes:
    return build_wheel(wheel_name(name, version), read_tables([tables]))


def install(wheel: bytes, site: Path) -> None:
    """Unpack a pure wheel, which is all that installing one does to `site`."""
    with zipfile.ZipFile(BytesIO(wheel)) as archive:
        archive.extractall(site)
    importlib.invalidate_caches()
