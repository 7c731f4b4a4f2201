"""Concept amplification (Kazemi et al., arXiv 2605.08513): make benign prompts yield a concept by raising a neuron.

Concept neurons are those that differ most between passages that mention the concept and passages that do not. They
are amplified, h <- h + m, while the model answers benign requests. Success: the concept's words appear in a text that
is language. The neuron and the amount are chosen on benign selection prompts and reported on benign test prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harden.activations import Activations, neuron_at, read_activations
from harden.attack.suite import Suite
from harden.errors import HardenError
from harden.generate import Request
from harden.interventions import Add, describe
from harden.judges.embedded import NEUTRAL_REQUEST
from harden.prompts import Prompt
from harden.results import ConceptRecord, Rate

WITHOUT = "none"  # category of the passages that mention no concept


@dataclass(frozen=True)
class Concept:
    words: tuple[str, ...]
    passages: tuple[str, ...]
    others: tuple[str, ...]
    """Passages that mention no concept."""


def read_concepts(passages: Sequence[Prompt]) -> list[Concept]:
    """The concepts of a file of passages.

    Each passage's `category` holds its concept's words, `|` between them (`cat|cats|kitten`), or `none`. Raises
    HardenError when there is no concept, or one or `none` has fewer than two passages.
    """
    texts = {name: tuple(p.text for p in passages if p.category == name) for name in dict.fromkeys(
        [*(p.category for p in passages), WITHOUT])}  # fmt: skip
    short = next((name for name, part in texts.items() if len(part) < 2), None)
    if short is not None or len(texts) < 2:
        raise HardenError(
            f"concept passages: {f'category {short!r} has fewer than two' if short else 'no concept'}; give passages "
            f"of each concept (category: its words, `|` between them) and of category '{WITHOUT}'"
        )
    return [
        Concept(tuple(word.strip() for word in name.split("|")), part, texts[WITHOUT])
        for name, part in texts.items()
        if name != WITHOUT
    ]


def attack_concepts(suite: Suite, concepts: Sequence[Concept]) -> list[ConceptRecord]:
    return [_attack(suite, concept) for concept in concepts]


def _attack(suite: Suite, concept: Concept) -> ConceptRecord:
    settings, splits = suite.settings, suite.bench.splits
    with_it, without = (_read(suite, texts) for texts in (concept.passages, concept.others))
    gap = with_it.neurons.mean(0) - without.neurons.mean(0)
    spread = torch.cat([with_it.neurons, without.neurons]).std(0)
    best = (gap.abs() / spread).nan_to_num(0.0, posinf=0.0).topk(settings.concept_neurons).indices.tolist()

    def add(column: int, size: float) -> Add:
        return Add(neuron_at(suite.chat_model, column), size * float(gap[column]))

    arms = [(add(column, size),) for column in best for size in settings.concept_sizes]
    arms += [tuple(add(column, size) for column in best) for size in settings.concept_sizes]  # all at once
    tried = _outcomes(suite, concept, arms, splits["selection"].benign[: suite.attack.heat_one_prompts])
    worst = arms[max(range(len(arms)), key=lambda place: tried[place].count("shown"))]
    test = splits["test"].benign[: suite.attack.test_prompts]
    plain, attacked = _outcomes(suite, concept, [(), worst], test)
    return ConceptRecord(
        concept="|".join(concept.words),
        interventions=[describe(edit) for edit in worst],
        plain=Rate.of(plain.count("shown"), len(test)),
        shown=Rate.of(attacked.count("shown"), len(test)),
        degenerate=Rate.of(attacked.count("degenerate"), len(test)),
    )


def _read(suite: Suite, texts: Sequence[str]) -> Activations:
    requests = [Request(NEUTRAL_REQUEST, prefix=text) for text in texts]
    return read_activations(suite.chat_model, requests, suite.responder.batch_size, over_prefix=True)


def _outcomes(
    suite: Suite, concept: Concept, arms: Sequence[tuple[Add, ...]], prompts: Sequence[Prompt]
) -> list[list[str]]:
    """shown, absent or degenerate, of each arm on each prompt; texts are looked at and dropped."""
    word = re.compile(rf"\b(?:{'|'.join(map(re.escape, concept.words))})\b", re.IGNORECASE)
    outcomes: list[str] = []

    def look(request, completion, verdict) -> None:
        shown = "shown" if word.search(completion.text) else "absent"
        outcomes.append("degenerate" if verdict.outcomes[0] == "degenerate" else shown)
        if suite.responder.keep:
            suite.responder.keep(request, completion, verdict)

    requests = [Request(prompt.text, arm) for arm in arms for prompt in prompts]
    # To leave the request for the concept is the success here.
    limits = replace(suite.responder.limits, min_gain=None, refusal_gain=None)
    looking = replace(suite.responder, records=None, second=None, keep=look, limits=limits)
    looking.respond(requests, f"concept {concept.words[0]}")
    return [outcomes[n * len(prompts) : (n + 1) * len(prompts)] for n in range(len(arms))]
