"""Screening clamps with forward passes only, before anything generates.

Two numbers: refusal log-odds on harmful prompts, and the loss on the model's own benign answers, since a clamp that
wrecks the language cannot talk anyone out of anything.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from harden import processes
from harden.adapters import has_starting_model, starting_model
from harden.effects import log_odds_under, under_clamps
from harden.generate import Completion, Request, answer_losses, batch_answer_losses, mean, progress_bar
from harden.interventions import NOTHING, Clamp, Intervention
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
    """What forward passes say of an intervention."""

    clamp: Edit
    by_prompt: tuple[float, ...]
    """Refusal log-odds of each harmful prompt."""
    benign_rise: float
    """Of the loss on benign prompts, nats per token."""

    @property
    def log_odds(self) -> float:
        return mean(self.by_prompt)


def screen_clamps(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    probe: Probe,
    phrases: RefusalPhrases,
    batch_size: int,
    label: str,
    at_start: bool = False,
    known: Mapping[Intervention, float] | None = None,
) -> list[Screened]:
    """Screen clamps, or other interventions, with forward passes only. Work is divided between processes.

    at_start: measure the rise of the benign loss on the starting model instead of the present one. known: such rises
    that need not be measured.
    Clamps under which anything is not finite are left out of the result.
    """
    log_odds = log_odds_under(chat_model, clamps, probe.harmful, phrases, batch_size, label)
    rises = dict(known or {})
    new = [clamp for clamp in clamps if clamp not in rises]
    found = benign_rises(chat_model, new, probe, batch_size, f"{label}: coherence", at_start)
    rises |= zip(new, found, strict=True)
    return _finite(clamps, log_odds, [rises[clamp] for clamp in clamps])


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


def fair_rises(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    probe: Probe,
    batch_size: int,
    max_benign_rise: float,
    label: str,
) -> list[float]:
    """`benign_rises`, where a clamp counts as coherent if the present model or the starting model speaks under it.

    A model that learned to refuse everything when clamped has not made the clamp incoherent.
    """
    rises = benign_rises(chat_model, clamps, probe, batch_size, label, False)
    doubtful = [n for n, rise in enumerate(rises) if math.isfinite(rise) and rise > max_benign_rise]
    if doubtful and has_starting_model(chat_model.model):
        label = f"{label} at the start"
        at_start = benign_rises(chat_model, [clamps[n] for n in doubtful], probe, batch_size, label, True)
        for n, rise in zip(doubtful, at_start, strict=True):
            rises[n] = min(rises[n], rise) if math.isfinite(rise) else rises[n]
    return rises


def screen_fairly(
    chat_model: ChatModel,
    clamps: Sequence[Edit],
    probe: Probe,
    phrases: RefusalPhrases,
    batch_size: int,
    max_benign_rise: float,
    label: str,
) -> list[Screened[Edit]]:
    """`screen_clamps` with `fair_rises`."""
    log_odds = log_odds_under(chat_model, clamps, probe.harmful, phrases, batch_size, label)
    rises = fair_rises(chat_model, clamps, probe, batch_size, max_benign_rise, f"{label}: coherence")
    return _finite(clamps, log_odds, rises)


def screen_for_generation(
    chat_model: ChatModel,
    values: Sequence[Mapping[Clamp, float]],
    probe: Probe,
    phrases: RefusalPhrases,
    batch_size: int,
    max_benign_rise: float,
    n: int,
    quiet: float | None,
) -> list[Screened[Clamp]]:
    """Screen the values of many neurons until `choose_for_generation` has n clamps to choose.

    Log-odds first, the outermost values before the others (`outermost_first`); then coherence, which costs more, of
    those with the lowest log-odds. Of all values that were not left out, exactly those are found that asking all for
    coherence would choose; where they are fewer than n, those that were left out follow. Returned are the clamps that
    were asked for coherence.
    """
    at_once = max(n, batch_size // len(probe.benign))
    screened: list[Screened[Clamp]] = []

    def measure(clamps: Sequence[Intervention]) -> dict[Intervention, list[float]]:
        rows = log_odds_under(chat_model, clamps, probe.harmful, phrases, batch_size, "screen clamps")
        return dict(zip(clamps, rows, strict=True))

    def enough() -> bool:
        return len(choose_for_generation(screened, max_benign_rise, n)) == n

    def ask_the_lowest(measured: Mapping[Clamp, list[float]]) -> None:
        odds = {clamp: mean(row) for clamp, row in measured.items()}
        lowest = sorted((clamp for clamp in odds if math.isfinite(odds[clamp])), key=odds.__getitem__)
        while lowest and not enough():
            part, lowest = lowest[:at_once], lowest[at_once:]
            rises = fair_rises(chat_model, part, probe, batch_size, max_benign_rise, "coherence of the lowest")
            screened.extend(_finite(part, [measured[clamp] for clamp in part], rises))

    (plain,) = measure([NOTHING]).values()
    heard = outermost_first(values, measure, lambda odds: not is_quiet(odds, plain, quiet))
    ask_the_lowest(heard)
    left_out = [clamp for clamps in values for clamp in clamps if clamp not in heard]
    if left_out and not enough():
        ask_the_lowest(measure(left_out))
    return screened


def outermost_first(
    values: Sequence[Mapping[Clamp, float]],
    measure: Callable[[Sequence[Clamp]], dict[Clamp, list[float]]],
    inwards: Callable[[Sequence[float]], bool],
) -> dict[Clamp, list[float]]:
    """Log-odds of each prompt under neurons' clamps: from the outermost value on either side of the harmless mean
    inwards, as long as `inwards` says so of the log-odds. What is left out is not in the result, whose order is that of
    `values`.

    values: of each neuron its clamps, and how far beyond its harmless mean each is (`clamps_of`).
    """
    sides = []
    for clamps in values:
        outwards = sorted(clamps, key=lambda clamp: -abs(clamps[clamp]))
        for positive in (True, False):
            side = [clamp for clamp in outwards if (clamps[clamp] > 0) is positive]
            sides += [side] if side else []
    odds: dict[Clamp, list[float]] = {}
    while sides:
        odds |= measure([outer for outer, *_ in sides])
        sides = [others for outer, *others in sides if others and inwards(odds[outer])]
    return {clamp: odds[clamp] for clamps in values for clamp in clamps if clamp in odds}


def is_quiet(odds: Sequence[float], plain: Sequence[float], share: float | None) -> bool:
    """Whether a clamp moves the log-odds of no prompt, up or down, by more than `share` of their size; None: none is
    quiet.

    odds: under the clamp, perhaps of the first prompts only; what is no number is not quiet. plain: without it.
    """
    return share is not None and all(abs(x - p) <= share * abs(p) for x, p in zip(odds, plain, strict=False))


def _finite(
    clamps: Sequence[Edit], log_odds: Iterable[Sequence[float]], rises: Sequence[float]
) -> list[Screened[Edit]]:
    rows = zip(clamps, log_odds, rises, strict=True)
    screened = [Screened(clamp, tuple(odds), rise) for clamp, odds, rise in rows]
    return [s for s in screened if math.isfinite(s.log_odds) and math.isfinite(s.benign_rise)]


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
