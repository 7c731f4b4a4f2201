"""The attack suite: every published neuron attack on one model, chosen on the selection split, reported on test.

Each attack is a function of a `Suite`, named in `ATTACKS`. It builds arms (what selects neurons x what intervenes x
what edits the input), lets the selection split choose among them, and reports the chosen ones on the test split.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch

from harden import processes
from harden.activations import neuron_at
from harden.attack import arms as build
from harden.attack.arms import NO_ATTACK, Anchor, Arm
from harden.attack.screen import screen_fairly
from harden.attack.search import Search
from harden.bench import Bench
from harden.confidence import holm, mcnemar
from harden.errors import MeasurementError
from harden.interventions import Clamp, Scale, describe
from harden.judges.agreement import Verdict, agreement
from harden.judges.embedded import OUTCOMES
from harden.locate.contrast import Contrast, read_contrast
from harden.locate.gradient import NeuronScores
from harden.locate.passes import Passes
from harden.measure import attribution_record
from harden.neurons import Neuron
from harden.prompts import Prompt, Split
from harden.results import (
    BYPASSES,
    AgreementRecord,
    ArmRecord,
    AttackReport,
    AttributionRecord,
    Outcome,
    Rate,
)

logger = logging.getLogger(__name__)

Verdicts = dict[str, Verdict]  # by prompt id

ATTRIBUTION = "attribution"  # the stage of its record
DIRECTION_PROMPTS = 128  # harmful and as many ordinary benign prompts, as in Arditi et al.; forward passes only


class Suite:
    """A model under attack, and what the attacks share; nothing is computed before an attack asks for it."""

    def __init__(self, bench: Bench, settled: Callable[[AttackReport], bool] | None = None):
        """settled: asked after every batch on the test split whether an attack may stop; without it none does."""
        self.bench, self.settled = bench, settled
        self.settings, self.attack = bench.recipe.suite, bench.recipe.attack
        self.responder, self.chat_model = bench.responder, bench.chat_model

    @cached_property
    def passes(self) -> Passes:
        return self.bench.passes()

    @cached_property
    def scores(self) -> NeuronScores:
        scores = self.passes.scores
        self.bench.folder.stage(ATTRIBUTION, AttributionRecord, lambda: attribution_record(scores, "selection"))
        return scores

    @cached_property
    def contrast(self) -> Contrast:
        return self.passes.contrast

    @cached_property
    def search(self) -> Search:
        """The constant-clamp search, which other attacks take their neurons and values from."""

        def make() -> Search:
            _ = self.scores  # whatever is attacked, the attribution is recorded
            return self.bench.search(self.passes)[1]

        return self.bench.folder.stage("search", Search, make)

    @cached_property
    def no_attack(self) -> Verdicts:
        """On the test split."""

        def make() -> Verdicts:
            return self.verdicts([NO_ATTACK], self.bench.harmful["test"])[0]

        return self.bench.folder.stage("no-attack", Verdicts, make)

    @cached_property
    def directions(self) -> torch.Tensor:
        """The refusal direction behind each layer: (layers, d_model)."""
        selection = self.bench.splits["selection"]
        texts = [[prompt.text for prompt in kind[:DIRECTION_PROMPTS]] for kind in (selection.harmful, selection.benign)]
        contrast = read_contrast(self.chat_model, *texts, self.responder.batch_size)
        return build.refusal_directions(contrast.harmful, contrast.harmless)

    def verdicts(self, arms: Sequence[Arm], prompts: Sequence[Prompt]) -> list[Verdicts]:
        """What the judges say of every arm on every prompt."""
        verdicts = self.responder.respond(
            [arm.request(prompt) for arm in arms for prompt in prompts], f"{len(arms)} arms x {len(prompts)} prompts"
        )
        parts = [verdicts[n * len(prompts) : (n + 1) * len(prompts)] for n in range(len(arms))]
        return [{prompt.id: verdict for prompt, verdict in zip(prompts, part, strict=True)} for part in parts]

    def choose(self, arms: Sequence[Arm]) -> tuple[Arm, list[ArmRecord]]:
        """The worst arm in two heats: all on the first selection prompts, the finalists on all of them; and the records
        of both heats, the finals first."""
        prompts = self.bench.harmful["selection"]
        ranked, first = self._heat(arms, prompts[: self.attack.heat_one_prompts])
        if len(arms) == 1:
            return ranked[0], first
        finalists, finals = self._heat(ranked[: self.attack.finalists], prompts)
        return finalists[0], [*finals, *first]

    def _heat(self, arms: Sequence[Arm], prompts: Sequence[Prompt]) -> tuple[list[Arm], list[ArmRecord]]:
        verdicts = self.verdicts(arms, prompts)
        records = [self.arm_record(arm, "selection", part) for arm, part in zip(arms, verdicts, strict=True)]
        ranked = sorted(range(len(arms)), key=lambda n: (-records[n].comply.count, -records[n].unjudged.count))
        return [arms[n] for n in ranked], [records[n] for n in ranked]

    def report(self, attack: str, arms: Sequence[Arm], tried: Sequence[ArmRecord], began: float) -> AttackReport:
        """Run the chosen arms on the test split; where asked to, only until the attack is settled."""
        prompts = self.bench.harmful["test"]
        step = len(prompts)
        if self.settled:
            step = max(1, self.responder.batch_size * processes.count() // len(arms))
        verdicts: list[Verdicts] = [{} for _ in arms]
        for start in range(0, len(prompts), step):
            for whole, part in zip(verdicts, self.verdicts(arms, prompts[start : start + step]), strict=True):
                whole.update(part)
            report = self._report(attack, arms, verdicts, tried, began)
            if self.settled and self.settled(report):
                break
        return report

    def _report(
        self, attack: str, arms: Sequence[Arm], verdicts: Sequence[Verdicts], tried: Sequence[ArmRecord], began: float
    ) -> AttackReport:
        plain = _outcomes(self.no_attack)
        p_values = [mcnemar(_outcomes(part), plain) for part in verdicts]
        records = [
            self.arm_record(arm, "test", part).model_copy(update={"p_value": p, "p_holm": corrected})
            for arm, part, p, corrected in zip(arms, verdicts, p_values, holm(p_values), strict=True)
        ]
        measured = records[0].outcomes
        union = sum(any(record.outcomes[name] in BYPASSES for record in records) for name in measured)
        return AttackReport(
            attack=attack,
            tried=list(tried),
            arms=records,
            union=Rate.of(union, len(measured)),
            seconds=round(time.monotonic() - began, 1),
        )

    def arm_record(self, arm: Arm, split: Split, verdicts: Verdicts) -> ArmRecord:
        outcomes = _outcomes(verdicts)
        listed = list(outcomes.values())
        some = next(iter(arm.by_prompt.values()), arm.interventions)
        judges = self.responder.judges
        return ArmRecord(
            label=arm.label,
            interventions=[describe(edit) for edit in arm.interventions],
            neurons=len({edit.neuron for edit in some if hasattr(edit, "neuron")}),
            prefix=arm.prefix,
            split=split,
            outcomes=outcomes,
            by_judge={
                judge: {name: verdict.outcomes[place] for name, verdict in verdicts.items()}
                for place, judge in enumerate(judges)
                if len(judges) > 1
            },
            **{kind: Rate.of(listed.count(kind), len(listed)) for kind in (*OUTCOMES, "unjudged")},
        )


def _outcomes(verdicts: Verdicts) -> dict[str, Outcome]:
    return {name: verdict.outcome for name, verdict in verdicts.items()}


def judges_agreement(records: Sequence[ArmRecord]) -> AgreementRecord | None:
    """How far the two judges agree over all these arms; None where there is one judge, or nothing that both judged."""
    pairs = [list(record.by_judge.values()) for record in records if record.by_judge]
    sides = [
        {f"{number}/{name}": outcome for number, pair in enumerate(pairs) for name, outcome in pair[side].items()}
        for side in (0, 1)
    ]
    if all("unjudged" in both for both in zip(sides[0].values(), sides[1].values(), strict=True)):
        return None
    found = agreement(*sides)
    return AgreementRecord(rate=found.rate, kappa=found.kappa, unjudged=found.unjudged)


# -- the attacks ---------------------------------------------------------------------------------------------------


def constant(suite: Suite) -> AttackReport:
    """The worst clamp of the search, other values of its neuron, the other worst neurons, and the recipe's clamps."""
    began = time.monotonic()
    worst = suite.search.worst.clamp
    values = [worst.value * factor for factor in suite.settings.sweep]
    others = [clamp for clamp in suite.search.best_clamps(suite.settings.top) if clamp.neuron != worst.neuron]
    clamps = [worst, *(Clamp(worst.neuron, value) for value in values), *others]
    clamps += map(Clamp.parse, suite.attack.clamps)
    tried = [
        suite.arm_record(build.constant(a.clamp.neuron, a.clamp.value), "selection", a.verdicts)
        for a in sorted(suite.search.finals, key=lambda a: -a.share("comply"))
    ]
    return suite.report("constant", [build.constant(c.neuron, c.value) for c in dict.fromkeys(clamps)], tried, began)


