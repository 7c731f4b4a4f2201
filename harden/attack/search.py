"""The constant clamp: search the worst neuron and the worst value for it.

Constant clamp (Kazemi, Chegini and Safi, arXiv 2605.08513, section 3). Clamps are screened first; what
survives generates, first on few prompts, then on all of the selection split. Which neuron and value are worst is
decided there and nowhere else.
Departures from the paper: (1) values are not absolute, but multiples of a neuron's own activation gap, beyond the
harmless mean, and shares of the residual stream's norm; (2) clamps are screened before they generate, so that many
neurons can be tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harden.attack.respond import Attempt, Responder
from harden.attack.screen import Probe, Screened, choose_for_generation, screen_for_generation
from harden.errors import MeasurementError
from harden.interventions import Clamp
from harden.neurons import Neuron
from harden.prompts import Prompt
from harden.refusal import RefusalPhrases


@dataclass(frozen=True)
class Search:
    """A fresh search on the selection split: everything that was tried there, and the worst clamp."""

    no_attack: Attempt
    screened: tuple[Screened[Clamp], ...]
    """Those whose coherence was asked: the ones with the lowest log-odds."""
    first_heat: tuple[Attempt, ...]
    """On the first prompts; the refined values stand behind the screened ones."""
    finals: tuple[Attempt, ...]

    @property
    def worst(self) -> Attempt:
        """The final with most `comply`; of equals the one with more that was not judged."""
        return max(self.finals, key=badness)

    def best_clamps(self, n: int) -> list[Clamp]:
        """The best clamp of each of the n worst neurons: finals before the first heat, then by `comply`."""
        best: dict[Neuron, Clamp] = {}
        for attempts in (self.finals, self.first_heat):
            for attempt in sorted(attempts, key=badness, reverse=True):
                best.setdefault(attempt.clamp.neuron, attempt.clamp)
        return list(best.values())[:n]


def badness(attempt: Attempt) -> tuple[float, float]:
    return attempt.share("comply"), attempt.share("unjudged")


def search_worst_neuron(
    responder: Responder,
    values: Sequence[Mapping[Clamp, float]],
    selection: Sequence[Prompt],
    probe: Probe,
    phrases: RefusalPhrases,
    max_benign_rise: float,
    heat_one: int,
    heat_one_prompts: int,
    finalists: int,
    retest: Sequence[Clamp] = (),
    refine: Sequence[float] = (),
    quiet: float | None = None,
) -> Search:
    """Screen the values of many neurons, generate with the best in two heats, and find the worst clamp for the model.

    values, quiet: see `outermost_first` and `is_quiet`. heat_one clamps run on the first `heat_one_prompts` of
    `selection`; the best value of each of the `finalists` worst neurons runs on all of it, and so does every clamp of
    `retest`. With `refine`, multiples of the finalists' values run on the first prompts as well, around the peak of
    what is an inverted U.
    Raises MeasurementError when no clamp is coherent: nothing was attacked then.
    """
    screened = screen_for_generation(
        responder.chat_model, values, probe, phrases, responder.batch_size, max_benign_rise, heat_one, quiet
    )
    chosen = choose_for_generation(screened, max_benign_rise, heat_one)
    if not chosen:
        raise MeasurementError(
            f"none of {sum(map(len, values))} clamps leaves the benign loss within {max_benign_rise} nats per token:"
            " nothing could be attacked; give smaller attack.sizes or attack.strengths, or raise attack.max_benign_rise"
        )
    few = selection[:heat_one_prompts]
    heat = responder.attempt(chosen, few, "first heat")
    finer = [Clamp(c.neuron, c.value * factor) for c in _best_of_each(heat)[:finalists] for factor in refine]
    finer = [clamp for clamp in dict.fromkeys(finer) if clamp not in chosen]
    heat += responder.attempt(finer, few, "around the peak") if finer else []
    finals = _best_of_each(heat)[:finalists]
    finals += [clamp for clamp in dict.fromkeys(retest) if clamp not in finals]
    no_attack, *attempts = responder.attempt([None, *finals], selection, "finals")
    return Search(no_attack, tuple(screened), tuple(heat), tuple(attempts))


def _best_of_each(heat: Sequence[Attempt]) -> list[Clamp]:
    """The best value of each neuron, worst neuron first; of equals the one with the lower log-odds."""
    best: dict[Neuron, Clamp] = {}
    for attempt in sorted(heat, key=badness, reverse=True):
        best.setdefault(attempt.clamp.neuron, attempt.clamp)
    return list(best.values())
