"""What selects neurons: the best of several locators, in turns, and random ones that no locator suggests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from harden.locate.base import Candidate
from harden.locate.passes import LOCATORS, Passes
from harden.neurons import Neuron

RANDOM = "random"


def select_candidates(
    locators: Sequence[str],
    n: int,
    passes: Passes,
    layer_share: float,
    seed: int,
    named: Sequence[Neuron] = (),
) -> list[Candidate]:
    """The named neurons, and the union of several locators' best, taken in turns until there are n more."""
    rankings = {locator: _best(locator, n, passes, layer_share, seed) for locator in locators}
    chosen = {neuron: passes.scores.candidate(neuron) for neuron in named}
    n += len(chosen)
    for turn in range(n):
        for locator in locators:
            if turn < len(rankings[locator]) and len(chosen) < n:
                candidate = rankings[locator][turn]
                chosen.setdefault(candidate.neuron, candidate)
    return list(chosen.values())


def _best(locator: str, n: int, passes: Passes, layer_share: float, seed: int) -> list[Candidate]:
    """The n best of the first `layer_share` of the layers, or n random ones of them."""
    if locator == "gradient":  # it has its own token, and so its own activations, for each neuron
        return passes.scores.top(n, layer_share)
    widths = passes.chat_model.neurons.widths
    total = sum(widths[: max(1, round(layer_share * len(widths)))])
    if locator == RANDOM:
        columns = random.Random(seed).sample(range(total), min(n, total))
    else:
        columns = LOCATORS[locator](passes)[:total].argsort(descending=True, stable=True)[:n].tolist()
    return [passes.contrast.candidate(column) for column in columns]
