"""Loss terms. Each is a small function of a model and some rows; the training loop weighs and adds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harden.adapters import starting_model
from harden.chat import pad_left
from harden.generate import answer_cross_entropy, answer_log_probs
from harden.interventions import Intervention
from harden.locate.backward import graph_from_embeddings
from harden.models import ChatModel
from harden.prefill import batch_prompts
from harden.refusal import RefusalPhrases, refusal_log_odds


@dataclass(frozen=True)
class Row:
    """One training row: prompt and answer tokens, trained under these interventions."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    interventions: tuple[Intervention, ...] = ()


def refusal_loss(chat_model: ChatModel, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy of each row's answer (a refusal) under its interventions: (batch,), nats per token."""
    losses, mask = answer_cross_entropy(chat_model, *_columns(rows))
    return losses.sum(1) / mask.sum(1)


def benign_kl(chat_model: ChatModel, rows: Sequence[Row]) -> torch.Tensor:
    """KL(starting model || model) over the whole vocabulary at each row's answer: (batch,), nats per token.

    Both models run under the row's interventions.
    """
    with torch.no_grad(), starting_model(chat_model.model):
        reference, _ = answer_log_probs(chat_model, *_columns(rows))
    log_probs, mask = answer_log_probs(chat_model, *_columns(rows))
    divergence = (reference.exp() * (reference - log_probs)).sum(-1)  # (batch, longest answer)
    return (divergence * mask).sum(1) / mask.sum(1)


def refusal_rise(chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases) -> torch.Tensor:
    """How far each prompt's refusal log-odds stand above the starting model's, and 0 where they do not: (batch,).

    On look-alike twins it is what over-refusal comes from. KL hardly sees it: a twin whose refusal goes from 45 to 55%
    costs two hundredths of a nat.
    """
    none = [()] * len(prompts)

    def log_odds() -> torch.Tensor:
        return refusal_log_odds(chat_model.model, batch_prompts(chat_model, prompts, none), phrases)

    with torch.no_grad(), starting_model(chat_model.model):
        start = log_odds()
    return (log_odds() - start).relu()


def _columns(rows: Sequence[Row]) -> tuple[list, list, list]:
    return [row.prompt for row in rows], [row.answer for row in rows], [row.interventions for row in rows]


def spread_loss(chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases) -> torch.Tensor:
    """-log of the effective number of neurons that each prompt's refusal rests on: (batch,), with a gradient.

    Attribution a(i) = sum over template tokens of h(i) * d(refusal log-odds)/dh(i); the effective number is the
    participation ratio (sum |a|)^2 / sum a^2 over all MLP neurons. (`NeuronScores` reports that of the prompts' mean
    attribution; per prompt, the loss does not depend on how rows are divided between processes.) It is differentiated
    twice, so attention runs on the plain-math kernel, the only one with a second derivative.
    """
    tail = chat_model.chat.template_tail
    batch = pad_left(prompts, chat_model.chat.pad_id, chat_model.device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        graph_from_embeddings(chat_model.model),
        chat_model.neurons.read() as h,
    ):
        log_odds = refusal_log_odds(chat_model.model, batch, phrases)
        layers = [h[layer] for layer in range(len(chat_model.neurons.widths))]
        gradients = torch.autograd.grad(log_odds.sum(), layers, create_graph=True)
    attribution = torch.cat(
        [(act[:, -tail:] * grad[:, -tail:]).float().sum(1) for act, grad in zip(layers, gradients, strict=True)], -1
    )  # (batch, all neurons)
    return (attribution**2).sum(-1).log() - 2 * attribution.abs().sum(-1).log()
