"""Screening clamps with forward passes only, before anything generates.

Two numbers for each (neuron, value): refusal log-odds on harmful prompts, and the loss on the model's own benign
answers, since a clamp that wrecks the language cannot talk anyone out of anything.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from harden import processes
from harden.adapters import has_starting_model, starting_model
from harden.effects import log_odds_under, under_clamps
from harden.generate import Completion, Request, answer_losses, batch_answer_losses, mean, progress_bar
from harden.interventions import Clamp, Intervention
from harden.models import ChatModel
from harden.refusal import RefusalPhrases

Edit = TypeVar("Edit", bound=Intervention)

VALUES_PER_NEURON = 2  # how many values of one neuron may enter the first heat


@dataclass(frozen=True)
class Probe:
    """Prompts with which clamps are screened: harmful requests, and benign ones with the model's own answers."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    answers: tuple[Completion, ...]


@dataclass(frozen=True)
class Screened(Generic[Edit]):
    """Mean refusal log-odds on harmful prompts under an intervention, and the rise of the loss (nats per token) on
    benign ones."""

    clamp: Edit
    log_odds: float
    benign_rise: float


def screen_clamps(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    probe: Probe,
    phrases: RefusalPhrases,
    batch_size: int,
    label: str,
    coherence_at_start: bool = False,
) -> list[Screened]:
    """Screen clamps, or other interventions, with forward passes only. Work is divided between processes.

    coherence_at_start: measure the rise of the benign loss on the starting model instead of the present one.
    Clamps under which anything is not finite are left out of the result.
    """

    log_odds = map(mean, log_odds_under(chat_model, clamps, probe.harmful, phrases, batch_size, label))
    rises = benign_rises(chat_model, clamps, probe, batch_size, f"{label}: coherence", coherence_at_start)
    screened = [Screened(*row) for row in zip(clamps, log_odds, rises, strict=True)]
    return [s for s in screened if math.isfinite(s.log_odds) and math.isfinite(s.benign_rise)]


def benign_rises(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    probe: Probe,
    batch_size: int,
    label: str,
    at_start: bool,
) -> list[float]:
    """By how many nats per token each clamp raises the loss on the probe's benign answers, of the present model or of
    the starting one. Work is divided between processes."""

    def work(mine: list[Intervention]) -> list[float]:
        with progress_bar(len(mine), label) as bar:
            return under_clamps(
                chat_model,
                mine,
                batch_size,
                len(probe.benign),
                lambda edits: _losses(chat_model, edits, probe),
                bar.update,
            )

    with starting_model(chat_model.model) if at_start else nullcontext():
        plain = answer_losses(chat_model, [Request(text) for text in probe.benign], probe.answers, batch_size)
        base = mean([mean(losses) for losses in plain])
        return [loss - base for loss in processes.divide(list(clamps), work)]


def screen_fairly(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    probe: Probe,
    phrases: RefusalPhrases,
    batch_size: int,
    max_benign_rise: float,
    label: str,
) -> list[Screened]:
    """`screen_clamps`, where a clamp counts as coherent if the present model or the starting model speaks under it.

    A model that learned to refuse everything when clamped has not made the clamp incoherent.
    """
    screened = screen_clamps(chat_model, clamps, probe, phrases, batch_size, label)
    doubtful = [s.clamp for s in screened if s.benign_rise > max_benign_rise]
    if not doubtful or not has_starting_model(chat_model.model):
        return screened
    rises = benign_rises(chat_model, doubtful, probe, batch_size, f"{label}: coherence at the start", True)
    at_start = {clamp: rise for clamp, rise in zip(doubtful, rises, strict=True) if math.isfinite(rise)}
    return [replace(s, benign_rise=min(s.benign_rise, at_start.get(s.clamp, s.benign_rise))) for s in screened]


def _losses(chat_model, edits, probe) -> list[float]:
    """Mean loss of the benign answers, for each tuple of interventions."""
    rows = [
        (Request(text, each), answer)
        for each in edits
        for text, answer in zip(probe.benign, probe.answers, strict=True)
    ]
    losses = torch.tensor([mean(losses) for losses in batch_answer_losses(chat_model, rows)])
    return losses.view(len(edits), len(probe.benign)).mean(1).tolist()


def choose_for_generation(screened: Sequence[Screened], max_benign_rise: float, n: int) -> list[Clamp]:
    """The n coherent clamps with the lowest refusal log-odds, at most `VALUES_PER_NEURON` of one neuron."""
    chosen: list[Clamp] = []
    used: dict = defaultdict(int)
    for entry in sorted(screened, key=lambda s: s.log_odds):
        if entry.benign_rise <= max_benign_rise and used[entry.clamp.neuron] < VALUES_PER_NEURON:
            used[entry.clamp.neuron] += 1
            chosen.append(entry.clamp)
    return chosen[:n]
