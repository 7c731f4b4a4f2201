"""What every step of a round of training works with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from harden.attack.screen import Probe
from harden.interventions import Clamp
from harden.models import ChatModel
from harden.objective.rows import Row
from harden.refusal import RefusalPhrases
from harden.settings.training import TrainSection


@dataclass(frozen=True)
class TrainingData:
    """Token rows to train on, and the texts with which neurons are located and clamps are weighed."""

    harmful: tuple[tuple[int, ...], ...]
    refusals: tuple[tuple[int, ...], ...]
    twins: tuple[tuple[int, ...] | None, ...]
    """The twin of each harmful prompt, if it has one."""
    more_twins: tuple[tuple[int, ...], ...]
    """Look-alikes that are drawn by themselves."""
    benign: tuple[Row, ...]
    harmful_texts: tuple[str, ...]
    twin_texts: tuple[str, ...]
    probe: Probe
    texts: tuple[Row, ...] = ()
    """Benign requests alone: the first token, and as an answer the rest."""

    @property
    def more_share(self) -> float:
        """Share of all look-alikes that are drawn by themselves."""
        every = sum(twin is not None for twin in self.twins) + len(self.more_twins)
        return len(self.more_twins) / every if every else 0.0


@dataclass(frozen=True)
class Start:
    """What is read of the starting model once, before a round; empty where no term asks for it."""

    twins: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    """Refusal log-odds of each twin."""
    leverage: Sequence[torch.Tensor] = ()
    """Clamp values of all neurons, one (neurons,) vector per size."""
    full: torch.Tensor | None = None
    """`full_strength`, (neurons,)."""


@dataclass(frozen=True)
class RoundContext:
    """What stays the same through a round, but for the weights of the adapter."""

    chat_model: ChatModel
    data: TrainingData
    phrases: RefusalPhrases
    settings: TrainSection
    """The recipe's `train`, with the weights that the utility terms have in this round."""
    max_benign_rise: float
    """`attack.max_benign_rise`: what clamps may add to the starting model's loss on benign answers, nats per token."""
    past_breakers: Sequence[Clamp]
    """Clamps that broke the model in an earlier round; they stay among those that are drawn from, and so do others of
    their neurons, as long as the starting model is coherent under them."""
    batch_size: int
    """Rows at once where neurons are located, clamps weighed and the starting model read. A term's rows are a batch."""
    start: Start = field(default_factory=Start)
    """What `read_start` returns; `train_round` puts it here."""


def pick(rng: random.Random, items: Sequence, n: int) -> list:
    """`n` different items in a random order; all of them where there are fewer."""
    return rng.sample(items, min(n, len(items)))
