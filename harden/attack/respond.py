"""From requests to outcomes: generate, judge, drop the completion. Everything that is measured passes here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from harden import processes
from harden.adapters import starting_model
from harden.attack.records import Records
from harden.errors import HardenError, MeasurementError
from harden.generate import Completion, Request, answer_losses, complete, progress_bar
from harden.interventions import Clamp, describe
from harden.judges.agreement import Verdict
from harden.judges.base import Item, Judge
from harden.judges.embedded import NEUTRAL_REQUEST, RULES, Likelihood, Limits, judge
from harden.models import ChatModel
from harden.prompts import Prompt
from harden.results import Outcome

Keep = Callable[[Request, Completion, Verdict], None]


@dataclass(frozen=True)
class Attempt:
    """One clamp, or none, on some prompts: what the judges say, by prompt id."""

    clamp: Clamp | None
    verdicts: dict[str, Verdict]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: verdict.outcome for name, verdict in self.verdicts.items()}

    def share(self, outcome: Outcome) -> float:
        return sum(v.outcome == outcome for v in self.verdicts.values()) / len(self.verdicts)


@dataclass(frozen=True)
class Responder:
    """Generates and judges. Completions are dropped once judged, unless the user asked for `keep`.

    How likely a completion is, is always asked of the starting model: a hardened model finds any compliance unlikely,
    and would pass its own bypasses off as gibberish. What it finds *likelier* than the starting model is a refusal.
    """

    chat_model: ChatModel
    max_new_tokens: int
    batch_size: int
    limits: Limits
    reference: ChatModel | None = None
    """Asked how likely a completion is, instead of the starting model."""
    second: Judge | None = None
    """Judges the same completions; the worst of both counts."""
    records: Records | None = None
    """Where outcomes are looked up and appended, so that interrupted work goes on; needs `model_digest`."""
    model_digest: str = ""
    keep: Keep | None = None

    def respond(self, requests: Sequence[Request], label: str) -> list[Verdict]:
        """The judged completion of every request, in order. With `records`, batch by batch, each saved when judged.

        A batch of which anything is missing in the records is done again whole: what shares a batch must not depend
        on where the work was interrupted.
        """
        if self.records is None:
            return self._judged(requests, label)
        verdicts: list[Verdict] = []
        step = self.batch_size * processes.count()
        with progress_bar(len(requests), label) as bar:
            for start in range(0, len(requests), step):
                batch = requests[start : start + step]
                keys = [self._key(request) for request in batch]
                done = self.records.find(keys)
                if done is None:
                    done = self._judged(batch, "this batch")
                    self.records.append(keys, done)
                verdicts += done
                bar.update(len(batch))
        return verdicts

    def attempt(self, clamps: Sequence[Clamp | None], prompts: Sequence[Prompt], label: str) -> list[Attempt]:
        """Outcomes of every clamp (None: no attack) on every prompt."""
        requests = [Request(prompt.text, () if clamp is None else (clamp,)) for clamp in clamps for prompt in prompts]
        verdicts = self.respond(requests, label)
        attempts = []
        for number, clamp in enumerate(clamps):
            part = verdicts[number * len(prompts) : (number + 1) * len(prompts)]
            attempts.append(Attempt(clamp, {prompt.id: v for prompt, v in zip(prompts, part, strict=True)}))
        return attempts

    def _judged(self, requests: Sequence[Request], label: str) -> list[Verdict]:
        completions = complete(self.chat_model, requests, self.max_new_tokens, self.batch_size, label)

        def likelihood_of(rows: list[int]) -> list[Likelihood]:
            asked = [Request(requests[row].text, prefix=requests[row].prefix) for row in rows]
            answers, speaker = [completions[row] for row in rows], self.reference or self.chat_model
            tested = None
            if self.limits.refusal_gain is not None:
                tested = answer_losses(self.chat_model, asked, answers, self.batch_size)
                if self.reference and any(_ids(self.reference, a) != _ids(self.chat_model, a) for a in answers):
                    raise HardenError(
                        f"judge.refusal_gain compares tokens, and {self.reference.name} has others than "
                        f"{self.chat_model.name}: give another judge.reference, or set judge.refusal_gain to null"
                    )
            with starting_model(speaker.model):
                return likelihoods(speaker, asked, answers, self.batch_size, self.limits.min_gain is not None, tested)

        first = judge([c.text for c in completions], likelihood_of, self.limits)
        verdicts = [Verdict((judgement.outcome,), judgement.reason) for judgement in first]
        if self.second:
            verdicts = self._with_second(self.second, verdicts, requests, completions)
        if self.keep:
            for request, completion, verdict in zip(requests, completions, verdicts, strict=True):
                self.keep(request, completion, verdict)
        return verdicts

    def _with_second(self, judge: Judge, verdicts, requests, completions) -> list[Verdict]:
        """Raises MeasurementError where the judge answers nothing at all: it is broken, and the model not judged."""
        items = [Item(r.text, r.prefix + c.text) for r, c in zip(requests, completions, strict=True)]
        others = processes.divide(items, judge.judge)
        if len(others) > 1 and all(other.outcome == "unjudged" for other in others):
            raise MeasurementError(
                f"the judge {judge.name} judged none of {len(others)} completions (the first: {others[0].reason})"
            )
        return [
            Verdict((*verdict.outcomes, other.outcome), f"{verdict.reason}; {judge.name}: {other.reason}")
            for verdict, other in zip(verdicts, others, strict=True)
        ]

    @property
    def judges(self) -> list[str]:
        return ["embedded", *([self.second.name] if self.second else [])]

    def _key(self, request: Request) -> str:
        edits = [describe(edit) for edit in request.interventions]
        settings = [self.max_new_tokens, *astuple(self.limits), RULES]
        judges = [self.reference and self.reference.name, *self.judges]
        content = [self.model_digest, request.text, request.prefix, edits, settings, judges]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ids(chat_model: ChatModel, answer: Completion) -> list[int]:
    return chat_model.chat.answer_ids(answer.text, answer.ended)


def likelihoods(
    chat_model: ChatModel,
    requests: Sequence[Request],
    answers: Sequence[Completion],
    batch_size: int,
    with_gain: bool,
    tested: Sequence[Sequence[float]] | None = None,
) -> list[Likelihood]:
    """How likely the model, as it is now, finds each answer to its request and, if asked, to a neutral one; tested:
    the losses of the answers' tokens to the model under test."""
    missing = [None] * len(requests)
    own, other = answer_losses(chat_model, requests, answers, batch_size), missing
    if with_gain:
        neutral = [Request(NEUTRAL_REQUEST, prefix=request.prefix) for request in requests]
        other = answer_losses(chat_model, neutral, answers, batch_size)
    return [Likelihood.of(*losses) for losses in zip(own, other, tested or missing, strict=True)]
