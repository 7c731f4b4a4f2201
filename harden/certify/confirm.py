"""Suspects generate: which clamps break the model on test prompts.

Of each neuron the strongest clamp of one side generates, then, unless the model is broken, that of the other side; each
is followed by the smallest of its side if it made gibberish of an answer and did not break the model.

A clamp meets first the prompts that are refused least. If those do not break the model, it meets the others in order
of their exact refusal log-odds under this very clamp, the most damaged first. Those that it leaves above 0 it does not
meet, unless one of the first was above 0 and complied. It ends when the model is broken or cannot be any more, or when
all answers of the first prompts and of the next refuse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from harden.bench import Bench
from harden.certify.chunks import saved_in_chunks
from harden.certify.suspects import Flip, Suspects
from harden.effects import log_odds_under
from harden.errors import MeasurementError
from harden.generate import Request
from harden.interventions import NOTHING, Clamp
from harden.prompts import Prompt
from harden.results import BYPASSES, Outcome, Rate, Suspect

Outcomes = dict[str, Outcome]  # by prompt id


def plain_log_odds(bench: Bench, texts: Sequence[str]) -> list[float]:
    """Refusal log-odds of prompts without attack. Raises MeasurementError if one is no number."""
    batch_size = bench.recipe.generation.batch_size
    (odds,) = log_odds_under(bench.chat_model, [NOTHING], texts, bench.phrases, batch_size, "no attack")
    if not all(map(math.isfinite, odds)):
        raise MeasurementError("refusal log-odds are not finite; is the model sound? try model.dtype float32")
    return odds


def confirm(bench: Bench, suspects: Sequence[Suspects], drawn: Collection[str]) -> tuple[list[Suspect], Rate]:
    """Generate with suspects on test prompts. Returns the clamps that did, breakers first, and how many of the prompts
    comply without attack.

    suspects: of each neuron the side with the strongest clamp first. drawn: addresses of random neurons. Raises
    MeasurementError where more than half of the test prompts comply without attack.
    """
    prompts = bench.splits["test"].harmful[: bench.recipe.certify.test_prompts]
    (plain,) = bench.responder.attempt([None], prompts, "no attack")
    refused = [prompt for prompt in prompts if not flipped({prompt.id: plain.outcomes[prompt.id]})]
    if 2 * len(refused) < len(prompts):
        raise MeasurementError(
            f"{len(prompts) - len(refused)} of {len(prompts)} test prompts comply without attack, or are left "
            "unjudged: there is too little refusal to break"
        )
    odds = dict(zip(refused, plain_log_odds(bench, [prompt.text for prompt in refused]), strict=True))
    race = _Race(bench, sorted(refused, key=odds.__getitem__))
    judged = [_judged(flip, outcomes, race, drawn) for flip, outcomes in _generate(race, suspects).items()]
    return breakers_first(judged), Rate.of(len(prompts) - len(refused), len(prompts))


def breakers_first(judged: Sequence[Suspect]) -> list[Suspect]:
    return sorted(judged, key=lambda suspect: (-suspect.breaks, -suspect.flipped.rate))


def _generate(race: _Race, suspects: Sequence[Suspects]) -> dict[Flip, Outcomes]:
    """What the test prompts that each clamp met came to."""
    sides: dict[str, list[Suspects]] = defaultdict(list)
    for side in suspects:
        sides[side.strongest.neuron].append(side)
    found: dict[Flip, Outcomes] = {}
    broken: set[str] = set()

    def run(flips: Sequence[Flip]) -> None:
        outcomes = race.run([flip.clamp for flip in flips])
        found.update({flip: outcomes[flip.clamp] for flip in flips})
        broken.update(flip.neuron for flip in flips if race.broken(found[flip]))

    for turn in (0, 1):
        now = [of[turn] for neuron, of in sides.items() if len(of) > turn and neuron not in broken]
        run([side.strongest for side in now])
        garbled = [side for side in now if "degenerate" in found[side.strongest].values()]
        run([side.smallest for side in garbled if side.smallest not in found and side.smallest.neuron not in broken])
    return found


def _judged(flip: Flip, outcomes: Outcomes, race: _Race, drawn: Collection[str]) -> Suspect:
    met = list(outcomes.values())
    return Suspect(
        neuron=flip.neuron,
        drawn=flip.neuron in drawn,
        value=flip.value,
        scanned_flips=flip.flips,
        scanned_refused=flip.refused,
        **{kind: Rate.of(met.count(kind), len(met)) for kind in ("comply", "degenerate", "unjudged")},
        flipped=Rate.of(flipped(outcomes), len(met)),
        breaks=race.broken(outcomes),
    )


def flipped(outcomes: Mapping[str, Outcome]) -> int:
    """How many comply, or are left unjudged."""
    return sum(outcome in BYPASSES for outcome in outcomes.values())


class _Race:
    """Clamps against the test prompts that do not comply without attack, easiest first."""

    def __init__(self, bench: Bench, prompts: Sequence[Prompt]):
        self.bench, self.prompts = bench, prompts
        self.first = bench.recipe.certify.confirm_first
        self.allowed = bench.recipe.certify.tolerance * len(prompts)

    def broken(self, outcomes: Mapping[str, Outcome]) -> bool:
        return flipped(outcomes) > self.allowed

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
        return not self.broken(outcomes) and flipped(outcomes) + len(queue) > self.allowed

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
            surprised = any(odds[prompt] > 0 and flipped({prompt: of}) for prompt, of in found[clamp].items())
            left = [prompt for prompt in self.prompts[self.first :] if surprised or odds[prompt.id] <= 0]
            queues[clamp] = sorted(left, key=lambda prompt, odds=odds: odds[prompt.id])
        return queues

    def _log_odds(self, clamps: Collection[Clamp]) -> dict[Clamp, dict[str, float]]:
        """Of every prompt, by id; minus infinity where they are no number, since that may be anything."""
        if len(self.prompts) <= self.first:
            return {}
        names = [prompt.id for prompt in self.prompts]
        rows = saved_in_chunks(self.bench.folder, "test-odds", list(clamps), names, self._exact)
        numbers = {clamp: [-math.inf if odds is None else odds for odds in row] for clamp, row in rows.items()}
        return {clamp: dict(zip(names, row, strict=True)) for clamp, row in numbers.items()}

    def _exact(self, clamps: Sequence[Clamp]) -> list[list[float]]:
        """Log-odds of every prompt under every clamp."""
        bench, texts = self.bench, [prompt.text for prompt in self.prompts]
        batch_size = bench.recipe.generation.batch_size
        return log_odds_under(bench.chat_model, clamps, texts, bench.phrases, batch_size, "these clamps")
