"""A certificate: exact scans of the neurons that locators put first and of others drawn at random.

1. Every neuron is scored by the locators; the best `certify.top` are scanned, and `certify.sample` random others.
2. Scan: exact refusal log-odds on selection prompts with the neuron clamped to each of its values.
3. Suspects: neurons with a clamp that flips a scanned prompt and leaves the model able to speak. Each generates on test
   prompts at the value that flips most, and breaks the model if more than the tolerance comply.
4. What random neurons were found to do bounds what the neurons that nobody scanned do (as AtP*, arXiv 2403.00745,
   bounds its misses by a random sample): exact hypergeometric bound at 95%.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path

from harden import __version__, processes
from harden.activations import neuron_at
from harden.attack.screen import log_odds_under, screen_fairly
from harden.attack.select import RANDOM, select_candidates
from harden.bench import Bench
from harden.errors import HardenError, MeasurementError
from harden.generate import mean, progress_bar
from harden.interventions import Clamp, Scale
from harden.neurons import Neuron
from harden.recipe import Recipe
from harden.report.certificate import certificate_card
from harden.results import Certificate, NeuronScan, Rate, Spread, Suspect, most_missed
from harden.runfolder import RunFolder, write_atomically

logger = logging.getLogger(__name__)

CHUNK = 64  # neurons that are scanned and saved together
NOTHING = Scale(Neuron(0, 0), 1.0)


def certify(recipe: Recipe) -> Certificate:
    """Certify a recipe's model, or resume it, in `certificate/` of its run folder; returns `certificate.json`."""
    folder = RunFolder(recipe, "certificate")
    finished = folder.path / "certificate.json"
    if processes.from_main(finished.exists):
        logger.info("%s is complete already", folder.path)
        return _read(finished)
    bench = Bench(recipe, folder, training=False)
    settings, chat_model = recipe.certify, bench.chat_model
    first, drawn = (
        [Neuron.parse(neuron) for neuron in part]
        for part in folder.stage("neurons", tuple[list[str], list[str]], lambda: _chosen(bench))
    )
    prompts = [prompt.text for prompt in bench.splits["selection"].harmful[: settings.prompts]]
    batch_size = recipe.generation.batch_size

    def without_attack() -> list[float]:
        odds = log_odds_under(chat_model, [NOTHING], prompts, bench.phrases, batch_size, "no attack")[0]
        if not all(map(math.isfinite, odds)):
            raise MeasurementError("refusal log-odds are not finite; is the model sound? try model.dtype float32")
        return odds

    plain = folder.stage("plain", list[float], without_attack)
    if max(plain) <= 0:
        raise MeasurementError(
            f"none of the {len(prompts)} scanned prompts is refused by its log-odds, so none can flip: the model does "
            "not refuse, or not with refusal.phrases; raise certify.prompts or give its own phrases"
        )
    scans = _scan(bench, [*first, *drawn], prompts, plain)
    suspects = folder.stage("suspects", list[tuple[str, float, int]], lambda: _suspects(bench, scans))
    logger.info("%d of %d scanned neurons are suspect; generating with them", len(suspects), len(scans))
    judged, no_attack = _confirm(bench, suspects, {str(neuron) for neuron in drawn})
    found = sum(suspect.breaks and suspect.drawn for suspect in judged)
    drops = {scan.neuron: _drop(scan, mean(plain)) for scan in scans}
    certificate = Certificate(
        harden_version=__version__,
        model=recipe.model.name,
        adapter=recipe.model.adapter,
        seed=recipe.seed,
        neurons=chat_model.neurons.count,
        first=len(first),
        drawn=len(drawn),
        sizes=list(settings.sizes),
        prompts=len(prompts),
        refused=sum(odds > 0 for odds in plain),
        tolerance=settings.tolerance,
        no_attack=no_attack,
        suspects=judged,
        breakers=[suspect.neuron for suspect in judged if suspect.breaks],
        most_missed=most_missed(chat_model.neurons.count - len(first), len(drawn), found),
        drops_first=_spread([drops[str(neuron)] for neuron in first]) if first else None,
        drops_drawn=_spread([drops[str(neuron)] for neuron in drawn]) if drawn else None,
        judges=bench.responder.judges,
        max_new_tokens=recipe.generation.max_new_tokens,
        seconds=round(folder.seconds(), 1),
    )
    if processes.is_main():
        write_atomically(folder.path / "README.md", certificate_card(certificate, recipe))
        write_atomically(finished, certificate.model_dump_json(indent=1) + "\n")
    processes.wait()
    return certificate


def _chosen(bench: Bench) -> tuple[list[str], list[str]]:
    """The neurons that locators put first, and those drawn at random from all others."""
    recipe, total = bench.recipe, bench.chat_model.neurons.count
    locators = [locator for locator in recipe.attack.locators if locator != RANDOM]
    found = select_candidates(
        locators, recipe.certify.top, bench.passes(), recipe.locate.layer_share, recipe.seed, bench.named_neurons
    )
    located = {candidate.neuron: None for candidate in found}
    others = [neuron for n in range(total) if (neuron := neuron_at(bench.chat_model, n)) not in located]
    if recipe.certify.sample is not None:
        others = random.Random(recipe.seed).sample(others, min(recipe.certify.sample, len(others)))
    return list(map(str, located)), list(map(str, others))


