"""Curves of regret over measurements as SVG, written by hand: a picture that diffs, and needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 56
COLOURS = ("#0b6e4f", "#b5651d", "#5b5f97")  # apart in lightness, too
SHARE_TICKS = (0.05, 0.1, 0.25, 0.5, 1.0)
LEAST_REGRET = 1e-3  # a logarithmic axis has no zero
REGRET_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Curve:
    """Points: share of the measurements, above 0, and regret."""

    name: str
    points: Sequence[tuple[float, float]]


def picture(curves: Sequence[Curve]) -> str:
    """Both axes are logarithmic; a dashed line lies 1% above the end of the first curve."""
    regrets = [max(regret, LEAST_REGRET) for curve in curves for _, regret in curve.points]
    low, high = min(regrets) / 1.2, max(regrets) * 1.2
    first = min(share for curve in curves for share, _ in curve.points)

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(share / first) / -math.log(first)

    def y(regret: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / max(regret, LEAST_REGRET)) / math.log(high / low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Held-out regret against measurements spent</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        "share of the grid&#8217;s measurements</text>",
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "mean regret on held-out shapes</text>",
    ]
    for share in SHARE_TICKS:
        if share >= first:
            parts += _line(x(share), TOP, x(share), HEIGHT - BOTTOM, "#ddd")
            parts.append(_text(x(share), HEIGHT - BOTTOM + 18, f"{share:.0%}", "middle"))
    for regret in REGRET_TICKS:
        if low <= regret <= high:
            parts += _line(LEFT, y(regret), WIDTH - RIGHT, y(regret), "#ddd")
            parts.append(_text(LEFT - 6, y(regret) + 4, f"{regret:.0%}", "end"))
    goal = curves[0].points[-1][1] + 0.01
    parts += _line(LEFT, y(goal), WIDTH - RIGHT, y(goal), "#888", ' stroke-dasharray="5 4"')
    parts.append(_text(LEFT + 6, y(goal) - 5, "whole grid and 1%", "start"))
    for number, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        points = " ".join(f"{x(share):.1f},{y(regret):.1f}" for share, regret in curve.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(r):.1f}" r="3" fill="{colour}"/>' for s, r in curve.points]
        row = HEIGHT - BOTTOM - 10 - 17 * number  # bottom left, where no order has come yet
        parts += _line(LEFT + 8, row - 4, LEFT + 33, row - 4, colour, ' stroke-width="2"')
        parts.append(_text(LEFT + 40, row, f"{curve.name} order", "start"))
    return "\n".join((*parts, "</svg>", ""))


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> list[str]:
    return [f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>']


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
