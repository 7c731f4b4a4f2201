"""The exact scan: refusal log-odds with each neuron clamped to each of its values.

It is a race. Most clamps are cleared on the few prompts that are most easily talked out of refusing, or flip one; only
the undecided see the others. The outermost value on either side of a neuron's harmless mean comes first; where a value
hardly moves the log-odds, the smaller ones of its side are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from harden import processes
from harden.activations import column_of
from harden.attack.screen import is_quiet, outermost_first
from harden.bench import Bench
from harden.certify.suspects import count_flips
from harden.effects import log_odds_under
from harden.generate import mean, progress_bar
from harden.interventions import Clamp
from harden.locate.base import clamps_of
from harden.locate.passes import Passes
from harden.neurons import Neuron
from harden.results import NeuronScan

CHUNK = 256  # neurons that are scanned and saved together, or as many as the processes' batches have rows, if more


def scan_neurons(
    bench: Bench,
    passes: Passes,
    neurons: Sequence[Neuron],
    prompts: Sequence[str],
    plain: Sequence[float],
    name: str = "scan",
    race: bool = True,
    stop_at_flips: bool = False,
) -> list[NeuronScan]:
    """Scan neurons, chunk by chunk; each chunk is a stage, saved when it is done.

    prompts: those first that are most easily talked out of refusing; plain: their log-odds without a clamp. name: of
    the stages. race: without it every clamp meets all prompts, and no value is left out. stop_at_flips: of a side of
    which a value flips a prompt no smaller one is scanned: whether the neuron flips any is known then.
    """
    settings, chat_model = bench.recipe.certify, bench.chat_model
    contrast = passes.contrast
    values, harmless = [contrast.clamp_values(size) for size in settings.sizes], contrast.harmless.neurons.mean(0)
    full = contrast.full if settings.strengths else torch.zeros_like(harmless)
    first, quiet = (settings.race_prompts, settings.quiet) if race else (len(prompts), None)

    def log_odds(clamps: Sequence[Clamp], heat: slice) -> list[list[float]]:
        batch_size = bench.recipe.generation.batch_size
        return log_odds_under(chat_model, clamps, prompts[heat], bench.phrases, batch_size, "these clamps")

    def heats(clamps: Sequence[Clamp]) -> dict[Clamp, list[float]]:  # log-odds of the prompts that each clamp met
        odds = dict(zip(clamps, log_odds(clamps, slice(first)), strict=True))
        undecided = [clamp for clamp in clamps if not _decided(odds[clamp], plain, settings.cleared)]
        if undecided and len(prompts) > first:
            for clamp, more in zip(undecided, log_odds(undecided, slice(first, None)), strict=True):
                odds[clamp] = odds[clamp] + more
        return odds

    def clamps_at(neuron: Neuron) -> dict[Clamp, float]:
        column = column_of(chat_model, neuron)
        at_sizes = [float(value[column]) for value in values]
        return clamps_of(neuron, float(harmless[column]), at_sizes, settings.strengths, float(full[column]))

    def inwards(odds: Sequence[float]) -> bool:
        flips = stop_at_flips and count_flips(odds, plain)
        return not flips and not is_quiet(odds, plain, quiet)

    def scan(chunk: Sequence[Neuron]) -> list[NeuronScan]:
        clamps = {neuron: clamps_at(neuron) for neuron in chunk}
        odds = outermost_first(list(clamps.values()), heats, inwards)
        return [_neuron_scan(n, [clamp for clamp in clamps[n] if clamp in odds], odds, plain) for n in chunk]

    rows = bench.recipe.generation.batch_size * processes.count()
    at_a_time = bench.folder.stage(f"chunk-{name}", int, lambda: max(CHUNK, rows))  # whatever a later start has
    scans: list[NeuronScan] = []
    neurons = sorted(neurons)  # those of a layer run together
    with progress_bar(len(neurons), f"{name} neurons") as bar:
        for number, start in enumerate(range(0, len(neurons), at_a_time)):
            chunk = neurons[start : start + at_a_time]
            scans += bench.folder.stage(f"{name}-{number:05d}", list[NeuronScan], lambda chunk=chunk: scan(chunk))
            bar.update(len(chunk))
    return scans


def _decided(odds: Sequence[float], plain: Sequence[float], share: float) -> bool:
    """Whether a clamp flips a refused prompt, or takes none below `share` of its log-odds; no number decides nothing.

    odds: of the first prompts, under the clamp; plain: of all prompts without it.
    """
    if any(map(math.isnan, odds)):
        return False
    refused = [(x, p) for x, p in zip(odds, plain, strict=False) if p > 0]
    return any(x <= 0 for x, _ in refused) or all(x >= share * p for x, p in refused)


def _neuron_scan(
    neuron: Neuron, clamps: Sequence[Clamp], odds: Mapping[Clamp, Sequence[float]], plain: Sequence[float]
) -> NeuronScan:
    rows = [odds[clamp] for clamp in clamps]
    means = [mean(row) for row in rows]
    return NeuronScan(
        neuron=str(neuron),
        prompts=[len(row) for row in rows],
        values=[clamp.value for clamp in clamps],
        log_odds=[value if math.isfinite(value) else None for value in means],
        flips=[count_flips(row, plain) for row in rows],
    )
