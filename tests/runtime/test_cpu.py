"""The processor, read from real /proc/cpuinfo texts: one processor's block each, repeated for as many as needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.devices.cpu import (
    INSTRUCTION_SETS,
    detect_processor,
    instruction_set,
    intra_op_threads,
    parse_cpuinfo,
)

TEXTS = Path(__file__).parent / "cpuinfo"


def cpuinfo(name: str, cores: Sequence[tuple[int, int]]) -> str:
    """The text with one processor for each (physical id, core id)."""
    block = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    blocks = []
    for number, (package, core) in enumerate(cores):
        text = re.sub(r"(?m)^processor\t: 0$", f"processor\t: {number}", block)
        text = re.sub(r"(?m)^physical id\t: 0$", f"physical id\t: {package}", text)
        blocks.append(re.sub(r"(?m)^core id\t\t: 0$", f"core id\t\t: {core}", text))
    return "\n".join(blocks)


@pytest.mark.parametrize(
    ("text", "name", "level"),
    [
        ("amd_epyc_masked", "AMD EPYC", "avx512_bf16"),
        ("intel_xeon_amx", "Intel(R) Xeon(R) Processor", "amx_bf16"),
        ("intel_xeon_avx512", "Intel(R) Xeon(R) Gold 6140 CPU @ 2.30GHz", "avx512"),
        # Its hypervisor hides DQ, BW and VL: libraries then take their AVX2 code.
        ("intel_xeon_partial_avx512", "Intel(R) Xeon(R) Gold 6278C CPU @ 2.60GHz", "avx2"),
        ("intel_core2_duo", "Intel(R) Core(TM)2 Duo CPU T9400 @ 2.53GHz", "sse"),
        ("arm_graviton3", "Arm Neoverse-V1", "sve_bf16"),
        ("arm_cortex_a53", "Arm implementer 0x41 part 0xd03", "neon"),
    ],
)
def test_name_and_instruction_set(text: str, name: str, level: str) -> None:
    found = parse_cpuinfo(cpuinfo(text, [(0, 0), (0, 1)]))
    assert found is not None
    assert (found.name, found.instruction_set, found.physical_cores) == (name, level, 2)


def test_hardware_threads_of_one_core_count_once() -> None:
    text = cpuinfo("intel_xeon_avx512", [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)])
    whole = parse_cpuinfo(text)
    assert whole is not None
    assert whole.physical_cores == 4


@pytest.mark.parametrize(
    ("usable", "cores"), [({0, 4}, 1), ({0, 1}, 2), ({0, 2, 4, 6}, 2), ({7}, 1), (set(range(64)), 4), ({63}, 4)]
)
def test_affinity_limits_the_cores(usable: set[int], cores: int) -> None:
    text = cpuinfo("intel_xeon_avx512", [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)])
    found = parse_cpuinfo(text, frozenset(usable))
    assert found is not None
    assert found.physical_cores == cores


def test_affinity_on_a_text_without_core_ids() -> None:
    found = parse_cpuinfo(cpuinfo("arm_graviton3", [(0, 0)] * 64), frozenset(range(8, 24)))
    assert found is not None
    assert found.physical_cores == 16


def test_a_sandbox_that_hides_the_name() -> None:
    text = cpuinfo("intel_xeon_amx", [(0, 0)]).replace("Intel(R) Xeon(R) Processor", "unknown")
    found = parse_cpuinfo(text)
    assert found is not None
    assert found.name == "GenuineIntel family 6 model 207"


def test_a_processor_without_vector_instructions_is_generic() -> None:
    found = parse_cpuinfo("processor\t: 0\nmodel name\t: Pentium 75 - 200\nflags\t\t: fpu vme de pse tsc msr mce cx8\n")
    assert found is not None
    assert (found.name, found.instruction_set) == ("Pentium 75 - 200", "generic")


@pytest.mark.parametrize("text", ["", "\n\n", "no colon here", "vendor_id\t: IBM/S390\n# processors : 2\n"])
def test_a_text_without_processors(text: str) -> None:
    assert parse_cpuinfo(text) is None


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_cpuinfo(text + "\nprocessor : 0\nCPU implementer : " + text)


@pytest.mark.parametrize("position", range(len(INSTRUCTION_SETS)))
def test_levels_are_told_apart_by_their_own_flags(position: int) -> None:
    name, flags = INSTRUCTION_SETS[position]
    assert instruction_set(flags) == name
    for flag in flags:
        assert instruction_set(flags - {flag}) != name


def test_matrix_instructions_without_the_vector_ones_are_not_enough() -> None:
    assert instruction_set(["avx2", "fma", "amx_tile", "amx_bf16"]) == "avx2"


def test_this_machine() -> None:
    found = detect_processor()
    assert found.name
    assert 1 <= found.physical_cores <= (os.cpu_count() or 1)


def in_a_new_process(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    completed = subprocess.run(
        [sys.executable, "-c", f"from layerzero_runtime.devices import cpu\n{code}"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return completed.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_a_process_tied_to_one_core_has_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(cpu.detect_processor())"
    assert "physical_cores=1)" in in_a_new_process(code)


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs two processors")
def test_threads_that_openmp_tied_to_cores_do_not_hide_the_other_cores() -> None:
    code = (
        "import torch; torch.randn(600, 600) @ torch.randn(600, 600)\n"
        "import os; print(len(os.sched_getaffinity(0)), len(cpu.usable_processors()))"
    )
    main_thread, process = in_a_new_process(code, OMP_PROC_BIND="true").split()
    assert main_thread == "1"
    assert int(process) > 1


@pytest.mark.parametrize(
    ("setting", "threads"),
    [("3", 3), ("5,2", 5), (" 4 ", 4), ("", 8), ("0", 8), ("-2", 8), ("many", 8), ("9" * 5000, 8)],
)
def test_threads_before_torch_is_imported(setting: str, threads: int) -> None:
    assert in_a_new_process("print(cpu.intra_op_threads(8))", OMP_NUM_THREADS=setting) == str(threads)


def test_threads_are_torchs_once_it_is_imported() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert intra_op_threads(8) == 3
    finally:
        torch.set_num_threads(before)
