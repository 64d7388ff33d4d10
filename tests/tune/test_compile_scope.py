"""Scopes: a table expects a configuration to serve where its space holds it, in the regimes that it was measured in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.compile.scope import scope_of
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import ALL_KERNELS, configured, contest_rows, norm

BLOCK = 2048
OWN: Choice = ("synthetic.lean", "{}")
TILED: Choice = ("synthetic.lean", f'{{"block":{BLOCK}}}')
ROWS = (4, 32, 256, 2048)
NARROW, TRIED, WIDE = (256, 512, 768), (1200, 1536, 2048), (2304, 3072, 4096)


def is_whole(configuration: Configuration, context: SelectionContext) -> bool:
    return bool(configuration["block"] >= (context.hidden_size or 0))


def is_half_full(configuration: Configuration, context: SelectionContext) -> bool:
    return bool(configuration["block"] < 2 * (context.hidden_size or 0))


REGIMES = ConfigurationSpace({"block": (1024, BLOCK)}, regime=is_whole)
VALID = ConfigurationSpace({"block": (1024, BLOCK)}, is_half_full)
NEITHER = ConfigurationSpace({"block": (1024, BLOCK)})


def results() -> list[Measurement]:
    """A configuration that gains much wherever it was tried, which it was between narrow and wide rows alone."""
    rows = []
    for width in (*NARROW, *TRIED, *WIDE):
        for count in ROWS:
            found = contest_rows(norm(count, width), {"torch.rms_norm": 1e6, OWN[0]: 9e5}, noise=0.002)
            rows += found
            if width in TRIED:
                rows += configured(found[1], {BLOCK: 5e5})
    return rows


def given(space: ConfigurationSpace | None) -> dict[int, Choice]:
    """By width what a table gives at rows that were measured."""
    kernels = [replace(kernel, space=space) if kernel.kernel_id == OWN[0] else kernel for kernel in ALL_KERNELS]
    (entry,) = compile_table(results(), kernels).entries
    return {width: leaf_at(entry.tree, (256, width)).chain[0].choice for width in (*NARROW, *TRIED, *WIDE)}


@pytest.mark.parametrize(
    ("space", "outside"), [(REGIMES, WIDE), (VALID, NARROW)], ids=["another regime", "not worth measuring"]
)
def test_a_configuration_does_not_serve_beyond_its_scope(space: ConfigurationSpace, outside: tuple[int, ...]) -> None:
    found = given(space)
    assert {found[width] for width in outside} == {OWN}
    assert {found[width] for width in TRIED} == {TILED}


@pytest.mark.parametrize("space", [NEITHER, None])
def test_without_bounds_it_serves_beside_where_it_was_measured(space: ConfigurationSpace | None) -> None:
    found = given(space)
    assert found[WIDE[0]] == found[NARROW[-1]] == TILED


def test_a_kernels_own_choice_has_the_limits_of_the_kernel_alone() -> None:
    kernel = next(kernel for kernel in ALL_KERNELS if kernel.kernel_id == OWN[0])
    assert scope_of(replace(kernel, space=REGIMES), OWN, (), None) is None
    scope = scope_of(replace(kernel, space=REGIMES), TILED, (), None)
    assert scope is not None
    assert not scope.holds(norm(8, 1024))


def test_a_configuration_of_parameters_that_the_space_has_no_more_serves_nowhere() -> None:
    def wants_stages(configuration: Configuration, context: SelectionContext) -> bool:
        return bool(configuration["stages"])

    space = ConfigurationSpace({"block": (BLOCK,), "stages": (1, 2)}, wants_stages, wants_stages)
    assert set(given(space).values()) == {OWN}


def test_regimes_may_depend_on_the_device() -> None:
    def width(configuration: Configuration, context: SelectionContext) -> str:
        assert context.device is not None
        return context.device.slug

    found = given(ConfigurationSpace({"block": (1024, BLOCK)}, regime=width))
    assert {found[width] for width in TRIED} == {TILED}


def test_rows_of_triton_kernels_lie_whole_in_a_block_or_not() -> None:
    from layerzero_runtime.kernels.triton_norm import KERNELS

    for kernel in KERNELS:
        assert isinstance(kernel, Kernel)
        assert kernel.space is not None
        found = [kernel.space.regime({"block_width": 4096}, norm(8, width)) for width in (1024, 4096, 4097, 5120)]
        assert found == [True, True, False, False]
