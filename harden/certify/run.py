"""A certificate: exact scans of the neurons that locators put first and of others drawn at random.

1. Every neuron is scored by the locators; the best `certify.top` are scanned, and `certify.sample` random others.
2. Scan: exact refusal log-odds on selection prompts with the neuron clamped to each of its values. It is a race: most
   clamps are cleared on the few prompts that are most easily talked out of refusing, or flip one; only the undecided
   see the others. The outermost value of either sign comes first; where it hardly moves the log-odds, the others of its
   sign are left out.
3. Suspects: clamps that flip a scanned prompt and leave the model able to speak; where all that flip one are gibberish,
   smaller values are tried.
4. Confirm: they generate on test prompts, the easiest first and then those that they damage most; one breaks the model
   if more than the tolerance of those that do not comply anyway do.
5. What random neurons were found to do bounds what those that nobody scanned do: exact hypergeometric bound at 95% (in
   the spirit of AtP*, arXiv 2403.00745, which bounds its misses by a random sample).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Mapping, Sequence

import torch

from harden import __version__, processes
from harden.activations import column_of, neuron_at
from harden.attack.screen import outermost_first
from harden.attack.select import select_candidates
from harden.bench import Bench
from harden.certify.confirm import confirm, plain_log_odds
from harden.certify.suspects import Suspects, count_flips, drops_of, find_suspects
from harden.effects import log_odds_under
from harden.errors import MeasurementError
from harden.files import read_finished, write_atomically
from harden.generate import mean, progress_bar
from harden.interventions import Clamp
from harden.judges.embedded import RULES
from harden.locate.base import Candidate, clamps_of
from harden.locate.passes import Passes
from harden.neurons import Neuron
from harden.recipe import Recipe
from harden.report.certificate import certificate_card
from harden.results import Certificate, NeuronScan, Rate, Spread, Suspect, most_missed
from harden.runfolder import RunFolder

logger = logging.getLogger(__name__)

LISTED = 1000  # neurons whose drop is in the certificate
CHUNK = 256  # neurons that are scanned and saved together


def certify(recipe: Recipe) -> Certificate:
    """Certify a recipe's model, or resume it, in `certificate/` of its run folder; returns `certificate.json`."""
    folder = RunFolder(recipe, "certificate")
    finished = folder.path / "certificate.json"
    if processes.from_main(finished.exists):
        logger.info("%s is complete already", folder.path)
        return read_finished(finished, Certificate)
    folder.warn_of_another_model()
    bench = Bench(recipe, folder, training=False)
    settings, chat_model = recipe.certify, bench.chat_model
    population = sum(chat_model.neurons.widths[layer] for layer in _layers(bench))
    prompts = [prompt.text for prompt in bench.splits["selection"].harmful[: settings.prompts]]
    plain = folder.stage("plain", list[float], lambda: plain_log_odds(bench, prompts))
    if max(plain) <= 0:
        raise MeasurementError(
            f"none of the {len(prompts)} scanned prompts is refused by its log-odds, so none can flip: the model does "
            "not refuse, or not with refusal.phrases; raise certify.prompts or give its own phrases"
        )
    passes = bench.passes()
    first, drawn = (
        [Neuron.parse(neuron) for neuron in part]
        for part in folder.stage("neurons", tuple[list[str], list[str]], lambda: _chosen(bench, passes))
    )
    easiest = sorted(range(len(plain)), key=lambda place: (plain[place] <= 0, plain[place]))  # to talk out of refusing
    prompts, plain = [prompts[place] for place in easiest], [plain[place] for place in easiest]
    scans = _scan(bench, passes, [*first, *drawn], prompts, plain)
    suspects = folder.stage("suspects", list[Suspects], lambda: find_suspects(bench, passes, scans, prompts, plain))
    neurons = len({side.strongest.neuron for side in suspects})
    logger.info("%d of %d scanned neurons have a suspect clamp; generating", neurons, len(scans))
    random_ones = {str(neuron) for neuron in drawn}
    judged, no_attack = folder.stage(
        "confirmed", tuple[list[Suspect], Rate], lambda: confirm(bench, suspects, random_ones)
    )
    breakers = list(dict.fromkeys(suspect.neuron for suspect in judged if suspect.breaks))
    unmeasured = {scan.neuron for scan in scans if None in scan.log_odds}
    drops = {
        scan.neuron: max((drop for drop in drops_of(scan, plain) if drop is not None), default=None) for scan in scans
    }
    certificate = Certificate(
        harden_version=__version__,
        model=recipe.model.name,
        adapter=recipe.model.adapter,
        weights=bench.weights,
        dtype=recipe.model.dtype,
        judge_rules=RULES,
        seed=recipe.seed,
        layers=None if settings.layers is None else sorted(_layers(bench)),
        neurons=population,
        first=len(first),
        drawn=len(drawn),
        sizes=list(settings.sizes),
        strengths=list(settings.strengths),
        prompts=len(prompts),
        refused=sum(odds > 0 for odds in plain),
        race_prompts=min(settings.race_prompts, len(prompts)),
        cleared=settings.cleared,
        quiet=settings.quiet,
        clamps=sum(len(scan.values) for scan in scans),
        halvings=settings.halvings,
        confirm_first=min(settings.confirm_first, no_attack.n),
        raced=sum(max(scan.prompts) < len(prompts) for scan in scans),
        tolerance=settings.tolerance,
        no_attack=no_attack,
        suspects=judged,
        breakers=breakers,
        unmeasured=len(unmeasured),
        most_missed=most_missed(population - len(first), len(drawn), len(random_ones & {*breakers, *unmeasured})),
        drops_first=_spread([drops[str(neuron)] for neuron in first]),
        drops_drawn=_spread([drops[str(neuron)] for neuron in drawn]),
        largest_drops=_largest(drops),
        judges=bench.responder.judges,
        max_new_tokens=recipe.generation.max_new_tokens,
        seconds=round(folder.seconds(), 1),
    )
    if processes.is_main():
        write_atomically(folder.path / "README.md", certificate_card(certificate, recipe))
        write_atomically(finished, certificate.model_dump_json(indent=1) + "\n")
    processes.wait()
    return certificate


