"""What has to be so before any test imports a library, and which tests have the machine to themselves."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

from tests.turns import pytest_runtest_protocol

__all__ = ["pytest_runtest_protocol"]

# Triton decides when its functions are defined whether they are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes of pytest-xdist are told that their terminal is narrow; they have none.
os.environ.pop("COLUMNS", None)

# How long an example takes says nothing beside other tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
