"""A located neuron, and the values that it is clamped to."""

from __future__ import annotations

from dataclasses import dataclass

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
