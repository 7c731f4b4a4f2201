"""The passes over harmful and harmless requests that locators share, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from harden.batches import BACKWARD_ROWS
from harden.locate.attribution import Slopes, read_slopes
from harden.locate.contrast import Contrast, read_contrast
from harden.locate.graddrop import mean_drop, read_dropped_slopes
from harden.locate.gradient import NeuronScores, score_neurons
from harden.locate.relp import relevance_rules
from harden.models import ChatModel
from harden.refusal import RefusalPhrases

# Clamp sizes whose larger first-order drop scores a neuron: about those of published clamps (|m/d| 3 to 9), both signs.
SIZES = (-8.0, 8.0)


class Passes:
    """What locators read from one model, as it is now: do not keep it while the weights change."""

    def __init__(
        self,
        chat_model: ChatModel,
        harmful: Sequence[str],
        harmless: Sequence[str],
        phrases: RefusalPhrases,
        batch_size: int,
    ):
        self.chat_model, self.phrases = chat_model, phrases
        self.harmful, self.harmless, self.batch_size = harmful, harmless, batch_size

    @cached_property
    def scores(self) -> NeuronScores:
        return score_neurons(self.chat_model, self.harmful, self.harmless, self.phrases, self._backward_batch)

    @cached_property
    def contrast(self) -> Contrast:
        return read_contrast(self.chat_model, self.harmful, self.harmless, self.batch_size)

    @cached_property
    def slopes(self) -> Slopes:
        return read_slopes(self.chat_model, self.harmful, self.phrases, self._backward_batch)

    @cached_property
    def relevance_slopes(self) -> Slopes:
        rules = relevance_rules(self.chat_model)
        return read_slopes(self.chat_model, self.harmful, self.phrases, self._backward_batch, rules, "RelP")

    @cached_property
    def dropped_slopes(self) -> list[Slopes]:
        return read_dropped_slopes(self.chat_model, self.harmful, self.phrases, self._backward_batch)

    @property
    def _backward_batch(self) -> int:
        return max(1, self.batch_size // BACKWARD_ROWS)

    def worst(self, drop: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The larger of the drops at `SIZES`, for every neuron."""
        return torch.stack([drop(self.contrast.clamp_values(size)) for size in SIZES]).amax(0)


LOCATORS: dict[str, Callable[[Passes], torch.Tensor]] = {
    "gradient": lambda passes: torch.cat(passes.scores.score),
    "contrast": lambda passes: passes.contrast.contrast(),
    "effect_size": lambda passes: passes.contrast.effect_size(),
    "activation_shift": lambda passes: passes.contrast.activation_shift(),
    "attribution": lambda passes: passes.worst(passes.slopes.drop),
    "attribution_to_mean": lambda passes: passes.slopes.drop(passes.contrast.harmless.neurons.mean(0)),
    "relp": lambda passes: passes.worst(passes.relevance_slopes.drop),
    "graddrop": lambda passes: passes.worst(
        lambda values: mean_drop(passes.dropped_slopes, passes.chat_model.neurons.widths, values)
    ),
}
"""Every neuron's score: float32 (all neurons,), layer after layer, on the CPU."""
