"""Rates and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from harden.results import Rate


def rate_text(rate: Rate) -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}], n={rate.n}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
