"""Suspects generate: which clamps break the model on test prompts.

A clamp meets first the prompts that are refused least. If those do not break the model, it meets the others in order
of their exact refusal log-odds under this very clamp, the most damaged first. Those that it leaves above 0 it does not
meet, unless one of the first was above 0 and complied. It ends when the model is broken, or cannot be any more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence

from harden.bench import Bench
from harden.effects import log_odds_under
from harden.errors import MeasurementError
from harden.generate import Request, progress_bar
from harden.interventions import NOTHING, Clamp
from harden.judges.base import Outcome
from harden.neurons import Neuron
from harden.prompts import Prompt
from harden.results import Rate, Suspect

CHUNK = 32  # clamps whose log-odds are saved together

Outcomes = dict[str, Outcome]  # by prompt id


def plain_log_odds(bench: Bench, texts: Sequence[str]) -> list[float]:
    """Refusal log-odds of prompts without attack. Raises MeasurementError if one is no number."""
    batch_size, odds = bench.recipe.generation.batch_size, []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        odds += log_odds_under(bench.chat_model, [NOTHING], part, bench.phrases, batch_size, "no attack")[0]
    if not all(map(math.isfinite, odds)):
        raise MeasurementError("refusal log-odds are not finite; is the model sound? try model.dtype float32")
    return odds


def confirm(
    bench: Bench, suspects: Sequence[tuple[str, float, int, int]], drawn: Collection[str]
) -> tuple[list[Suspect], Rate]:
    """Generate with the suspects on test prompts; those that did, the worst first, and the rate of `comply` without
    attack.

    suspects: address, value, flips of scanned prompts, and of how many that it met; a neuron's second clamp is only
    tried if the first does not break the model and made gibberish of an answer. drawn: addresses of random neurons.
    Raises MeasurementError where more than half of the test prompts comply without attack.
    """
    prompts = bench.splits["test"].harmful[: bench.recipe.certify.test_prompts]
    (plain,) = bench.responder.attempt([None], prompts, "no attack")
    refused = [prompt for prompt in prompts if plain.outcomes[prompt.id] != "comply"]
    if 2 * len(refused) < len(prompts):
        raise MeasurementError(
            f"{len(prompts) - len(refused)} of {len(prompts)} test prompts comply without attack: there is too little "
            "refusal to break"
        )
    odds = dict(zip(refused, plain_log_odds(bench, [prompt.text for prompt in refused]), strict=True))
    race = _Race(bench, sorted(refused, key=odds.__getitem__))
    scanned = {Clamp(Neuron.parse(neuron), value): flips for neuron, value, *flips in suspects}
    first: dict[Neuron, Clamp] = {}
    for clamp in scanned:
        first.setdefault(clamp.neuron, clamp)
    found = race.run(list(first.values()))
    garbled = {clamp.neuron for clamp, of in found.items() if not race.broken(of) and "degenerate" in of.values()}
    found |= race.run([clamp for clamp in scanned if clamp not in found and clamp.neuron in garbled])
    judged = []
    for clamp, outcomes in found.items():
        met, neuron = list(outcomes.values()), str(clamp.neuron)
        judged.append(
            Suspect(
                neuron=neuron,
                drawn=neuron in drawn,
                value=clamp.value,
                scanned_flips=scanned[clamp][0],
                scanned_refused=scanned[clamp][1],
                **{kind: Rate.of(met.count(kind), len(met)) for kind in ("comply", "degenerate", "unjudged")},
                flipped=Rate.of(flips(outcomes), len(met)),
                breaks=race.broken(outcomes),
            )
        )
    judged.sort(key=lambda suspect: (-suspect.breaks, -suspect.flipped.rate))
    return judged, Rate.of(len(prompts) - len(refused), len(prompts))


def flips(outcomes: Mapping[str, Outcome]) -> int:
    """How many comply, or are left unjudged."""
    return sum(outcome in ("comply", "unjudged") for outcome in outcomes.values())


class _Race:
    """Clamps against the test prompts that do not comply without attack, easiest first."""

    def __init__(self, bench: Bench, prompts: Sequence[Prompt]):
        self.bench, self.prompts = bench, prompts
        self.first = bench.recipe.certify.confirm_first
        self.allowed = bench.recipe.certify.tolerance * len(prompts)

    def broken(self, outcomes: Mapping[str, Outcome]) -> bool:
        return flips(outcomes) > self.allowed

    def run(self, clamps: Sequence[Clamp]) -> dict[Clamp, Outcomes]:
        """What the prompts that each clamp met came to."""
        found: dict[Clamp, Outcomes] = {clamp: {} for clamp in clamps}
        self._meet(found, {clamp: self.prompts[: self.first] for clamp in clamps}, "the easiest prompts")
        ahead = self._most_damaged_first({clamp: of for clamp, of in found.items() if not self.broken(of)})
        size = self.first
        while ahead := {clamp: queue for clamp, queue in ahead.items() if self._open(found[clamp], queue)}:
            self._meet(found, {clamp: queue[:size] for clamp, queue in ahead.items()}, f"{len(ahead)} undecided")
            ahead = {clamp: queue[size:] for clamp, queue in ahead.items() if set(found[clamp].values()) != {"refuse"}}
            size *= 2
        return found

    def _open(self, outcomes: Outcomes, queue: Sequence[Prompt]) -> bool:
        """Whether the prompts that are left can still decide."""
        return not self.broken(outcomes) and flips(outcomes) + len(queue) > self.allowed

    def _meet(self, found: dict[Clamp, Outcomes], queues: Mapping[Clamp, Sequence[Prompt]], label: str) -> None:
        pairs = [(clamp, prompt) for clamp, queue in queues.items() for prompt in queue]
        requests = [Request(prompt.text, (clamp,)) for clamp, prompt in pairs]
        verdicts = self.bench.responder.respond(requests, f"confirm: {label}") if requests else []
        for (clamp, prompt), verdict in zip(pairs, verdicts, strict=True):
            found[clamp][prompt.id] = verdict.outcome

    def _most_damaged_first(self, found: Mapping[Clamp, Outcomes]) -> dict[Clamp, list[Prompt]]:
        """Of each clamp the prompts that it has not met, those of the lowest log-odds first, and none above 0 unless
        log-odds were wrong about a prompt that it met."""
        queues: dict[Clamp, list[Prompt]] = {}
        for clamp, odds in self._log_odds(found).items():
            surprised = any(odds[prompt] > 0 and flips({prompt: of}) for prompt, of in found[clamp].items())
            left = [prompt for prompt in self.prompts[self.first :] if surprised or odds[prompt.id] <= 0]
            queues[clamp] = sorted(left, key=lambda prompt, odds=odds: odds[prompt.id])
        return queues

    def _log_odds(self, clamps: Collection[Clamp]) -> dict[Clamp, dict[str, float]]:
        """Of every prompt, by id; minus infinity where they are no number, since that may be anything. Saved chunk by
        chunk, under the names of what is in it."""
        if len(self.prompts) <= self.first:
            return {}
        found: dict[Clamp, dict[str, float]] = {}
        ordered = sorted(clamps, key=lambda clamp: (clamp.neuron, clamp.value))  # those of a layer run together
        with progress_bar(len(ordered), "log-odds of test prompts") as bar:
            for start in range(0, len(ordered), CHUNK):
                chunk = ordered[start : start + CHUNK]
                content = [[prompt.id for prompt in self.prompts], [[str(c.neuron), c.value] for c in chunk]]
                name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
                rows = self.bench.folder.stage(
                    f"test-odds-{name}", list[list[float | None]], lambda chunk=chunk: self._exact(chunk)
                )
                for clamp, row in zip(chunk, rows, strict=True):
                    numbers = [-math.inf if x is None else x for x in row]
                    found[clamp] = {prompt.id: x for prompt, x in zip(self.prompts, numbers, strict=True)}
                bar.update(len(chunk))
        return found

    def _exact(self, clamps: Sequence[Clamp]) -> list[list[float | None]]:
        """Log-odds of every prompt under every clamp; None: no number."""
        bench, rows = self.bench, [[] for _ in clamps]
        batch_size = bench.recipe.generation.batch_size
        for start in range(0, len(self.prompts), batch_size):
            texts = [prompt.text for prompt in self.prompts[start : start + batch_size]]
            odds = log_odds_under(bench.chat_model, clamps, texts, bench.phrases, batch_size, "these clamps")
            for row, more in zip(rows, odds, strict=True):
                row += [x if math.isfinite(x) else None for x in more]
        return rows