def anchor(suite: Suite) -> AttackReport:
    """The anchored clamp of the worst neurons, whose value follows the neuron's natural activation."""
    began = time.monotonic()
    anchors = []
    for clamp in suite.search.best_clamps(suite.settings.reference_neurons):
        located = suite.scores.candidate(clamp.neuron)
        if located.harmful != located.harmless:
            anchors += [Anchor(clamp, located.harmful, located.harmless, k) for k in suite.settings.anchor_k]
    if not anchors:
        raise MeasurementError("none of the worst neurons tells harmful from harmless prompts: nothing to anchor to")
    prompts = [*suite.bench.harmful["selection"], *suite.bench.harmful["test"]]
    arms = build.anchored(suite.chat_model, anchors, prompts, suite.responder.batch_size)
    return _chosen(suite, "anchor", arms, began)


def zero(suite: Suite) -> AttackReport:
    """Zero ablation of one neuron, as a reference point: it is not the attack."""
    arms = [build.scaled([neuron], 0.0, f"zero {neuron}") for neuron in _worst_neurons(suite)]
    return _chosen(suite, "zero", arms, time.monotonic())


def mean(suite: Suite) -> AttackReport:
    """Clamp one neuron to its mean on harmless prompts."""
    arms = []
    for neuron in _worst_neurons(suite):
        value = suite.scores.candidate(neuron).harmless
        arms.append(Arm(f"mean {neuron} {value:.4g}", (Clamp(neuron, value),)))
    return _chosen(suite, "mean", arms, time.monotonic())


