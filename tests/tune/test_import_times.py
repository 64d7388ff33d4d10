"""Whether to wait for a process that has imported a library."""

from __future__ import annotations

from layerzero_tune.worker.import_times import ImportTimes


def test_waiting_is_worth_it_as_long_as_an_import_takes_longer() -> None:
    times = ImportTimes()
    assert not times.is_worth_waiting("quack", 1.0)
    times.learn("quack", 8.0, has_imported=False)
    assert times.is_worth_waiting("quack", 2.0)
    assert not times.is_worth_waiting("quack", 3.0)
    for seconds in (0.5, 1.5):
        times.learn("quack", seconds, has_imported=True)
    assert times.is_worth_waiting("quack", 6.0)
    assert not times.is_worth_waiting("quack", 7.0)
    assert not times.is_worth_waiting("liger", 1.0)
