"""The comparison of search strategies over recorded spaces."""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from layerzero_tune.search.configurations.trial import text_of

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("compare_strategies")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A cachefile of Kernel Tuner: 256 configurations, of which (3, 2, 1, .) is the best and 4 fail."""
    names = ("block", "warps", "stages", "order")
    cache = {}
    for values in product(range(8), range(4), range(4), (0, 1)):
        block, warps, stages, order = values
        time = 1.0 + abs(block - 3) + abs(warps - 2) + abs(stages - 1) + order / 10
        failed = block == 7 and warps == 3 and order == 1
        cache[",".join(map(str, values))] = dict(zip(names, values, strict=True)) | {
            "constant": 5,
            "time": "RuntimeFailedConfig" if failed else time,
        }
    path = tmp_path / "toy.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"tune_params_keys": [*names, "constant"], "cache": cache}, file)
    return path


def test_a_recording_gives_its_times_neighbours_and_best(script: ModuleType, recording: Path) -> None:
    space = script.load_space(recording)
    assert (space.name, len(space.valid), space.optimum) == ("toy", 256, 1.0)
    best = {"block": 3, "warps": 2, "stages": 1, "order": 0}
    assert space.best(1) == (best,)
    assert len(space.neighbours[text_of(best)]) == 7 + 3 + 3 + 1
    (failed,) = space.trials([{"block": 7, "warps": 3, "stages": 0, "order": 1}])
    assert (failed.log_ratio, failed.time_ns) == (None, None)
    (timed,) = space.trials([best])
    assert (timed.log_ratio, timed.time_ns) == (0.0, 1e6)


def test_every_strategy_spends_its_budget_on_different_configurations(script: ModuleType, recording: Path) -> None:
    space = script.load_space(recording)
    for strategy in script.STRATEGIES.values():
        shares = script.searched(strategy, space, (), 0, 24)
        assert len(shares) == 24
        assert shares == sorted(shares)
        assert 0.0 < shares[-1] <= 1.0
        begun = script.searched(strategy, space, space.best(3), 0, 12)
        assert begun[2] == 1.0
        assert script.searched(strategy, space, (), 0, 24) == shares


def test_a_strategy_that_repeats_itself_is_an_error(script: ModuleType, recording: Path) -> None:
    space = script.load_space(recording)
    with pytest.raises(ValueError, match="was proposed twice"):
        script.searched(lambda *arguments: space.valid[:1], space, (), 0, 3)
    with pytest.raises(ValueError, match="nothing was proposed after 0 of 3 measurements"):
        script.searched(lambda *arguments: (), space, (), 0, 3)
