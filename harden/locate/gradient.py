"""Contrastive gradient x activation gap: the locator of the paper, and the default.

(Kazemi, Chegini and Safi, arXiv 2605.08513, Eq. 3 and 4.) For neuron i and post-instruction template token t, with loss
L = -(refusal log-odds) and means over prompts:

    score_t(i) = (dL/dh[harmful] + dL/dh[harmless]) * (h[harmless] - h[harmful])     score(i) = max over t

the first-order rise of the loss if the neuron went from its harmful to its harmless activation. Cost: one forward
and one backward pass per prompt. Departures from the paper: (1) the layers searched are a setting (the paper takes
the first two thirds; on SmolLM2 the worst neuron lies at 80% of the depth); (2) neurons that fire less on harmful
prompts than on harmless ones are kept, since clamping them is just as possible; (3) the harmless prompts are
look-alikes of the harmful ones, so that the gap is about harm and not about topic or form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harden.locate.backward import Backward, read_backward
from harden.locate.base import Candidate
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.refusal import RefusalPhrases


@dataclass(frozen=True)
class NeuronScores:
    """Per layer, float32 tensors of shape (d_mlp,) on the CPU."""

    score: tuple[torch.Tensor, ...]
    harmful: tuple[torch.Tensor, ...]
    harmless: tuple[torch.Tensor, ...]
    attribution: tuple[torch.Tensor, ...]
    """Gradient x activation of the refusal log-odds on harmful prompts, summed over the template tokens."""
    harmful_log_odds: tuple[float, ...]
    """Refusal log-odds of each prompt."""
    harmless_log_odds: tuple[float, ...]

    def top(self, n: int, layer_share: float = 1.0) -> list[Candidate]:
        """The n best-scored neurons of the first `layer_share` of the layers, best first."""
        layers = max(1, round(layer_share * len(self.score)))
        flat = torch.cat(self.score[:layers])
        starts = torch.tensor([0, *[len(s) for s in self.score[:layers]]]).cumsum(0)
        best = flat.topk(min(n, len(flat)))
        layer_of = torch.searchsorted(starts, best.indices, right=True) - 1
        return [
            self.candidate(Neuron(layer, index - int(starts[layer])))
            for index, layer in zip(best.indices.tolist(), layer_of.tolist(), strict=True)
        ]

    def candidate(self, neuron: Neuron) -> Candidate:
        score, harmful, harmless = (
            float(kind[neuron.layer][neuron.index]) for kind in (self.score, self.harmful, self.harmless)
        )
        return Candidate(neuron, score, harmful, harmless)

    def effective_neurons(self) -> float:
        """Participation ratio (sum |a|)^2 / sum a^2 of the attributions: 1 if one neuron carries all, 0 if none any."""
        a = torch.cat(self.attribution).abs().double()
        return float(a.sum() ** 2 / (a**2).sum()) if a.any() else 0.0


def score_neurons(
    chat_model: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    phrases: RefusalPhrases,
    batch_size: int,
    label: str = "locate",
) -> NeuronScores:
    """Score every neuron on two sets of requests. Work is divided between processes.

    Raises MeasurementError if a gradient or an activation is not finite.
    """
    return contrast_scores(
        *(read_backward(chat_model, texts, phrases, batch_size, label=label) for texts in (harmful, harmless))
    )


def contrast_scores(harmful: Backward, harmless: Backward) -> NeuronScores:
    """Score every neuron by what was read of two sets of requests."""
    score, harmful_act, harmless_act, attribution = [], [], [], []
    for layer, (act_bad, act_good) in enumerate(zip(harmful.activation, harmless.activation, strict=True)):
        slope = harmful.gradient[layer] + harmless.gradient[layer]
        best, token = (-slope * (act_good - act_bad)).max(0)  # over (tail, d_mlp)
        score.append(best)
        harmful_act.append(act_bad.gather(0, token[None])[0])
        harmless_act.append(act_good.gather(0, token[None])[0])
        attribution.append(harmful.product[layer].sum(0))
    return NeuronScores(
        tuple(score),
        tuple(harmful_act),
        tuple(harmless_act),
        tuple(attribution),
        tuple(harmful.log_odds),
        tuple(harmless.log_odds),
    )
