"""Greedy search for strong clamps: exact at every clamp that it tries, and led to the next by slopes under the worst.

A clamp that writes a good part of the residual stream's norm does what no slope at the model's own activations shows.
A slope that is read *under* such a clamp does: it is one of the stream as a strong write leaves it. So

1. random neurons of every layer are clamped, to a value of either sign at which each writes `STRENGTH` of the norm;
2. of each layer, the clamp c that takes the log-odds lowest is differentiated: with h_t and g_t activations and
   gradients under c, the drop at any other clamp to such a value m is predicted as sum over t of (h_t - m) g_t;
3. the points c take turns to propose clamps, those with the largest predicted drops first;
4. the first that were not tried are clamped exactly; and again from 2, with points that were not differentiated.

It is the greedy coordinate gradient of Zou et al. (arXiv 2307.15043, Algorithm 1) with neurons in the place of tokens:
propose by the gradient at a point, try exactly. Departures: a point in every layer side by side instead of a single
one, and a step is never a pair of clamps.

A neuron's score is its exact drop; those that were never tried come behind, in the order in which they were proposed.
Cost, on one prompt: a forward pass from the clamped layer upwards for `START` clamps of each layer and `ROUNDS` times
`PROPOSED`; a forward and a backward pass per layer and round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch

from harden import processes
from harden.activations import neuron_at
from harden.batches import BACKWARD_ROWS, in_batches
from harden.effects import log_odds_under
from harden.generate import progress_bar
from harden.interventions import Clamp, intervene
from harden.locate.backward import differentiate
from harden.models import ChatModel
from harden.refusal import RefusalPhrases

STRENGTH = 0.35  # norms of the residual stream
START = 8  # random clamps of each layer
ROUNDS = 3
PROPOSED = 512  # clamps that are tried in each round
LISTED = 4096  # clamps that a point may propose


def greedy_drops(
    chat_model: ChatModel, full: torch.Tensor, request: str, plain: float, phrases: RefusalPhrases, batch_size: int
) -> torch.Tensor:
    """Every neuron's score, by what it does to the refusal log-odds of a request: (neurons,), float32, on the CPU.

    full: of `full_strength`, (neurons,); neurons of 0 are not tried. request: seeds the random start, too. plain: its
    log-odds without a clamp. Work is divided between processes.
    """
    if not full.any():
        return torch.zeros_like(full)
    clamps = _Clamps(chat_model, full)

    def try_all(places: Sequence[int]) -> dict[int, float]:
        rows = log_odds_under(chat_model, [clamps[p] for p in places], [request], phrases, batch_size, "greedy")
        return {place: plain - odds for place, (odds,) in zip(places, rows, strict=True) if math.isfinite(odds)}

    def propose(points: list[int]) -> list[list[int]]:
        with progress_bar(len(points), "greedy: slopes") as bar:

            def of_points(part: Sequence[int]) -> list[list[int]]:
                drops = clamps.predicted_drops(part, request, phrases)
                bar.update(len(part))
                return drops.topk(min(LISTED, len(clamps.places))).indices.tolist()

            return in_batches(chat_model, points, max(1, batch_size // BACKWARD_ROWS), of_points, BACKWARD_ROWS)

    drops = try_all(clamps.at_random(random.Random(request)))
    points: set[int] = set()
    proposed: dict[int, None] = {}
    for _ in range(ROUNDS):
        worst: dict[int, int] = {}  # by layer
        for place in sorted(drops.keys() - points, key=lambda place: (-drops[place], place)):
            worst.setdefault(clamps[place].neuron.layer, place)
        points.update(worst.values())
        lists = processes.divide(list(worst.values()), propose)
        turns = dict.fromkeys(place for turn in zip(*lists, strict=True) for place in turn)
        drops |= try_all([place for place in turns if place not in drops][:PROPOSED])
        proposed |= turns
    return _scores(drops, list(proposed), len(full))


class _Clamps:
    """A negative and a positive clamp of every neuron. A place is a column, or that and the number of neurons."""

    def __init__(self, chat_model: ChatModel, full: torch.Tensor):
        self.chat_model, self.values = chat_model, torch.cat([-STRENGTH * full, STRENGTH * full])
        self.places = self.values.nonzero().flatten().tolist()

    def __getitem__(self, place: int) -> Clamp:
        return Clamp(neuron_at(self.chat_model, place % (len(self.values) // 2)), float(self.values[place]))

    def at_random(self, rng: random.Random) -> list[int]:
        """`START` of each layer, of different neurons."""
        found, first = [], 0
        for width in self.chat_model.neurons.widths:
            columns = [column for column in range(first, first + width) if self.values[column]]
            drawn = rng.sample(columns, min(START, len(columns)))
            found += [column + rng.choice((0, len(self.values) // 2)) for column in drawn]
            first += width
        return found

    def predicted_drops(self, points: Sequence[int], request: str, phrases: RefusalPhrases) -> torch.Tensor:
        """To first order, under each of the clamps at `points`: (points, places), -inf where there is no clamp."""
        edits = [(self[point],) for point in points]
        with intervene(self.chat_model.neurons, edits):
            ones = torch.ones(len(points), device=self.chat_model.device)
            recorded, _ = differentiate(self.chat_model, [request] * len(points), phrases, ones)
        slope = torch.cat([sum(g.sum(1) for _, g in layer) for layer in recorded], 1).cpu()
        offset = torch.cat([sum((h * g).sum(1) for h, g in layer) for layer in recorded], 1).cpu()
        drops = offset.repeat(1, 2) - slope.repeat(1, 2) * self.values
        return drops.nan_to_num(-math.inf, -math.inf, -math.inf).masked_fill(self.values == 0, -math.inf)


def _scores(drops: Mapping[int, float], proposed: Sequence[int], count: int) -> torch.Tensor:
    """Of the neurons, from the exact drops of clamps that were tried and the order of all that were proposed."""
    score = torch.full([count], -math.inf)
    for place, drop in drops.items():
        score[place % count] = max(float(score[place % count]), drop)
    least = min(drops.values(), default=0.0)
    others = [column for column in dict.fromkeys(place % count for place in proposed) if score[column] == -math.inf]
    for number, column in enumerate(others, 1):
        score[column] = least - number / count
    return score.nan_to_num(neginf=least - 2)
