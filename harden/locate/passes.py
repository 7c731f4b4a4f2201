"""The passes over harmful and harmless requests that locators share, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch

from harden.batches import BACKWARD_ROWS
from harden.effects import log_odds_under
from harden.generate import mean
from harden.locate.attribution import Slopes
from harden.locate.backward import Backward, read_backward
from harden.locate.contrast import Contrast, read_contrast
from harden.locate.exact import layer_drops
from harden.locate.graddrop import mean_drop, read_dropped_slopes
from harden.locate.gradient import NeuronScores, contrast_scores
from harden.locate.greedy import greedy_drops
from harden.locate.integrated import read_integrated_slopes
from harden.locate.relp import relevance_rules
from harden.locate.tail import tail_log_odds
from harden.models import ChatModel
from harden.refusal import RefusalPhrases

# Clamp sizes whose larger first-order drop scores a neuron: about those of published clamps (|m/d| 3 to 9), both signs.
SIZES = (-8.0, 8.0)
STRENGTH = 0.25  # of the residual stream's norm; docs/method.md says how strong the clamps are that break SmolLM2
# What `tail` and `exact`, which pay for every size and prompt, measure a neuron with. Larger sizes: they see overshoot.
EXACT_SIZES = (-16.0, 16.0)
EXACT_PROMPTS = 1  # the one that is most easily talked out of refusing: docs/locators.md

Stage = Callable[[str, Callable[[], list[float]]], list[float]]
"""Gives what was saved under a name, or makes it and saves it."""


class Passes:
    """What locators read from one model, as it is now: do not keep it while the weights change."""

    def __init__(
        self,
        chat_model: ChatModel,
        harmful: Sequence[str],
        harmless: Sequence[str],
        phrases: RefusalPhrases,
        batch_size: int,
        stage: Stage = lambda _name, make: make(),
    ):
        self.stage = stage
        self.chat_model, self.phrases = chat_model, phrases
        self.harmful, self.harmless, self.batch_size = harmful, harmless, batch_size

    @cached_property
    def scores(self) -> NeuronScores:
        return contrast_scores(self.backward, self.harmless_backward)

    @cached_property
    def backward(self) -> Backward:
        return self._read_backward(self.harmful)

    @cached_property
    def harmless_backward(self) -> Backward:
        return self._read_backward(self.harmless)

    @cached_property
    def contrast(self) -> Contrast:
        return read_contrast(self.chat_model, self.harmful, self.harmless, self.batch_size)

    @cached_property
    def slopes(self) -> Slopes:
        return self.backward.slopes

    @cached_property
    def relevance_slopes(self) -> Slopes:
        return self._read_backward(self.harmful, partial(relevance_rules, self.chat_model), "RelP").slopes

    @cached_property
    def dropped_slopes(self) -> list[Slopes]:
        return read_dropped_slopes(self.chat_model, self.harmful, self.phrases, self._backward_batch)

    @cached_property
    def integrated_slopes(self) -> Slopes:
        means = self.harmless_backward.activation
        return read_integrated_slopes(self.chat_model, self.harmful, means, self.phrases, self._backward_batch)

    @cached_property
    def tail_drops(self) -> torch.Tensor:
        return self._drops("tail", tail_log_odds)

    @cached_property
    def exact_drops(self) -> torch.Tensor:
        return self._drops("exact", log_odds_under)

    @cached_property
    def greedy_drops(self) -> torch.Tensor:
        (request,), plain = self._easiest(1)

        def make() -> list[float]:
            full = self.contrast.full
            return greedy_drops(self.chat_model, full, request, plain, self.phrases, self.batch_size).tolist()

        return torch.tensor(self.stage("greedy", make))

    def _easiest(self, n: int) -> tuple[list[str], float]:
        """The n harmful prompts that are most easily talked out of refusing, and the mean of their log-odds."""
        odds = self.backward.log_odds
        easiest = sorted(range(len(odds)), key=lambda place: (odds[place] <= 0, abs(odds[place])))[:n]
        return [self.harmful[place] for place in easiest], mean([odds[place] for place in easiest])

    def _drops(self, name: str, measure: Callable[..., list[list[float]]]) -> torch.Tensor:
        """Largest drop of every neuron at `EXACT_SIZES`; each layer is a stage."""
        requests, plain = self._easiest(EXACT_PROMPTS)
        widths = list(self.chat_model.neurons.widths)
        values = [self.contrast.clamp_values(size).split(widths) for size in EXACT_SIZES]
        drops: list[float] = []
        for layer, layer_values in enumerate(zip(*values, strict=True)):
            measured = partial(
                layer_drops, self.chat_model, layer, layer_values, requests, plain, self.phrases, self.batch_size, name,
                measure,
            )  # fmt: skip
            drops += self.stage(f"{name}-{layer:03d}", measured)
        return torch.tensor(drops)

    def _read_backward(self, requests: Sequence[str], *rules_and_label) -> Backward:
        return read_backward(self.chat_model, requests, self.phrases, self._backward_batch, *rules_and_label)

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
    "attribution_to_stream": lambda passes: torch.maximum(
        *(passes.slopes.drop(sign * STRENGTH * passes.contrast.full) for sign in (-1, 1))
    ),
    "relp": lambda passes: passes.worst(passes.relevance_slopes.drop),
    "graddrop": lambda passes: passes.worst(
        lambda values: mean_drop(passes.dropped_slopes, passes.chat_model.neurons.widths, values)
    ),
    "integrated": lambda passes: passes.worst(passes.integrated_slopes.drop),
    "greedy": lambda passes: passes.greedy_drops,
    "tail": lambda passes: passes.tail_drops,
    "exact": lambda passes: passes.exact_drops,
}
"""Every neuron's score: float32 (all neurons,), layer after layer, on the CPU."""
