"""A certificate: exact scans of the neurons that locators put first and of others drawn at random.

docs/certify.md says the same at more length.

1. Every neuron is scored by the locators; the best `certify.top` are scanned, and `certify.sample` random others.
2. Scan: exact refusal log-odds on selection prompts with the neuron clamped to each of its values, as a race over
   prompts and values (`scan.py`).
3. Follow: of the neurons that flip a prompt at some value `certify.follow` random ones, or all, are scanned at the
   other values, too.
4. Suspects: their clamps that flip a scanned prompt and leave the model able to speak; where all that flip one are
   gibberish, smaller values are tried.
5. Confirm: they generate on test prompts, the easiest first and then those that they damage most. A neuron breaks
   the model if, of the prompts that do not comply without a clamp, a larger share than the tolerance complies, or is
   left unjudged, under one of its clamps.
6. Audit: of the neurons that do not break the model `certify.audit` random ones are scanned anew without a race.
7. What random neurons were found to do bounds what those do that nobody scanned, that the race cleared, or that nobody
   followed: exact hypergeometric bounds at 95% (in the spirit of AtP*, arXiv 2403.00745, which bounds its misses by a
   random sample).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from harden import __version__, processes
from harden.activations import neuron_at
from harden.attack.select import select_candidates
from harden.bench import Bench, note_finished
from harden.certify.confirm import breakers_first, confirm, plain_log_odds
from harden.certify.scan import scan_neurons
from harden.certify.suspects import Suspects, drops_of, find_suspects
from harden.confidence import marked_between, most_missed
from harden.errors import MeasurementError
from harden.files import read_finished, write_atomically
from harden.judges.embedded import RULES
from harden.locate.base import Candidate
from harden.locate.passes import Passes
from harden.neurons import Neuron
from harden.recipe import Recipe
from harden.report.certificate import certificate_card
from harden.results import Certificate, NeuronScan, Rate, Spread, Suspect
from harden.runfolder import RunFolder

logger = logging.getLogger(__name__)

LISTED = 1000  # neurons whose drop is in the certificate


def certify(recipe: Recipe) -> Certificate:
    """Certify a recipe's model, or resume it, in `certificate/` of its run folder; returns `certificate.json`."""
    folder = RunFolder(recipe, "certificate")
    finished = folder.path / "certificate.json"
    if processes.from_main(finished.exists):
        note_finished(recipe, folder)
        return read_finished(finished, Certificate)
    folder.warn_of_another_model()
    bench = Bench(recipe, folder, training=False)
    certificate = _certificate(bench, _measure(bench))
    if processes.is_main():
        write_atomically(folder.path / "README.md", certificate_card(certificate, recipe))
        write_atomically(finished, certificate.model_dump_json(indent=1) + "\n")
    processes.wait()
    return certificate


@dataclass(frozen=True)
class _Found:
    """What the stages found; neurons of records are addresses."""

    plain: list[float]
    """Refusal log-odds of the scanned prompts without a clamp."""
    first: list[Neuron]
    drawn: list[Neuron]
    scans: list[NeuronScan]
    flipping: list[str]
    followed: list[str]
    judged: list[Suspect]
    no_attack: Rate
    not_breaking: list[str]
    """Of the scanned neurons, those that an audit may draw."""
    audited: list[NeuronScan]
    of_audited: list[Suspect]


def _measure(bench: Bench) -> _Found:
    """Run the stages, or what is left of them."""
    settings, folder = bench.recipe.certify, bench.folder
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
    # refused ones before the others, and of these the least refused ones first
    easiest = sorted(range(len(plain)), key=lambda place: (plain[place] <= 0, plain[place]))
    prompts, plain = [prompts[place] for place in easiest], [plain[place] for place in easiest]
    scans, flipping, followed = _scan(bench, passes, first, drawn, prompts, plain)
    unfollowed = set(flipping) - set(followed)
    known = [scan for scan in scans if scan.neuron not in unfollowed]
    suspects = folder.stage("suspects", list[Suspects], lambda: find_suspects(bench, passes, known, prompts, plain))
    suspected = len({side.strongest.neuron for side in suspects})
    logger.info(
        "%d of %d scanned neurons flip a prompt, %d of them are followed; with a suspect clamp: %d; generating",
        len(flipping), len(scans), len(followed), suspected,
    )  # fmt: skip
    at_random = set(map(str, drawn))
    judged, no_attack = folder.stage(
        "confirmed", tuple[list[Suspect], Rate], lambda: confirm(bench, suspects, at_random)
    )
    broken = {suspect.neuron for suspect in judged if suspect.breaks}
    not_breaking = [scan.neuron for scan in known if scan.neuron not in broken and None not in scan.log_odds]
    audited, of_audited = _audit(bench, passes, not_breaking, prompts, plain, at_random)
    return _Found(plain, first, drawn, scans, flipping, followed, judged, no_attack, not_breaking, audited, of_audited)