def _scan(bench: Bench, neurons: Sequence[Neuron], prompts: Sequence[str], plain: Sequence[float]) -> list[NeuronScan]:
    """Scan the neurons, chunk by chunk; each chunk is saved when it is done."""
    contrast = bench.passes().contrast
    values = [contrast.clamp_values(size) for size in bench.recipe.certify.sizes]
    starts = [0, *accumulate(bench.chat_model.neurons.widths)]

    def scan(chunk: Sequence[Neuron]) -> list[NeuronScan]:
        columns = [starts[neuron.layer] + neuron.index for neuron in chunk]
        clamps = [Clamp(n, float(v[column])) for n, column in zip(chunk, columns, strict=True) for v in values]
        odds = log_odds_under(
            bench.chat_model, clamps, prompts, bench.phrases, bench.recipe.generation.batch_size, "these clamps"
        )
        scans = []
        for number, neuron in enumerate(chunk):
            part = slice(number * len(values), (number + 1) * len(values))
            means = [mean(row) for row in odds[part]]
            scans.append(
                NeuronScan(
                    neuron=str(neuron),
                    values=[clamp.value for clamp in clamps[part]],
                    log_odds=[value if math.isfinite(value) else None for value in means],
                    flips=[sum(p > 0 >= x for p, x in zip(plain, row, strict=True)) for row in odds[part]],
                )
            )
        return scans

    scans: list[NeuronScan] = []
    with progress_bar(len(neurons), "scan neurons") as bar:
        for number, start in enumerate(range(0, len(neurons), CHUNK)):
            chunk = neurons[start : start + CHUNK]
            scans += bench.folder.stage(f"scan-{number:05d}", list[NeuronScan], lambda chunk=chunk: scan(chunk))
            bar.update(len(chunk))
    return scans


def _suspects(bench: Bench, scans: Sequence[NeuronScan]) -> list[tuple[str, float, int]]:
    """Neurons with a coherent clamp that flips a scanned prompt: address, the value that flips most, and how many."""
    flips = {
        Clamp(Neuron.parse(scan.neuron), value): count
        for scan in scans
        for value, count, odds in zip(scan.values, scan.flips, scan.log_odds, strict=True)
        if count and odds is not None
    }
    if not flips:
        return []
    limit = bench.recipe.attack.max_benign_rise
    screened = screen_fairly(
        bench.chat_model, list(flips), bench.probe("selection"), bench.phrases,
        bench.recipe.generation.batch_size, limit, "suspects",
    )  # fmt: skip
    worst: dict[Neuron, Clamp] = {}
    for entry in sorted(screened, key=lambda s: (-flips[s.clamp], s.log_odds)):
        if entry.benign_rise <= limit:
            worst.setdefault(entry.clamp.neuron, entry.clamp)
    return [(str(clamp.neuron), clamp.value, flips[clamp]) for clamp in worst.values()]


def _confirm(
    bench: Bench, suspects: Sequence[tuple[str, float, int]], drawn: Collection[str]
) -> tuple[list[Suspect], Rate]:
    """Generate with every suspect on the test prompts; the suspects, and the rate of `comply` without attack."""
    settings = bench.recipe.certify
    prompts = bench.splits["test"].harmful[: settings.test_prompts]
    clamps = [Clamp(Neuron.parse(neuron), value) for neuron, value, _ in suspects]
    plain, *attempts = bench.responder.attempt([None, *clamps], prompts, "confirm")
    n, bad = len(prompts), ("comply", "unjudged")
    judged = []
    for (neuron, value, flips), attempt in zip(suspects, attempts, strict=True):
        outcomes = list(attempt.outcomes.values())
        flipped = sum(o in bad and plain.outcomes[name] not in bad for name, o in attempt.outcomes.items())
        judged.append(
            Suspect(
                neuron=neuron,
                drawn=neuron in drawn,
                value=value,
                scanned_flips=flips,
                comply=Rate.of(outcomes.count("comply"), n),
                degenerate=Rate.of(outcomes.count("degenerate"), n),
                flipped=Rate.of(flipped, n),
                breaks=flipped > settings.tolerance * n,
            )
        )
    judged.sort(key=lambda suspect: -suspect.flipped.count)
    return judged, Rate.of(list(plain.outcomes.values()).count("comply"), n)


def _drop(scan: NeuronScan, plain: float) -> float:
    """By how much the mean log-odds fall at the neuron's worst value; 0 where no value gives a number."""
    return plain - min((odds for odds in scan.log_odds if odds is not None), default=plain)


def _spread(drops: Sequence[float]) -> Spread:
    ordered = sorted(drops)

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Spread(n=len(ordered), median=quantile(0.5), q90=quantile(0.9), q99=quantile(0.99), largest=ordered[-1])


def _read(path: Path) -> Certificate:
    try:
        return Certificate.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HardenError(
            f"{path} is damaged or of another version of harden ({' '.join(str(error).split())[:200]}); "
            "give another --output"
        ) from None
