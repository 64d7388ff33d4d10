"""`explain`: which bucket answers a call, by what margin, measured when, and why other kernels do not serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table_evidence import evidence_of

# How the first reason begins against a kernel that runs on no such device.
_OTHER_DEVICES = "PLATFORM_NOT_ONE_OF"


@dataclass(frozen=True)
class Explanation:
    """Why a plan is what it is.

    Attributes:
        bucket: inclusive ranges of the sizes that the entry serves, by axis, product of axes ("rows * hidden_size") or
            balance of waves ("wave_balance(batch_kv_heads, seq_len_q, 132)": rows that each of so many multiprocessors
            works off one after the other in tiles of 192 rows, in 1024ths of those in tiles of 128); empty on a miss.
        evidence: what speaks for the entry: measured points, speedup over the default, runner-up with its margin,
            rounds and time of measurement; None without a hit or without the evidence file.
        provenance: results hash, versions and dates of the table, empty without one.
        policy: the rules that apply to the call.
        prior: the measured bucket that the live selector went by, empty on a hit and where none is near.
        fuses: the operations that the kernel does in one, if it says so.
        refused: for each kernel of the operation that cannot serve the call, why. Those for other kinds of devices are
            left out of the text.
    """

    context: SelectionContext
    plan: ExecutionPlan
    bucket: Mapping[str, tuple[int, int]]
    evidence: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    policy: tuple[str, ...]
    prior: str
    fuses: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        plan = self.plan
        lines = [f"{plan.operation}: {plan.kernel_id}" + (f" {dict(plan.configuration)}" if plan.configuration else "")]
        if self.fuses:
            lines.append(f"  fuses: {', '.join(self.fuses)}")
        for place, steps in (("before", plan.pre_transforms), ("behind", plan.post_transforms)):
            for step in steps:
                cost = "a copy" if step.copies else "a view"
                lines.append(f"  {place} it: {step.kind} {step.target}".rstrip() + f" ({cost})")
        if not plan.available:
            lines.append(f"  not available here: {plan.unavailable_reason}")
        if plan.miss_reason is not None:
            lines.append(f"  live selector, because of a miss: {plan.miss_reason}")
        if self.prior:
            lines.append(f"  nearest measured bucket: {self.prior}")
        lines += [f"  policy: {rule}" for rule in self.policy]
        if self.bucket:
            ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in self.bucket.items())
            lines.append(f"  bucket: {ranges}")
        lines += self._evidence_lines()
        if self.provenance:
            versions = ", ".join(f"{name} {version}" for name, version in self.provenance["versions"].items())
            lines.append(f"  table: {plan.table}, results {self.provenance['results']}, {versions}")
        for kernel_id, reasons in self.refused.items():
            if not reasons[0].startswith(_OTHER_DEVICES):
                lines.append(f"  refused {kernel_id}: {'; '.join(reasons)}")
        return "\n".join(lines)

    def _evidence_lines(self) -> list[str]:
        found = self.evidence
        if found is None:
            return []
        lines = []
        if found["speedup"] is not None:
            least = "" if found.get("least_speedup") is None else f" (95%: at least {found['least_speedup']:.2f}x)"
            lines.append(
                f"  {found['speedup']:.2f}x the default's speed{least} over {len(found['points'])} measured points"
            )
        if found["runner_up"] is not None:
            lines.append(f"  runner-up: {found['runner_up']}, {100 * found['margin']:.1f}% slower")
        lines.append(f"  measured {found['measured_at']}, {found['rounds']} paired rounds")
        return lines


def explain(context: SelectionContext) -> Explanation:
    """Explain the selection for a described call; without a device in the context, for the detected one.

    Raises:
        ContextError: the operation is unknown or a size is missing.
        NoKernelAvailableError: no registered kernel accepts the context.
        TableError: the evidence beside the table is damaged.
    """
    if context.device is None:
        context = context.with_device(detect_device())
    return explain_in(current_snapshot(), context)


def explain_in(snapshot: Snapshot, context: SelectionContext) -> Explanation:
    """`explain` in a given snapshot; the context must name its device."""
    plan = snapshot.select(context)
    assert context.device is not None
    table = snapshot.tables.of(context.device)
    found: Mapping[str, Any] = {}
    evidence = None
    if table is not None and plan.entry is not None:
        static_key, leaf = plan.entry
        found = evidence_of(table, plan.operation, static_key, leaf)
        first = table.entries[plan.operation][static_key].leaves[leaf][0]
        # It speaks for the leaf's first plan; another one serves where guards refuse that, or it is stale.
        if (first.kernel_id, first.configuration) == (plan.kernel_id, plan.configuration):
            evidence = found.get("evidence")
    refused = {
        kernel.kernel_id: reasons
        for kernel in snapshot.registry.candidates(context.operation)
        if (reasons := snapshot.live.refusals(kernel, context))
    }
    kernel = snapshot.registry.get(plan.kernel_id)
    kinds = ("locks", "allows", "denies", "boosts")
    applying = [f"{kind} {rule}" for kind in kinds for rule in getattr(snapshot.policy, kind) if rule.applies(context)]
    return Explanation(
        context=context,
        plan=plan,
        bucket={name: (low, high) for name, (low, high) in found.get("bucket", {}).items()},
        evidence=evidence,
        provenance={} if table is None else table.provenance,
        policy=tuple(applying),
        prior="" if plan.source == "table" else snapshot.prior_of(context).bucket,
        fuses=() if kernel is None else kernel.spec.fuses_ops,
        refused=refused,
    )
