"""Locators that read activations alone: harmful prompts against harmless ones, at the last prompt token.

- `contrast`: |difference of the mean activations| (CNA, arXiv 2605.12290), without always-on neurons.
- `effect_size`: |difference of the means| / pooled standard deviation (SafeNeuron, arXiv 2602.12158).
- `activation_shift`: |difference of the means| / the layer's mean |activation|, so that layers of small activations
  count like others (our reading of SafeNeuron's second criterion).

Cost: one forward pass per prompt, for all three. The papers contrast harmful prompts with ordinary harmless ones; here
the harmless ones are look-alikes of the harmful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from harden.activations import Activations, neuron_at, read_activations
from harden.generate import Request
from harden.interventions import Intervention
from harden.locate.base import Candidate
from harden.locate.strength import full_strength
from harden.models import ChatModel

ALWAYS_ON_SHARE = 0.001  # as many neurons as CNA takes: the most active ones whatever is asked are no refusal neurons
ALWAYS_ON_RATIO = 0.5  # and they are so alike: one mean is at least this much of the other


@dataclass(frozen=True)
class Contrast:
    """Activations on harmful prompts against harmless ones, over all neurons: float32 vectors, layer after layer."""

    chat_model: ChatModel
    harmful: Activations
    harmless: Activations

    @cached_property
    def gap(self) -> torch.Tensor:
        return self.harmful.neurons.mean(0) - self.harmless.neurons.mean(0)

    def contrast(self) -> torch.Tensor:
        """|gap|; -1 for neurons among the most active on harmful and on harmless prompts alike."""
        means = torch.stack([kind.neurons.mean(0).abs() for kind in (self.harmful, self.harmless)])
        n = max(1, round(ALWAYS_ON_SHARE * len(self.gap)))
        most_active = (means >= means.topk(n).values[:, -1:]).all(0)
        always_on = most_active & (means.amin(0) >= ALWAYS_ON_RATIO * means.amax(0))
        return self.gap.abs().masked_fill(always_on, -1.0)

    def effect_size(self) -> torch.Tensor:
        """|gap| in standard deviations; a neuron that never varies is no evidence."""
        return (self.gap.abs() / self.pooled_deviation()).nan_to_num(0.0, posinf=0.0)

    def activation_shift(self) -> torch.Tensor:
        size = self.harmless.neurons.abs().mean(0)
        widths = list(self.chat_model.neurons.widths)
        layer_mean = torch.cat([part.mean().expand(len(part)) for part in size.split(widths)])
        return (self.gap.abs() / layer_mean).nan_to_num(0.0, posinf=0.0)

    def ranking(self, locator: str) -> torch.Tensor:
        """Columns of all neurons, best first, by `contrast`, `effect_size` or `activation_shift`."""
        return getattr(self, locator)().argsort(descending=True, stable=True)

    def pooled_deviation(self) -> torch.Tensor:
        return ((self.harmful.neurons.var(0) + self.harmless.neurons.var(0)) / 2).sqrt()

    @cached_property
    def unit(self) -> torch.Tensor:
        """What clamp sizes count in: the gap, or the standard deviation if that is larger, with the sign of the gap."""
        gap, deviation = self.gap, self.pooled_deviation().nan_to_num(0.0)
        return torch.where(gap.abs() >= deviation, gap, deviation.copysign(gap))

    @cached_property
    def full(self) -> torch.Tensor:
        """Where each neuron writes as much as the stream of the harmful prompts holds: see `full_strength`."""
        return full_strength(self.chat_model, self.harmful.stream)

    def clamp_values(self, size: float) -> torch.Tensor:
        """Every neuron's clamp value of that size: beyond the harmless mean, away from the harmful one."""
        return self.harmless.neurons.mean(0) - size * self.unit

    def candidate(self, column: int) -> Candidate:
        """A neuron whose clamp sizes count in `unit`."""
        harmful, harmless = (float(kind.neurons[:, column].mean()) for kind in (self.harmful, self.harmless))
        score, unit = float(self.gap[column].abs()), float(self.unit[column])
        return Candidate(neuron_at(self.chat_model, column), score, harmful, harmless, unit)


def read_contrast(
    chat_model: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    batch_size: int,
    interventions: tuple[Intervention, ...] = (),
) -> Contrast:
    """Read both sets of prompts, all under the same interventions."""
    kinds = [
        read_activations(chat_model, [Request(text, interventions) for text in texts], batch_size)
        for texts in (harmful, harmless)
    ]
    return Contrast(chat_model, *kinds)
