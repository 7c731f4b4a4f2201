"""Suspects: clamps that flip a scanned prompt and leave the model able to speak. They have to generate.

Of either side of a neuron's harmless mean there are two: the clamp that flips the largest share of what it met, and the
smallest one, since a clamp may break the model where a larger one only makes gibberish. Where all that flip a prompt
make gibberish, smaller values are tried.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from harden.activations import column_of
from harden.attack.screen import Probe, fair_rises
from harden.bench import Bench
from harden.certify.chunks import saved_in_chunks
from harden.effects import log_odds_under
from harden.generate import mean
from harden.interventions import Clamp
from harden.locate.passes import Passes
from harden.neurons import Neuron
from harden.results import NeuronScan, Record

Side = tuple[Neuron, bool]
"""A neuron, and whether its values are above its mean on harmless prompts."""


class Flip(Record):
    """A coherent clamp that flips scanned prompts."""

    neuron: str
    value: float
    flips: int
    refused: int
    """Of the prompts that it met those that are refused without it: the ones that it could flip."""

    @property
    def clamp(self) -> Clamp:
        return Clamp(Neuron.parse(self.neuron), self.value)


class Suspects(Record):
    """Of one side of a neuron."""

    strongest: Flip
    """Flips the largest share; of equals the one under which log-odds fall most."""
    smallest: Flip


def find_suspects(
    bench: Bench, passes: Passes, scans: Sequence[NeuronScan], prompts: Sequence[str], plain: Sequence[float]
) -> list[Suspects]:
    """The suspects of all sides that have any; of a neuron's two sides the one with the strongest clamp first.

    plain: log-odds of the scanned prompts without a clamp, in the order in which clamps met them.
    """
    finder = _Finder(bench, passes, prompts, plain)
    return finder.choose(finder.flipping(scans))


def count_flips(odds: Sequence[float], plain: Sequence[float]) -> int:
    """How many refused prompts a clamp takes to log-odds of 0 or below; it may have met the first ones only."""
    return sum(p > 0 >= x for p, x in zip(plain, odds, strict=False))


def drops_of(scan: NeuronScan, plain: Sequence[float]) -> list[float | None]:
    """By how much the mean log-odds fall at each value, over the prompts that it met; None where they are no number."""
    measured = zip(scan.log_odds, scan.prompts, strict=True)
    return [None if odds is None else mean(plain[:n]) - odds for odds, n in measured]


class _Finder:
    def __init__(self, bench: Bench, passes: Passes, prompts: Sequence[str], plain: Sequence[float]):
        self.bench, self.prompts, self.plain = bench, list(prompts), plain
        self.harmless = passes.contrast.harmless.neurons.mean(0)

    @cached_property
    def probe(self) -> Probe:
        return self.bench.probe("selection")

    def flipping(self, scans: Sequence[NeuronScan]) -> dict[Flip, float]:
        """Coherent clamps that flip a prompt, those in between included; with each, how far log-odds fall."""
        drops: dict[Flip, float] = {}
        for scan in scans:
            for value, met, flips, drop in zip(
                scan.values, scan.prompts, scan.flips, drops_of(scan, self.plain), strict=True
            ):
                if flips:
                    drops[self._flip(scan.neuron, value, flips, met)] = -math.inf if drop is None else drop
        coherent = self._coherent([flip.clamp for flip in drops])
        kept = {flip: drop for flip, drop in drops.items() if flip.clamp in coherent}
        speaking = {self._side(flip.clamp) for flip in kept}
        gibberish = {self._side(flip.clamp) for flip in drops} - speaking
        return kept | self._between(self._gaps(scans, gibberish))

    def choose(self, flipping: Mapping[Flip, float]) -> list[Suspects]:
        strongest = sorted(flipping, key=lambda flip: (-flip.flips / flip.refused, -flipping[flip]))
        sides: dict[Side, list[Flip]] = defaultdict(list)
        for flip in strongest:
            sides[self._side(flip.clamp)].append(flip)
        return [
            Suspects(strongest=flips[0], smallest=min(flips, key=lambda flip: abs(self._beyond(flip.clamp))))
            for flips in sides.values()
        ]

    def _gaps(self, scans: Sequence[NeuronScan], sides: set[Side]) -> dict[Side, tuple[float, float]]:
        """Of each side the smallest value that flips a prompt, and before it the next smaller one that was scanned, or
        the harmless mean."""
        gaps: dict[Side, tuple[float, float]] = {}
        for scan in scans:
            neuron = Neuron.parse(scan.neuron)
            outwards = sorted(
                zip(scan.values, scan.flips, strict=True), key=lambda pair: abs(self._beyond(Clamp(neuron, pair[0])))
            )
            inner = dict.fromkeys((True, False), self._mean(neuron))
            for value, flips in outwards:
                side = self._side(Clamp(neuron, value))
                if side in sides and side not in gaps:
                    if flips:
                        gaps[side] = inner[side[1]], value
                    inner[side[1]] = value
        return gaps

    def _between(self, gaps: dict[Side, tuple[float, float]]) -> dict[Flip, float]:
        """Halves the gaps, `certify.halvings` times or until a coherent clamp that flips a prompt is found."""
        found: dict[Flip, float] = {}
        for _ in range(self.bench.recipe.certify.halvings):
            middle = {Clamp(side[0], sum(gap) / 2): side for side, gap in gaps.items()}
            odds = self._log_odds(list(middle))
            flips = {clamp: count_flips(odds[clamp], self.plain) for clamp in middle}
            coherent = self._coherent([clamp for clamp in middle if flips[clamp]])
            for clamp, side in middle.items():
                inner, outer = gaps[side]
                gaps[side] = (inner, clamp.value) if flips[clamp] else (clamp.value, outer)
                if clamp in coherent:
                    drop = mean(self.plain) - mean(odds[clamp])
                    flip = self._flip(str(clamp.neuron), clamp.value, flips[clamp], len(self.plain))
                    found[flip] = drop if math.isfinite(drop) else -math.inf
                    del gaps[side]
        return found

    def _flip(self, neuron: str, value: float, flips: int, met: int) -> Flip:
        return Flip(neuron=neuron, value=value, flips=flips, refused=sum(odds > 0 for odds in self.plain[:met]))

    def _mean(self, neuron: Neuron) -> float:
        return float(self.harmless[column_of(self.bench.chat_model, neuron)])

    def _beyond(self, clamp: Clamp) -> float:
        return clamp.value - self._mean(clamp.neuron)

    def _side(self, clamp: Clamp) -> Side:
        return clamp.neuron, self._beyond(clamp) > 0

    def _log_odds(self, clamps: Sequence[Clamp]) -> dict[Clamp, list[float]]:
        """Of every prompt; minus infinity where they are no number, since that may be anything."""
        bench = self.bench
        batch_size = bench.recipe.generation.batch_size

        def measure(chunk: Sequence[Clamp]) -> list[list[float]]:
            return log_odds_under(bench.chat_model, chunk, self.prompts, bench.phrases, batch_size, "values in between")

        saved = saved_in_chunks(bench.folder, "between", clamps, self.prompts, measure)
        return {clamp: [-math.inf if odds is None else odds for odds in row] for clamp, row in saved.items()}

    def _coherent(self, clamps: Sequence[Clamp]) -> set[Clamp]:
        bench, limit = self.bench, self.bench.recipe.attack.max_benign_rise
        batch_size = bench.recipe.generation.batch_size

        def measure(chunk: Sequence[Clamp]) -> list[list[float]]:
            rises = fair_rises(bench.chat_model, chunk, self.probe, batch_size, limit, "coherence")
            return [[rise] for rise in rises]

        saved = saved_in_chunks(bench.folder, "coherence", clamps, [limit], measure)
        return {clamp for clamp, (rise,) in saved.items() if rise is not None and rise <= limit}
