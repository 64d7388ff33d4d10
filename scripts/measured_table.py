"""Print the README's measured section from the committed evaluations; with --write, put it into the README."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from layerzero_tune.evaluate.summary import SUMMARY_COLUMNS, summary_cells

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end measured -->\n"


def measured_section() -> str:
    """One table per committed evaluation, in order of path."""
    return "\n".join(_table(path) for path in sorted((ROOT / "tables").glob("*/evaluation.json")))


def _table(path: Path) -> str:
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    device, versions = evaluation["device"], evaluation["provenance"]["versions"]
    traits = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in device.items() if name not in ("name", "platform")
    )
    lines = [
        f"{device['name']} ({traits}); {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{len(evaluation['shapes'])} held-out shapes, measured {evaluation['measured_to'][:10]}; "
        f"from `{path.relative_to(ROOT)}`.",
        "",
        _line(SUMMARY_COLUMNS),
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_line(summary_cells(summary["operation"], summary["mode"], summary)) for summary in evaluation["summaries"]),
        "",
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def readme_with(section: str) -> str:
    """The README with the section in its place."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(readme_with(measured_section()), encoding="utf-8")
    else:
        print(measured_section())