def _layers(bench: Bench) -> Collection[int]:
    """The layers that are certified."""
    layers = bench.recipe.certify.layers
    return range(len(bench.chat_model.neurons.widths)) if layers is None else set(layers)


def _chosen(bench: Bench, passes: Passes) -> tuple[list[str], list[str]]:
    """The neurons that locators put first, and those drawn at random from all others."""
    recipe, total, layers = bench.recipe, bench.chat_model.neurons.count, _layers(bench)
    found = bench.named_neurons
    if recipe.certify.sample is not None:  # else all are scanned, and none needs to be first
        found = [candidate.neuron for candidate in _located(bench, passes)]
    located = dict.fromkeys(neuron for neuron in found if neuron.layer in layers)
    others = [neuron_at(bench.chat_model, n) for n in range(total)]
    others = [neuron for neuron in others if neuron.layer in layers and neuron not in located]
    if recipe.certify.sample is not None:
        # a stream of its own: the search draws its random candidates with the seed, and training may know them
        others = random.Random(f"certify {recipe.seed}").sample(others, min(recipe.certify.sample, len(others)))
    return list(map(str, located)), list(map(str, others))


def _located(bench: Bench, passes: Passes) -> list[Candidate]:
    recipe = bench.recipe
    return select_candidates(
        recipe.certify.locators, recipe.certify.top, passes, recipe.locate.layer_share, recipe.seed, bench.named_neurons
    )


def _scan(
    bench: Bench, passes: Passes, neurons: Sequence[Neuron], prompts: Sequence[str], plain: Sequence[float]
) -> list[NeuronScan]:
    """Scan the neurons, chunk by chunk; each chunk is saved when it is done."""
    settings, chat_model = bench.recipe.certify, bench.chat_model
    contrast = passes.contrast
    values, harmless = [contrast.clamp_values(size) for size in settings.sizes], contrast.harmless.neurons.mean(0)
    full = contrast.full if settings.strengths else torch.zeros_like(harmless)

    def log_odds(clamps: Sequence[Clamp], heat: slice) -> list[list[float]]:
        batch_size = bench.recipe.generation.batch_size
        return log_odds_under(chat_model, clamps, prompts[heat], bench.phrases, batch_size, "these clamps")

    def race(clamps: Sequence[Clamp]) -> dict[Clamp, list[float]]:  # log-odds of the prompts that each clamp met
        odds = dict(zip(clamps, log_odds(clamps, slice(settings.race_prompts)), strict=True))
        undecided = [clamp for clamp in clamps if not _decided(odds[clamp], plain, settings.cleared)]
        if undecided and len(prompts) > settings.race_prompts:
            for clamp, more in zip(undecided, log_odds(undecided, slice(settings.race_prompts, None)), strict=True):
                odds[clamp] = odds[clamp] + more
        return odds

    def clamps_at(neuron: Neuron) -> dict[Clamp, float]:
        column = column_of(chat_model, neuron)
        at_sizes = [float(value[column]) for value in values]
        return clamps_of(neuron, float(harmless[column]), at_sizes, settings.strengths, float(full[column]))

    def scan(chunk: Sequence[Neuron]) -> list[NeuronScan]:
        clamps = {neuron: clamps_at(neuron) for neuron in chunk}
        odds = outermost_first(list(clamps.values()), race, plain, settings.quiet)
        return [_neuron_scan(n, [clamp for clamp in clamps[n] if clamp in odds], odds, plain) for n in chunk]

    scans: list[NeuronScan] = []
    neurons = sorted(neurons)  # those of a layer run together
    with progress_bar(len(neurons), "scan neurons") as bar:
        for number, start in enumerate(range(0, len(neurons), CHUNK)):
            chunk = neurons[start : start + CHUNK]
            scans += bench.folder.stage(f"scan-{number:05d}", list[NeuronScan], lambda chunk=chunk: scan(chunk))
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


def _largest(drops: Mapping[str, float | None]) -> dict[str, float]:
    """The largest ones, largest first, to a thousandth."""
    known = sorted(((drop, neuron) for neuron, drop in drops.items() if drop is not None), reverse=True)
    return {neuron: round(drop, 3) for drop, neuron in known[:LISTED]}


def _spread(drops: Sequence[float | None]) -> Spread | None:
    ordered = sorted(drop for drop in drops if drop is not None)
    if not ordered:
        return None

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Spread(n=len(ordered), median=quantile(0.5), q90=quantile(0.9), q99=quantile(0.99), largest=ordered[-1])
