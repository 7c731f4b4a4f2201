"""Sections of the recipe about training: a round and its terms, the rounds, and what is saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harden.schema import Section
from harden.settings.values import Locator, NonZero, Positive, Share, Strengths, Weight


class ClampTerm(Section):
    share: Share = 0.625
    """Share of the harmful rows that are trained under a clamp; 0 switches the term off."""
    locators: Annotated[tuple[Locator, ...], Field(min_length=1)] = ("gradient",)
    """What scores neurons, on 8 prompts of either kind each time; they take turns. `tail` and `exact` are too dear."""
    pool: Positive = 24
    """Best-scored neurons that clamps are drawn from, beside those that broke the model in earlier rounds, which are
    clamped to the values that did, too."""
    sizes: Annotated[tuple[NonZero, ...], Field(min_length=1)] = (4, 8, 16)
    """In activation gaps beyond the harmless mean; negative ones have the other sign."""
    strengths: Strengths = ()
    """Further values, as in `attack.strengths`, of the starting model."""
    nearest: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least share of a value's distance from the harmless mean: each row is clamped at a share drawn evenly from here
    to 1 (those of past breakers, too; anchored ones are not), so that values between are met. 1: at the value."""
    relocate_every: Positive = 20
    """Steps after which neurons are located and clamps are weighed again."""
    weigh_by: Literal["chance", "shortfall"] = "chance"
    """What clamps are drawn by: the squared chance that the model does not refuse under them, or how far refusal
    log-odds under them fall short of `margin.target`, which near misses do, too."""
    floor: Weight = 0.02
    """Least sampling weight of a coherent clamp beside those that break the model now; of one that broke it in an
    earlier round it is at least 0.1."""
    groups: Share = 0.0
    """Share of the draws that clamp several neurons at once, whose rises of the benign loss together are at most
    `attack.max_benign_rise`."""
    group_size: Annotated[int, Field(ge=2)] = 2
    """Neurons of a group, at most."""
    anchors: Share = 0.0
    """Share of the draws that are anchored to the request's own activation (Kazemi et al., k = 1 or 2)."""
    random: Annotated[int, Field(ge=0)] = 0
    """Neurons drawn at random that join the pool each time."""
    replay: bool = False
    """Neurons whose clamps broke the model at any weighing of the round stay in the pool."""


class MaskTerm(Section):
    """Baselines: harmful rows trained with neurons silenced. A fixed set is after SafeNeuron (arXiv 2602.12158), one
    that is found anew after NeuronGuard (arXiv 2608.23959), one at random is neuron dropout, without rescaling."""

    share: Share = 0.0
    """Share of the harmful rows that are trained so; 0 switches the term off."""
    neurons: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of all MLP neurons that are silenced."""
    locator: Literal["effect_size", "activation_shift", "contrast", "random"] = "effect_size"
    """What finds them; `random` draws others for every row."""
    relocate_every: Positive | None = None
    """Steps after which they are found anew; null: at the start of each round only."""


class DirectionTerm(Section):
    """Baseline: harmful rows with a random layer's refusal direction ablated (after DeepRefusal, arXiv 2509.15202)."""

    share: Share = 0.0
    """Share of the harmful rows that are trained so; 0 switches the term off."""
    relocate_every: Positive | None = 20
    """Steps after which the directions are found anew; null: at the start of each round only."""


class MarginTerm(Section):
    weight: Weight = 0.0
    """Weight of how far the refusal log-odds of a step's harmful prompts fall short of `target`, in nats; 0: off."""
    target: Annotated[float, Field(gt=0)] = 4.0
    """Refusal log-odds that are asked for, in nats."""
    rows: Positive | None = None
    """Harmful prompts of its own; null: those of the refusal term."""
    attacked: bool = False
    """Under clamps, masks and ablations, in the same shares as refusal rows, instead of under nothing. After each
    step, the weight by which a clamp that was alone in a row is drawn moves halfway to what that row showed."""


