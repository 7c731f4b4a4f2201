"""What loss terms are computed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harden.interventions import Intervention


@dataclass(frozen=True)
class Row:
    """One training row: prompt and answer tokens, trained under these interventions."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    interventions: tuple[Intervention, ...] = ()


def columns(rows: Sequence[Row]) -> tuple[list, list, list]:
    """Prompts, answers and interventions."""
    return [row.prompt for row in rows], [row.answer for row in rows], [row.interventions for row in rows]
