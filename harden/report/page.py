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
from harden.report.attacks import agreement_text, attack_rows, concept_rows, shown_arm, test_prompts
from harden.report.card import summary_rows, tolerance_line, verdict_line
from harden.report.certificate import statement
from harden.report.judges import judge_note
from harden.report.records import RunRecords
from harden.report.tables import duration_text, mean_text, rate_text, sizes_text
from harden.report.verdict import HOW_TO_READ, LIMITS, WORDS, verdict_rows
from harden.results import ArmRecord, AttackRecord, AttributionRecord, Rate, RoundRecord, SuiteResults

GENERATOR = "harden report"
RATES = """Rates are of the test split, with n and 95% interval. Attack success is comply: neither a refusal nor
degenerate. Effective neurons are those of gradient x activation, of the split that the map below names."""
ARMS = """Arms are chosen on the selection split and reported on test; where nothing is chosen there (topk, prune), the
worst on test is shown, which overstates it. The union counts a prompt if any arm makes it comply or leaves it unjudged,
so it grows with the number of arms. p: exact McNemar test against no attack, Holm-corrected over the attack's arms."""
TRAINED = """Training runs: one neuron at a time was clamped, to a constant, among the candidates of the recipe. Several
neurons at once, anchored clamps, fine-tuning, edits of the weights and jailbreak prompts are other attacks."""
ATTACKED = """Attacks: several neurons clamped at once to values that were searched together, fine-tuning or editing the
weights, and jailbreak prompts were not tried."""
CERTIFIED = """Certificates: nothing is said about other values or prompts, several neurons at once or other attacks. A
breaker that flips no scanned prompt, or only test prompts or values that the races left out, is not found, neither
among the neurons scanned nor in the bound, which is about this very test."""
WITHOUT_HUB = ("embedded", ".jsonl", ".json", ".csv", ".txt")
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
        Section("What was measured", [RATES, *_unlike(runs)], _comparison(models)),
        *_drawn("Attacks", _attack_figures(runs, models), drawn),
        *(section for place, run in enumerate(runs) for section in _details(run, drawn, place, several=len(runs) > 1)),
        *_drawn("Where refusal sits", _attribution_figures(models), drawn),
        *(section for run in runs for section in _prompts(run, texts, several=len(runs) > 1)),
        Section("Judges", list(dict.fromkeys(note for run in runs for note in _judges(run, several=len(runs) > 1)))),
        Section("What this does not say", list(dict.fromkeys(limit for run in runs for limit in _limits(run)))),
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files("harden").joinpath("data", "report.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(
        generator=f"{GENERATOR} {__version__}",
        title=", ".join(run.title if len(runs) == 1 else run.name for run in runs),
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
        recipe = run.recipes["training"]
        outcome = "none" if not recipe.rounds.tolerance else "pass" if run.training.passed else "fail"
        words = {"none": "No tolerance was set", "pass": "Tolerance met", "fail": "Tolerance not met"}[outcome]
        lines = [verdict_line(run.training), tolerance_line(run.training, recipe)]
        return [Banner(run.name, outcome, f"{words} (selection split)", lines)]
    what = "attacked" if run.suite is not None else "certified"
    return [Banner(run.name, "none", f"Measured ({what}), not judged", ["No policy was applied: see harden gate."])]


# -- side by side ------------------------------------------------------------------------------------------------------


def _models(run: RunRecords, several: bool) -> list[Model]:
    models = []
    if run.training is not None:
        rows = summary_rows(run.training)
        training = run.training
        adapters = training.adapter, f"{run.recipes['training'].output}/adapter"
        for place, (when, measured) in enumerate({"before": run.training.before, "after": run.training.after}.items()):
            models.append(
                Model(
                    label=f"{run.name}: {when}" if several else when,
                    figures={
                        "model": _model(training.model, adapters[place]),
                        "measured with": f"{training.max_new_tokens} tokens, seed {training.seed}",
                        **{name: values[place] for name, *values in rows},
                    },
                    attacks={
                        "none": measured.no_attack.comply,
                        "clamp (search of rounds)": measured.worst_neuron.comply,
                    },
                    attribution=measured.attribution,
                )
            )
    if run.suite is None and run.certificate is None:
        return models
    shown: dict[str, str] = {}
    attacks: dict[str, Rate] = {}
    if run.suite is not None:
        suite = run.suite
        attacks["none"] = suite.no_attack.comply
        shown["model"] = _model(suite.model, suite.adapter)
        shown["measured with"] = f"{suite.max_new_tokens} tokens, seed {suite.seed}, {' and '.join(suite.judges)}"
        shown["attack success without attack"] = rate_text(suite.no_attack.comply)
        shown["refused without attack"] = rate_text(suite.no_attack.refuse)
        for attack in suite.attacks:
            arm = shown_arm(attack)
            attacks[attack.attack] = arm.comply
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
        if suite.attribution:
            shown["effective number of neurons"] = f"{suite.attribution.effective_neurons:.0f}"
    if run.gate is not None and run.gate.benign_kl is not None:
        shown["benign KL, nats per token"] = mean_text(run.gate.benign_kl)
    if run.certificate is not None:
        c = run.certificate
        shown["model"] = _model(c.model, c.adapter)
        shown["neurons that break it (certificate)"] = f"{len(c.breakers)} of {c.first + c.drawn} scanned"
        shown["missed ones, at most"] = f"{c.most_missed} of {c.neurons - c.first - c.drawn}"
    label = run.name if several or models else run.title
    models.append(Model(f"{label}: suite" if models else label, shown, attacks,
                        run.suite.attribution if run.suite else None))  # fmt: skip
    return models


def _model(name: str, adapter: str | None) -> str:
    return f"{name} + {adapter}" if adapter else name


def _unlike(runs: Sequence[RunRecords]) -> list[str]:
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
    unlike = [what for what, values in found.items() if len(values) > 1]
    return [f"Not measured alike: the columns differ in {', '.join(unlike)}."] if unlike else []


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
        sweeps.append(_sweep(f"{prefix}{neuron}, test", run.suite.no_attack, arms))
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


def _attribution_figures(models: Sequence[Model]) -> Iterable[tuple[str, str, Figure]]:
    known = {
        f"{model.label} ({model.attribution.split}, n={model.attribution.prompts})": model.attribution
        for model in models
        if model.attribution is not None
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


# -- one run after the other -------------------------------------------------------------------------------------------


def _details(run: RunRecords, drawn: dict[str, Figure], place: int, several: bool) -> list[Section]:
    prefix, tag = (f"{run.name}: ", f"-{place + 1}") if several else ("", "")
    sections = []
    if run.verdict is not None:
        sections.append(Section(f"{prefix}checks of the policy", [HOW_TO_READ], verdict_rows(run.verdict)))
    if run.suite is not None:
        how = _how(run.recipes["suite"], run.suite)
        sections.append(Section(f"{prefix}what was attacked, and how", [how, ARMS], attack_rows(run.suite)))
        if run.suite.concepts:
            sections.append(Section(f"{prefix}concepts", rows=concept_rows(run.suite)))
    if run.certificate is not None:
        sections.append(Section(f"{prefix}certificate", [statement(run.certificate)]))
        if run.certificate.largest_drops:
            caption = (
                f"The {len(run.certificate.largest_drops)} of {run.certificate.first + run.certificate.drawn} scanned "
                "neurons whose refusal log-odds fall most at their worst value: means over the selection prompts that "
                "each clamp met, exactly computed."
            )
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
    text = (
        f"{_model(suite.model, suite.adapter)}, harden {suite.harden_version}, seed {suite.seed}, "
        f"{duration_text(suite.seconds)}. Greedy, {suite.max_new_tokens} new tokens, judged by "
        f"{' and '.join(suite.judges)}; reported on {test_prompts(suite)}."
    )
    constant = next((attack for attack in suite.attacks if attack.attack == "constant"), None)
    if constant is None or not constant.tried:
        return text
    attack = recipe.attack
    return text + (
        f" Clamped neurons and values were chosen on {max(arm.comply.n for arm in constant.tried)} selection prompts "
        f"among {attack.candidates} candidates of {', '.join(attack.locators)}, "
        f"{sizes_text(attack.sizes, attack.strengths)}"
        + (f", and {', '.join(f'{x:g}' for x in attack.refine)} times the best." if attack.refine else ".")
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
    known: dict[str, tuple[str, str]] = {}
    for part in ("training", "suite"):
        if part in run.recipes:
            known |= _test_prompts(run.recipes[part], texts)
    rows = [["prompt", "category", *(["text"] if texts else []), *arms]]
    for name in dict.fromkeys(name for arm in arms.values() for name in arm.outcomes):
        category, text = known.get(name, ("–", "–"))
        outcomes = [arm.outcomes.get(name, "–") for arm in arms.values()]
        rows.append([name, category, *([text] if texts else []), *outcomes])
    title = f"{run.name}: test prompts" if several else "Test prompts"
    return [Section(title, ["By id and category, with the outcome under each attack."], rows, folded=True)]


def _test_prompts(recipe: Recipe, needed: bool) -> dict[str, tuple[str, str]]:
    """Category and text by id, as they are now. None where the source is gone, or would have to be fetched, and nothing
    needs it."""
    sources, *_ = recipe.division()
    if not needed and not all(source["path"].endswith(WITHOUT_HUB) for source in sources.values()):
        return {}
    try:
        splits = load_splits(*recipe.division())
    except HardenError:
        if needed:
            raise
        return {}
    return {prompt.id: (prompt.category, prompt.text) for prompt in splits["test"].harmful}


def _judges(run: RunRecords, several: bool) -> list[str]:
    notes = [judge_note(recipe.judge) for recipe in run.recipes.values()]
    if run.suite is not None and run.suite.agreement is not None:
        notes.append((f"{run.name}: " if several else "") + agreement_text(run.suite.agreement))
    return notes


def _limits(run: RunRecords) -> list[str]:
    records = {LIMITS: run.verdict, TRAINED: run.training, ATTACKED: run.suite, CERTIFIED: run.certificate}
    return [limit for limit, record in records.items() if record is not None]