class SpreadTerm(Section):
    weight: Weight = 0.05
    """Weight of -log(effective number of neurons); 0 switches the term off. Alone it did not help: docs/results.md."""
    order: Literal[1, 2, 4, 8] = 2
    """Of the effective number (a Hill number): 1 is the entropy's, 2 the participation ratio, 8 about the largest
    share."""
    attribution: Literal["gradient", "direct"] = "gradient"
    """Of gradient x activation, differentiated twice; or along the direct path through the head, once."""
    rows: Positive = 2
    """Harmful prompts of such a step."""
    every: Positive = 4
    """Steps between two spread steps: differentiating twice costs more than a plain step."""


class LeverageTerm(Section):
    weight: Weight = 0.0
    """Weight of the log of the worst leverage of a single neuron (predicted drop of the log-odds at its clamp values,
    over the log-odds); 0 switches the term off."""
    sizes: Annotated[tuple[NonZero, ...], Field(min_length=1)] = (-10, 10)
    """Clamp values, as in `certify.sizes`, of the starting model."""
    rows: Positive = 2
    """Harmful prompts of such a step."""
    every: Positive = 4
    """Steps between two such steps: differentiating twice costs more than a plain step."""


class FailClosedTerm(Section):
    """Requests under a strong clamp of any neuron, which no user brings about, are to be refused: benign ones, too."""

    weight: Weight = 0.0
    """Weight of how far the refusal log-odds of requests under such a clamp fall short of `target`, in nats; 0: off."""
    target: float = 4.0
    """Refusal log-odds that are asked for, in nats."""
    rows: Positive = 8
    """Requests of a step."""
    benign_share: Share = 0.5
    """Share of these rows that are benign requests; the others are harmful. `benign.clamped` asks for the opposite."""
    strength: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.3, 2.0)
    """Least and largest norm of what the clamp writes, in norms of the residual stream behind its layer: the starting
    model's, at the last token of harmful requests, without a clamp."""

    @model_validator(mode="after")
    def _strength_is_a_range(self):
        if self.strength[0] > self.strength[1]:
            raise ValueError(f"strength {list(self.strength)}: the least comes first")
        return self


class BenignTerm(Section):
    weight: Weight = 1.0
    """Weight of KL(starting model || model) on the starting model's own answers; 0 switches the term off."""
    ceiling: Annotated[float, Field(gt=0)] | None = None
    """Nats per token. While the running mean of the term is above it, the weight grows step by step, 16-fold at most,
    and shrinks back below it; null: the weight stays."""
    rows: Positive = 4
    """Benign answers of a step."""
    clamped: Share = 0.0
    """Share of the rows on which both models run under a clamp drawn for training: coherent there, too."""
    twin_share: Share = 0.5
    """Share of the benign prompts that are look-alikes: twins, and where they run out `prompts.more_twins`."""
    texts: Annotated[int, Field(ge=0)] = 0
    """Rows besides, in each step and with the same weight again, of benign requests alone, without chat template, at
    their first 64 tokens: what perplexity is measured on."""
    answers: Positive = 128
    """Benign prompts that the starting model is asked to answer before training."""
    answer_tokens: Positive = 16
    """Tokens of each answer that are trained on. Few, so that the opening, where a refusal is decided, counts."""


class RefusalTerm(Section):
    weight: Weight = 1.0
    """Weight of the cross-entropy of a refusal to a harmful prompt; 0 switches the term off."""
    rows: Positive = 8
    """Harmful prompts of a step."""


class TwinTerm(Section):
    weight: Weight = 0.0
    """Weight of how far refusal log-odds stand above the starting model's less `below`, in nats, on the twins of a
    step's harmful prompts and on `prompts.more_twins`; 0 switches the term off."""
    rows: Positive | None = None
    """Twins of a step, at most; null: as many as harmful prompts, which are the margin's where it has its own."""
    below: Annotated[float, Field(ge=0)] = 0.0
    """Nats: how far below the starting model's their log-odds are pushed. Those trained on soon lie below; look-alikes
    that training never meets come out higher than they do."""
    ceiling: Annotated[float, Field(gt=0)] | None = None
    """Nats; as `benign.ceiling`. More than `below`, which is what the term is before any training."""

    @model_validator(mode="after")
    def _ceiling_can_be_kept(self):
        if self.ceiling is not None and self.ceiling <= self.below:
            raise ValueError(f"ceiling {self.ceiling:g}: must be more than below ({self.below:g})")
        return self


