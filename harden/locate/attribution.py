"""Attribution patching: to first order, what moving a neuron does to refusal log-odds, for every neuron at once.

With h_t the neuron's activation at position t and g_t = d(log-odds)/dh_t, a constant clamp to m lowers the log-odds by

    drop(m) = sum over t of (h_t - m) g_t

(attribution patching, Nanda 2023; AtP in Kramar et al., arXiv 2403.00745, Eq. 4). It is linear in m, so one pass gives
it for every value: `Slopes`. Departure: a constant is patched in at every position, not another prompt's activation.
Cost: one forward and one backward pass per harmful prompt, those of `gradient`. It misses neurons whose effect
saturates or cancels; `graddrop`, `relp` and `integrated` repair part of that, for more passes or other rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slopes:
    """Means over prompts, float32 vectors over all neurons, layer after layer, on the CPU."""

    slope: torch.Tensor
    """d(log-odds)/dm of a constant clamp to m: the sum of g_t over positions, with g_t = d(log-odds)/dh_t."""
    offset: torch.Tensor
    """The sum of h_t g_t over positions."""

    def drop(self, values: torch.Tensor) -> torch.Tensor:
        """By how much the log-odds fall, to first order, if every neuron alone went to its value."""
        return self.offset - values * self.slope
