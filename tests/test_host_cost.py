"""`scripts/host_cost.py`: every kernel that is asked for has a row or a reason, printed and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_kernel_has_a_row_or_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    # By their ends: torch.layer_norm and triton.layer_norm.
    options = ["--device", "cpu", "--ops", "norm.layer", "--kernels", "t*[hn].layer_norm", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "scripts/host_cost.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    content = json.loads(file.read_text(encoding="utf-8"))
    [row] = content["rows"]
    assert (row["kernel"], row["operation"], row["library"]) == ("torch.layer_norm", "norm.layer", "torch")
    assert row["adapter_ns"] > 0 < row["torch_ns"]
    assert row["public_ns"] is None
    assert content["absent"] == ["triton.layer_norm: runs on cuda"]
    assert content["device"]["platform"] == "cpu"
    assert content["versions"]["torch"] == row["version"]
    assert "| torch.layer_norm | norm.layer | bfloat16 4x256 |" in done.stdout
    assert "triton.layer_norm: runs on cuda" in done.stdout
