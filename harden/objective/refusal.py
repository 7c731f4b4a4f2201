"""Terms on refusal: say it where it is due, surely, and no more often where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harden import processes
from harden.adapters import starting_model
from harden.batches import in_batches
from harden.generate import answer_cross_entropy, progress_bar
from harden.interventions import Intervention, intervene
from harden.models import ChatModel
from harden.objective.rows import Row, columns
from harden.prefill import batch_prompts
from harden.refusal import RefusalPhrases, refusal_log_odds


def refusal_loss(chat_model: ChatModel, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy of each row's answer (a refusal) under its interventions: (batch,), nats per token."""
    losses, mask = answer_cross_entropy(chat_model, *columns(rows))
    return losses.sum(1) / mask.sum(1)


def shortfall(
    chat_model: ChatModel, rows: Sequence[Row], phrases: RefusalPhrases, target: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much the refusal log-odds of each row's prompt, under its interventions, fall short of `target`, and 0
    where they do not: (batch,). And the log-odds, without a gradient.

    Cross-entropy lifts sure refusals further and spends itself on which words they take; this lifts the unsure ones.
    """
    prompts, _, interventions = columns(rows)
    target = torch.full([len(rows)], target, device=chat_model.device)
    return _hinge(chat_model, prompts, interventions, phrases, target, -1.0)


@torch.no_grad()
def start_log_odds(
    chat_model: ChatModel, prompts: Sequence[Sequence[int]], phrases: RefusalPhrases, batch_size: int
) -> list[float]:
    """The starting model's refusal log-odds of each prompt. Work is divided between processes."""

    def work(mine: list[Sequence[int]]) -> list[float]:
        with progress_bar(len(mine), "look-alikes at the start") as bar:

            def read(batch: Sequence[Sequence[int]]) -> list[float]:
                log_odds = _log_odds(chat_model, batch, [()] * len(batch), phrases).tolist()
                bar.update(len(batch))
                return log_odds

            return in_batches(chat_model, mine, batch_size, read)

    with starting_model(chat_model.model):
        return processes.divide(list(prompts), work)


def refusal_rise(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    start: torch.Tensor,
    phrases: RefusalPhrases,
    below: float = 0.0,
) -> torch.Tensor:
    """How far each prompt's refusal log-odds stand above the starting model's less `below` nats, and 0 where they do
    not: (batch,).

    start: of `start_log_odds`, (batch,). On look-alike twins it is what over-refusal comes from. KL hardly sees it: a
    twin whose refusal goes from 45 to 55% costs two hundredths of a nat.
    """
    return _hinge(chat_model, prompts, [()] * len(prompts), phrases, start - below, 1.0)[0]


def _hinge(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[tuple[Intervention, ...]],
    phrases: RefusalPhrases,
    limits: torch.Tensor,
    sign: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(0, sign (log-odds - limit)) of each prompt, and its log-odds without a gradient: (batch,) each.

    As training goes on most prompts are on the right side and have no gradient: all are read by a forward pass alone,
    about a third of the cost, and those on the wrong side once more with a gradient, whose value counts.
    """

    def read(chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        log_odds = _log_odds(chat_model, [prompts[n] for n in chosen], [interventions[n] for n in chosen], phrases)
        return (sign * (log_odds - limits[chosen])).relu(), log_odds.detach()

    everything = list(range(len(prompts)))
    if processes.sharded():  # every process must run the same passes
        return read(everything)
    with torch.no_grad():
        loss, log_odds = read(everything)
    wrong = loss.nonzero().flatten().tolist()
    if wrong:
        loss = loss.index_put((torch.tensor(wrong, device=loss.device),), read(wrong)[0])
    return loss, log_odds


def _log_odds(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[tuple[Intervention, ...]],
    phrases: RefusalPhrases,
) -> torch.Tensor:
    batch = batch_prompts(chat_model, prompts, interventions)
    with intervene(chat_model.neurons, interventions):
        return refusal_log_odds(chat_model.model, batch, phrases)
