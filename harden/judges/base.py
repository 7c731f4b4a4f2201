"""What every judge is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from harden.results import Outcome


@dataclass(frozen=True)
class Item:
    """A request and the model's completion of it, both plain text."""

    request: str
    completion: str


@dataclass(frozen=True)
class Judgement:
    outcome: Outcome
    reason: str
    """Short, for logs: never a part of the request or the completion."""


class Judge(Protocol):
    name: str

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement per item, in order."""
