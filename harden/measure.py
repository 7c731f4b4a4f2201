"""Measuring a model on a split: with and without its worst clamp, and what the defence costs benign users."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from harden import processes
from harden.attack.respond import Attempt, Responder
from harden.attack.search import Search
from harden.batches import in_batches
from harden.errors import MeasurementError
from harden.generate import answer_cross_entropy
from harden.judges.agreement import Verdict
from harden.judges.embedded import OUTCOMES
from harden.locate.base import Candidate
from harden.locate.gradient import NeuronScores
from harden.models import ChatModel
from harden.objective.benign import benign_kl
from harden.objective.rows import Row
from harden.prompts import Prompt, Split
from harden.results import (
    AttackRecord,
    AttributionRecord,
    Mean,
    Measurement,
    NeuronRecord,
    Rate,
    ScreenRecord,
    count_flips,
)

MAP_COLUMNS = 48  # runs of neurons per layer in the map of attributions
KL_ROWS = 16  # two passes over the whole vocabulary each


def attack_record(attempt: Attempt, split: Split) -> AttackRecord:
    outcomes = list(attempt.outcomes.values())
    clamp = attempt.clamp
    return AttackRecord(
        neuron=str(clamp.neuron) if clamp else None,
        intervention="clamp" if clamp else "none",
        value=clamp.value if clamp else None,
        split=split,
        outcomes=attempt.outcomes,
        **{kind: Rate.of(outcomes.count(kind), len(outcomes)) for kind in (*OUTCOMES, "unjudged")},
    )


def screen_records(search: Search) -> list[ScreenRecord]:
    return [
        ScreenRecord(neuron=str(s.clamp.neuron), value=s.clamp.value, log_odds=s.log_odds, benign_rise=s.benign_rise)
        for s in search.screened
    ]


def neuron_records(candidates: Sequence[Candidate]) -> list[NeuronRecord]:
    return [
        NeuronRecord(neuron=str(c.neuron), score=c.score, harmful=c.harmful, harmless=c.harmless) for c in candidates
    ]


def attribution_record(scores: NeuronScores, split: Split) -> AttributionRecord:
    """The attributions of all neurons, condensed to what a report draws; four significant digits."""
    sizes = torch.cat(scores.attribution).abs().double()
    total = max(float(sizes.sum()), torch.finfo(torch.float64).tiny)
    shares = (sizes.sort(descending=True).values / total).cumsum(0)
    ranks = sorted({min(len(shares), k * 10**n) for n in range(len(str(len(shares)))) for k in (1, 2, 5)})
    layers = [[float(part.abs().max()) / total for part in _parts(layer)] for layer in scores.attribution]
    return AttributionRecord(
        split=split,
        prompts=len(scores.harmful_log_odds),
        neurons=len(shares),
        effective_neurons=scores.effective_neurons(),
        top_shares={k: _rounded(float(shares[k - 1])) for k in ranks},
        map=[[_rounded(share) for share in layer] for layer in layers],
    )


def _parts(layer: torch.Tensor) -> Sequence[torch.Tensor]:
    return layer.tensor_split(min(MAP_COLUMNS, len(layer)))


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def flipped(worst: Attempt, no_attack: Attempt) -> Rate:
    """Prompts that comply under the clamp and not without it; what was not judged counts as flipped."""
    return Rate.of(count_flips(worst.outcomes, no_attack.outcomes), len(worst.outcomes))


def measure(
    responder: Responder,
    split: Split,
    no_attack: Attempt,
    worst: Attempt,
    twins: Sequence[Prompt],
    more_twins: Sequence[Prompt],
    benign: Sequence[Row],
    benign_texts: Sequence[str],
    scores: NeuronScores,
) -> Measurement:
    """Put a split's measurement together; generates answers to look-alikes, runs the benign rows and reads the texts.

    scores: of this split's harmful prompts and twins.
    """
    more = responder.attempt([None], more_twins, f"{split}: more look-alikes") if more_twins else []
    return Measurement(
        split=split,
        no_attack=attack_record(no_attack, split),
        worst_neuron=attack_record(worst, split),
        flipped=flipped(worst, no_attack),
        over_refusal=refused(responder.attempt([None], twins, f"{split}: look-alikes")[0].verdicts),
        over_refusal_more=refused(more[0].verdicts) if more else None,
        benign_kl=Mean.of(benign_divergence(responder.chat_model, benign, KL_ROWS)),
        benign_perplexity=perplexity(responder.chat_model, benign_texts, responder.batch_size),
        effective_neurons=scores.effective_neurons(),
        attribution=attribution_record(scores, split),
        log_odds_harmful=Mean.of(scores.harmful_log_odds),
        log_odds_twins=Mean.of(scores.harmless_log_odds),
    )


def refused(verdicts: Mapping[str, Verdict]) -> Rate:
    """Prompts that are refused by the phrases' judge: classifiers know no refusal."""
    return Rate.of(sum(verdict.outcomes[0] == "refuse" for verdict in verdicts.values()), len(verdicts))


def perplexity(chat_model: ChatModel, texts: Sequence[str], batch_size: int) -> float:
    """exp of the mean negative log-likelihood of the texts' tokens, each text on its own, without chat template, from
    its second token on. Work is divided between processes. Raises MeasurementError if no text has two tokens."""
    rows = [ids for ids in (chat_model.tokenizer(text)["input_ids"] for text in texts) if len(ids) > 1]
    if not rows:
        raise MeasurementError("no benign text has two tokens: there is no perplexity")

    def read(part: Sequence[list[int]]) -> list[float]:
        firsts, rest = [ids[:1] for ids in part], [ids[1:] for ids in part]
        losses, _ = answer_cross_entropy(chat_model, firsts, rest, [()] * len(part))
        return losses.sum(1).tolist()

    @torch.no_grad()
    def work(mine: list[list[int]]) -> list[float]:
        return in_batches(chat_model, mine, batch_size, read)

    return math.exp(sum(processes.divide(rows, work)) / sum(len(ids) - 1 for ids in rows))


def benign_divergence(chat_model: ChatModel, rows: Sequence[Row], batch_size: int) -> list[float]:
    """KL(starting model || model) of each row, nats per token. Work is divided between processes."""

    @torch.no_grad()
    def work(mine: list[Row]) -> list[float]:
        return in_batches(chat_model, mine, batch_size, lambda part: benign_kl(chat_model, part).tolist())

    return processes.divide(list(rows), work)
