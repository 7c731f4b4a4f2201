"""What rows are trained under: clamps that break the model now, strong ones, and the baselines' masks and ablations.

Neurons are located on the present weights, and clamp sizes count in their present gaps, strengths in norms of the
starting model's residual stream; what keeps clamps from growing with training is that they must be coherent on the
starting model.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from harden.activations import column_of, neuron_at
from harden.attack.arms import Anchor, anchored, refusal_directions
from harden.attack.screen import screen_clamps
from harden.attack.select import RANDOM, select_candidates
from harden.context import RoundContext, pick
from harden.generate import mean
from harden.interventions import Ablate, Clamp, Intervention, Scale
from harden.locate.base import Candidate, clamps_of
from harden.locate.contrast import read_contrast
from harden.locate.passes import Passes
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.prompts import Prompt
from harden.settings.training import TrainSection

logger = logging.getLogger(__name__)

RELOCATE_PROMPTS = 8  # harmful and as many look-alikes; locating again must stay cheap beside the steps
CONTRAST_PROMPTS = 32  # of either kind, for masks and directions: forward passes alone
ANCHOR_K = (1.0, 2.0)  # strengths of anchored clamps, those of Kazemi et al.
REPLAYED = {"chance": 0.25, "shortfall": 0.5}  # weight over the floor from which on a neuron is not forgotten
PAST_FLOOR = 0.1  # least weight of a clamp that broke the model in an earlier round, however well it is resisted


@dataclass(frozen=True)
class Nearer(Clamp):
    """A clamp at a share of a weighed one's distance from the harmless mean; it says of which, so that what its row met
    counts for that one."""

    weighed: Clamp


@dataclass(frozen=True)
class Weighed:
    """A clamp, how likely it is drawn, and what else that takes."""

    clamp: Clamp
    weight: float
    benign_rise: float
    """Of the starting model's loss on benign answers, nats per token."""
    harmful: float
    harmless: float
    """The neuron's mean activations on either kind of prompt, for its anchor and for nearer values."""
    floor: float
    """Of the weight, whatever the model resists."""

    def nearer(self, rng: random.Random, nearest: float) -> Clamp:
        """The clamp, at a share of its distance from the harmless mean that is drawn evenly from `nearest` to 1."""
        if nearest == 1:
            return self.clamp
        value = self.harmless + rng.uniform(nearest, 1) * (self.clamp.value - self.harmless)
        return Nearer(self.clamp.neuron, value, self.clamp)


