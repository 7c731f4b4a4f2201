"""What harmful rows are trained under: clamps that break the model now, and the baselines' masks and ablations.

Neurons are located on the present weights, and clamp sizes count in their present gaps; what keeps clamps from growing
with training is that they must be coherent on the starting model.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from harden.activations import neuron_at
from harden.attack.arms import refusal_directions
from harden.attack.screen import Probe, screen_clamps
from harden.interventions import Ablate, Clamp, Intervention, Scale
from harden.locate.base import Candidate
from harden.locate.contrast import read_contrast
from harden.locate.gradient import NeuronScores, score_neurons
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.recipe import ClampTerm, TrainSection
from harden.refusal import RefusalPhrases

logger = logging.getLogger(__name__)

RELOCATE_PROMPTS = 8  # harmful and as many look-alikes; locating again must stay cheap beside the steps
CONTRAST_PROMPTS = 32  # of either kind, for masks and directions: forward passes alone
REPLAYED = 0.25  # weight over the floor from which on a neuron is not forgotten: an even chance of no refusal


@dataclass
class Adversary:
    """Clamps and how likely each is drawn; neurons that broke the model; those that are masked; refusal directions."""

    clamps: list[Clamp] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    breakers: list[Neuron] = field(default_factory=list)
    """Of any earlier weighing in this round."""
    masked: list[Neuron] = field(default_factory=list)
    directions: torch.Tensor | None = None
    """(layers, d_model), unit vectors."""

    def draw(self, rng: random.Random, pairs: float = 0.0) -> tuple[Clamp, ...]:
        """A clamp; with chance `pairs`, two of different neurons. Empty where there are no clamps."""
        if not self.clamps:
            return ()
        first = rng.choices(self.clamps, self.weights)[0]
        if not pairs or rng.random() >= pairs:
            return (first,)
        others = [place for place, clamp in enumerate(self.clamps) if clamp.neuron != first.neuron]
        if not others:
            return (first,)
        second = rng.choices(others, [self.weights[place] for place in others])[0]
        return first, self.clamps[second]

    def row(
        self, rng: random.Random, number: int, settings: TrainSection, chat_model: ChatModel
    ) -> tuple[Intervention, ...]:
        """What the number-th harmful row of a step is trained under: the first under clamps, the next masked, the next
        with a direction ablated, the others under nothing."""
        rows, shares = settings.refusal.rows, (settings.clamps.share, settings.mask.share, settings.direction.share)
        clamped, masked, ablated = (round(rows * total) for total in accumulate(shares))
        if number < clamped:
            return self.draw(rng, settings.clamps.pairs)
        if number < masked:
            chosen = self.masked
            if settings.mask.locator == "random":
                columns = rng.sample(range(chat_model.neurons.count), _masked(settings, chat_model))
                chosen = [neuron_at(chat_model, column) for column in columns]
            return tuple(Scale(neuron, 0.0) for neuron in chosen)
        if number < ablated and self.directions is not None:
            layer = rng.randrange(max(1, len(self.directions) * 4 // 5))  # the last fifth writes the words themselves
            return (Ablate(f"layer {layer}", self.directions[layer].expand_as(self.directions)),)
        return ()

    def to_state(self) -> dict[str, Any]:
        """Plain lists and tensors, for a checkpoint."""
        return {
            "clamps": [
                [clamp.neuron.layer, clamp.neuron.index, clamp.value, weight]
                for clamp, weight in zip(self.clamps, self.weights, strict=True)
            ],
            "breakers": [[neuron.layer, neuron.index] for neuron in self.breakers],
            "masked": [[neuron.layer, neuron.index] for neuron in self.masked],
            "directions": self.directions,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Adversary:
        rows = state["clamps"]
        return cls(
            [Clamp(Neuron(int(r[0]), int(r[1])), r[2]) for r in rows],
            [r[3] for r in rows],
            *([Neuron(layer, index) for layer, index in state[name]] for name in ("breakers", "masked")),
            state["directions"],
        )


def refresh(
    adversary: Adversary,
    step: int,
    chat_model: ChatModel,
    harmful: Sequence[str],
    twins: Sequence[str],
    probe: Probe,
    phrases: RefusalPhrases,
    settings: TrainSection,
    max_benign_rise: float,
    past_breakers: Sequence[Neuron],
    batch_size: int,
    rng: random.Random,
) -> Adversary:
    """The adversary at a step: what is due is located anew on the present weights, the rest stays."""
    clamps, mask, direction = settings.clamps, settings.mask, settings.direction
    if settings.draws_clamps and step % clamps.relocate_every == 0:
        known = [*past_breakers, *(adversary.breakers if clamps.replay else ())]
        texts = _pick(rng, harmful, RELOCATE_PROMPTS), _pick(rng, twins, RELOCATE_PROMPTS)
        scores = score_neurons(chat_model, *texts, phrases, batch_size)
        at_random: list[Candidate] = []
        if clamps.random:  # sizes count in standard deviations where a gap is smaller: most of theirs are noise
            contrast = read_contrast(chat_model, *texts, batch_size)
            columns = rng.sample(range(chat_model.neurons.count), min(clamps.random, chat_model.neurons.count))
            at_random = [contrast.candidate(column) for column in columns]
        found = weigh_clamps(chat_model, scores, probe, phrases, clamps, max_benign_rise, known, at_random, batch_size)
        worst = zip(found.clamps, found.weights, strict=True)
        now = [clamp.neuron for clamp, weight in worst if weight - clamps.floor >= REPLAYED]
        breakers = list(dict.fromkeys([*adversary.breakers, *now]))
        adversary = replace(adversary, clamps=found.clamps, weights=found.weights, breakers=breakers)
    locate_mask = mask.share and mask.locator != "random" and _due(step, mask.relocate_every)
    locate_directions = direction.share and _due(step, direction.relocate_every)
    if locate_mask or locate_directions:
        texts = _pick(rng, harmful, CONTRAST_PROMPTS), _pick(rng, twins, CONTRAST_PROMPTS)
        contrast = read_contrast(chat_model, *texts, batch_size)
        if locate_mask:
            columns = contrast.ranking(mask.locator)[: _masked(settings, chat_model)].tolist()
            adversary = replace(adversary, masked=[neuron_at(chat_model, column) for column in columns])
        if locate_directions:
            adversary = replace(adversary, directions=refusal_directions(contrast.harmful, contrast.harmless))
    return adversary


def weigh_clamps(
    chat_model: ChatModel,
    scores: NeuronScores,
    probe: Probe,
    phrases: RefusalPhrases,
    settings: ClampTerm,
    max_benign_rise: float,
    known: Sequence[Neuron],
    at_random: Sequence[Candidate],
    batch_size: int,
) -> Adversary:
    """Clamps of the best-scored neurons, of known ones and of some at random, weighed by how well they work now.

    A clamp's weight is the squared chance that the model does not refuse under it (squared: most located clamps are
    harmless, and would together be drawn more often than the few that work) plus `settings.floor`; clamps that raise
    the loss on benign answers by more than `max_benign_rise` nats per token are left out. That is measured on the
    starting model: training can widen a neuron's activation gap, and the clamps must not grow with it until they only
    make the model babble. If none is left there are no clamps, and rows are trained without.
    """
    candidates = {c.neuron: c for c in scores.top(settings.pool)}
    candidates |= {neuron: scores.candidate(neuron) for neuron in known}
    candidates |= {c.neuron: c for c in at_random}
    clamps = [Clamp(c.neuron, c.clamp_value(size)) for c in candidates.values() for size in settings.sizes]
    screened = screen_clamps(chat_model, clamps, probe, phrases, batch_size, "weigh clamps", coherence_at_start=True)
    coherent = [entry for entry in screened if entry.benign_rise <= max_benign_rise]
    if not coherent:
        logger.warning("none of %d clamps is coherent: training without; smaller train.clamps.sizes?", len(clamps))
    return Adversary(
        [entry.clamp for entry in coherent],
        [settings.floor + (1 / (1 + math.exp(min(entry.log_odds, 50.0)))) ** 2 for entry in coherent],
    )


def _masked(settings: TrainSection, chat_model: ChatModel) -> int:
    return max(1, round(settings.mask.neurons * chat_model.neurons.count))


def _due(step: int, every: int | None) -> bool:
    return step == 0 if every is None else step % every == 0


def _pick(rng: random.Random, items: Sequence, n: int) -> list:
    return rng.sample(items, min(n, len(items)))
