"""Requirements of kernels: found, missing, forgotten; versions without importing the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version, missing_requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_probes() -> Iterator[None]:
    missing_requirement.cache_clear()
    library_version.cache_clear()
    yield
    missing_requirement.cache_clear()
    library_version.cache_clear()


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; `-I` is left out so that the package under test is found as it is here."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    return done.stdout.strip()


def test_nothing_required_is_never_missing() -> None:
    assert missing_requirement(()) is None


def test_installed_torch_is_found_without_importing_it() -> None:
    code = (
        "import sys; from layerzero_runtime.libraries import missing_requirement, library_version;"
        "print(missing_requirement(('torch',)), library_version('torch'), 'torch' in sys.modules)"
    )
    assert run_python(code) == f"None {version('torch')} False"


def test_importing_the_module_imports_none_of_the_slow_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import layerzero_runtime.libraries;"
        "print({'importlib.metadata', 'sysconfig', 'shutil', 'subprocess'} & (set(sys.modules) - before))"
    )
    assert run_python(code) == "set()"


def test_torch_not_installed_names_the_extra(tmp_path: Path) -> None:
    # Without site-packages there is no torch.
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p];"
        "from layerzero_runtime.libraries import missing_requirement, library_version;"
        "print(missing_requirement(('torch', 'cxx_compiler')), '|', library_version('torch'))"
    )
    assert run_python(code) == "torch is not installed: pip install 'layerzero-dispatch[tune]' | None"


def test_triton_not_installed_names_the_extra() -> None:
    code = (
        "import sys; from layerzero_runtime.libraries import missing_requirement;"
        "print(missing_requirement(('triton',)), 'triton' in sys.modules);"
        "missing_requirement.cache_clear(); sys.path = [p for p in sys.path if 'site-packages' not in p];"
        "print(missing_requirement(('triton',)))"
    )
    assert run_python(code).splitlines() == [
        "None False",
        "triton is not installed: pip install 'layerzero-dispatch[triton]'",
    ]


@pytest.mark.parametrize(
    ("probe", "module", "extra"),
    [
        ("liger", "liger_kernel.ops", "liger"),
        ("quack", "quack.rmsnorm", "quack"),
        ("flashinfer_norm", "flashinfer.norm", "flashinfer"),
        ("flashinfer", "flashinfer.prefill", "flashinfer"),
    ],
)
@pytest.mark.parametrize("form", ["{}.py", "{}/__init__.py"])
def test_a_library_counts_as_installed_with_the_module_that_kernels_call(
    probe: str, module: str, extra: str, form: str, tmp_path: Path
) -> None:
    """Not with its package alone, which another distribution may own, and which is not imported to find out."""
    package, part = module.split(".")
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    place = folder / form.format(part)
    code = (
        "import sys; from pathlib import Path; from layerzero_runtime.libraries import missing_requirement;"
        f"sys.path = [p for p in sys.path if 'site-packages' not in p]; print(missing_requirement(({probe!r},)));"
        f"sys.path.insert(0, {str(tmp_path)!r}); missing_requirement.cache_clear();"
        f"print(missing_requirement(({probe!r},))); place = Path({str(place)!r}); place.parent.mkdir(exist_ok=True);"
        "place.write_text(''); missing_requirement.cache_clear();"
        f"print(missing_requirement(({probe!r},)), {package!r} in sys.modules)"
    )
    missing = f"{module} is not installed: pip install 'layerzero-dispatch[{extra}]'"
    assert run_python(code).splitlines() == [missing, missing, "None False"]


def test_every_library_of_a_kernel_has_an_extra_with_the_version_that_its_limits_are_of() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = {requirement for found in extras.values() for requirement in found}
    for kernel in builtin_kernels():
        if "-" in kernel.spec.library:  # not torch, nor what is built from its sources
            wanted = f"{kernel.spec.library}>={kernel.spec.min_version}"
            assert any(each == wanted or each.startswith(f"{wanted},") for each in required)


def test_compiler_not_on_path_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    reason = missing_requirement(("cxx_compiler",))
    assert reason is not None
    assert "C++ compiler" in reason
    assert "CXX" in reason
    assert "install" in reason


def test_compiler_named_by_cxx_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-c++")
    assert missing_requirement(("cxx_compiler",)) is None
    missing_requirement.cache_clear()
    monkeypatch.setenv("CXX", "other-c++")
    assert "'other-c++'" in str(missing_requirement(("cxx_compiler",)))


@pytest.mark.parametrize("named", ["c++", "none", "text", "folder", "{}/c++", "{}/text", "bin/c++", "{}/bin", ""])
def test_a_compiler_is_found_where_a_shell_finds_it(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `shutil.which` does, which takes longer to import than a selection should."""
    binaries = tmp_path / "bin"
    (binaries / "folder").mkdir(parents=True)
    for name, mode in (("c++", 0o755), ("text", 0o644)):
        (binaries / name).write_text("#!/bin/sh\n")
        (binaries / name).chmod(mode)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "nowhere"), str(binaries)]))
    monkeypatch.setenv("CXX", named.format(binaries))
    reason = missing_requirement(("cxx_compiler",)) or ""
    assert ("is not on PATH" in reason) == (shutil.which(named.format(binaries)) is None)


