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
from harden.adversary import CONTRAST_PROMPTS, Adversary, draw_strong_clamp, refresh
from harden.context import RoundContext, Start, pick
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
from harden.settings.training import TrainSection

logger = logging.getLogger(__name__)

HINGES = ("margin", "twins", "fail_closed")
FINAL_LEARNING_RATE = 0.1  # of the peak: where the linear fall is headed at the end of a round


def train_round(
    context: RoundContext,
    seed: int,
    round_number: int,
    checkpoint: Path,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train the adapter for `train.steps` steps, in place.

    checkpoint: a file that is written every `train.checkpoint_every` steps, once the next step's loss has shown that
    the weights are sound, and resumed from if it exists. log: called with the event of each step.
    Raises MeasurementError naming the step if the loss or a gradient is not finite; the checkpoint stays.
    """
    context = replace(context, start=read_start(context, f"{seed}:{round_number}"))
    chat_model, settings = context.chat_model, context.settings
    parameters = trained_parameters(chat_model.model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    adversary = Adversary()
    terms = {"benign_kl": settings.benign, "twins": settings.twins}
    ceilings = {name: Ceiling(term.ceiling) for name, term in terms.items() if term.ceiling}
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
                locate_rng = random.Random(f"{seed}:{round_number}:{step}:locate")
                adversary = refresh(context, adversary, step, locate_rng)
            rng = random.Random(f"{seed}:{round_number}:{step}")
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            factors = {name: ceiling.factor for name, ceiling in ceilings.items()}
            losses, met = backward(context, adversary, step, rng, factors)
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
            adversary.learn(met, settings)
            for name in ceilings.keys() & losses.keys():
                ceilings[name].update(losses[name])
            optimizer.step()
            optimizer.zero_grad()
            log({
                "event": "step", "round": round_number, "step": step + 1, **losses,
                "gradient_norm": norm, "utility_factors": factors,
                "seconds": round(time.monotonic() - began, 3),
            })  # fmt: skip
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            bar.update(1)


def backward(
    context: RoundContext, adversary: Adversary, step: int, rng: random.Random, factors: Mapping[str, float]
) -> tuple[dict[str, float], list[tuple[Clamp | None, float]]]:
    """Draw one step's rows, and add the gradients of their loss terms to those of the parameters.

    factors: on the weights of utility terms, by name; 1 for the others.
    Returns each term's value, over all processes, and what the rows of an attacked margin met: the clamp, if it was one
    alone, and the refusal log-odds under it, in nats.
    """
    settings = context.settings
    terms = _Step(context, adversary, rng, factors)
    places = terms.refusal_and_margin()
    if settings.fail_closed.weight:
        terms.fail_closed()
    if settings.twins.weight:
        terms.twins(places)
    if settings.benign.weight:
        terms.benign()
    if settings.spread.weight and step % settings.spread.every == 0:
        terms.spread()
    if settings.leverage.weight and step % settings.leverage.every == 0:
        terms.leverage()
    return terms.losses, terms.met


@dataclass
class _Step:
    """The terms of one step. The method of a term draws its rows and adds its value and its gradients.

    All draw from the same `rng`, so the order in which they are called decides what is drawn.
    """

    context: RoundContext
    adversary: Adversary
    rng: random.Random
    factors: Mapping[str, float]
    losses: dict[str, float] = field(default_factory=dict)
    """Value of each term so far, over all processes."""
    met: list[tuple[Clamp | None, float]] = field(default_factory=list)
    """What the rows of an attacked margin met, in all processes; see `backward`."""

    def refusal_and_margin(self) -> list[int]:
        """Both terms are on the same harmful prompts, attacked in the same way, unless the margin has rows of its own.

        Returns the places of these prompts in `TrainingData.harmful`: of the margin's, where it has its own.
        """
        chat_model, data = self.context.chat_model, self.context.data
        refusal, margin = self.context.settings.refusal, self.context.settings.margin
        places = pick(self.rng, range(len(data.harmful)), refusal.rows)
        attacked = self._attack(places) if refusal.weight or (margin.attacked and not margin.rows) else []
        if refusal.weight:
            self._add("refusal", refusal.weight, attacked, lambda mine: refusal_loss(chat_model, mine))
        if margin.weight and margin.rows:
            places = pick(self.rng, range(len(data.harmful)), margin.rows)
            attacked = self._attack(places) if margin.attacked else []
        if margin.weight:
            self._margin(attacked if margin.attacked else [Row(data.harmful[place]) for place in places])
        return places

    def _margin(self, rows: Sequence[Row]) -> None:
        """Of these rows; what they met is kept if they are attacked."""
        chat_model, phrases, margin = self.context.chat_model, self.context.phrases, self.context.settings.margin
        met_here: list[tuple[Clamp | None, float]] = []  # by this process's share of the rows

        def term(mine: list[Row]) -> torch.Tensor:
            loss, log_odds = shortfall(chat_model, mine, phrases, margin.target)
            met_here.extend(zip(map(_clamp_alone, mine), log_odds.tolist(), strict=True))
            return loss

        self._add("margin", margin.weight, rows, term)
        if margin.attacked:
            self.met = processes.gather(met_here, len(rows))

    def fail_closed(self) -> None:
        """On benign and harmful requests, each under a strong clamp of its own."""
        chat_model, data, full = self.context.chat_model, self.context.data, self.context.start.full
        closed = self.context.settings.fail_closed
        n = round(closed.benign_share * closed.rows)
        prompts = [row.prompt for row in pick(self.rng, data.benign, n)]
        prompts += pick(self.rng, data.harmful, closed.rows - n)
        clamps = [draw_strong_clamp(chat_model, full, closed.strength, self.rng) for _ in prompts]
        rows = [Row(prompt, (), (clamp,)) for prompt, clamp in zip(prompts, clamps, strict=True)]

        def term(mine: list[Row]) -> torch.Tensor:
            return shortfall(chat_model, mine, self.context.phrases, closed.target)[0]

        self._add("fail_closed", closed.weight, rows, term)

    def twins(self, places: Sequence[int]) -> None:
        """On the twins of the harmful prompts at `places`, so that what is learned tells the two apart; a share
        `more_share` of the rows are other look-alikes."""
        chat_model, data, twins = self.context.chat_model, self.context.data, self.context.settings.twins
        n = twins.rows or len(places)
        share = n * data.more_share
        n_more = int(share) + (share % 1 > 0 and self.rng.random() < share % 1)  # few others: not in every step
        more = pick(self.rng, data.more_twins, n_more)
        rows = [twin for place in places if (twin := data.twins[place]) is not None][: n - len(more)] + more

        def term(mine: list[tuple[int, ...]]) -> torch.Tensor:
            began = torch.tensor([self.context.start.twins[row] for row in mine], device=chat_model.device)
            return refusal_rise(chat_model, mine, began, self.context.phrases, twins.below)

        if rows:
            self._add("twins", self.factors.get("twins", 1.0) * twins.weight, rows, term)

    def benign(self) -> None:
        """On benign answers, a share of them under a clamp of the adversary's, and on benign requests alone."""
        data, benign = self.context.data, self.context.settings.benign
        weight = self.factors.get("benign_kl", 1.0) * benign.weight

        def term(mine: list[Row]) -> torch.Tensor:
            return benign_kl(self.context.chat_model, mine)

        rows, nearest = pick(self.rng, data.benign, benign.rows), self.context.settings.clamps.nearest
        for place in range(round(benign.clamped * len(rows))):
            clamps = tuple(weighed.nearer(self.rng, nearest) for weighed in self.adversary.draw(self.rng))
            rows[place] = replace(rows[place], interventions=clamps)
        self._add("benign_kl", weight, rows, term)
        if benign.texts:
            self._add("text_kl", weight, pick(self.rng, data.texts, benign.texts), term)

    def spread(self) -> None:
        """On harmful prompts of its own, without an attack."""
        chat_model, phrases, spread = self.context.chat_model, self.context.phrases, self.context.settings.spread

        def term(mine: list[tuple[int, ...]]) -> torch.Tensor:
            return spread_loss(chat_model, mine, phrases, spread.order, spread.attribution)

        self._add("spread", spread.weight, pick(self.rng, self.context.data.harmful, spread.rows), term)

    def leverage(self) -> None:
        """On harmful prompts of its own, without an attack."""
        chat_model, phrases, leverage = self.context.chat_model, self.context.phrases, self.context.settings.leverage

        def term(mine: list[tuple[int, ...]]) -> torch.Tensor:
            return leverage_loss(chat_model, mine, phrases, self.context.start.leverage)

        self._add("leverage", leverage.weight, pick(self.rng, self.context.data.harmful, leverage.rows), term)

    def _attack(self, places: Sequence[int]) -> list[Row]:
        """Rows of the harmful prompts at these places: each with a drawn refusal, under what the adversary draws."""
        data, rows = self.context.data, []
        for number, place in enumerate(places):
            refusal = self.rng.choice(data.refusals)
            edits = self.adversary.row(self.context, self.rng, number, len(places), data.harmful_texts[place])
            rows.append(Row(data.harmful[place], refusal, edits))
        return rows

    def _add(self, name: str, weight: float, rows: Sequence, term: Callable[[list], torch.Tensor]) -> None:
        """Add a term's mean over the rows of all processes. term: of this process's share of the rows, (batch,)."""
        share = processes.my_share(rows)
        keep = torch.tensor([kept for _, kept in share], device=self.context.chat_model.device)
        loss = (term([row for row, _ in share]) * keep).sum() / len(rows)
        if loss.requires_grad or name not in HINGES:  # a hinge that nothing is on the wrong side of has no gradient
            (weight * loss).backward()
        self.losses[name] = float(processes.total(loss.detach()))


def _clamp_alone(row: Row) -> Clamp | None:
    return row.interventions[0] if len(row.interventions) == 1 and isinstance(row.interventions[0], Clamp) else None


def read_start(context: RoundContext, seed: str) -> Start:
    """Read of the starting model what the terms that are switched on ask for. seed: of the prompts that are drawn."""
    chat_model, data, settings = context.chat_model, context.data, context.settings
    twins, leverage, full = {}, [], None
    rows = list(dict.fromkeys(filter(None, data.twins + data.more_twins)))
    if settings.twins.weight and not rows:
        logger.warning("train.twins has no effect: no look-alike is a harmful prompt's `twin` or of more_twins")
    if settings.twins.weight and rows:
        twins = dict(zip(rows, start_log_odds(chat_model, rows, context.phrases, context.batch_size), strict=True))
    if settings.leverage.weight:
        rng = random.Random(f"{seed}:values")
        texts = [pick(rng, texts, CONTRAST_PROMPTS) for texts in (data.harmful_texts, data.twin_texts)]
        with starting_model(chat_model.model):
            contrast = read_contrast(chat_model, *texts, context.batch_size)
        leverage = [contrast.clamp_values(size) for size in settings.leverage.sizes]
    if settings.fail_closed.weight or (settings.draws_clamps and settings.clamps.strengths):
        rng = random.Random(f"{seed}:strength")
        requests = [Request(text) for text in pick(rng, data.harmful_texts, CONTRAST_PROMPTS)]
        with starting_model(chat_model.model):
            full = full_strength(chat_model, read_activations(chat_model, requests, context.batch_size).stream)
    return Start(twins, leverage, full)


def learning_rate_factor(step: int, settings: TrainSection) -> float:
    """Linear warm-up, then linear decay to `FINAL_LEARNING_RATE` at the end of the round."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warmup * (1 - (1 - FINAL_LEARNING_RATE) * step / settings.steps)


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
