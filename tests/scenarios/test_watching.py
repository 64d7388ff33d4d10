"""What is seen of a watched call is the call alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.scenarios.watching import entered


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The garbage collector runs after every few allocations and tells a Python function, whose calls are here."""
    seen: list[str] = []

    def collected(phase: str, information: dict[str, int]) -> None:
        seen.append(phase)

    usual = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    yield seen
    gc.set_threshold(*usual)
    gc.callbacks.remove(collected)


def test_a_collection_is_no_part_of_a_watched_call(collections: list[str]) -> None:
    def call() -> list[list[int]]:
        return [[number] for number in range(100)]

    collections.clear()
    call()
    assert collections
    assert "collected" not in {name for _, name in entered(call)}
    assert gc.isenabled()
