"""Which configuration next: valid ones alone, none twice, the same for the same trials."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Configuration, ConfigurationSpace
from layerzero_tune.search.configurations import tpe
from layerzero_tune.search.configurations.proposals import best_trials, finalists, left_to_measure, next_batch
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.trial import Trial, text_of
from layerzero_tune.search.configurations.valid import MAX_COMBINATIONS, valid_configurations

NORM = SelectionContext(operation="norm.rms", dtype="float32", rows=4, hidden_size=64)
SEARCH = SearchPolicy(enumerated=8, measurements=30, batch=4)

Clock = Callable[[Configuration], float | None]


@dataclass(frozen=True)
class Landscape:
    """Valid configurations and their log ratios to the kernel's own choice, None for those that fail."""

    valid: tuple[Configuration, ...]
    clock: Clock

    @property
    def by_text(self) -> dict[str, Configuration]:
        return {text_of(configuration): configuration for configuration in self.valid}

    def trials(self, configurations: Sequence[Configuration]) -> tuple[Trial, ...]:
        ratios = [(configuration, self.clock(configuration)) for configuration in configurations]
        return tuple(Trial(c, ratio, None if ratio is None else 1e3 * math.exp(ratio)) for c, ratio in ratios)


def search(landscape: Landscape, policy: SearchPolicy, seeds: Sequence[Configuration] = ()) -> list[Trial]:
    """The trials of a whole search, in order; each batch follows from nothing but those before it."""
    trials: list[Trial] = []
    while batch := next_batch(landscape.by_text, trials, seeds, policy):
        assert len(batch) <= policy.batch
        trials += landscape.trials(batch)
        assert len(trials) <= len(landscape.valid)
    return trials


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([0.5, 1.5, 1e-9]), st.text(max_size=3)
)


@st.composite
def landscapes(draw: st.DrawFn) -> Landscape:
    names = draw(st.lists(st.sampled_from(["block", "warps", "stages", "order"]), min_size=1, unique=True))
    parameters = {name: tuple(draw(st.lists(SCALARS, min_size=1, max_size=6, unique=True))) for name in names}
    salt, refused, failing = draw(st.integers(0, 99)), draw(st.integers(0, 3)), draw(st.integers(0, 2))

    def chance(configuration: Configuration, kind: str, out_of: int) -> int:
        return int.from_bytes(f"{salt} {kind} {text_of(configuration)}".encode(), "big") % 1_000_003 % out_of

    space = ConfigurationSpace(parameters, lambda configuration, context: chance(configuration, "valid", 4) >= refused)

    def clock(configuration: Configuration) -> float | None:
        if chance(configuration, "status", 4) < failing:
            return None
        return chance(configuration, "time", 1000) / 500.0 - 1.0

    return Landscape(tuple(valid_configurations(space, NORM).values()), clock)


@settings(max_examples=40, deadline=None)
@given(landscapes(), st.integers(1, 5), st.integers(0, 2))
def test_a_search_proposes_valid_configurations_once_within_its_budget(
    landscape: Landscape, batch: int, seed: int
) -> None:
    policy = replace(SEARCH, batch=batch, seed=seed)
    trials = search(landscape, policy)
    texts = [text_of(trial.configuration) for trial in trials]
    assert len(set(texts)) == len(texts)
    assert set(texts) <= set(map(text_of, landscape.valid))
    allowed = policy.enumerated if len(landscape.valid) <= policy.enumerated else policy.measurements
    assert len(texts) == min(len(landscape.valid), allowed)
    assert search(landscape, policy) == trials


