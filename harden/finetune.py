"""The one LoRA training loop: a round of steps, resumable at its checkpoints.

A step is drawn from (seed, round, step) alone, so a run that was interrupted repeats its steps exactly.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harden import processes
from harden.adapters import adapter_state, restore_adapter, trained_parameters
from harden.attack.screen import Probe, screen_clamps
from harden.errors import MeasurementError
from harden.generate import progress_bar
from harden.interventions import Clamp
from harden.locate.gradient import score_neurons
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.objective import Row, benign_kl, refusal_loss, refusal_rise, spread_loss
from harden.recipe import TrainSection
from harden.refusal import RefusalPhrases

logger = logging.getLogger(__name__)

FINAL_LEARNING_RATE = 0.1  # of the peak, reached linearly at the last step of a round
RELOCATE_PROMPTS = 8  # harmful and as many benign prompts; locating again must stay cheap beside the steps


@dataclass(frozen=True)
class TrainingData:
    """Token rows to train on, and the texts with which neurons are located and clamps are weighed."""

    harmful: tuple[tuple[int, ...], ...]
    refusals: tuple[tuple[int, ...], ...]
    twins: tuple[tuple[int, ...] | None, ...]
    """The twin of each harmful prompt, if it has one."""
    benign: tuple[Row, ...]
    harmful_texts: tuple[str, ...]
    twin_texts: tuple[str, ...]
    probe: Probe


@dataclass
class ClampPool:
    """Clamps to train under and how likely each is drawn."""

    clamps: list[Clamp] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def draw(self, rng: random.Random) -> tuple[Clamp, ...]:
        return (rng.choices(self.clamps, self.weights)[0],) if self.clamps else ()

    def to_json(self) -> list[list[float]]:
        return [
            [clamp.neuron.layer, clamp.neuron.index, clamp.value, weight]
            for clamp, weight in zip(self.clamps, self.weights, strict=True)
        ]

    @classmethod
    def from_json(cls, rows: list[list[float]]) -> ClampPool:
        return cls([Clamp(Neuron(int(r[0]), int(r[1])), r[2]) for r in rows], [r[3] for r in rows])


def train_round(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    max_benign_rise: float,
    past_breakers: Sequence[Neuron],
    batch_size: int,
    seed: int,
    round_number: int,
    checkpoint: Path,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train the adapter for `settings.steps` steps, in place.

    checkpoint: a file that is written every `settings.checkpoint_every` steps, once the next step's loss has shown
    that the weights are sound, and resumed from if it exists.
    past_breakers: neurons that broke the model in an earlier round; clamps of them are always drawn from.
    Raises MeasurementError naming the step if the loss or a gradient is not finite; the checkpoint stays.
    """
    parameters = trained_parameters(chat_model.model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    pool = ClampPool()
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        restore_adapter(chat_model.model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        pool = ClampPool.from_json(saved["pool"])
        first = saved["step"]

    with progress_bar(settings.steps, f"round {round_number}: train") as bar:
        bar.update(first)
        for step in range(first, settings.steps):
            began = time.monotonic()
            if settings.clamps.share > 0 and step % settings.clamps.relocate_every == 0:
                pool = weigh_clamps(
                    chat_model, data, phrases, settings, max_benign_rise, past_breakers, batch_size,
                    random.Random(f"{seed}:{round_number}:{step}:locate"),
                )  # fmt: skip
            rng = random.Random(f"{seed}:{round_number}:{step}")
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            losses = backward(chat_model, data, phrases, settings, pool, step, rng)
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = processes.total(gradient)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm))
            if not all(map(math.isfinite, [norm, *losses.values()])):
                raise MeasurementError(
                    f"round {round_number}, step {step + 1}: the loss is not finite ({losses}); the last good "
                    f"checkpoint is {checkpoint if checkpoint.exists() else 'the start of the round'}; "
                    "lower train.learning_rate or use model.dtype float32"
                )
            if step > first and step % settings.checkpoint_every == 0:  # its weights have just shown to be sound
                _save_checkpoint(checkpoint, chat_model, optimizer, pool, step)
            optimizer.step()
            optimizer.zero_grad()
            log({
                "event": "step", "round": round_number, "step": step + 1, **losses,
                "gradient_norm": norm, "seconds": round(time.monotonic() - began, 3),
            })  # fmt: skip
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            bar.update(1)


