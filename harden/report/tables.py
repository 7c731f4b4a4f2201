"""Rates and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from harden.results import Mean, Rate


def rate_text(rate: Rate) -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}], n={rate.n}"


def mean_text(mean: Mean) -> str:
    """To four decimals: what is beyond them is rounding, as where a model is compared with itself."""
    return "{:.3g} [{:.3g}, {:.3g}]".format(*(round(x, 4) + 0.0 for x in (mean.mean, mean.low, mean.high)))


def duration_text(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def sizes_text(sizes: Sequence[float], strengths: Sequence[float]) -> str:
    """How many values a neuron is clamped to, at most, and which."""
    n, text = len(sizes) + 2 * len(strengths), f"sizes {', '.join(f'{size:g}' for size in sizes)}"
    if strengths:
        text += f"; {', '.join(f'±{share:g}' for share in strengths)} of the residual stream's norm"
    return f"{n} value{'s' if n > 1 else ''} ({text})"
