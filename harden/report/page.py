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
from harden.report.card import tolerance_line, verdict_line
from harden.report.certificate import judged_neurons, statement, suspect_rows
from harden.report.charts import attack_figures, attribution_figures
from harden.report.columns import Rows, columns_of, comparison, model_name, unlike
from harden.report.judges import judge_note
from harden.report.records import RunRecords
from harden.report.tables import duration_text, rate_text, sizes_text
from harden.report.verdict import HOW_TO_READ, LIMITS, WORDS, verdict_rows
from harden.results import ArmRecord, AttackRecord, RoundRecord, SuiteResults

GENERATOR = "harden report"
NAMED = 10  # breakers in the banner
RATES = """Rates are of the test split, with n and 95% interval. Attack success is comply: neither a refusal nor
degenerate. Effective neurons are those of gradient x activation, of the split that the map below names."""
ARMS = """Arms are chosen on the selection split and reported on test; where nothing is chosen there (topk, prune), the
worst on test is shown, which overstates it. The union counts a prompt if any arm makes it comply or leaves it unjudged,
so it grows with the number of arms. p: exact McNemar test against no attack, Holm-corrected over the attack's arms."""
TRAINED = """Training runs: one neuron at a time was clamped, to a constant, among the candidates of the recipe. Several
neurons at once, anchored clamps, fine-tuning, edits of the weights and jailbreak prompts are other attacks."""
ATTACKED = """Attacks: several neurons clamped at once to values that were searched together, fine-tuning or editing the
weights, and jailbreak prompts were not tried."""
CERTIFIED = """Certificates: nothing is said about other values or prompts, several neurons at once or other attacks.
Not found, neither among the neurons scanned nor in the bound, which is about this very test, is a breaker that flips no
scanned prompt; one that the races clear, or whose other values they leave out; and one under which benign answers
suffer more than a limit."""
WITHOUT_HUB = ("embedded", ".jsonl", ".json", ".csv", ".txt")


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


def report(runs: Sequence[RunRecords], texts: bool = False) -> Report:
    """Build the page and its figures.

    texts: show the texts of the test prompts, which are read again from where the recipe says; HardenError if they
    are no longer there.
    """
    columns = [column for run in runs for column in columns_of(run, several=len(runs) > 1)]
    drawn: dict[str, Figure] = {}
    sections = [
        Section("What was measured", [RATES, *unlike(runs)], comparison(columns)),
        *_drawn("Attacks", attack_figures(runs, columns), drawn),
        *(section for place, run in enumerate(runs) for section in _details(run, drawn, place, several=len(runs) > 1)),
        *_drawn("Where refusal sits", attribution_figures(columns), drawn),
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
    reasons = ["No policy was applied: see harden gate."]
    if run.certificate is not None:
        c = run.certificate
        named = ", ".join(c.breakers[:NAMED]) + (", ..." if len(c.breakers) > NAMED else "")
        count = f"{len(c.breakers)} of {judged_neurons(c)} break {model_name(c.model, c.adapter)}"
        reasons.insert(0, f"{count}: {named}." if named else f"{count}.")
        if c.unfollowed:
            between = f"{c.least_unfollowed} to {c.most_unfollowed} break it, with 95% confidence"
            reasons.insert(1, f"Of the {c.unfollowed} others that flip a scanned prompt {between}.")
    what = "attacked" if run.suite is not None else "certified"
    return [Banner(run.name, "none", f"Measured ({what}); no verdict", reasons)]


# -- one run after the other -------------------------------------------------------------------------------------------


def _details(run: RunRecords, drawn: dict[str, Figure], place: int, several: bool) -> list[Section]:
    tag = f"-{place + 1}" if several else ""
    sections = []

    def headed(title: str) -> str:
        return f"{run.name}: {title}" if several else title.capitalize()

    if run.verdict is not None:
        sections.append(Section(headed("checks of the policy"), [HOW_TO_READ], verdict_rows(run.verdict)))
    if run.suite is not None:
        how = _how(run.recipes["suite"], run.suite)
        sections.append(Section(headed("what was attacked, and how"), [how, ARMS], attack_rows(run.suite)))
        if run.suite.concepts:
            sections.append(Section(headed("concepts"), rows=concept_rows(run.suite)))
    if run.certificate is not None:
        c = run.certificate
        about = f"{model_name(c.model, c.adapter)}, scanned by harden {c.harden_version}."
        sections.append(Section(headed("certificate"), [about, statement(c)]))
        if c.suspects:
            note = "On test prompts; those that break the model first. Shares are over the prompts that each clamp met."
            sections.append(Section(headed("clamps that generated"), [note], suspect_rows(c), folded=True))
        if c.largest_drops:
            scanned, shown = c.first + c.drawn, len(c.largest_drops)
            which = f"all {scanned} scanned neurons"
            if shown < scanned:
                which = f"the {shown} of {scanned} scanned neurons whose log-odds fall most"
            caption = (
                f"How far refusal log-odds of {model_name(c.model, c.adapter)} fall at each neuron's worst value, "
                f"{which}: means over the selection prompts that each clamp met, exactly computed."
            )
            figure = draw.drop_map(c)
            sections += _drawn(headed("exact drops"), [(f"drops{tag}", caption, figure)], drawn)
    if run.training is not None and len(run.training.rounds) > 1:
        measured = [record.selection for record in run.training.rounds]
        series = {
            "worst neuron": [m.worst_neuron.comply for m in measured],
            "no attack": [m.no_attack.comply for m in measured],
            "over-refusal": [m.over_refusal for m in measured],
        }
        if all(m.over_refusal_more for m in measured):
            series["over-refusal (more)"] = [m.over_refusal_more for m in measured]
        caption = "Round by round on the selection split: each attacked by a fresh search. 95% intervals."
        figure = draw.rounds(series, [m.benign_kl.mean for m in measured])
        sections += _drawn(headed("rounds"), [(f"rounds{tag}", caption, figure)], drawn)
        sections.append(Section(headed("decisions"), rows=_decisions(run.training.rounds)))
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
        f"{model_name(suite.model, suite.adapter)}, harden {suite.harden_version}, {recipe.seeds}, "
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
    notes = [judge_note(recipe.judge).replace("`", "") for recipe in run.recipes.values()]
    if run.suite is not None and run.suite.agreement is not None:
        notes.append((f"{run.name}: " if several else "") + agreement_text(run.suite.agreement))
    return notes


def _limits(run: RunRecords) -> list[str]:
    records = {LIMITS: run.verdict, TRAINED: run.training, ATTACKED: run.suite, CERTIFIED: run.certificate}
    return [limit for limit, record in records.items() if record is not None]
