"""FS-014 to FS-021: kernels that are exchanged, do not load or do not compile; files that are damaged or missing."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import PolicyLoadError, ResultsError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from layerzero_runtime.tables.table_files import TABLES_VARIABLE
from layerzero_tune.compile.form import TableForm
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.runtime.conftest import tables_in_force
from tests.runtime.synthetic_table import write_table
from tests.scenarios.conftest import XEON, beside_builtin, only
from tests.scenarios.failing_kernels import (
    Background,
    Body,
    Stop,
    clock_by_hand,
    count_of,
    refusal,
    right,
    serve_rightly,
    swiglu_context,
    swiglu_kernel,
    swiglu_spec,
)
from tests.tune.command import CommandsHere
from tests.tune.measurements import make_contest, rows_of


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.mark.scenario("FS-014")
def test_a_call_that_runs_ends_with_the_code_it_began_with() -> None:
    stop = Stop()

    def held(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        stop.come_by()
        return right(gate, up)

    old, new = Body(held), Body()
    lz.register_kernel(swiglu_spec("test.reloaded"), old)
    running = Background(serve_rightly)
    stop.wait_until_reached()
    lz.unregister_kernel("test.reloaded")
    lz.register_kernel(swiglu_spec("test.reloaded"), new)
    serve_rightly()
    assert running.is_running
    assert (old.calls, new.calls) == (1, 1)
    stop.let_go()
    running.result()
    serve_rightly()
    assert (old.calls, new.calls) == (1, 2)
    assert lz.stats().broken == ()


@pytest.mark.scenario("FS-014")
def test_a_kernel_of_the_same_name_does_not_inherit_a_failure() -> None:
    def fail(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the code before the reload")

    lz.register_kernel(swiglu_spec("test.reloaded"), fail)
    serve_rightly()
    assert lz.stats().broken == ("test.reloaded",)
    lz.unregister_kernel("test.reloaded")
    assert lz.stats().broken == ()
    mended = Body()
    lz.register_kernel(swiglu_spec("test.reloaded"), mended)
    serve_rightly()
    assert mended.calls == 1


@pytest.mark.scenario("FS-015")
def test_a_backend_that_cannot_be_imported_is_left_out_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    attempts: list[str] = []

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        attempts.append(context.operation)
        from some_backend_for_layerzero import swiglu  # type: ignore[import-not-found]

        function: KernelFunction = swiglu
        return function

    monkeypatch.syspath_prepend(str(tmp_path))
    fallbacks = count_of("fallbacks")
    with clock_by_hand() as clock, beside_builtin(Kernel(swiglu_spec("some_backend.swiglu"), load)):
        # Nothing is imported before a call needs it.
        assert lz.select(swiglu_context()).kernel_id == "some_backend.swiglu"
        assert attempts == []
        for _ in range(3):
            serve_rightly()
        assert (len(attempts), count_of("fallbacks")) == (1, fallbacks + 1)
        assert "ModuleNotFoundError: No module named 'some_backend_for_layerzero'" in refusal("some_backend.swiglu")
        assert caplog.text.count("some_backend.swiglu failed to load: ModuleNotFoundError") == 1
        assert lz.select(swiglu_context()).kernel_id == "torch.swiglu"
        (tmp_path / "some_backend_for_layerzero.py").write_text(
            "from torch.nn.functional import silu\ndef swiglu(gate, up):\n    return silu(gate) * up\n"
        )
        clock.move(30.0)
        serve_rightly()
        assert (len(attempts), lz.stats().broken) == (2, ())
        assert lz.select(swiglu_context()).kernel_id == "some_backend.swiglu"


@pytest.mark.scenario("FS-016")
def test_a_library_that_is_too_old_is_never_called() -> None:
    body = Body()
    with beside_builtin(swiglu_kernel("test.modern", body, library="torch", min_version="99.1")):
        serve_rightly()
        plan = lz.select(swiglu_context())
    assert (plan.kernel_id, plan.available) == ("torch.swiglu", True)
    assert body.calls == 0
    with beside_builtin(swiglu_kernel("test.modern", body, library="torch", min_version="99.1")):
        assert f"torch {torch.__version__} is installed, required at least 99.1" in refusal("test.modern")
    with beside_builtin(swiglu_kernel("test.modest", body, library="torch", min_version="1.0")):
        serve_rightly()
    assert body.calls == 1


@pytest.mark.scenario("FS-017")
def test_a_compilation_that_fails_costs_one_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    attempts: list[str] = []

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        attempts.append(context.dtype)
        command = ["g++", "-x", "c++", "-fsyntax-only", "-"]
        subprocess.run(command, input=b"int kernel( { return; }", stderr=subprocess.DEVNULL, check=True)
        return right

    with clock_by_hand() as clock, beside_builtin(Kernel(swiglu_spec("test.jit", compiles=True), load)):
        for _ in range(3):
            serve_rightly()
        assert attempts == ["float32"]
        assert lz.stats().broken == ("test.jit",)
        assert "test.jit failed to load: CalledProcessError" in refusal("test.jit")
        assert "CalledProcessError" in caplog.text
        clock.move(30.0)
        serve_rightly()
        assert attempts == ["float32"] * 2
        assert lz.stats().broken == ("test.jit",)


@pytest.mark.scenario("FS-018")
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("denies:\n  - kernel: torch.swiglu\n   backend: torch\n", 3, ""),
        ("denies:\n  - kernel: [torch.swiglu\n", 3, ""),
        ("denies:\n  - kernel: torch.swiglu\nforbids:\n  - kernel: torch.swiglu\n", 3, "forbids"),
        ("denies:\n  - kernel: torch.swiglu\n  - kernels: torch.swiglu\n", 3, "kernels"),
        ("denies:\n  - kernel: 7\n", 2, "kernel"),
    ],
)
def test_a_policy_file_that_is_damaged_leaves_the_policy_as_it_was(
    text: str, line: int, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("yaml")
    caplog.set_level(logging.WARNING, "layerzero")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("denies:\n  - kernel: torch.swiglu\n")
    bad.write_text(text)
    lz.set_policy(str(good))
    in_force, refused = current_snapshot().policy, count_of("policies_refused")
    assert lz.select(swiglu_context()).kernel_id == "torch.swiglu.in_place"
    with pytest.raises(PolicyLoadError) as raised:
        lz.set_policy(str(bad))
    assert f"{bad}:{line}" in str(raised.value)
    assert words in str(raised.value)
    assert current_snapshot().policy is in_force
    assert lz.select(swiglu_context()).kernel_id == "torch.swiglu.in_place"
    assert count_of("policies_refused") == refused + 1
    assert "the policy before it stays in force" in caplog.text


@pytest.mark.scenario("FS-019")
def test_a_changed_byte_anywhere_costs_one_contest_at_most(tmp_path: Path) -> None:
    """Whatever byte of a file is damaged, its rows are right or the file is set aside; the others are used."""
    store = ResultsStore(tmp_path)
    paths = [store.append(make_contest(number)) for number in range(3)]
    content = paths[1].read_bytes()
    set_aside = 0
    for place in range(0, len(content), max(1, len(content) // 60)):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        paths[1].write_bytes(bytes(damaged))
        found = store.read()
        assert found.rows in (rows_of(0, 1, 2), rows_of(0, 2))
        assert (found.rows == rows_of(0, 2)) == bool(found.quarantined)
        set_aside += bool(found.quarantined)
    assert set_aside > 10
    # Measuring the contest again makes the store whole; what was damaged is still there to look at.
    store.append(make_contest(1))
    assert store.read().rows == rows_of(0, 1, 2)
    assert len(list((tmp_path / "quarantine").iterdir())) == set_aside


@pytest.mark.scenario("FS-020")
def test_without_a_table_the_first_call_is_served_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    for folder in (tmp_path, tmp_path / "there is no such folder"):
        with tables_in_force(folder):
            plan = lz.select(swiglu_context())
            assert (plan.source, plan.kernel_id, plan.table) == ("live", "torch.swiglu", None)
            assert str(plan.miss_reason).startswith("no table for device cpu_")
            calls, misses = count_of("calls"), count_of("misses")
            for _ in range(2):
                serve_rightly()
            assert (count_of("calls"), count_of("misses")) == (calls + 2, misses + 2)
    assert "which is not a folder" in caplog.text


@pytest.mark.scenario("FS-021")
def test_a_table_of_another_schema_is_skipped_logged_and_counted(
    synthetic_table: tuple[Path, TableForm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: CommandsHere,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    [module] = synthetic_table[0].glob("*/__init__.py")
    other = tmp_path / "tables" / module.parent.name / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text(module.read_text().replace("SCHEMA = 1", "SCHEMA = 999"))
    skipped = count_of("tables_skipped")
    with tables_in_force(synthetic_table[0]):
        assert lz.select(swiglu_context(1, 32)).source == "table"
    with tables_in_force(tmp_path / "tables"):
        for _ in range(2):
            assert lz.select(swiglu_context(1, 32)).source == "live"
            serve_rightly(1, 32)
        assert count_of("tables_skipped") == skipped + 1
    assert "table schema is 999, this runtime reads 1" in caplog.text
    monkeypatch.delenv(TABLES_VARIABLE, raising=False)
    call = ("--operation", "mlp.swiglu", "--dtype", "float32", "--rows", 1, "--hidden-size", 32, "--device", "cpu")
    ended = command("explain", *call, "--tables", tmp_path / "tables")
    assert ended.status != 0
    assert "table schema is 999" in ended.errors


@pytest.mark.scenario("FS-021")
def test_results_of_a_newer_release_are_refused_and_left_alone(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from layerzero_tune.results.schema import SCHEMA_KEY, to_table

    rows: list[Measurement] = make_contest(0)
    path = ResultsStore(tmp_path).append(rows)
    pq.write_table(to_table(rows).replace_schema_metadata({SCHEMA_KEY: b"999"}), path)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="schema version 999"):
        ResultsStore(tmp_path).read()
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def synthetic_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TableForm]:
    """A folder with a table of this machine's CPU."""
    folder = tmp_path_factory.mktemp("tables")
    device = swiglu_context().device
    assert device is not None
    return folder, write_table(folder, device)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandsHere:
    """`layerzero-tune` in this process."""
    return CommandsHere(monkeypatch, capsys)


@pytest.mark.scenario("FS-016")
def test_a_described_call_says_which_version_it_lacks() -> None:
    with only(swiglu_kernel("test.modern", right, library="torch", min_version="99.1")):
        plan = lz.select(swiglu_context(device=XEON))
    assert not plan.available
    assert "required at least 99.1: pip install 'torch>=99.1'" in str(plan.unavailable_reason)
