"""Print the README's sections of figures from the committed results; with --write, put them into the README."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lookup_bench.report import readme_section

from layerzero_tune.evaluate.summary import SUMMARY_COLUMNS, summary_cells

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DISPATCH = ROOT / "scripts" / "results" / "bench_lookup.json"


def measured_section() -> str:
    """One table per committed evaluation, in order of path."""
    return "\n".join(_table(path) for path in sorted((ROOT / "tables").glob("*/evaluation.json")))


def _days(evaluation: Mapping[str, Any]) -> str:
    """Of a table that was mended, what serves as before was measured before."""
    last = evaluation["measured_to"][:10]
    first = evaluation.get("measured_from", last)[:10]
    return last if first == last else f"{first} to {last}"


def _table(path: Path) -> str:
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    device, versions = evaluation["device"], evaluation["provenance"]["versions"]
    traits = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in device.items() if name not in ("name", "platform")
    )
    lines = [
        f"{device['name']} ({traits}); {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{len(evaluation['shapes'])} held-out shapes, measured {_days(evaluation)}; "
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


def dispatch_section() -> str:
    """What `scripts/bench_lookup.py` found."""
    results = json.loads(DISPATCH.read_text(encoding="utf-8"))
    return readme_section(results, str(DISPATCH.relative_to(ROOT)))


def marked(name: str, section: str) -> str:
    """The section as it stands in the README, between its marks."""
    return f"{_begin(name)}\n{section}\n{_end(name)}"


def _begin(name: str) -> str:
    return f"<!-- {name} -->\n"


def _end(name: str) -> str:
    return f"<!-- end {name} -->\n"


def readme_with(sections: Mapping[str, str]) -> str:
    """The README with the sections in their places."""
    readme = README.read_text(encoding="utf-8")
    for name, section in sections.items():
        before, rest = readme.split(_begin(name))
        readme = before + marked(name, section) + rest.split(_end(name))[1]
    return readme


if __name__ == "__main__":
    found = {"measured": measured_section(), "dispatch": dispatch_section()}
    if "--write" in sys.argv[1:]:
        README.write_text(readme_with(found), encoding="utf-8")
    else:
        print("\n".join(marked(name, section) for name, section in found.items()))
