"""The passes in order: results to verdicts, to regret models, to few configurations, to trees, to a table's form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ResultsError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import Key
from layerzero_tune.compile.cover import Cutter, cover_of
from layerzero_tune.compile.coverage import bounds_of, max_product_of, unmeasured_cells
from layerzero_tune.compile.feature import features_over
from layerzero_tune.compile.foreseen import foreseen_sizes
from layerzero_tune.compile.form import Entry, TableForm
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.judge import Verdict, judge
from layerzero_tune.compile.leaf import LeafBuilder
from layerzero_tune.compile.pooling import beside, pooled
from layerzero_tune.compile.portfolio import candidates
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.compile.tree import TreeGrower
from layerzero_tune.compile.waves import Waves
from layerzero_tune.compile.witnesses import witnesses
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.content import results_hash
from layerzero_tune.results.measurement import Measurement


@dataclass(frozen=True)
class Compilation:
    """A table's form, and what it was decided by: the regret model of each of its static keys."""

    form: TableForm
    models: Mapping[Key, RegretModel]

    @property
    def verdicts(self) -> dict[Key, tuple[Verdict, ...]]:
        """The verdicts that the table follows from."""
        return {key: model.verdicts for key, model in self.models.items()}


def compile_table(rows: Sequence[Measurement], kernels: Iterable[Kernel]) -> TableForm:
    """The table that the measurements of one device justify, as `compile_rows` has it."""
    return compile_rows(rows, kernels).form


def compile_rows(rows: Sequence[Measurement], kernels: Iterable[Kernel]) -> Compilation:
    """The table that the measurements of one device justify; equal rows give an equal form, in whatever order.

    Raises:
        ResultsError: no row has a time, they come from several devices, or a kernel in them is not registered.
    """
    if not rows:
        raise ResultsError("the results hold no measurement; run layerzero-tune run first")
    device = _single_device(rows)
    by_id = {kernel.kernel_id: kernel for kernel in kernels}
    unknown = sorted({row.kernel_id for row in rows} - by_id.keys())
    if unknown:
        raise ResultsError(
            f"the results hold kernels that are not registered: {', '.join(unknown)}; name their module with --kernels"
        )
    current = current_rows(rows, by_id)
    verdicts = pooled(judge(current), device.platform)
    others = beside(verdicts, device.platform)
    models = {key: _model(key[0], own, others[key], device) for key, own in verdicts.items()}
    entries = tuple(entry_of(key, model, by_id, device) for key, model in models.items())
    if not entries:
        statuses = ", ".join(sorted({row.status for row in current}))
        raise ResultsError(
            f"none of the {len(current)} measurements has a time ({statuses}); "
            "layerzero-tune run lists the reasons, layerzero-tune doctor what is missing"
        )
    form = TableForm(
        device=device.to_dict(),
        provenance={
            "results": results_hash(current),
            "measurements": len(current),
            "measured_from": min(row.measured_at for row in current),
            "measured_to": max(row.measured_at for row in current),
            "versions": _newest_versions(current),
        },
        kernels=_kernel_identities(current, by_id, entries),
        entries=entries,
    )
    return Compilation(form, models)


def _single_device(rows: Sequence[Measurement]) -> DeviceSpec:
    shared = {id(row.device): row.device for row in rows}
    devices = sorted({canonical_json(dict(device)) for device in shared.values()})
    if len(devices) > 1:
        raise ResultsError(f"the results come from {len(devices)} devices, required one: {'; '.join(devices)}")
    return DeviceSpec.from_dict(rows[0].device)


def _age(row: Measurement) -> tuple[str, str]:
    return (row.measured_at, row.job_id)


def _newest_versions(rows: Iterable[Measurement]) -> dict[str, str]:
    """The version of each library in the newest measurement that used it."""
    versions: dict[str, str] = {}
    for row in sorted(rows, key=_age):
        versions |= row.versions
    return dict(sorted(versions.items()))


def _identity(row: Measurement, kernel: Kernel) -> Mapping[str, str]:
    spec = kernel.spec
    return _identity_of(spec.library, spec.version_digits, row.versions.get(spec.library, ""), row.source_hash)


@lru_cache(maxsize=4096)
def _identity_of(library: str, digits: int, version: str, source_hash: str) -> Mapping[str, str]:
    return {
        "library": library,
        "version": ".".join(version.split("+")[0].split(".")[:digits]),
        "source": source_hash,
    }


def current_rows(rows: Sequence[Measurement], kernels: Mapping[str, Kernel]) -> tuple[Measurement, ...]:
    """Rows of each kernel's newest library version and source alone: the older ones measured something else."""
    newest: dict[str, Measurement] = {}
    for row in rows:
        held = newest.get(row.kernel_id)
        if held is None or _age(row) > _age(held):
            newest[row.kernel_id] = row
    identities = {kernel_id: _identity(row, kernels[kernel_id]) for kernel_id, row in newest.items()}
    return tuple(row for row in rows if _identity(row, kernels[row.kernel_id]) == identities[row.kernel_id])


def _kernel_identities(
    rows: Sequence[Measurement], kernels: Mapping[str, Kernel], entries: Sequence[Entry]
) -> dict[str, Mapping[str, str]]:
    used = {step.choice[0] for entry in entries for leaf in entry.leaves() for step in leaf.chain}
    found = {row.kernel_id: _identity(row, kernels[row.kernel_id]) for row in rows}
    return {kernel_id: found[kernel_id] for kernel_id in sorted(used)}


def _model(name: str, verdicts: Sequence[Verdict], others: Sequence[Verdict], device: DeviceSpec) -> RegretModel:
    operation = operation_named(name)
    free = tuple(operation.axes.index(axis) for axis in operation.axes_of(verdicts[0].context))
    return RegretModel(tuple(verdicts), free, tuple(others), Waves.of(operation, device))


def entry_of(key: Key, model: RegretModel, kernels: Mapping[str, Kernel], device: DeviceSpec) -> Entry:
    """The entry of a static key, as its regret model has it."""
    name, static_key = key
    operation = operation_named(name)
    context: SelectionContext = model.verdicts[0].context.with_device(device)
    axes = tuple(axis.name for axis in operation.axes)
    bounds = bounds_of([verdict.sizes for verdict in model.verdicts])
    verdicts = witnesses(model, bounds)
    sizes = [verdict.sizes for verdict in verdicts]
    max_product = max_product_of(sizes, model.free)
    default, tried = model.verdicts[0].default, (*model.verdicts, *model.beside)
    leaves = LeafBuilder(operation, context, kernels, default, model.default_is_measured, tried)
    holes = unmeasured_cells(sizes, model.free, max_product)
    tiles = {} if model.waves is None else model.waves.tiles
    foreseen = foreseen_sizes(sizes, holes, model.free, bounds, max_product, tiles)
    ground = Ground.of(
        model,
        verdicts,
        [choice for choice in candidates(verdicts) if choice in model.choices],
        foreseen.served,
        leaves.serving,
        leaves.passes,
    )
    region = Region(bounds, model.free)
    features = features_over(model.free, None if model.waves is None else model.waves.balance(context))
    tree = TreeGrower(ground, leaves, features).grow(verdicts, region)
    cover = cover_of(sizes, foreseen, holes, model.free)
    tree = Cutter(leaves.is_legal).cut_out(tree, cover, region, ground.sizes)
    return Entry(name, static_key, axes, model.free, bounds, max_product, tree)
