"""The models of a report side by side: a column for each, with its figures as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harden.report.attacks import shown_arm
from harden.report.card import summary_rows
from harden.report.certificate import judged_neurons
from harden.report.records import RunRecords
from harden.report.tables import mean_text, rate_text
from harden.results import AttributionRecord, Certificate, Rate, SuiteResults

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Column:
    """One model that was measured."""

    label: str
    figures: Mapping[str, str]
    attacks: Mapping[str, Rate]
    attribution: AttributionRecord | None


def columns_of(run: RunRecords, several: bool) -> list[Column]:
    """Those of a run folder: before and after training, and what its suite or certificate measured. several: it
    stands beside other folders, so labels have its name."""
    columns = _training_columns(run, several) if run.training is not None else []
    models = list(dict.fromkeys(filter(None, (_model_of(run.suite), _model_of(run.certificate)))))
    for model in models:  # usually one: both parts are of the same
        suite = run.suite if _model_of(run.suite) == model else None
        certificate = run.certificate if _model_of(run.certificate) == model else None
        name = run.name if several or columns or len(models) > 1 else run.title
        label = f"{name}: {'suite' if suite else 'certificate'}" if columns or len(models) > 1 else name
        columns.append(_measured_column(run, suite, certificate, label))
    return columns


def _model_of(part: SuiteResults | Certificate | None) -> tuple[str, str | None] | None:
    return None if part is None else (part.model, part.adapter and os.path.normpath(part.adapter))


def _training_columns(run: RunRecords, several: bool) -> list[Column]:
    training, recipe = run.training, run.recipes["training"]
    rows = summary_rows(training)
    adapters = training.adapter, f"{recipe.output}/adapter"
    return [
        Column(
            label=f"{run.name}: {when}" if several else when,
            figures={
                "model": model_name(training.model, adapters[place]),
                "measured with": f"{training.max_new_tokens} tokens, {recipe.seeds}",
                **{name: values[place] for name, *values in rows},
            },
            attacks={"none": measured.no_attack.comply, "clamp (search of rounds)": measured.worst_neuron.comply},
            attribution=measured.attribution,
        )
        for place, (when, measured) in enumerate({"before": training.before, "after": training.after}.items())
    ]


def _measured_column(
    run: RunRecords, suite: SuiteResults | None, certificate: Certificate | None, label: str
) -> Column:
    """Of a suite, of a gate's KL and of a certificate, as far as there are any; both are of one model."""
    shown: dict[str, str] = {}
    attacks: dict[str, Rate] = {}
    if suite is not None:
        attacks = {"none": suite.no_attack.comply}
        attacks |= {attack.attack: shown_arm(attack).comply for attack in suite.attacks}
        shown |= _suite_figures(suite, run.recipes["suite"].seeds)
    if run.gate is not None and run.gate.benign_kl is not None:
        shown["benign KL, nats per token"] = mean_text(run.gate.benign_kl)
    if certificate is not None:
        c = certificate
        left_out = c.neurons - c.first - c.drawn
        shown["model"] = model_name(c.model, c.adapter)
        shown["neurons that break it (certificate)"] = f"{len(c.breakers)} of {judged_neurons(c)}"
        if c.unfollowed:
            between = f"{c.least_unfollowed} to {c.most_unfollowed} of {c.unfollowed}"
            shown["those that flip a prompt and were not followed, with 95% confidence"] = between
        shown["missed ones, at most"] = f"{c.most_missed} of {left_out}" if left_out else "no neuron left out"
    return Column(label, shown, attacks, suite.attribution if suite else None)


def _suite_figures(suite: SuiteResults, seeds: str) -> dict[str, str]:
    shown = {
        "model": model_name(suite.model, suite.adapter),
        "measured with": f"{suite.max_new_tokens} tokens, {seeds}, {' and '.join(suite.judges)}",
        "attack success without attack": rate_text(suite.no_attack.comply),
        "refused without attack": rate_text(suite.no_attack.refuse),
    }
    for attack in suite.attacks:
        arm = shown_arm(attack)
        if attack.attack == "constant":
            shown |= {
                "worst single neuron": arm.label.removeprefix("clamp ").replace(" ", " clamped to "),
                "its attack success": rate_text(arm.comply),
                "its degenerate share": rate_text(arm.degenerate),
                "union over clamps": f"{rate_text(attack.union)}, {len(attack.arms)} clamps",
            }
        else:
            chosen = "" if attack.tried or len(attack.arms) == 1 else f", worst of {len(attack.arms)} on test"
            shown[f"attack success, {attack.attack}"] = rate_text(arm.comply) + chosen
    shown["over-refusal (benign look-alikes)"] = rate_text(suite.over_refusal)
    if suite.over_refusal_more:
        shown["over-refusal (more look-alikes)"] = rate_text(suite.over_refusal_more)
    if suite.attribution:
        shown["effective number of neurons"] = f"{suite.attribution.effective_neurons:.0f}"
    return shown


def model_name(name: str, adapter: str | None) -> str:
    return f"{name} + {adapter}" if adapter else name


def unlike(runs: Sequence[RunRecords]) -> list[str]:
    """A warning where figures that stand side by side were not measured alike."""
    found: dict[str, set] = {"prompts": set(), "judges": set(), "number of new tokens": set()}
    met: dict[str, set[int]] = {}
    for run in runs:
        if run.suite is not None:
            found["prompts"].add(frozenset(run.suite.no_attack.outcomes))
            for attack in run.suite.attacks:
                met.setdefault(attack.attack, set()).add(attack.union.n)
            found["judges"].add(tuple(run.suite.judges))
            found["number of new tokens"].add(run.suite.max_new_tokens)
        if run.training is not None:
            found["prompts"].add(frozenset(run.training.after.no_attack.outcomes))
            found["number of new tokens"].add(run.training.max_new_tokens)
    found |= {f"prompts that {attack} met": sizes for attack, sizes in met.items()}
    differing = [what for what, values in found.items() if len(values) > 1]
    return [f"Not measured alike: the columns differ in {', '.join(differing)}."] if differing else []


def comparison(columns: Sequence[Column]) -> Rows:
    """The table, its heading first."""
    names = dict.fromkeys(name for column in columns for name in column.figures)
    rows = [[name, *(column.figures.get(name, "–") for column in columns)] for name in names]
    return [["", *(column.label for column in columns)], *rows]
