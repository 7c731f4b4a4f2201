"""Which figures the records of a report give: name, caption and drawing of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from harden.report import figures as draw
from harden.report.columns import Column
from harden.report.records import RunRecords
from harden.results import ArmRecord, AttackRecord, Rate, SuiteResults

OUTCOMES = ("refuse", "comply", "degenerate", "unjudged")


def attack_figures(runs: Sequence[RunRecords], columns: Sequence[Column]) -> Iterable[tuple[str, str, Figure]]:
    if any(len(column.attacks) > 1 for column in columns):
        yield (
            "attacks",
            "Attack success (comply) by attack: the arm that was chosen on the selection split; of topk and prune, "
            "where nothing is chosen, the worst on test.",
            draw.attack_bars({column.label: column.attacks for column in columns if column.attacks}),
        )
    sweeps = [sweep for run in runs for sweep in _sweeps(run, several=len(runs) > 1)]
    if sweeps:
        yield (
            "values",
            "Outcomes by the value that one neuron is clamped to. The neuron was chosen on the selection split; clamps "
            "under which the model cannot speak may have been screened out before.",
            draw.outcomes_by_value(sweeps),
        )
    suites = {run.name: run.suite for run in runs if run.suite is not None}
    curves = {name: _by_k(suite) for name, suite in suites.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if curves:
        yield (
            "neurons",
            "Silencing the k neurons of largest contrast (CNA). Bands are 95% intervals.",
            draw.success_by_k(curves),
        )


def _sweeps(run: RunRecords, several: bool) -> list[draw.Sweep]:
    """The worst neuron at every value that it was clamped to, on one set of prompts."""
    prefix = f"{run.name}: " if several else ""
    sweeps = []
    if run.training is not None:
        for when, number in {"before": 0, "after": run.training.kept_round}.items():
            record = run.training.rounds[number]
            neuron = record.selection.worst_neuron.neuron
            heats = [{a.value: a for a in heat if a.neuron == neuron} for heat in (record.finals, record.first_heat)]
            sweeps.append(
                _sweep(f"{prefix}{when}: {neuron}, selection", record.selection.no_attack, max(heats, key=len))
            )
    constant = next((a for a in run.suite.attacks if a.attack == "constant"), None) if run.suite else None
    if run.suite is not None and constant is not None and constant.arms:
        neuron = _clamp(constant.arms[0])[0]
        arms = {_clamp(arm)[1]: arm for arm in constant.arms if _clamp(arm)[0] == neuron}
        sweeps.append(
            _sweep(f"{prefix}{'suite: ' if run.training is not None else ''}{neuron}, test", run.suite.no_attack, arms)
        )
    return [sweep for sweep in sweeps if len(sweep.rates) > 2]


def _sweep(
    label: str, plain: ArmRecord | AttackRecord, clamped: Mapping[float, ArmRecord | AttackRecord]
) -> draw.Sweep:
    """All on the prompts of the clamped ones, which may be the first of those that were run without attack."""
    prompts = next(iter(clamped.values()), plain).outcomes.keys() & plain.outcomes.keys()
    records = {None: plain, **clamped}
    rates = {}
    for value, record in records.items():
        listed = [record.outcomes[name] for name in prompts if name in record.outcomes]
        rates[value] = {kind: Rate.of(listed.count(kind), len(listed)) for kind in OUTCOMES}
    return draw.Sweep(f"{label}, n={len(prompts)}", rates)


def _clamp(arm: ArmRecord) -> tuple[str, float]:
    _kind, neuron, value = arm.interventions[0].split()
    return neuron, float(value)


def _rates(record: ArmRecord | AttackRecord) -> dict[str, Rate]:
    return {kind: getattr(record, kind) for kind in OUTCOMES}


def _by_k(suite: SuiteResults) -> dict[int, Mapping[str, Rate]]:
    return {arm.neurons: _rates(arm) for attack in suite.attacks if attack.attack == "topk" for arm in attack.arms}


def attribution_figures(columns: Sequence[Column]) -> Iterable[tuple[str, str, Figure]]:
    known = {
        f"{column.label} ({column.attribution.split}, n={column.attribution.prompts})": column.attribution
        for column in columns
        if column.attribution is not None
    }
    if not known:
        return
    yield (
        "attribution-map",
        "Refusal attribution (gradient x activation on the refusal log-odds) by layer and neuron; each cell is the "
        "largest of a run of neighbouring neurons.",
        draw.attribution_map(known),
    )
    yield (
        "attribution-spectrum",
        "How much of all attribution the k largest neurons hold. Spread alone is not robustness: what counts is what a "
        "clamp does.",
        draw.attribution_spectrum(known),
    )
