"""The processor that this process runs on: model name, instruction set, physical cores, intra-op threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# From the widest down; a processor has the first level of which it has every flag. The names of the flags are Linux's.
# AVX-512 means what PyTorch and oneDNN mean by it (F, DQ, BW and VL); bfloat16 arithmetic is a level of its own because
# bfloat16 kernels run several times faster with it.
_AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")
INSTRUCTION_SETS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx_bf16", frozenset((*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"))),
    ("avx512_bf16", frozenset((*_AVX512, "avx512_bf16"))),
    ("avx512", frozenset(_AVX512)),
    ("avx2", frozenset(("avx2", "fma"))),
    ("sse", frozenset(("sse2",))),
    ("sve_bf16", frozenset(("asimd", "sve", "svebf16"))),
    ("sve", frozenset(("asimd", "sve"))),
    ("neon_bf16", frozenset(("asimd", "bf16"))),
    ("neon", frozenset(("asimd",))),
)
UNKNOWN_INSTRUCTION_SET = "generic"

# Arm's main ID register gives numbers in place of a name. From Arm's technical reference manuals (MIDR_EL1) and, for
# other makers, the list in util-linux (sys-utils/lscpu-arm.c).
_ARM_CORES: Mapping[tuple[int, int], str] = {
    (0x41, 0xD08): "Arm Cortex-A72",
    (0x41, 0xD0B): "Arm Cortex-A76",
    (0x41, 0xD0C): "Arm Neoverse-N1",
    (0x41, 0xD40): "Arm Neoverse-V1",
    (0x41, 0xD49): "Arm Neoverse-N2",
    (0x41, 0xD4F): "Arm Neoverse-V2",
    (0x41, 0xD83): "Arm Neoverse-V3AE",
    (0x41, 0xD84): "Arm Neoverse-V3",
    (0x41, 0xD8E): "Arm Neoverse-N3",
    (0x46, 0x001): "Fujitsu A64FX",
    (0x48, 0xD01): "HiSilicon TaiShan-v110",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """What of a processor decides timings.

    Attributes:
        name: the model's name as the system gives it (a hypervisor may shorten it to "AMD EPYC").
        instruction_set: a name from `INSTRUCTION_SETS`, or "generic".
        physical_cores: cores that this process may use; two hardware threads of one core count once.
    """

    name: str
    instruction_set: str
    physical_cores: int


def instruction_set(flags: Iterable[str]) -> str:
    """The widest level of which every flag is there; "generic" where none is."""
    present = frozenset(flags)
    return next((name for name, needed in INSTRUCTION_SETS if needed <= present), UNKNOWN_INSTRUCTION_SET)


def parse_cpuinfo(text: str, usable: frozenset[int] | None = None) -> Processor | None:
    """The processor described by the text of Linux's /proc/cpuinfo; None where the text lists no processor.

    `usable` holds the numbers of the logical processors that count (None: all). Where the text gives no core ids (Arm,
    some virtual machines), each logical processor counts as a core.
    """
    described = [fields for block in _blocks(text) if (fields := _fields(block)).get("processor", "").isdecimal()]
    processors = [fields for fields in described if usable is None or int(fields["processor"]) in usable] or described
    if not processors:
        return None
    first = processors[0]
    cores = {(fields.get("physical id"), fields.get("core id")) for fields in processors}
    has_core_ids = all(None not in core for core in cores)
    return Processor(
        name=_model_name(first),
        instruction_set=instruction_set((first.get("flags") or first.get("features") or "").split()),
        physical_cores=len(cores) if has_core_ids else len(processors),
    )


def detect_processor() -> Processor:
    """The processor of this machine: from /proc/cpuinfo, on macOS from sysctl, else what `os` knows."""
    usable = usable_processors()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = parse_cpuinfo(file.read(), usable)
    except OSError:
        found = _from_sysctl() if sys.platform == "darwin" else None
    return found or Processor(_machine(), UNKNOWN_INSTRUCTION_SET, len(usable or ()) or os.cpu_count() or 1)


def intra_op_threads(physical_cores: int) -> int:
    """Threads of one operation: torch's setting if torch is imported, else `OMP_NUM_THREADS`, else one per core."""
    torch_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if torch_threads is not None:
        return int(torch_threads())
    # OpenMP takes a list, one number per nesting level, and ignores what is not a positive number.
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    is_number = outermost.isdecimal() and len(outermost) < 10
    return int(outermost) if is_number and int(outermost) > 0 else physical_cores


def _blocks(text: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return blocks


def _fields(lines: Iterable[str]) -> dict[str, str]:
    """Names in lower case, since Linux writes "flags" on x86 and "Features" on Arm."""
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): " ".join(value.split()) for name, colon, value in pairs if colon}


def _model_name(fields: Mapping[str, str]) -> str:
    """The model's name. Arm has numbers; where a sandbox says "unknown" (gVisor), family and model stand in."""
    if "cpu implementer" in fields:
        implementer, part = _number(fields["cpu implementer"]), _number(fields.get("cpu part", ""))
        return _ARM_CORES.get((implementer, part), f"Arm implementer {implementer:#x} part {part:#x}")
    name = fields.get("model name") or fields.get("cpu model") or fields.get("cpu") or ""
    if name and name.lower() != "unknown":
        return name
    vendor = fields.get("vendor_id") or _machine()
    numbers = [f"{key.split()[-1]} {fields[key]}" for key in ("cpu family", "model") if fields.get(key)]
    return " ".join((vendor, *numbers))


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0


def usable_processors() -> frozenset[int] | None:
    """Numbers of the logical processors that this process may run on; None where the system cannot say.

    The union over all threads: OpenMP with `OMP_PROC_BIND` ties each thread, the main one too, to a core of its own.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = set(os.sched_getaffinity(0))
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return frozenset(usable)
    for thread in threads:
        try:
            usable |= os.sched_getaffinity(thread)
        except OSError:  # the thread has ended meanwhile
            continue
    return frozenset(usable)


def _machine() -> str:
    return os.uname().machine if hasattr(os, "uname") else os.environ.get("PROCESSOR_ARCHITECTURE", "unknown processor")


def _from_sysctl() -> Processor | None:
    """macOS: names and numbers from sysctlbyname(3)."""
    import ctypes

    library = ctypes.CDLL(None)

    def read(name: str) -> bytes:
        buffer, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
        failed = library.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
        return b"" if failed else buffer.raw[: size.value]

    def number(name: str) -> int:
        return int.from_bytes(read(name), "little")

    flags = [
        flag
        for flag, key in (
            ("asimd", "hw.optional.arm64"),
            ("bf16", "hw.optional.arm.FEAT_BF16"),
            ("avx2", "hw.optional.avx2_0"),
            ("fma", "hw.optional.fma"),
            ("sse2", "hw.optional.sse2"),
        )
        if number(key)
    ]
    name = read("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")
    return Processor(name or _machine(), instruction_set(flags), number("hw.physicalcpu") or os.cpu_count() or 1)