def _certificate(bench: Bench, found: _Found) -> Certificate:
    """The record, with the bounds that follow from what random neurons were found to do."""
    recipe, settings, plain, scans = bench.recipe, bench.recipe.certify, found.plain, found.scans
    neurons = sum(bench.chat_model.neurons.widths[layer] for layer in _layers(bench))
    unmeasured = {scan.neuron for scan in scans if None in scan.log_odds}
    unfollowed = set(found.flipping) - set(found.followed)
    drawn = set(map(str, found.drawn))

    broken = {suspect.neuron for suspect in found.judged if suspect.breaks}  # by the race, before the audit
    of_drawn = drawn & set(found.followed)
    least, most = marked_between(
        len(of_drawn) + len(unfollowed), len(of_drawn), len(of_drawn & broken), len(of_drawn & unmeasured - broken)
    )
    overlooked = {suspect.neuron for suspect in found.of_audited if suspect.breaks}
    no_number = {scan.neuron for scan in found.audited if None in scan.log_odds}

    by_clamp = {(suspect.neuron, suspect.value): suspect for suspect in found.judged}
    for suspect in found.of_audited:  # one that generated before may break the model only now, by rounding
        if suspect.breaks or (suspect.neuron, suspect.value) not in by_clamp:
            by_clamp[suspect.neuron, suspect.value] = suspect
    suspects = breakers_first(list(by_clamp.values()))
    breakers = list(dict.fromkeys(suspect.neuron for suspect in suspects if suspect.breaks))
    drops = {
        scan.neuron: max((drop for drop in drops_of(scan, plain) if drop is not None), default=None) for scan in scans
    }
    return Certificate(
        harden_version=__version__,
        model=recipe.model.name,
        adapter=recipe.model.adapter,
        weights=bench.weights,
        dtype=recipe.model.dtype,
        judge_rules=RULES,
        seed=recipe.seed,
        layers=None if settings.layers is None else sorted(_layers(bench)),
        neurons=neurons,
        first=len(found.first),
        drawn=len(found.drawn),
        sizes=list(settings.sizes),
        strengths=list(settings.strengths),
        prompts=len(plain),
        refused=sum(odds > 0 for odds in plain),
        race_prompts=min(settings.race_prompts, len(plain)),
        cleared=settings.cleared,
        quiet=settings.quiet,
        clamps=sum(len(scan.values) for scan in scans),
        flipping=len(found.flipping),
        unfollowed=len(unfollowed),
        least_unfollowed=least,
        most_unfollowed=most,
        halvings=settings.halvings,
        confirm_first=min(settings.confirm_first, found.no_attack.n),
        raced=sum(max(scan.prompts) < len(plain) for scan in scans),
        tolerance=settings.tolerance,
        no_attack=found.no_attack,
        suspects=suspects,
        breakers=breakers,
        unmeasured=len(unmeasured),
        cleared_neurons=len(found.not_breaking),
        audited=len(found.audited),
        overlooked=sorted(overlooked),
        most_overlooked=most_missed(len(found.not_breaking), len(found.audited), len(overlooked | no_number)),
        most_missed=most_missed(
            neurons - len(found.first), len(drawn), len(drawn & {*breakers, *unmeasured, *unfollowed})
        ),
        drops_first=_spread([drops[str(neuron)] for neuron in found.first]),
        drops_drawn=_spread([drops[str(neuron)] for neuron in found.drawn]),
        largest_drops=_largest(drops),
        judges=bench.responder.judges,
        max_new_tokens=recipe.generation.max_new_tokens,
        seconds=round(bench.folder.seconds(), 1),
    )


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
    bench: Bench,
    passes: Passes,
    first: Sequence[Neuron],
    drawn: Sequence[Neuron],
    prompts: Sequence[str],
    plain: Sequence[float],
) -> tuple[list[NeuronScan], list[str], list[str]]:
    """Scans of all these neurons; addresses of those that flip a prompt; and of those among them that are followed.

    Followed are all, or with `certify.follow` those of `first` and so many random ones of `drawn`. These are scanned
    again, at the smaller values, too.
    """
    follow = bench.recipe.certify.follow
    scans = scan_neurons(bench, passes, [*first, *drawn], prompts, plain, stop_at_flips=follow is not None)
    flipping = [scan.neuron for scan in scans if any(scan.flips)]
    if follow is None:
        return scans, flipping, flipping
    put_first = {str(neuron) for neuron in first}
    others = sorted(set(flipping) - put_first)
    chosen = random.Random(f"follow {bench.recipe.seed}").sample(others, min(follow, len(others)))
    followed = [*sorted(put_first & set(flipping)), *chosen]
    neurons = [Neuron.parse(neuron) for neuron in followed]
    again = {scan.neuron: scan for scan in scan_neurons(bench, passes, neurons, prompts, plain, "follow")}
    return [again.get(scan.neuron, scan) for scan in scans], flipping, followed


def _audit(
    bench: Bench,
    passes: Passes,
    not_breaking: Sequence[str],
    prompts: Sequence[str],
    plain: Sequence[float],
    at_random: Collection[str],
) -> tuple[list[NeuronScan], list[Suspect]]:
    """Scans of some neurons that do not break the model by the race, without it; and those of their clamps that
    generated.

    not_breaking: addresses of all of them, of which `certify.audit` are drawn. at_random: of those that the scan drew.
    """
    settings, folder = bench.recipe.certify, bench.folder
    drawn = random.Random(f"audit {bench.recipe.seed}").sample(
        sorted(not_breaking), min(settings.audit, len(not_breaking))
    )
    neurons = [Neuron.parse(neuron) for neuron in drawn]
    scans = scan_neurons(bench, passes, neurons, prompts, plain, "audit", race=False)

    def generated() -> list[Suspect]:
        suspects = find_suspects(bench, passes, scans, prompts, plain)
        return confirm(bench, suspects, at_random)[0] if suspects else []

    return scans, folder.stage("audited", list[Suspect], generated) if scans else []


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
