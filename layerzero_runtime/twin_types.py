"""The types that decide nothing on a GPU beside each other: its tensor cores and its memory serve both alike.

Of 1,217 contests on an H100 (scripts/results/h100_table, graph mode) log ratios of kernels at the same sizes, to a
tenth of an octave, differ by 0.020 between the two types (root mean square of 49) and by 0.031 within one (17); within
an octave by 0.126 and 0.135. A CPU may have instructions for one of them alone.
"""

from __future__ import annotations

from layerzero_runtime.operation import StaticKey

TWINS = {"bfloat16": "float16", "float16": "bfloat16"}


def twin_of(static_key: StaticKey, platform: str) -> StaticKey | None:
    """The same static key with the other type; None where there is none on the platform."""
    mode, dtype, *others = static_key
    return None if platform == "cpu" or dtype not in TWINS else (mode, TWINS[dtype], *others)
