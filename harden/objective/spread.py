"""Terms that spread refusal over many neurons: concentration of its attribution, and the leverage of single neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harden.chat import pad_left
from harden.locate.backward import graph_from_embeddings
from harden.models import ChatModel
from harden.refusal import RefusalPhrases, refusal_log_odds

TINY = 1e-30  # below it a neuron counts for nothing, and has no gradient
SHARP = 8.0  # order of the soft maximum


def spread_loss(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    phrases: RefusalPhrases,
    order: float = 2.0,
    attributions: str = "gradient",
) -> torch.Tensor:
    """-log of the effective number of neurons that each prompt's refusal rests on: (batch,), with a gradient.

    The effective number of order q is exp(H_q), with Renyi's entropy H_q of the shares p = |a| / sum |a| of the
    attributions over all MLP neurons (a Hill number). q = 1 is the entropy, q = 2 the participation ratio
    (sum |a|)^2 / sum a^2, a large q sees the largest share alone. (`NeuronScores` reports the participation ratio of
    the prompts' mean attribution; per prompt, the loss does not depend on how rows are divided between processes.)

    attributions: `gradient` or `direct`, see ATTRIBUTIONS.
    """
    _, a = ATTRIBUTIONS[attributions](chat_model, prompts, phrases)
    return concentration(a, order)


def concentration(attribution: torch.Tensor, order: float) -> torch.Tensor:
    """-H_order of the shares of |attribution| over the last dimension: 0 if one holds all, -log n if n are equal.

    Not a number where all are 0: refusal then rests on nothing.
    """
    size = attribution.abs()
    log_share = size.clamp_min(TINY).log().log_softmax(-1) + 0 * size.sum(-1, keepdim=True).log()
    if order == 1:
        return (log_share.exp() * log_share).sum(-1)
    return (order * log_share).logsumexp(-1) / (order - 1)


def leverage_loss(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    phrases: RefusalPhrases,
    values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """log of the worst leverage of a single neuron on each prompt's refusal: (batch,), with a gradient.

    Leverage is the drop of the refusal log-odds that the gradient predicts if the neuron goes to a clamp value at every
    prompt token, divided by the log-odds (their softplus, to stay positive); above 1 the clamp is predicted to break
    the refusal. The worst over all neurons and values, coherent or not, is softened to a norm of order 8. values: one
    of each neuron per vector, (neurons,). Differentiated twice.
    """
    log_odds, h, gradient = _differentiated(chat_model, prompts, phrases)
    slope = torch.cat([grad.float().sum(1) for grad in gradient], -1)  # (batch, neurons)
    natural = torch.cat([(act * grad).float().sum(1) for act, grad in zip(h, gradient, strict=True)], -1)
    drops = torch.cat([natural - value.to(slope) * slope for value in values], -1)
    worst = drops.clamp_min(TINY).log()
    return (SHARP * worst).logsumexp(-1) / SHARP - torch.nn.functional.softplus(log_odds).log()


def gradient_attribution(
    chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refusal log-odds (batch,), and sum over template tokens of h * d(log-odds)/dh: (batch, neurons).

    Differentiated twice, so attention runs on the plain-math kernel, the only one with a second derivative.
    """
    tail = chat_model.chat.template_tail
    log_odds, h, gradient = _differentiated(chat_model, prompts, phrases)
    parts = [(act[:, -tail:] * grad[:, -tail:]).float().sum(1) for act, grad in zip(h, gradient, strict=True)]
    return log_odds, torch.cat(parts, -1)


def direct_attribution(
    chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refusal log-odds (batch,), and h * (what the neuron writes at the last prompt token . g): (batch, neurons).

    g is the gradient of the log-odds in the stream behind the last layer, taken as fixed: the direct path through the
    head, without what later layers make of a write. One backward pass, through attention of any kernel. Where a norm
    stands behind the down projection (Gemma 2 and 3, OLMo 2) it is left out.
    """
    stream: list[torch.Tensor] = []
    last = chat_model.neurons.blocks[-1].layer

    def record(_module, _args, output) -> None:
        stream.append(output[0] if isinstance(output, tuple) else output)

    with (
        graph_from_embeddings(chat_model.model),
        chat_model.neurons.read() as h,
        last.register_forward_hook(record),
    ):
        log_odds = refusal_log_odds(chat_model.model, _batch(chat_model, prompts), phrases)
    g = torch.autograd.grad(log_odds.sum(), stream[0], retain_graph=True)[0][:, -1].detach()
    parts = []
    for layer, down in enumerate(chat_model.neurons.down_projections):
        at = h[layer][:, -1].detach().requires_grad_()
        (weight,) = torch.autograd.grad(down(at), at, g, create_graph=True)
        parts.append((h[layer][:, -1] * weight).float())
    return log_odds, torch.cat(parts, -1)


ATTRIBUTIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "gradient": gradient_attribution,
    "direct": direct_attribution,
}


def _differentiated(
    chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Refusal log-odds; by layer, the neurons at the prompt tokens (batch, seq, d_mlp), and the log-odds' gradients."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        graph_from_embeddings(chat_model.model),
        chat_model.neurons.read() as h,
    ):
        log_odds = refusal_log_odds(chat_model.model, _batch(chat_model, prompts), phrases)
        layers = [h[layer] for layer in range(len(chat_model.neurons.widths))]
        gradients = torch.autograd.grad(log_odds.sum(), layers, create_graph=True)
    return log_odds, layers, list(gradients)


def _batch(chat_model: ChatModel, prompts: Sequence[Sequence[int]]):
    return pad_left(prompts, chat_model.chat.pad_id, chat_model.device)
