"""What has to be so before any test imports a library."""

from __future__ import annotations

import os

import torch

# Triton decides when its functions are defined whether they are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
