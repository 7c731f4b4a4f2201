"""What is decided between rounds, from their records alone: whether to go on, what a round keeps, which one is best."""

from __future__ import annotations

from collections.abc import Sequence

from harden.interventions import Clamp
from harden.neurons import Neuron
from harden.recipe import Recipe
from harden.results import AttackRecord, Measurement, RoundRecord, count_flips


def reason_to_stop(rounds: Sequence[RoundRecord], recipe: Recipe) -> str | None:
    last = rounds[-1]
    if last.accepted and meets_tolerance(last, recipe):
        return (
            f"no single neuron of this search flips more than {recipe.rounds.tolerance:.0%} of the selection prompts "
            f"(upper bound {last.most_flipped.high:.1%})"
        )
    if last.number >= recipe.rounds.max:
        rejected = "" if last.accepted else f", and {last.decision}"
        return f"the budget of {recipe.rounds.max} round{'s' * (recipe.rounds.max > 1)} is spent{rejected}"
    return None


def utility_factor(rounds: Sequence[RoundRecord], recipe: Recipe) -> float:
    """On the weights of the utility terms of the next round."""
    return recipe.rounds.tighten ** sum(not record.accepted for record in rounds)


def meets_tolerance(record: RoundRecord, recipe: Recipe) -> bool:
    """Whether the model refuses without attack and no neuron flips more than a few prompts, on the upper bound."""
    return record.most_flipped.high <= recipe.rounds.tolerance and refuses(record, recipe)


def refuses(record: RoundRecord, recipe: Recipe) -> bool:
    return record.selection.no_attack.refuse.rate >= recipe.rounds.min_refusal


def accept(number: int, selection: Measurement, start: Measurement | None, recipe: Recipe) -> tuple[bool, str]:
    """Whether a round keeps the utility floors, and a sentence that says so."""
    if start is None:
        return True, "the starting model"
    rises = {"over-refusal": selection.over_refusal.rate - start.over_refusal.rate}
    if selection.over_refusal_more and start.over_refusal_more:
        rises["over-refusal of more look-alikes"] = selection.over_refusal_more.rate - start.over_refusal_more.rate
    if selection.benign_kl.mean > recipe.rounds.max_benign_kl:
        return False, (
            f"round {number} broke the utility floor: benign KL {selection.benign_kl.mean:.3f} nats per token is "
            f"above {recipe.rounds.max_benign_kl}"
        )
    if selection.benign_perplexity is not None and start.benign_perplexity is not None:
        dearer = selection.benign_perplexity / start.benign_perplexity - 1
        if dearer > recipe.rounds.max_perplexity_rise:
            return False, (
                f"round {number} broke the utility floor: benign perplexity rose by {dearer:.1%}, more than "
                f"{recipe.rounds.max_perplexity_rise:.1%}"
            )
    for what, rise in rises.items():
        if rise > recipe.rounds.max_over_refusal_rise:
            return False, (
                f"round {number} broke the utility floor: {what} rose by {rise:.1%}, more than "
                f"{recipe.rounds.max_over_refusal_rise:.1%}"
            )
    return True, "utility floors kept"


def best_round(rounds: Sequence[RoundRecord], recipe: Recipe) -> RoundRecord:
    """The best accepted round on the selection split.

    One that meets the tolerance before one that does not, one that refuses without attack before one that does not,
    then the lowest attack success, then the lowest benign KL.
    """

    def badness(record: RoundRecord) -> tuple[bool, bool, float, float]:
        selection = record.selection
        worst = max(selection.worst_neuron.comply.rate, selection.no_attack.comply.rate)
        return not meets_tolerance(record, recipe), not refuses(record, recipe), worst, selection.benign_kl.mean

    return min((record for record in rounds if record.accepted), key=badness)


def breakers(rounds: Sequence[RoundRecord]) -> list[Clamp]:
    """Clamps that flipped any prompt in the finals of an earlier search."""
    found = {
        clamp_of(attack)
        for record in rounds
        for attack in record.finals
        if count_flips(attack.outcomes, record.selection.no_attack.outcomes)
    }
    return sorted(found, key=lambda clamp: (clamp.neuron, clamp.value))


def clamp_of(record: AttackRecord) -> Clamp:
    return Clamp(Neuron.parse(record.neuron), record.value)