@settings(max_examples=25, deadline=None)
@given(landscapes(), st.data())
def test_a_search_goes_on_from_any_trials_as_if_it_had_never_stopped(landscape: Landscape, data: st.DataObject) -> None:
    """A study is rebuilt from trials that were made anew, as from results that were read again."""
    trials = search(landscape, SEARCH)
    stopped = data.draw(st.integers(0, len(trials) // SEARCH.batch)) * SEARCH.batch
    again = [Trial(dict(reversed(list(t.configuration.items()))), t.log_ratio, t.time_ns) for t in trials[:stopped]]
    expected = [text_of(trial.configuration) for trial in trials[stopped : stopped + SEARCH.batch]]
    assert list(map(text_of, next_batch(landscape.by_text, again, (), SEARCH))) == expected


@settings(max_examples=25, deadline=None)
@given(landscapes(), st.data())
def test_seeds_are_measured_first_where_they_are_valid(landscape: Landscape, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(landscape.valid), max_size=6)) if landscape.valid else []
    elsewhere: Configuration = {"block": "of another kernel"}
    trials = search(landscape, SEARCH, (elsewhere, *chosen, *chosen))
    asked = list(dict.fromkeys(map(text_of, chosen)))
    assert [text_of(trial.configuration) for trial in trials][: len(asked)] == asked
    assert len(trials) == len(search(landscape, SEARCH))


def line(count: int, best: int = 0) -> Landscape:
    """Two parameters; times grow with the distance of the first from the best."""
    valid = tuple({"block": block, "warps": warps} for block, warps in product(range(count // 2), (4, 8)))
    return Landscape(valid, lambda c: abs(c["block"] - best) / 10.0 + (0.0 if c["warps"] == 4 else 0.05) - 1.0)


def test_up_to_the_limit_all_are_measured_in_their_order() -> None:
    few = line(200)
    trials = search(few, SearchPolicy())
    assert tuple(trial.configuration for trial in trials) == few.valid
    assert len(search(line(202), SearchPolicy())) == SearchPolicy().measurements


def test_a_search_finds_what_random_draws_would_miss() -> None:
    """Of 625 configurations one is the best: 60 random draws hold it with a chance of 0.1."""
    names = ("block", "warps", "stages", "order")
    valid = tuple(dict(zip(names, values, strict=True)) for values in product(range(5), repeat=4))
    landscape = Landscape(valid, lambda c: sum(abs(c[name] - at) for name, at in zip(names, (4, 1, 0, 3), strict=True)))
    found = [
        min(trial.log_ratio or 0.0 for trial in search(landscape, SearchPolicy(measurements=60, seed=seed)))
        for seed in range(5)
    ]
    assert found.count(0.0) >= 3


def test_failed_configurations_are_avoided_and_never_proposed_again() -> None:
    """All with 8 warps fail: the estimator takes what failed for worse than all that has a time."""
    landscape = line(400, best=50)
    failing = Landscape(landscape.valid, lambda c: None if c["warps"] == 8 else landscape.clock(c))
    trials = search(failing, SearchPolicy())
    assert len({text_of(trial.configuration) for trial in trials}) == len(trials) == 100
    assert sum(trial.log_ratio is None for trial in trials[40:]) <= 12


def test_rare_valid_configurations_are_found_all_the_same() -> None:
    """24 of 13,824 combinations are valid: nearly every draw is refused, and the most similar valid one is taken."""
    valid = tuple({"block": i, "warps": i, "stages": i} for i in range(24))
    trials = search(Landscape(valid, lambda c: abs(c["block"] - 20) / 10.0), replace(SEARCH, measurements=20))
    assert len({trial.configuration["block"] for trial in trials}) == 20


def test_the_search_ends_at_the_roofline() -> None:
    landscape = line(400)
    trials = landscape.trials(landscape.valid[6:10])
    assert trials[0].time_ns is not None
    policy = SearchPolicy(bound_margin=0.05)
    assert next_batch(landscape.by_text, trials, bound_ns=trials[0].time_ns / 1.06, policy=policy)
    assert not next_batch(landscape.by_text, trials, bound_ns=trials[0].time_ns / 1.04, policy=policy)
    assert next_batch(landscape.by_text, landscape.trials([]), bound_ns=1e9, policy=policy)


def test_trials_of_configurations_that_are_valid_no_more_count_for_nothing() -> None:
    landscape = line(400)
    trials = search(landscape, SEARCH)
    others = tuple(Trial({"block": -1, "warps": 4, "gone": True}, -5.0, 1.0) for _ in range(3))
    assert next_batch(landscape.by_text, (*others, *trials[:12]), (), SEARCH) == next_batch(
        landscape.by_text, trials[:12], (), SEARCH
    )
    left = left_to_measure(landscape.by_text, trials[:12], SEARCH, None)
    assert left_to_measure(landscape.by_text, (*others, *trials[:12]), SEARCH, None) == left == 18


def test_the_best_are_the_fastest_that_have_a_ratio() -> None:
    trials = [Trial({"block": index}, ratio) for index, ratio in enumerate([-0.5, None, -0.52, -0.3, 0.5])]
    assert [configuration["block"] for configuration in best_trials(trials, 3)] == [2, 0, 3]
    assert best_trials(trials[1:2], 3) == ()


def test_finalists_are_near_the_fastest_the_kernels_own_choice_included() -> None:
    def entered(*ratios: float | None, **policy: Any) -> list[int]:
        trials = [Trial({"block": index}, ratio, batch=index) for index, ratio in enumerate(ratios)]
        return [configuration["block"] for configuration in finalists(trials, SearchPolicy(**policy))]

    assert entered(-0.5, None, -0.52, -0.3, -0.45, finalist_margin=0.1) == [2, 0, 4]
    assert entered(0.5, 0.05, 0.2) == [1]
    assert entered(0.5, None) == []
    assert entered() == []
    assert entered(-0.5, None, -0.52, -0.3, -0.45, finalist_margin=1.0, finalists=2) == [2, 0]


def test_half_of_the_finalists_are_of_the_earliest_contests() -> None:
    trials = [Trial({"block": block}, block / 1000.0 - 1.0, batch=7 - block // 2) for block in range(16)]
    chosen = [configuration["block"] for configuration in finalists(trials, SearchPolicy(finalists=6))]
    assert chosen == [0, 1, 2, 14, 15, 12]


def test_valid_configurations_come_in_the_order_of_the_declaration() -> None:
    space = ConfigurationSpace({"warps": (8, 4), "block": (1, 2)}, lambda c, context: c != {"warps": 8, "block": 2})
    assert list(valid_configurations(space, NORM).items()) == [
        ('{"block":1,"warps":8}', {"warps": 8, "block": 1}),
        ('{"block":1,"warps":4}', {"warps": 4, "block": 1}),
        ('{"block":2,"warps":4}', {"warps": 4, "block": 2}),
    ]


@pytest.mark.parametrize("count", [30, 200])
def test_what_is_valid_depends_on_the_context_whether_combinations_are_kept_or_not(count: int) -> None:
    values = tuple(range(count))
    space = ConfigurationSpace({"a": values, "b": values}, lambda c, context: c["a"] * c["b"] == context.rows)
    for rows in (4, 6, 4):
        valid = valid_configurations(space, replace(NORM, rows=rows))
        assert list(valid.values()) == [{"a": a, "b": rows // a} for a in range(1, rows + 1) if rows % a == 0]
        assert list(valid) == list(map(text_of, valid.values()))


def test_restrictions_that_fail_and_spaces_too_large_are_refused_by_name() -> None:
    space = ConfigurationSpace({"block": (16,)}, lambda configuration, context: configuration["blocks"] > 1)
    with pytest.raises(SpecError, match=r"fail for \{'block': 16\} at norm.rms: KeyError: 'blocks'"):
        valid_configurations(space, NORM)
    values = tuple(range(101))
    with pytest.raises(SpecError, match=rf"1,030,301 combinations \(a, b, c\) .* allowed are {MAX_COMBINATIONS:,}"):
        valid_configurations(ConfigurationSpace({"a": values, "b": values, "c": values}), NORM)


def test_optuna_is_imported_where_a_search_begins_and_not_for_an_enumeration() -> None:
    code = """
import sys
from layerzero_tune.search.configurations.proposals import next_batch
from layerzero_tune.search.device import LiveDevice
few, many = ({str(block): {"block": block} for block in range(count)} for count in (200, 201))
assert next_batch(few, ()) and "optuna" not in sys.modules
assert next_batch(many, ()) and "optuna" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_batch_holds_different_proposals_of_one_study() -> None:
    """What is proposed runs on in the study, so the estimator spreads over a batch; the study is quiet."""
    landscape = line(400)
    trials = landscape.trials(landscape.valid[:40:2])
    batch = tpe.propose(landscape.by_text, trials, (), 8, seed=0)
    assert len(set(map(text_of, batch))) == 8
    assert tpe.propose(landscape.by_text, trials, (), 3, seed=0) == batch[:3]