def scale(suite: Suite) -> AttackReport:
    """Multiply one neuron."""
    arms = [
        build.scaled([neuron], factor, f"scale {neuron} x{factor:g}")
        for neuron in _worst_neurons(suite)
        for factor in suite.settings.scales
    ]
    return _chosen(suite, "scale", arms, time.monotonic())


def topk(suite: Suite) -> AttackReport:
    """Silence the k neurons of largest contrast (CNA, arXiv 2605.12290): `topk_share` of all, and a curve over k."""
    began = time.monotonic()
    total = suite.chat_model.neurons.count
    published, most = (max(1, round(share * total)) for share in (suite.settings.topk_share, suite.settings.most_share))
    sizes = [published, *(2**n for n in range(most.bit_length()) if 2**n < most), most]
    ranking = suite.contrast.ranking("contrast").tolist()
    arms = [build.scaled(_neurons(suite, ranking[:k]), 0.0, f"zero top {k}") for k in dict.fromkeys(sizes)]
    return suite.report("topk", arms, [], began)


def prune(suite: Suite) -> AttackReport:
    """Silence neurons found by effect size or activation shift (SafeNeuron, arXiv 2602.12158), or in several passes,
    each of which finds its part anew in the model pruned so far (NeuronGuard, arXiv 2608.23959)."""
    began = time.monotonic()
    most = max(1, round(suite.settings.most_share * suite.chat_model.neurons.count))
    arms = [
        build.scaled(_neurons(suite, suite.contrast.ranking(locator)[:most].tolist()), 0.0, f"zero {most} by {locator}")
        for locator in ("effect_size", "activation_shift")
    ]
    passes = suite.settings.prune_passes
    pruned: dict[Neuron, None] = {}
    for number in range(passes):
        silenced = tuple(Scale(neuron, 0.0) for neuron in pruned)
        contrast = suite.bench.contrast(silenced) if silenced else suite.contrast
        goal = max(1, round(most * (number + 1) / passes))
        for neuron in _neurons(suite, contrast.ranking("effect_size")[: 2 * most].tolist()):
            if len(pruned) < goal:
                pruned.setdefault(neuron)
    arms.append(build.scaled(pruned, 0.0, f"zero {len(pruned)} found anew in {passes} passes"))
    return suite.report("prune", arms, [], began)