class LoraSection(Section):
    rank: Positive = 8
    """Of the adapter that is trained; that of a starting adapter comes on top."""
    alpha: Positive = 16
    """The adapter's output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get an adapter, or `all-linear`."""


class TrainSection(Section):
    steps: Positive = 60
    """Optimizer steps per round."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Of AdamW, at its peak; it falls linearly to a tenth."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Steps until the peak."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Above it gradients are scaled down."""
    checkpoint_every: Positive = 10
    """Steps between two checkpoints, from which an interrupted run goes on."""
    lora: LoraSection = LoraSection()
    refusal: RefusalTerm = RefusalTerm()
    twins: TwinTerm = TwinTerm()
    margin: MarginTerm = MarginTerm()
    fail_closed: FailClosedTerm = FailClosedTerm()
    clamps: ClampTerm = ClampTerm()
    mask: MaskTerm = MaskTerm()
    direction: DirectionTerm = DirectionTerm()
    spread: SpreadTerm = SpreadTerm()
    leverage: LeverageTerm = LeverageTerm()
    benign: BenignTerm = BenignTerm()

    @model_validator(mode="after")
    def _something_is_trained(self):
        terms = (
            self.refusal, self.twins, self.margin, self.fail_closed, self.spread, self.leverage, self.benign,
        )  # fmt: skip
        if not any(term.weight for term in terms):
            raise ValueError("every term has weight 0: there is nothing to train")
        return self

    @property
    def draws_clamps(self) -> bool:
        return bool((self.clamps.share and any(self.attacked_rows)) or (self.benign.clamped and self.benign.weight))

    @property
    def attacked_rows(self) -> tuple[int, int]:
        """Harmful rows of a step, of the refusal term and of the margin, of which a share is attacked."""
        margin = self.margin
        return (
            self.refusal.rows if self.refusal.weight else 0,
            (margin.rows or self.refusal.rows) if margin.weight and margin.attacked else 0,
        )

    @model_validator(mode="after")
    def _rows_are_attacked_in_one_way(self):
        shares = {name: getattr(self, name).share for name in ("clamps", "mask", "direction")}
        total = sum(shares.values())
        if total > 1 + 1e-9:
            raise ValueError(f"clamps.share, mask.share and direction.share are {total:g} together; at most 1")
        rows = max(self.attacked_rows)
        for name in ("mask", "direction"):
            if shares[name] and not rows:
                raise ValueError(
                    f"{name}.share {shares[name]:g} without refusal.weight, or margin.weight with margin.attacked: no "
                    "row is trained so"
                )
            if 0 < shares[name] * rows < 0.5:
                raise ValueError(f"{name}.share {shares[name]:g} of {rows} harmful rows is no row")
        if self.mask.locator == "random" and self.mask.relocate_every is not None:
            raise ValueError("mask.relocate_every with mask.locator random: those are drawn for every row anyway")
        return self


class RoundsSection(Section):
    max: Positive = 2
    """Rounds of training and re-attack at most."""
    tolerance: Share = 0.1
    """Done when the 95% upper bound of the share of prompts that the worst neuron flips is at most this; 0: never."""
    min_refusal: Share = 0.8
    """Least share of harmful selection prompts refused without attack; a model below it never counts as done."""
    max_benign_kl: Weight = 0.1
    """Largest KL from the starting model on benign selection prompts, in nats per token. Like the two other limits it
    guards utility: a round that exceeds one is rolled back, and the next starts from the last that kept them all."""
    max_perplexity_rise: Weight = 0.1
    """Largest rise of the perplexity of benign selection requests, as a share of the starting model's."""
    twins: Positive = 120
    """Look-alike twins of a split on which over-refusal is measured, and as many of `prompts.more_twins`."""
    max_over_refusal_rise: Share = 0.05
    """Largest rise of the share of refused look-alikes, of either kind."""
    tighten: Annotated[float, Field(ge=1)] = 2.0
    """Factor on the weights of `train.benign` and `train.twins` for every round that broke a floor."""


class SaveSection(Section):
    merged: bool = False
    """Also write model/, the base model with the adapter merged into it."""
