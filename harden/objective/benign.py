"""The term on everything that must stay as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harden.adapters import starting_model
from harden.generate import answer_log_probs
from harden.models import ChatModel
from harden.objective.rows import Row, columns


def benign_kl(chat_model: ChatModel, rows: Sequence[Row]) -> torch.Tensor:
    """KL(starting model || model) over the whole vocabulary at each row's answer: (batch,), nats per token.

    Both models run under the row's interventions.
    """
    with torch.no_grad(), starting_model(chat_model.model):
        reference, _ = answer_log_probs(chat_model, *columns(rows))
    log_probs, mask = answer_log_probs(chat_model, *columns(rows))
    return answer_kl(reference, log_probs, mask)


def answer_kl(reference: torch.Tensor, found: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(reference || found), mean over each row's answer: (batch,), nats per token.

    Both are log-probabilities, (batch, longest answer, vocabulary); mask: (batch, longest answer), 1 at answer tokens.
    """
    divergence = (reference.exp() * (reference - found)).sum(-1)  # (batch, longest answer)
    return (divergence * mask).sum(1) / mask.sum(1)
