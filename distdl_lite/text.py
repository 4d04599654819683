"""Words in lines. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of words in aligned columns.

    >>> print(columns([("rank", "holds"), ("0", "[0:4]")]))
    rank  holds
    0     [0:4]
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
