"""Print as JSON what measurements on this GPU were made with: commit, device, and versions of all that matters.

usage: python scripts/device_facts.py COMMIT
"""

from __future__ import annotations

import json
import platform
import sys

import torch

from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version


def main() -> None:
    libraries = sorted({kernel.spec.library for kernel in builtin_kernels() if "cuda" in kernel.spec.platforms})
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    found = {library: library_version(library) for library in libraries if library not in versions}
    facts = {
        "commit": sys.argv[1],
        "device": torch.cuda.get_device_name(0),
        "versions": versions | {library: version for library, version in found.items() if version},
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
