"""Content hashes: equal content gives equal ids on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; floats as Python's repr, which reads back to the same bits."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """The first 128 bits of SHA-256 over the canonical JSON, as 32 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def choice_of(kernel_id: str, configuration: Mapping[str, Any]) -> tuple[str, str]:
    """What tells choices apart: the kernel, and the canonical JSON of its configuration."""
    return kernel_id, canonical_json(dict(configuration))
