"""The report: one self-contained HTML page about one run folder or several, from their records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from harden import __version__
from harden.errors import HardenError
from harden.prompts import load_splits
from harden.recipe import Recipe
from harden.report import figures as draw
from harden.report.attacks import agreement_text, attack_rows, shown_arm
from harden.report.card import summary_rows, verdict_line
from harden.report.certificate import statement
from harden.report.judges import judge_note
from harden.report.records import RunRecords
from harden.report.tables import rate_text
from harden.report.verdict import HOW_TO_READ, LIMITS, WORDS, verdict_rows
from harden.results import ArmRecord, AttackRecord, AttributionRecord, Rate, RoundRecord, SuiteResults

GENERATOR = "harden report"
OUTCOMES = ("refuse", "comply", "degenerate", "unjudged")
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What a reader meets in order; `rows` has its heading first."""

    title: str
    paragraphs: Sequence[str] = ()
    rows: Rows = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """Captions by name of the figure."""
    folded: bool = False


@dataclass(frozen=True)
class Report:
    html: str
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class Banner:
    """The verdict on one folder."""

    name: str
    kind: str
    """pass, fail, inconclusive or none; sets the colour."""
    headline: str
    reasons: Sequence[str]


@dataclass(frozen=True)
class Model:
    """One model that was measured: a column of the comparison."""

    label: str
    figures: Mapping[str, str]
    attacks: Mapping[str, Rate]
    attribution: AttributionRecord | None


def report(runs: Sequence[RunRecords], texts: bool = False) -> Report:
    """Build the page and its figures.

    texts: show the texts of the test prompts, which are read again from where the recipe says; HardenError if they
    are no longer there.
    """
    models = [model for run in runs for model in _models(run, several=len(runs) > 1)]
    drawn: dict[str, Figure] = {}
    sections = [
        Section("What was measured", ["Rates are of the test split, with n and 95% interval."], _comparison(models)),
        *_drawn("Attacks", _attack_figures(runs, models), drawn),
        *(section for run in runs for section in _details(run, drawn, several=len(runs) > 1)),
        *_drawn("Where refusal sits", _attribution_figures(models), drawn),
        *(section for run in runs for section in _prompts(run, texts, several=len(runs) > 1)),
        Section("Judges", list(dict.fromkeys(note for run in runs for note in _judges(run)))),
        Section("What this does not say", [LIMITS]),
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files("harden").joinpath("data", "report.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(
        generator=f"{GENERATOR} {__version__}",
        title=", ".join(run.recipe.name if len(runs) == 1 else run.name for run in runs),
        banners=[banner for run in runs for banner in _banners(run)],
        sections=sections,
        drawings={name: Markup(draw.svg(figure, name)) for name, figure in drawn.items()},
    )
    return Report(html, drawn)


def _drawn(title: str, made: Iterable[tuple[str, str, Figure]], drawn: dict[str, Figure]) -> list[Section]:
    """A section of figures (name, caption, figure), which are added to `drawn`; none where there are none."""
    found = list(made)
    drawn |= {name: figure for name, _, figure in found}
    return [Section(title, figures={name: caption for name, caption, _ in found})] if found else []


# -- the verdict -------------------------------------------------------------------------------------------------------


def _banners(run: RunRecords) -> list[Banner]:
    if run.verdict is not None:
        return [Banner(run.name, run.verdict.outcome, f"{WORDS[run.verdict.outcome]} by policy {run.verdict.policy}",
                       run.verdict.reasons)]  # fmt: skip
    if run.training is not None:
        met = run.training.passed
        headline = f"Tolerance {'met' if met else 'not met'} on the selection split"
        return [Banner(run.name, "pass" if met else "fail", headline, [verdict_line(run.training)])]
    what = "attacked" if run.suite is not None else "certified"
    return [Banner(run.name, "none", f"Measured ({what}), not judged", ["No policy was applied: see harden gate."])]


# -- side by side ------------------------------------------------------------------------------------------------------


def _models(run: RunRecords, several: bool) -> list[Model]:
    models = []
    if run.training is not None:
        rows = summary_rows(run.training)
        for place, (when, measured) in enumerate({"before": run.training.before, "after": run.training.after}.items()):
            models.append(
                Model(
                    label=f"{run.name}: {when}" if several else when,
                    figures={name: values[place] for name, *values in rows},
                    attacks={"none": measured.no_attack.comply, "constant": measured.worst_neuron.comply},
                    attribution=measured.attribution,
                )
            )
    if run.suite is None and run.certificate is None:
        return models
    shown: dict[str, str] = {}
    attacks: dict[str, Rate] = {}
    if run.suite is not None:
        attacks["none"] = run.suite.no_attack.comply
        shown["attack success without attack"] = rate_text(run.suite.no_attack.comply)
        shown["refused without attack"] = rate_text(run.suite.no_attack.refuse)
        for attack in run.suite.attacks:
            arm = shown_arm(attack)
            attacks[attack.attack] = arm.comply
            if attack.attack == "constant":
                shown |= {
                    "worst single neuron": arm.label.removeprefix("clamp ").replace(" ", " clamped to "),
                    "its attack success": rate_text(arm.comply),
                    "its degenerate share": rate_text(arm.degenerate),
                    f"union of {len(attack.arms)} clamps": rate_text(attack.union),
                }
            else:
                shown[f"attack success, {attack.attack}"] = rate_text(arm.comply)
        shown["over-refusal (benign look-alikes)"] = rate_text(run.suite.over_refusal)
        if run.suite.attribution:
            shown["effective number of neurons"] = f"{run.suite.attribution.effective_neurons:.0f}"
    if run.gate is not None and run.gate.benign_kl is not None:
        kl = run.gate.benign_kl
        shown["benign KL, nats per token"] = f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}]"
    if run.certificate is not None:
        c = run.certificate
        shown["neurons that break it (certificate)"] = f"{len(c.breakers)} of {c.first + c.drawn} scanned"
        shown["missed ones, at most"] = f"{c.most_missed} of {c.neurons - c.first - c.drawn}"
    label = run.name if several or models else run.recipe.name
    models.append(Model(f"{label}: suite" if models else label, shown, attacks,
                        run.suite.attribution if run.suite else None))  # fmt: skip
    return models


