"""Staleness: what makes an entry stale, and what does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from layerzero_runtime.tables.staleness import kernel_source_hash

ADAPTER = '''"""An adapter."""

from layerzero_runtime.kernel import Kernel, KernelSpec

_BLOCK = 64


def load(context, configuration):
    return lambda gate, up: gate * up * _BLOCK


_SPEC = KernelSpec(kernel_id="mine.swiglu", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",))
KERNELS = (Kernel(_SPEC, load),)
'''


def adapter_hash(tmp_path: Path, name: str, source: str) -> str:
    path = tmp_path / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return kernel_source_hash(module.KERNELS[0])


def test_code_and_constants_count_declarations_and_comments_do_not(tmp_path: Path) -> None:
    measured = adapter_hash(tmp_path, "adapter_before", ADAPTER)
    assert len(measured) == 32
    harmless = {
        "limit": ADAPTER.replace('dtypes=("float32",)', 'dtypes=("float32", "bfloat16"), min_seq_len=4'),
        "docstring": ADAPTER.replace("An adapter.", "The same adapter."),
        "comment": ADAPTER.replace("_SPEC =", "# A comment.\n_SPEC ="),
        "import": ADAPTER.replace("from layerzero", "import math\n\nfrom layerzero"),
    }
    for name, source in harmless.items():
        assert source != ADAPTER
        assert adapter_hash(tmp_path, f"adapter_{name}", source) == measured, name
    for name, source in {
        "constant": ADAPTER.replace("_BLOCK = 64", "_BLOCK = 128"),
        "function": ADAPTER.replace("gate * up * _BLOCK", "up * gate * _BLOCK"),
    }.items():
        assert adapter_hash(tmp_path, f"adapter_{name}", source) != measured, name
