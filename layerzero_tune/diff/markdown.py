"""The text of a comparison as Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from layerzero_tune.diff.document import Section

# What would be read as markup; an underscore inside a word is none.
_SPECIAL = re.compile(r"[\\`*<|\[]|(?<![^\W_])_|_(?![^\W_])")


def markdown_of(sections: Iterable[Section]) -> str:
    """The sections with headings of the third level, as GitHub shows them."""
    return "\n".join(line for section in sections for line in _lines(section))


def _lines(section: Section) -> Iterator[str]:
    yield from (f"### {_escaped(section.title)}", "")
    for paragraph in section.text:
        yield from (_escaped(paragraph), "")
    if section.rows:
        yield from (_row(section.columns), _row("---" for _ in section.columns))
        yield from (*(_row(map(_escaped, row)) for row in section.rows), "")
    for group in section.groups:
        yield f"- **{_escaped(group.title)}**"
        yield from (f"  - {_escaped(line)}" for line in group.lines)
    if section.groups:
        yield ""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", text)
