"""A located neuron, and the values that it is clamped to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harden.interventions import Clamp
from harden.neurons import Neuron


@dataclass(frozen=True)
class Candidate:
    """A neuron with its score (|activation gap| if it was not located by `gradient`) and its mean activations: at the
    template token that scored best, or at the last one."""

    neuron: Neuron
    score: float
    harmful: float
    harmless: float
    unit: float | None = None
    """What sizes count in, with the sign of the activation gap; None: the gap."""

    def clamp_value(self, size: float) -> float:
        """The value `size` activation gaps (or units) beyond the harmless mean, away from the harmful one."""
        return self.harmless - size * (self.harmful - self.harmless if self.unit is None else self.unit)


def clamps_of(
    neuron: Neuron, harmless: float, values: Iterable[float], strengths: Iterable[float], full: float
) -> dict[Clamp, float]:
    """Clamps of a neuron to the values, and of either sign to where it writes the given shares of the residual stream;
    with each how far it is beyond the neuron's mean on harmless prompts. Equal ones are one.

    full: the neuron's `full_strength`; 0: it writes nothing, and is clamped to the values alone.
    """
    strong = [sign * share * full for share in strengths for sign in (-1, 1) if full]
    return {Clamp(neuron, value): value - harmless for value in (*values, *strong)}