def backward(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    pool: ClampPool,
    step: int,
    rng: random.Random,
) -> dict[str, float]:
    """One step's rows, their loss terms and gradients; returns each term's value, over all processes.

    The twins are those of the step's harmful prompts, so that what is learned tells the two apart.
    """
    losses: dict[str, float] = {}

    def add(name: str, weight: float, rows: Sequence, term: Callable[[list], torch.Tensor]) -> None:
        share = processes.my_share(rows)
        keep = torch.tensor([w for _, w in share], device=chat_model.device)
        loss = (term([row for row, _ in share]) * keep).sum() / len(rows)
        (weight * loss).backward()
        losses[name] = float(processes.total(loss.detach()))

    refusal, benign, spread = settings.refusal, settings.benign, settings.spread
    drawn = _pick(rng, range(len(data.harmful)), refusal.rows)
    if refusal.weight:
        attacked = round(settings.clamps.share * refusal.rows)
        rows = [
            Row(data.harmful[place], rng.choice(data.refusals), pool.draw(rng) if number < attacked else ())
            for number, place in enumerate(drawn)
        ]
        add("refusal", refusal.weight, rows, lambda mine: refusal_loss(chat_model, mine))
    if settings.twins.weight:
        rows = [data.twins[place] for place in drawn if data.twins[place] is not None]
        if rows:
            add("twins", settings.twins.weight, rows, lambda mine: refusal_rise(chat_model, mine, phrases))
    if benign.weight:
        rows = _pick(rng, data.benign, benign.rows)
        add("benign_kl", benign.weight, rows, lambda mine: benign_kl(chat_model, mine))
    if spread.weight and step % spread.every == 0:
        rows = _pick(rng, data.harmful, spread.rows)
        add(
            "spread",
            spread.weight,
            rows,
            lambda mine: spread_loss(chat_model, mine, phrases),
        )
    return losses


def weigh_clamps(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    max_benign_rise: float,
    past_breakers: Sequence[Neuron],
    batch_size: int,
    rng: random.Random,
) -> ClampPool:
    """Locate neurons on the present weights and weigh their clamps by how well they break it now.

    A clamp's weight is the squared chance that the model does not refuse under it (squared: most located clamps are
    harmless, and would together be drawn more often than the few that work) plus `settings.clamps.floor`; clamps that
    raise the loss on benign answers by more than `max_benign_rise` nats per token are left out. That is measured on
    the starting model: training can widen a neuron's activation gap, and the clamps must not grow with it until they
    only make the model babble. If none is left the pool is empty, and rows are trained without a clamp.
    """
    harmful, twins = (_pick(rng, texts, RELOCATE_PROMPTS) for texts in (data.harmful_texts, data.twin_texts))
    scores = score_neurons(chat_model, harmful, twins, phrases, batch_size)
    located = {c.neuron: c for c in scores.top(settings.clamps.pool)}
    located.update({neuron: scores.candidate(neuron) for neuron in past_breakers})
    clamps = [Clamp(c.neuron, c.clamp_value(size)) for c in located.values() for size in settings.clamps.sizes]
    screened = screen_clamps(
        chat_model, clamps, data.probe, phrases, batch_size, "weigh clamps", coherence_at_start=True
    )
    coherent = [entry for entry in screened if entry.benign_rise <= max_benign_rise]
    if not coherent:
        logger.warning("none of %d clamps is coherent: training without; smaller train.clamps.sizes?", len(clamps))
    floor = settings.clamps.floor
    return ClampPool(
        [entry.clamp for entry in coherent],
        [floor + (1 / (1 + math.exp(min(entry.log_odds, 50.0)))) ** 2 for entry in coherent],
    )


def learning_rate_factor(step: int, settings: TrainSection) -> float:
    """Linear warm-up, then linear decay to `FINAL_LEARNING_RATE` at the end of the round."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warmup * (1 - (1 - FINAL_LEARNING_RATE) * step / settings.steps)


def _pick(rng: random.Random, items: Sequence, n: int) -> list:
    return rng.sample(items, min(n, len(items)))


def _save_checkpoint(path: Path, chat_model: ChatModel, optimizer, pool: ClampPool, step: int) -> None:
    if not processes.is_main():
        return
    part = path.with_suffix(".part")
    state = {"adapter": adapter_state(chat_model.model), "optimizer": optimizer.state_dict()}
    torch.save({**state, "pool": pool.to_json(), "step": step}, part)
    part.replace(path)
