"""The one LoRA training loop: a round of steps, resumable at its checkpoints.

A step is drawn from (seed, round, step) alone, so a run that was interrupted repeats its steps exactly.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harden import processes
from harden.activations import read_activations
from harden.adapters import adapter_state, restore_adapter, starting_model, trained_parameters
from harden.adversary import CONTRAST_PROMPTS, Adversary, refresh
from harden.attack.screen import Probe
from harden.errors import MeasurementError
from harden.generate import Request, progress_bar
from harden.interventions import Clamp
from harden.locate.contrast import read_contrast
from harden.locate.strength import full_strength
from harden.models import ChatModel
from harden.objective.benign import benign_kl
from harden.objective.ceiling import Ceiling
from harden.objective.refusal import refusal_loss, refusal_rise, shortfall, start_log_odds
from harden.objective.rows import Row
from harden.objective.spread import leverage_loss, spread_loss
from harden.objective.strength import draw_strong_clamp
from harden.refusal import RefusalPhrases
from harden.settings.training import TrainSection

logger = logging.getLogger(__name__)

HINGES = ("margin", "twins", "fail_closed")
FINAL_LEARNING_RATE = 0.1  # of the peak, reached linearly at the last step of a round


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
    texts: tuple[Row, ...] = ()
    """Benign requests alone: the first token, and as an answer the rest."""


@dataclass(frozen=True)
class Start:
    """What is read of the starting model once, before a round; empty where no term asks for it."""

    twins: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    """Refusal log-odds of each twin."""
    leverage: Sequence[torch.Tensor] = ()
    """Clamp values of all neurons, one (neurons,) vector per size."""
    full: torch.Tensor | None = None
    """`full_strength`, (neurons,)."""


def train_round(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    max_benign_rise: float,
    past_breakers: Sequence[Clamp],
    batch_size: int,
    seed: int,
    round_number: int,
    checkpoint: Path,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train the adapter for `settings.steps` steps, in place.

    checkpoint: a file that is written every `settings.checkpoint_every` steps, once the next step's loss has shown
    that the weights are sound, and resumed from if it exists.
    past_breakers: clamps that broke the model in an earlier round; they stay among those that are drawn from, and so do
    others of their neurons, as long as the starting model is coherent under them.
    Raises MeasurementError naming the step if the loss or a gradient is not finite; the checkpoint stays.
    """
    parameters = trained_parameters(chat_model.model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    adversary = Adversary()
    terms = {"benign_kl": settings.benign, "twins": settings.twins}
    ceilings = {name: Ceiling(term.ceiling) for name, term in terms.items() if term.ceiling}
    start = read_start(chat_model, data, phrases, settings, batch_size, f"{seed}:{round_number}")
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        restore_adapter(chat_model.model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        adversary = Adversary.from_state(saved["adversary"])
        ceilings = {name: Ceiling(*state) for name, state in saved["ceilings"].items()}
        first = saved["step"]

    with progress_bar(settings.steps, f"round {round_number}: train") as bar:
        bar.update(first)
        for step in range(first, settings.steps):
            began = time.monotonic()
            if step > first or not first:  # a checkpoint has that of its step
                adversary = refresh(
                    adversary, step, chat_model, data.harmful_texts, data.twin_texts, data.probe, phrases, settings,
                    max_benign_rise, past_breakers, batch_size, random.Random(f"{seed}:{round_number}:{step}:locate"),
                    start.full,
                )  # fmt: skip
            rng = random.Random(f"{seed}:{round_number}:{step}")
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            factors = {name: ceiling.factor for name, ceiling in ceilings.items()}
            losses, met = backward(
                chat_model, data, phrases, settings, max_benign_rise, adversary, start, step, rng, factors
            )
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
                _save_checkpoint(checkpoint, chat_model, optimizer, adversary, ceilings, step)
            adversary.learn(met)
            for name in ceilings.keys() & losses.keys():
                ceilings[name].update(losses[name])
            optimizer.step()
            optimizer.zero_grad()
            log({
                "event": "step", "round": round_number, "step": step + 1, **losses,
                "gradient_norm": norm, "utility_factors": factors,
                "seconds": round(time.monotonic() - began, 3),
            })  # fmt: skip
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            bar.update(1)


def backward(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    max_benign_rise: float,
    adversary: Adversary,
    start: Start,
    step: int,
    rng: random.Random,
    factors: Mapping[str, float],
) -> tuple[dict[str, float], list[tuple[Clamp | None, float]]]:
    """One step's rows, their loss terms and gradients; returns each term's value, over all processes, and what the
    rows of an attacked margin met: the clamp, if it was one alone, and the refusal log-odds under it, in nats.

    The twins are those of the step's harmful prompts (of the margin's, where it has its own), so that what is learned
    tells the two apart. factors: on the weights of terms, by name.
    """
    losses: dict[str, float] = {}

    def add(name: str, weight: float, rows: Sequence, term: Callable[[list], torch.Tensor], like: str = "") -> None:
        share = processes.my_share(rows)
        keep = torch.tensor([w for _, w in share], device=chat_model.device)
        loss = (term([row for row, _ in share]) * keep).sum() / len(rows)
        if loss.requires_grad or name not in HINGES:  # a hinge that nothing is on the wrong side of has no gradient
            (factors.get(like or name, 1.0) * weight * loss).backward()
        losses[name] = float(processes.total(loss.detach()))

    refusal, benign, spread, leverage = settings.refusal, settings.benign, settings.spread, settings.leverage
    margin, closed, met = settings.margin, settings.fail_closed, []

    def attack(places: Sequence[int]) -> list[Row]:
        texts = [data.harmful_texts[place] for place in places]
        return [
            Row(
                data.harmful[place],
                rng.choice(data.refusals),
                adversary.row(rng, number, len(places), settings, max_benign_rise, chat_model, text),
            )
            for number, (place, text) in enumerate(zip(places, texts, strict=True))
        ]

    def short_of_margin(mine: list[Row]) -> torch.Tensor:
        loss, log_odds = shortfall(chat_model, mine, phrases, margin.target)
        met.extend(zip((_clamp_alone(row) for row in mine), log_odds.tolist(), strict=True))
        return loss

    drawn = _pick(rng, range(len(data.harmful)), refusal.rows)
    attacked = attack(drawn) if refusal.weight or (margin.attacked and not margin.rows) else []
    if refusal.weight:
        add("refusal", refusal.weight, attacked, lambda mine: refusal_loss(chat_model, mine))
    if margin.weight:
        if margin.rows:
            drawn = _pick(rng, range(len(data.harmful)), margin.rows)
            attacked = attack(drawn) if margin.attacked else []
        rows = attacked if margin.attacked else [Row(data.harmful[place]) for place in drawn]
        add("margin", margin.weight, rows, short_of_margin)
    if closed.weight:
        n = round(closed.benign_share * closed.rows)
        prompts = [row.prompt for row in _pick(rng, data.benign, n)] + _pick(rng, data.harmful, closed.rows - n)
        rows = [Row(p, (), (draw_strong_clamp(chat_model, start.full, closed.strength, rng),)) for p in prompts]
        add(
            "fail_closed",
            closed.weight,
            rows,
            lambda mine: shortfall(chat_model, mine, phrases, closed.target)[0],
        )
    met = processes.gather(met, len(drawn)) if margin.attacked and margin.weight else []
    if settings.twins.weight:
        twins = settings.twins
        rows = [data.twins[place] for place in drawn if data.twins[place] is not None][: twins.rows]
        if rows:

            def rise(mine: list[tuple[int, ...]]) -> torch.Tensor:
                began = torch.tensor([start.twins[row] for row in mine], device=chat_model.device)
                return refusal_rise(chat_model, mine, began, phrases, twins.below)

            add("twins", twins.weight, rows, rise)
    if benign.weight:
        rows = _pick(rng, data.benign, benign.rows)
        clamped = round(benign.clamped * len(rows))
        clamps = [tuple(weighed.clamp for weighed in adversary.draw(rng)) for _ in rows[:clamped]]
        rows = [replace(row, interventions=c) for row, c in zip(rows, clamps, strict=False)] + rows[clamped:]
        add("benign_kl", benign.weight, rows, lambda mine: benign_kl(chat_model, mine))
        if benign.texts:
            rows = _pick(rng, data.texts, benign.texts)
            add("text_kl", benign.weight, rows, lambda mine: benign_kl(chat_model, mine), "benign_kl")
    if spread.weight and step % spread.every == 0:
        rows = _pick(rng, data.harmful, spread.rows)
        add(
            "spread",
            spread.weight,
            rows,
            lambda mine: spread_loss(chat_model, mine, phrases, spread.order, spread.attribution),
        )
    if leverage.weight and step % leverage.every == 0:
        rows = _pick(rng, data.harmful, leverage.rows)
        add("leverage", leverage.weight, rows, lambda mine: leverage_loss(chat_model, mine, phrases, start.leverage))
    return losses, met


def _clamp_alone(row: Row) -> Clamp | None:
    return row.interventions[0] if len(row.interventions) == 1 and isinstance(row.interventions[0], Clamp) else None


def read_start(
    chat_model: ChatModel,
    data: TrainingData,
    phrases: RefusalPhrases,
    settings: TrainSection,
    batch_size: int,
    seed: str,
) -> Start:
    """Read of the starting model what the terms that are switched on ask for."""
    twins, leverage, full = {}, [], None
    if settings.twins.weight and not any(data.twins):
        logger.warning("train.twins has no effect: no look-alike is the `twin` of a harmful prompt")
    if settings.twins.weight and any(data.twins):
        rows = list(dict.fromkeys(filter(None, data.twins)))
        twins = dict(zip(rows, start_log_odds(chat_model, rows, phrases, batch_size), strict=True))
    if settings.leverage.weight:
        rng = random.Random(f"{seed}:values")
        texts = [_pick(rng, texts, CONTRAST_PROMPTS) for texts in (data.harmful_texts, data.twin_texts)]
        with starting_model(chat_model.model):
            contrast = read_contrast(chat_model, *texts, batch_size)
        leverage = [contrast.clamp_values(size) for size in settings.leverage.sizes]
    if settings.fail_closed.weight or (settings.draws_clamps and settings.clamps.strengths):
        rng = random.Random(f"{seed}:strength")
        requests = [Request(text) for text in _pick(rng, data.harmful_texts, CONTRAST_PROMPTS)]
        with starting_model(chat_model.model):
            full = full_strength(chat_model, read_activations(chat_model, requests, batch_size).stream)
    return Start(twins, leverage, full)


def learning_rate_factor(step: int, settings: TrainSection) -> float:
    """Linear warm-up, then linear decay to `FINAL_LEARNING_RATE` at the end of the round."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warmup * (1 - (1 - FINAL_LEARNING_RATE) * step / settings.steps)


def _pick(rng: random.Random, items: Sequence, n: int) -> list:
    return rng.sample(items, min(n, len(items)))


def _save_checkpoint(
    path: Path, chat_model: ChatModel, optimizer, adversary: Adversary, ceilings: Mapping[str, Ceiling], step: int
) -> None:
    if not processes.is_main():
        return
    part = path.with_suffix(".part")
    state = {"adapter": adapter_state(chat_model.model), "optimizer": optimizer.state_dict()}
    state |= {"adversary": adversary.to_state(), "step": step}
    torch.save({**state, "ceilings": {name: astuple(ceiling) for name, ceiling in ceilings.items()}}, part)
    part.replace(path)
