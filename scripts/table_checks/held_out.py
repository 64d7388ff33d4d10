"""Conditions on the held-out shapes of a table's evaluation, in either mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.statistics import geometric_mean, percentile
from table_checks.condition import Condition

BOTTOM_RIGHT = "bottom-right chunks"
# Kinds of attention beside chunks with a mask aligned at the end.
ATTENTION = ("prefill", "decode", "chunks", "full")
OTHERS = ("norm.rms", "norm.add_rms", "norm.layer", "mlp.swiglu", "mlp.geglu")
# Held-out shapes that an evaluation needs, of both modes together.
SHAPES = {"attention": 300, **dict.fromkeys(OTHERS, 100)}
MODES = ("graph", "eager")
GRAPH_SPEEDUPS = {"norm.rms": 1.6, "norm.add_rms": 1.6, "mlp.swiglu": 1.7}


@dataclass(frozen=True)
class HeldOut:
    """One shape of evaluation.json; times are ratios as in `layerzero_tune.evaluate.score.Score`."""

    context: SelectionContext
    hit: bool
    efficiency: float
    speedup: float
    end_to_end: float | None

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> Self:
        context = SelectionContext(**shape["context"])
        return cls(context, shape["hit"], shape["efficiency"], shape["speedup"], shape["end_to_end"])

    @property
    def kind(self) -> str:
        """The operation, of attention what part of serving it is."""
        context = self.context
        if context.operation == "attention.causal":
            return BOTTOM_RIGHT if context.causal_alignment == "bottom_right" else "prefill"
        if context.operation == "attention.cross":
            return "decode" if context.seq_len_q == 1 else "chunks"
        return "full" if context.operation == "attention.full" else context.operation


def held_out_conditions(evaluation: Mapping[str, Any]) -> Iterator[Condition]:
    shapes = [HeldOut.of(shape) for shape in evaluation["shapes"]]
    for name, least in SHAPES.items():
        count = sum(shape.context.operation.startswith(name) for shape in shapes)
        yield Condition.at_least(f"held-out shapes of {name}", count, least)
    yield from _graph([shape for shape in shapes if shape.context.mode == "graph"])
    yield from _eager([shape for shape in shapes if shape.context.mode == "eager"])
    slower = sum(line["slower_than_default"] for line in evaluation["summaries"] if line["mode"] in MODES)
    yield Condition.at_most("shapes slower than the default", slower, 0)
    yield Condition.at_most("shapes without a time", len(evaluation["unscored"]), 0)


def _graph(shapes: Sequence[HeldOut]) -> Iterator[Condition]:
    attention = _of(shapes, *ATTENTION, BOTTOM_RIGHT)
    efficiencies = [shape.efficiency for shape in attention]
    yield Condition.at_least("graph, attention: hit rate", _hit_rate(attention), 0.95)
    yield Condition.at_least("graph, attention: efficiency", geometric_mean(efficiencies), 0.985)
    yield Condition.at_least("graph, attention: efficiency, 10th percentile", percentile(efficiencies, 10), 0.96)
    yield Condition.at_least("graph, attention: least efficiency", min(efficiencies), 0.85)
    yield _faster(f"graph, {', '.join(ATTENTION)} in equal parts", [_of(shapes, kind) for kind in ATTENTION], 1.25)
    yield _faster(f"graph, {BOTTOM_RIGHT}", [_of(shapes, BOTTOM_RIGHT)], 3.0)
    for name, bound in GRAPH_SPEEDUPS.items():
        found = _of(shapes, name)
        efficiency = geometric_mean([shape.efficiency for shape in found])
        yield Condition.at_least(f"graph, {name}: efficiency", efficiency, 0.98)
        yield _faster(f"graph, {name}", [found], bound)


def _eager(shapes: Sequence[HeldOut]) -> Iterator[Condition]:
    for name, kinds in (("attention", (*ATTENTION, BOTTOM_RIGHT)), *((name, (name,)) for name in OTHERS)):
        found = _of(shapes, *kinds)
        yield Condition.at_least(f"eager, {name}: hit rate", _hit_rate(found), 0.95)
        efficiency = geometric_mean([shape.efficiency for shape in found])
        yield Condition.at_least(f"eager, {name}: efficiency", efficiency, 0.97)
    yield _faster(f"eager, {', '.join(ATTENTION)} in equal parts", [_of(shapes, kind) for kind in ATTENTION], 1.06)
    end_to_end = [shape.end_to_end for shape in _of(shapes, *ATTENTION) if shape.end_to_end is not None]
    yield Condition.at_least("eager, the same through lz.attention, all shapes", geometric_mean(end_to_end), 1.0)


def _of(shapes: Sequence[HeldOut], *kinds: str) -> list[HeldOut]:
    return [shape for shape in shapes if shape.kind in kinds]


def _hit_rate(shapes: Sequence[HeldOut]) -> float:
    return sum(shape.hit for shape in shapes) / len(shapes)


def _faster(what: str, parts: Sequence[Sequence[HeldOut]], bound: float) -> Condition:
    """On the speedup over the default over some parts, each of which counts as much, beside what the best kernel of
    each shape would give: no table gives more."""

    def mean(of: Callable[[HeldOut], float]) -> float:
        return geometric_mean([geometric_mean([of(shape) for shape in part]) for part in parts])

    found = Condition.at_least(f"{what}: speedup", mean(lambda shape: shape.speedup), bound)
    most = mean(lambda shape: shape.speedup / shape.efficiency)
    return replace(found, text=f"{found.text} (the best kernel of each shape has {most:.4g})")
