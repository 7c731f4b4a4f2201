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

from harden import processes
from harden.batches import BACKWARD_ROWS, in_batches
from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.generate import progress_bar
from harden.locate.base import Candidate
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.refusal import RefusalPhrases, refusal_log_odds


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
        """Participation ratio (sum |a|)^2 / sum a^2 of the attributions: 1 if one neuron carries all of it."""
        a = torch.cat(self.attribution).abs().double()
        return float(a.sum() ** 2 / (a**2).sum())


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
    with progress_bar(len(harmful) + len(harmless), label) as bar:
        act_bad, grad_bad, product, odds_bad = _means(chat_model, harmful, phrases, batch_size, bar)
        act_good, grad_good, _, odds_good = _means(chat_model, harmless, phrases, batch_size, bar)
    score, harmful_act, harmless_act, attribution = [], [], [], []
    for layer in range(len(act_bad)):
        rise = (grad_bad[layer] + grad_good[layer]) * (act_good[layer] - act_bad[layer])  # (tail, d_mlp)
        if not torch.isfinite(rise).all():
            raise MeasurementError(f"layer {layer}: gradients or activations are not finite; is the model sound?")
        best, token = rise.max(0)
        score.append(best)
        harmful_act.append(act_bad[layer].gather(0, token[None])[0])
        harmless_act.append(act_good[layer].gather(0, token[None])[0])
        attribution.append(product[layer].sum(0))
    return NeuronScores(
        tuple(score), tuple(harmful_act), tuple(harmless_act), tuple(attribution), tuple(odds_bad), tuple(odds_good)
    )


def _means(chat_model, requests, phrases, batch_size, bar):
    """Means of activation, gradient of -(log-odds) and attribution, each a list of (tail, d_mlp); the log-odds."""
    tail = chat_model.chat.template_tail
    share = processes.my_share(requests)
    activation = [torch.zeros(tail, width, device=chat_model.device) for width in chat_model.neurons.widths]
    gradient = [torch.zeros_like(a) for a in activation]
    product = [torch.zeros_like(a) for a in activation]

    def add(rows) -> list[float]:
        weight = torch.tensor([weight for _, weight in rows], device=chat_model.device)
        prompts = pad_left(
            [chat_model.chat.prompt_ids(text) for text, _ in rows], chat_model.chat.pad_id, chat_model.device
        )
        with graph_from_embeddings(chat_model.model), chat_model.neurons.read() as h:
            log_odds = refusal_log_odds(chat_model.model, prompts, phrases)
        layers = [h[layer] for layer in range(len(activation))]
        gradients = torch.autograd.grad((-log_odds * weight).sum(), layers)
        tails = [(a[:, -tail:].detach().float(), g[:, -tail:].float()) for a, g in zip(layers, gradients, strict=True)]
        sums = [(torch.einsum("btn,b->tn", act, weight), grad.sum(0), (act * grad).sum(0)) for act, grad in tails]
        for layer, (act, grad, both) in enumerate(sums):  # all of the batch or, where memory ran out, none of it
            activation[layer] += act
            gradient[layer] += grad
            product[layer] -= both
        bar.update(len(rows))
        return log_odds.tolist()

    odds = in_batches(chat_model, share, batch_size, add, BACKWARD_ROWS)
    means = [[(processes.total(t) / len(requests)).cpu() for t in kind] for kind in (activation, gradient, product)]
    return *means, processes.gather(odds, len(requests))


class graph_from_embeddings:
    """Make the embeddings' output the root of the autograd graph, so that a frozen model has gradients inside."""

    def __init__(self, model):
        self.embeddings = model.get_input_embeddings()

    def __enter__(self):
        self.handle = self.embeddings.register_forward_hook(
            lambda _module, _args, output: output if output.requires_grad else output.requires_grad_()
        )

    def __exit__(self, *_):
        self.handle.remove()