def _comparison(models: Sequence[Model]) -> Rows:
    names = dict.fromkeys(name for model in models for name in model.figures)
    rows = [[name, *(model.figures.get(name, "–") for model in models)] for name in names]
    return [["", *(model.label for model in models)], *rows]


# -- figures -----------------------------------------------------------------------------------------------------------


def _attack_figures(runs: Sequence[RunRecords], models: Sequence[Model]) -> Iterable[tuple[str, str, Figure]]:
    if any(len(model.attacks) > 1 for model in models):
        yield (
            "attacks",
            "Attack success (comply) by attack: the arm that was chosen on the selection split; of topk and prune, "
            "where nothing is chosen, the worst on test.",
            draw.attack_bars({model.label: model.attacks for model in models}),
        )
    sweeps = [sweep for run in runs for sweep in _sweeps(run, several=len(runs) > 1)]
    if sweeps:
        yield (
            "values",
            "What one clamped neuron does, by its value: too little leaves the refusal, too much leaves no language.",
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
            sweeps += _sweep_of_round(run.training.rounds[number], f"{prefix}{when}")
    constant = next((a for a in run.suite.attacks if a.attack == "constant"), None) if run.suite else None
    if run.suite is not None and constant is not None and constant.arms:
        neuron = _clamp(constant.arms[0])[0]
        rates: dict[float | None, Mapping[str, Rate]] = {None: _rates(run.suite.no_attack)}
        rates |= {_clamp(arm)[1]: _rates(arm) for arm in constant.arms if _clamp(arm)[0] == neuron}
        sweeps.append(draw.Sweep(f"{prefix}{neuron}, test split", rates))
    return [sweep for sweep in sweeps if len(sweep.rates) > 2]


def _sweep_of_round(record: RoundRecord, label: str) -> list[draw.Sweep]:
    neuron = record.selection.worst_neuron.neuron
    heats = [[attack for attack in heat if attack.neuron == neuron] for heat in (record.finals, record.first_heat)]
    largest = max(heats, key=len)
    n = largest[0].comply.n if largest else 0
    plain = record.selection.no_attack
    rates: dict[float | None, Mapping[str, Rate]] = {None: _rates(plain)}
    rates |= {attack.value: _rates(attack) for attack in largest}
    return [draw.Sweep(f"{label}: {neuron}, selection split, n={n}", rates)]


def _clamp(arm: ArmRecord) -> tuple[str, float]:
    _kind, neuron, value = arm.interventions[0].split()
    return neuron, float(value)


def _rates(record: ArmRecord | AttackRecord) -> dict[str, Rate]:
    return {kind: getattr(record, kind) for kind in OUTCOMES}


def _by_k(suite: SuiteResults) -> dict[int, Mapping[str, Rate]]:
    return {arm.neurons: _rates(arm) for attack in suite.attacks if attack.attack == "topk" for arm in attack.arms}


def _attribution_figures(models: Sequence[Model]) -> Iterable[tuple[str, str, Figure]]:
    known = {model.label: model.attribution for model in models if model.attribution is not None}
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


# -- one run after the other -------------------------------------------------------------------------------------------


def _details(run: RunRecords, drawn: dict[str, Figure], several: bool) -> list[Section]:
    prefix, tag = (f"{run.name}: ", f"-{run.name.replace('/', '-')}") if several else ("", "")
    sections = []
    if run.verdict is not None:
        sections.append(Section(f"{prefix}checks of the policy", [HOW_TO_READ], verdict_rows(run.verdict)))
    if run.suite is not None:
        sections.append(Section(f"{prefix}what was attacked, and how", [_how(run.recipe, run.suite)],
                                attack_rows(run.suite)))  # fmt: skip
    if run.certificate is not None:
        sections.append(Section(f"{prefix}certificate", [statement(run.certificate)]))
        if run.certificate.largest_drops:
            caption = "Scanned neurons whose refusal log-odds fall most at their worst value, exactly computed."
            figure = draw.drop_map(run.certificate)
            sections += _drawn(f"{prefix}exact drops", [(f"drops{tag}", caption, figure)], drawn)
    if run.training is not None and len(run.training.rounds) > 1:
        measured = [record.selection for record in run.training.rounds]
        series = {
            "worst neuron": [m.worst_neuron.comply for m in measured],
            "no attack": [m.no_attack.comply for m in measured],
            "over-refusal": [m.over_refusal for m in measured],
        }
        caption = "Round by round on the selection split: each attacked by a fresh search. 95% intervals."
        figure = draw.rounds(series, [m.benign_kl.mean for m in measured])
        sections += _drawn(f"{prefix}rounds", [(f"rounds{tag}", caption, figure)], drawn)
        sections.append(Section(f"{prefix}decisions", rows=_decisions(run.training.rounds)))
    return sections


def _decisions(rounds: Sequence[RoundRecord]) -> Rows:
    rows = [["round", "worst neuron (selection)", "its attack success", "prompts flipped", "decision"]]
    for record in rounds:
        worst = record.selection.worst_neuron
        name = f"{worst.neuron} at {worst.value:.4g}" if worst.neuron else "none"
        rows.append([str(record.number), name, rate_text(worst.comply), rate_text(record.most_flipped),
                     record.decision])  # fmt: skip
    return rows


def _how(recipe: Recipe, suite: SuiteResults) -> str:
    attack = recipe.attack
    return (
        f"{suite.model}{f' with the adapter {suite.adapter}' if suite.adapter else ''}, harden {suite.harden_version}, "
        f"seed {suite.seed}, {suite.seconds / 60:.0f} minutes. Neurons and values were chosen on "
        f"{attack.selection_prompts} selection prompts among {attack.candidates} candidates of "
        f"{', '.join(attack.locators)}, sizes {', '.join(f'{size:g}' for size in attack.sizes)}, and reported on "
        f"{suite.no_attack.comply.n} test prompts. Greedy, {suite.max_new_tokens} new tokens, judged by "
        f"{' and '.join(suite.judges)}."
    )


def _prompts(run: RunRecords, texts: bool, several: bool) -> list[Section]:
    """Every test prompt and what became of it, by id and category; texts only if asked for."""
    arms: dict[str, ArmRecord | AttackRecord] = {}
    if run.training is not None:
        before, after = run.training.before, run.training.after
        arms = {"before": before.no_attack, "before, clamped": before.worst_neuron,
                "after": after.no_attack, "after, clamped": after.worst_neuron}  # fmt: skip
    if run.suite is not None:
        arms["no attack"] = run.suite.no_attack
        arms |= {attack.attack: shown_arm(attack) for attack in run.suite.attacks}
    if not arms:
        return []
    known = _test_prompts(run.recipe, needed=texts)
    rows = [["prompt", "category", *(["text"] if texts else []), *arms]]
    for name in next(iter(arms.values())).outcomes:
        category, text = known.get(name, ("–", "–"))
        outcomes = [arm.outcomes.get(name, "–") for arm in arms.values()]
        rows.append([name, category, *([text] if texts else []), *outcomes])
    title = f"{run.name}: test prompts" if several else "Test prompts"
    return [Section(title, ["By id and category, with the outcome under each attack."], rows, folded=True)]


def _test_prompts(recipe: Recipe, needed: bool) -> dict[str, tuple[str, str]]:
    """Category and text by id; none where the source is gone and nothing needs it."""
    sources = {kind: getattr(recipe.prompts, kind).model_dump() for kind in ("harmful", "twins", "benign")}
    try:
        splits = load_splits(sources, recipe.prompts.train_share, recipe.prompts.selection_share, recipe.seed)
    except HardenError:
        if needed:
            raise
        return {}
    return {prompt.id: (prompt.category, prompt.text) for prompt in splits["test"].harmful}


def _judges(run: RunRecords) -> list[str]:
    notes = [judge_note(run.recipe.judge.min_gain)]
    if run.suite is not None and run.suite.agreement is not None:
        notes.append(agreement_text(run.suite.agreement))
    return notes