@dataclass
class Adversary:
    """Clamps that are drawn from; neurons that broke the model; those that are masked; refusal directions."""

    clamps: list[Weighed] = field(default_factory=list)
    breakers: list[Neuron] = field(default_factory=list)
    """Of any earlier weighing in this round."""
    masked: list[Neuron] = field(default_factory=list)
    directions: torch.Tensor | None = None
    """(layers, d_model), unit vectors."""

    def draw(self, rng: random.Random, size: int = 1, max_benign_rise: float = math.inf) -> tuple[Weighed, ...]:
        """Clamps of up to `size` different neurons, by weight; none where there are none.

        Their rises of the benign loss add up to at most the limit: two that are coherent one by one may not be so
        together.
        """
        drawn: list[Weighed] = []
        others = self.clamps
        while others and len(drawn) < size:
            drawn += rng.choices(others, [other.weight for other in others])
            neurons, spent = {member.clamp.neuron for member in drawn}, sum(member.benign_rise for member in drawn)
            others = [
                other
                for other in self.clamps
                if other.clamp.neuron not in neurons and spent + other.benign_rise <= max_benign_rise
            ]
        return tuple(drawn)

    def clamped(self, context: RoundContext, rng: random.Random, text: str) -> tuple[Clamp, ...]:
        """Clamps to train the request `text` under: one or, in its share, a group; constant or, in theirs, anchored."""
        settings = context.settings.clamps
        grouped = settings.groups and rng.random() < settings.groups
        drawn = self.draw(rng, settings.group_size if grouped else 1, context.max_benign_rise)
        if not settings.anchors or rng.random() >= settings.anchors:
            return tuple(member.nearer(rng, settings.nearest) for member in drawn)
        anchors = [
            Anchor(member.clamp, member.harmful, member.harmless, rng.choice(ANCHOR_K))
            for member in drawn
            if member.harmful != member.harmless
        ]
        if not anchors:
            return ()
        prompt = Prompt("here", "", text)
        return tuple(arm.by_prompt[prompt.id][0] for arm in anchored(context.chat_model, anchors, [prompt], 1))

    def row(
        self, context: RoundContext, rng: random.Random, number: int, of: int, text: str
    ) -> tuple[Intervention, ...]:
        """What the number-th of a step's harmful rows, the request `text`, is trained under: the first under clamps,
        the next masked, the next with a direction ablated, the others under nothing. of: how many they are."""
        chat_model, settings = context.chat_model, context.settings
        shares = (settings.clamps.share, settings.mask.share, settings.direction.share)
        clamped, masked, ablated = (round(of * total) for total in accumulate(shares))
        if number < clamped:
            return self.clamped(context, rng, text)
        if number < masked:
            chosen = self.masked
            if settings.mask.locator == "random":
                columns = rng.sample(range(chat_model.neurons.count), _n_masked(context))
                chosen = [neuron_at(chat_model, column) for column in columns]
            return tuple(Scale(neuron, 0.0) for neuron in chosen)
        if number < ablated and self.directions is not None:
            layer = rng.randrange(max(1, len(self.directions) * 4 // 5))  # the last fifth writes the words themselves
            return (Ablate(f"layer {layer}", self.directions[layer].expand_as(self.directions)),)
        return ()

    def learn(self, met: Sequence[tuple[Clamp | None, float]], settings: TrainSection) -> None:
        """Weigh clamps by what single rows just met: the clamp, None where it was not one alone, and the refusal
        log-odds under it, in nats.

        A row is one prompt of many, so it moves a clamp's weight half of the way. Clamps that are resisted by now are
        drawn less at once, not only when all are weighed again. With `clamps.nearest` a weight becomes that of the
        values which the clamp is drawn at, not of its own alone.
        """
        places = {weighed.clamp: place for place, weighed in enumerate(self.clamps)}
        for clamp, log_odds in met:
            place = places.get(clamp.weighed if isinstance(clamp, Nearer) else clamp)
            if place is not None:
                weighed = self.clamps[place]
                weight = (weighed.weight + weighed.floor + _breaking([log_odds], settings)) / 2
                self.clamps[place] = replace(weighed, weight=weight)

    def to_state(self) -> dict[str, Any]:
        """Plain lists and tensors, for a checkpoint."""
        return {
            "clamps": [
                [
                    w.clamp.neuron.layer,
                    w.clamp.neuron.index,
                    w.clamp.value,
                    w.weight,
                    w.benign_rise,
                    w.harmful,
                    w.harmless,
                    w.floor,
                ]
                for w in self.clamps
            ],
            "breakers": [[neuron.layer, neuron.index] for neuron in self.breakers],
            "masked": [[neuron.layer, neuron.index] for neuron in self.masked],
            "directions": self.directions,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Adversary:
        return cls(
            [Weighed(Clamp(Neuron(int(r[0]), int(r[1])), r[2]), *r[3:]) for r in state["clamps"]],
            *([Neuron(layer, index) for layer, index in state[name]] for name in ("breakers", "masked")),
            state["directions"],
        )


def refresh(context: RoundContext, adversary: Adversary, step: int, rng: random.Random) -> Adversary:
    """The adversary at a step: what is due is located anew on the present weights, the rest stays."""
    chat_model, data, settings = context.chat_model, context.data, context.settings
    mask, direction = settings.mask, settings.direction
    if settings.draws_clamps and step % settings.clamps.relocate_every == 0:
        known = {weighed.clamp: weighed.benign_rise for weighed in adversary.clamps}
        found = weigh_clamps(context, _pool(context, adversary.breakers, rng), known)
        least = REPLAYED[settings.clamps.weigh_by]
        now = [weighed.clamp.neuron for weighed in found if weighed.weight - weighed.floor >= least]
        breakers = list(dict.fromkeys([*adversary.breakers, *now]))
        adversary = replace(adversary, clamps=found, breakers=breakers)
    locate_mask = mask.share and mask.locator != "random" and _due(step, mask.relocate_every)
    locate_directions = direction.share and _due(step, direction.relocate_every)
    if locate_mask or locate_directions:
        texts = [pick(rng, texts, CONTRAST_PROMPTS) for texts in (data.harmful_texts, data.twin_texts)]
        contrast = read_contrast(chat_model, *texts, context.batch_size)
        if locate_mask:
            columns = contrast.ranking(mask.locator)[: _n_masked(context)].tolist()
            adversary = replace(adversary, masked=[neuron_at(chat_model, column) for column in columns])
        if locate_directions:
            adversary = replace(adversary, directions=refusal_directions(contrast.harmful, contrast.harmless))
    return adversary


def _pool(context: RoundContext, breakers: Sequence[Neuron], rng: random.Random) -> list[Candidate]:
    """Neurons whose clamps are weighed: those scored best now, those of past breakers, with `train.clamps.replay` this
    round's `breakers`, and random ones."""
    chat_model, data, clamps = context.chat_model, context.data, context.settings.clamps
    texts = [pick(rng, texts, RELOCATE_PROMPTS) for texts in (data.harmful_texts, data.twin_texts)]
    passes = Passes(chat_model, *texts, context.phrases, context.batch_size)
    pool = {c.neuron: c for c in select_candidates(clamps.locators, clamps.pool, passes, 1.0, rng.randrange(2**32))}
    known = [*(clamp.neuron for clamp in context.past_breakers), *(breakers if clamps.replay else ())]
    pool |= {neuron: passes.scores.candidate(neuron) for neuron in known}
    if clamps.random:
        n = min(clamps.random, chat_model.neurons.count)
        pool |= {c.neuron: c for c in select_candidates([RANDOM], n, passes, 1.0, rng.randrange(2**32))}
    return list(pool.values())


def weigh_clamps(context: RoundContext, candidates: Sequence[Candidate], known: Mapping[Clamp, float]) -> list[Weighed]:
    """Clamps of the candidates, and those that broke the model before, weighed by how well they work now.

    A clamp's weight is what `train.clamps.weigh_by` makes of the refusal log-odds under it (`_breaking`), averaged over
    the prompts (a clamp that turns few of them has high mean log-odds), plus `train.clamps.floor`, of past breakers at
    least `PAST_FLOOR`. Clamps that raise the loss on benign answers by more than `max_benign_rise` nats per token are
    left out. That is measured on the starting model: training can widen a neuron's activation gap, and the clamps must
    not grow with it until they only make the model babble. If none is left there are no clamps, and rows are trained
    without.

    candidates: the neurons of the past breakers are among them. known: such rises of the clamps that were kept at the
    last weighing, since that model does not change.
    """
    chat_model, least = context.chat_model, context.settings.clamps.floor
    by_neuron = {candidate.neuron: candidate for candidate in candidates}
    clamps = {clamp: candidate for candidate in candidates for clamp in _clamps(context, candidate)}
    clamps |= {clamp: by_neuron[clamp.neuron] for clamp in context.past_breakers}
    screened = screen_clamps(
        chat_model, list(clamps), context.data.probe, context.phrases, context.batch_size, "weigh clamps", True, known
    )
    coherent = [entry for entry in screened if entry.benign_rise <= context.max_benign_rise]
    if not coherent:
        logger.warning(
            "none of %d clamps is coherent: training without; smaller train.clamps.sizes or strengths?", len(clamps)
        )
    past = set(context.past_breakers)
    weighed = []
    for entry in coherent:
        clamp, candidate = entry.clamp, clamps[entry.clamp]
        floor = max(least, PAST_FLOOR) if clamp in past else least
        weight = floor + _breaking(entry.by_prompt, context.settings)
        weighed.append(Weighed(clamp, weight, entry.benign_rise, candidate.harmful, candidate.harmless, floor))
    return weighed


def _clamps(context: RoundContext, candidate: Candidate) -> list[Clamp]:
    settings = context.settings.clamps
    values = [candidate.clamp_value(size) for size in settings.sizes]
    column = column_of(context.chat_model, candidate.neuron)
    strongest = float(context.start.full[column]) if settings.strengths else 0.0
    return list(clamps_of(candidate.neuron, candidate.harmless, values, settings.strengths, strongest))


def draw_strong_clamp(
    chat_model: ChatModel, full: torch.Tensor, strength: tuple[float, float], rng: random.Random
) -> Clamp:
    """A clamp of a random neuron that writes anything, of either sign, at a share of `full` between the two of
    `strength`: evenly drawn in the logarithm. full: (neurons,), of `full_strength`.

    No locator is asked. Clamps that break SmolLM2 write a vector with a tenth to twice the norm of the stream behind
    their layer. These write as much, whatever their neuron, and what a model learns under them it learns about being
    clamped at all.
    """
    column = rng.choice(torch.nonzero(full).flatten().tolist())
    share = math.exp(rng.uniform(*map(math.log, strength)))
    return Clamp(neuron_at(chat_model, column), rng.choice((-1, 1)) * share * float(full[column]))


def _breaking(log_odds: Sequence[float], settings: TrainSection) -> float:
    """From 0 to 1, averaged over prompts: by `chance` the squared chance of no refusal (squared: most located clamps
    are harmless, and would together be drawn more often than the few that work); by `shortfall` how far refusal
    log-odds, in nats, fall short of the margin's target, as a share of it."""
    if settings.clamps.weigh_by == "chance":
        return mean([(1 / (1 + math.exp(min(x, 50.0)))) ** 2 for x in log_odds])
    return mean([min(1.0, max(0.0, 1 - x / settings.margin.target)) for x in log_odds])


def _n_masked(context: RoundContext) -> int:
    """How many neurons a mask silences."""
    return max(1, round(context.settings.mask.neurons * context.chat_model.neurons.count))


def _due(step: int, every: int | None) -> bool:
    return step == 0 if every is None else step % every == 0