ATTENTION_LIBRARIES = {
    "flash_attn_2": ("flash_attn/flash_attn_interface.py", "flash-attn-2"),
    "flash_attn_3": ("flash_attn_interface.py", ""),
    "flash_attn_4": ("flash_attn/cute/interface.py", "flash-attn-4"),
    "flashinfer": ("flashinfer/prefill.py", "flashinfer"),
    "xformers_split_k": ("xformers/ops/fmha/triton_splitk.py", "xformers"),
    "sageattention": ("sageattention/__init__.py", "sageattention"),
}


def install(folder: Path, *files: str) -> None:
    """Modules that must not be imported."""
    for file in files:
        place = folder / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("raise AssertionError('a probe imports nothing')\n")


@pytest.mark.parametrize("probe", ATTENTION_LIBRARIES)
def test_attention_libraries_that_are_not_installed_name_what_installs_them(probe: str) -> None:
    reason = missing_requirement((probe,))
    extra = ATTENTION_LIBRARIES[probe][1]
    assert reason is not None
    assert "is not installed" in reason
    assert f"layerzero-dispatch[{extra}]" in reason if extra else "hopper" in reason
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert not extra or extra in declared["project"]["optional-dependencies"]


@pytest.mark.parametrize("has_init", [False, True])
@pytest.mark.parametrize("probe", ATTENTION_LIBRARIES)
def test_attention_libraries_are_found_by_the_module_that_is_called_and_not_imported(
    probe: str, has_init: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ATTENTION_LIBRARIES[probe][0]
    top = module.split("/")[0].removesuffix(".py")
    monkeypatch.syspath_prepend(str(tmp_path))
    if "/" in module:
        (tmp_path / top).mkdir()
        if has_init:
            install(tmp_path, f"{top}/__init__.py")
        if module != "sageattention/__init__.py":
            assert missing_requirement((probe,)) is not None
            missing_requirement.cache_clear()
    install(tmp_path, module)
    assert missing_requirement((probe,)) is None
    assert top not in sys.modules


def test_xformers_is_refused_beside_a_flash_attn_that_it_cannot_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "xformers/ops/fmha/triton_splitk.py", "flash_attn/cute/interface.py")
    assert missing_requirement(("flash_attn_4",)) is None
    assert "flash-attn-4" in str(missing_requirement(("xformers_split_k",)))
    assert "flash-attn-2" in str(missing_requirement(("flash_attn_2",)))
    install(tmp_path, "flash_attn/flash_attn_interface.py")
    missing_requirement.cache_clear()
    assert [missing_requirement((name,)) for name in ("xformers_split_k", "flash_attn_2")] == [None, None]


def test_missing_headers_of_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    reason = missing_requirement(("cxx_compiler",))
    assert reason is not None
    assert "Python.h" in reason


def test_answers_are_kept_until_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_requirement(("cxx_compiler",)) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_requirement(("cxx_compiler",)) is None
    missing_requirement.cache_clear()
    assert missing_requirement(("cxx_compiler",)) is not None


def test_unknown_probe_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"'fortran'.*torch, triton, cxx_compiler"):
        missing_requirement(("fortran",))


def test_version_of_an_imported_library_is_its_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "__version__", "1.2.3+local")
    assert library_version("pytest") == "1.2.3+local"


def test_version_of_what_is_not_installed_is_none() -> None:
    assert library_version("no-such-distribution") is None
