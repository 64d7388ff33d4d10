"""What has to be so before any test imports a library, and which tests have the machine to themselves."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.turns import Turns

# Triton decides when its functions are defined whether they are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says nothing beside other tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Any two files do: processes of one checkout agree on them.
TURNS = Turns(Path(__file__), Path(__file__).with_name("turns.py"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with TURNS.turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)