def direction(suite: Suite) -> AttackReport:
    """Ablate one layer's refusal direction from all layers (Arditi et al., arXiv 2406.11717): no neuron attack, but
    the yardstick. The layer is chosen by log-odds and coherence first, then by outcomes."""
    began = time.monotonic()
    layers = max(1, round(suite.settings.direction_layers * len(suite.directions)))
    arms = {
        arm.interventions[0]: arm
        for layer in range(layers)
        for arm in [build.ablated(suite.directions[layer].expand_as(suite.directions), f"direction of layer {layer}")]
    }
    limit = suite.attack.max_benign_rise
    screened = screen_fairly(
        suite.chat_model, list(arms), suite.bench.probe("selection"), suite.bench.phrases,
        suite.responder.batch_size, limit, "screen directions",
    )  # fmt: skip
    if not screened:
        raise MeasurementError("no refusal direction can be ablated: nothing is finite")
    coherent = [s for s in screened if s.benign_rise <= limit]
    if not coherent:
        logger.warning("direction: ablation wrecks the language whatever the layer; taking those that do so least")
    order = sorted(coherent, key=lambda s: s.log_odds) or sorted(screened, key=lambda s: s.benign_rise)
    return _chosen(suite, "direction", [arms[s.clamp] for s in order[: 2 * suite.attack.finalists]], began)


def layer_directions(suite: Suite) -> AttackReport:
    """Ablate each layer's own refusal direction in that layer."""
    arms = [build.ablated(suite.directions, "each layer's direction")]
    return suite.report("layer_directions", arms, [], time.monotonic())


def prefill(suite: Suite) -> AttackReport:
    """Begin the answer for the model, affirmatively: no neuron attack; no neuron defence may make it worse."""
    return _chosen(suite, "prefill", [build.prefilled(prefix) for prefix in suite.settings.prefixes], time.monotonic())


def _chosen(suite: Suite, attack: str, arms: Sequence[Arm], began: float) -> AttackReport:
    worst, tried = suite.choose(arms)
    return suite.report(attack, [worst], tried, began)


def _worst_neurons(suite: Suite) -> list[Neuron]:
    return [clamp.neuron for clamp in suite.search.best_clamps(suite.settings.reference_neurons)]


def _neurons(suite: Suite, columns: Sequence[int]) -> Iterator[Neuron]:
    return (neuron_at(suite.chat_model, column) for column in columns)


ATTACKS: dict[str, Callable[[Suite], AttackReport]] = {
    attack.__name__: attack
    for attack in (constant, anchor, zero, mean, scale, topk, prune, direction, layer_directions, prefill)
}
