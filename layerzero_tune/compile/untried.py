"""Configurations at cells where they were not tried, expected from another one of their kernel that was.

Searches look at few cells, and a configuration has times where it was among the fastest: what lies between, or beyond,
would look as good to a model that knew those times alone. At most cells one configuration of each kernel was measured,
which says how the kernel fares there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from layerzero_tune.compile.arrays import Floats
from layerzero_tune.compile.local_plane import sum_of, total

# What a configuration gains or loses on the kernel's most measured one fades over this many octaves from where both
# were tried, and a loss grows by so much (in log time) per octave: configurations are made for sizes. Judged by the
# 520 contests of norms and activations of an H100's evaluation, the loss of its table falls from 0.055 to 0.018; with
# 1 or 4 octaves, or 0.1, it is within 0.003 of that, without either 0.052.
_FADING = 2.0
_LOSS_PER_OCTAVE = 0.05


def with_untried(own: Floats, base: Floats, places: Floats, shares: Callable[[Floats], Floats]) -> Floats:
    """A configuration's log ratios, (cells,), NaN where unknown, filled where `base`, those of its kernel's most
    measured configuration, are known.

    `places` are the cells' in octaves, (cells, axes); `shares` weighs cells by distances, (cells, places), as
    `RegretModel` does. At least one cell has both.
    """
    both, missing = np.flatnonzero(~np.isnan(own + base)), np.flatnonzero(np.isnan(own) & ~np.isnan(base))
    filled = own.copy()
    if both.size and missing.size:
        offsets = [line[both][:, None] - line[missing] for line in places.T]
        distances = np.sqrt(sum_of([offset * offset for offset in offsets]))
        weights, nearest = shares(distances), distances.min(axis=0)
        gap = total(weights * (own - base)[both][:, None]) / total(weights)
        filled[missing] = base[missing] + gap * np.exp(-nearest / _FADING) + _LOSS_PER_OCTAVE * nearest
    return filled
