"""Libraries and tools that kernels need: whether they are here, which version, and what to install otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from layerzero_runtime.errors import SpecError


@lru_cache(maxsize=256)
def missing_requirement(requires: tuple[str, ...]) -> str | None:
    """Why a kernel with these requirements cannot be loaded, and what to install; None if it can.

    Args:
        requires: names of probes, asked in this order; the first one that fails gives the reason.

    Answers are kept for the life of the process; `missing_requirement.cache_clear()` forgets them.

    Raises:
        SpecError: a name is not that of a probe.
    """
    for name in requires:
        probe = _PROBES.get(name)
        if probe is None:
            raise SpecError(f"requirement {name!r} is not a known probe, known probes: {', '.join(_PROBES)}")
        reason = probe()
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=256)
def library_version(distribution: str) -> str | None:
    """The version of an installed distribution, such as "2.13.0+cpu" for "torch"; None if it is not installed.

    A library that is imported already answers for itself; otherwise the name of its metadata folder tells, as pip
    writes it (PEP 376, PEP 503): `importlib.metadata` says the same, but its import alone costs more than a first
    selection should. Answers are kept for the life of the process; `library_version.cache_clear()` forgets them.
    """
    import os
    import re
    import sys

    version = getattr(sys.modules.get(distribution), "__version__", None)
    if version is not None:
        return str(version)
    name = "[-_.]+".join(map(re.escape, re.split("[-_.]+", distribution)))
    folder = re.compile(rf"{name}-([^-]+)(-py[^-]*)?\.(dist|egg)-info", re.IGNORECASE)
    for place in sys.path:
        try:
            entries = os.listdir(place or ".")
        except OSError:
            continue
        for entry in entries:
            if found := folder.fullmatch(entry):
                return found[1]
    return None


@lru_cache(maxsize=256)
def unfit_version(distribution: str, minimum: str) -> str | None:
    """Why an installed distribution is too old, None if it is not, or is not installed at all.

    Versions are compared by their leading numbers: "2.11" is met by "2.13.0+cpu".
    """
    if not minimum:
        return None
    installed = library_version(distribution)
    if installed is None or _numbers(installed) >= _numbers(minimum):
        return None
    return (
        f"{distribution} {installed} is installed, required at least {minimum}: pip install '{distribution}>={minimum}'"
    )


def _numbers(version: str) -> tuple[int, ...]:
    import re

    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _module_probe(module: str, extra: str) -> Callable[[], str | None]:
    """Whether the module that a kernel calls is there, not only the package that it lies in."""

    def probe() -> str | None:
        if _is_there(module):
            return None
        return f"{module} is not installed: pip install 'layerzero-dispatch[{extra}]'"

    return probe


def _is_there(name: str) -> bool:
    """Whether there is a module of that dotted name; unlike `find_spec`, this imports none of its packages."""
    import os
    import sys
    from importlib.machinery import all_suffixes
    from importlib.util import find_spec

    if name in sys.modules:
        return True
    top, *inner = name.split(".")
    # What is imported without a spec, as stand-ins of tests are, has no submodules beside those in sys.modules.
    spec = find_spec(top) if top not in sys.modules else getattr(sys.modules[top], "__spec__", None)
    if spec is None:
        return False
    if not inner:
        return True
    paths = [os.path.join(folder, *inner) for folder in spec.submodule_search_locations or ()]
    return any(os.path.isdir(path) or any(os.path.isfile(path + end) for end in all_suffixes()) for path in paths)


def _probe_flash_attn_3() -> str | None:
    if _is_there("flash_attn_interface"):
        return None
    return (
        "FlashAttention-3 is not installed: run `python setup.py install` in the folder hopper of "
        "https://github.com/Dao-AILab/flash-attention"
    )


def _probe_xformers_split_k() -> str | None:
    if not _is_there("xformers.ops.fmha.triton_splitk"):
        return "xFormers is not installed: pip install 'layerzero-dispatch[xformers]'"
    # Its fmha/flash.py imports the one where it finds the other.
    if _is_there("flash_attn") and not _is_there("flash_attn.flash_attn_interface"):
        return (
            "xFormers cannot be imported beside a flash_attn without flash_attn_interface, such as FlashAttention-4: "
            "pip install 'layerzero-dispatch[flash-attn-2]' as well, or use an environment without flash-attn-4"
        )
    return None


def _probe_cxx_compiler() -> str | None:
    """What Inductor compiles its CPU kernels with: $CXX or its platform default, and the headers of Python."""
    import os
    import sys
    import sysconfig

    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not _is_on_path(compiler):
        return (
            f"the C++ compiler {compiler!r} is not on PATH: install it (Debian: apt install g++), "
            "or name another one in the environment variable CXX"
        )
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return (
            f"there is no Python.h in {headers}: install Python's development headers (Debian: apt install python3-dev)"
        )
    return None


def _is_on_path(program: str) -> bool:
    """`shutil.which` says the same; with its compressors, importing it takes as long as all of a selection's answer."""
    import os

    folders = [""] if os.path.dirname(program) else os.get_exec_path()
    paths = (os.path.join(folder, program) for folder in folders)
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


_PROBES: dict[str, Callable[[], str | None]] = {
    "torch": _module_probe("torch", "tune"),
    "triton": _module_probe("triton", "triton"),
    "cxx_compiler": _probe_cxx_compiler,
    "flash_attn_2": _module_probe("flash_attn.flash_attn_interface", "flash-attn-2"),
    "flash_attn_3": _probe_flash_attn_3,
    "flash_attn_4": _module_probe("flash_attn.cute.interface", "flash-attn-4"),
    "flashinfer": _module_probe("flashinfer.prefill", "flashinfer"),
    "xformers_split_k": _probe_xformers_split_k,
    "sageattention": _module_probe("sageattention", "sageattention"),
    "liger": _module_probe("liger_kernel.ops", "liger"),
    "quack": _module_probe("quack.rmsnorm", "quack"),
    "flashinfer_norm": _module_probe("flashinfer.norm", "flashinfer"),
}
