"""A ceiling on a utility term: its weight grows while the term stands above it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 0.8  # of the running mean, per step: about the last five steps count
GROWTH = 0.1  # of the logarithm of the factor, per step, where the running mean is at twice the ceiling or above
MOST = 16.0


@dataclass
class Ceiling:
    """Dual ascent on `loss <= limit`, in the logarithm of the multiplier: what costs too much utility gets dearer.

    limit: in the term's own units, above 0. The factor on the term's weight stays between 1 and `MOST`.
    """

    limit: float
    average: float = 0.0
    """Running mean of the loss; it starts at 0, as the losses of utility terms do."""
    factor: float = 1.0

    def update(self, loss: float) -> None:
        """Take note of a step's loss."""
        self.average = MEMORY * self.average + (1 - MEMORY) * loss
        excess = max(-1.0, min(1.0, self.average / self.limit - 1))
        self.factor = max(1.0, min(MOST, self.factor * math.exp(GROWTH * excess)))
