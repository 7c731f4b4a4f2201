"""Defences compared: each recipe trained from several seeds and attacked afresh by the same suite.

    python benchmarks/defences.py --output OUT [--recipes RECIPE.yaml ...] [--seeds 0 1 2] [--suite RECIPE.yaml] \\
        [--jobs 1] [--cells FILE.jsonl] [--train.steps 34 ...]

One round of training per recipe and seed, of as many steps as the recipe says: 66 to 198. Recipes that train under
clamps are told which clamps broke the model before, as in a run of theirs: those that flipped a selection prompt in
the suite's attack on it. Options of a recipe change all of them alike, the suite's too. Everything is a run folder
OUT/<name>/seed-<n>, goes on where it was interrupted, and is read again when it is complete; OUT/start/seed-0 is the
model before.

The figures of a finished cell are added to --cells (OUT/cells.jsonl), and a cell that is there is not run: that file is
all that must be kept to go on elsewhere. Those of docs/results.md, made with --model.dtype bfloat16, are in
benchmarks/measured/defences.jsonl.

--jobs N trains and attacks so many at once, each in a process of its own: a small model leaves most of a GPU idle.
Seconds per step then say nothing.

Prints two Markdown tables of what is finished, at first and after each cell, one row per recipe: the mean over the
seeds and, in brackets, the least and the most; rates and the rise of perplexity in percent, benign KL in nats per
token. All figures are of the test split, the same prompts for all seeds. Writes OUT/frontier.png: attack success
against benign KL and over-refusal; and OUT/plots/: the attacks in the folders of `PLOTTED`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harden.adapters import starting_model
from harden.attack.run import attack
from harden.attack.search import Search
from harden.entry import command_parser, guarded, start_logging
from harden.errors import HardenError, MeasurementError
from harden.generate import mean
from harden.interventions import Clamp
from harden.judges.embedded import RULES
from harden.measure import benign_divergence, perplexity
from harden.objective.spread import leverage_loss
from harden.policy import SUITE_VERSION
from harden.recipe import Recipe, load_recipe, read_overrides
from harden.report.attacks import shown_arm
from harden.report.page import report
from harden.report.records import read_run
from harden.report.tables import markdown_table
from harden.report.writing import write_plots
from harden.results import Mean, Record, SuiteResults, count_flips
from harden.rounds import Run
from harden.runfolder import RunFolder
from harden.schema import merge

RECIPES = Path(__file__).parents[1] / "recipes/smollm2-135m"
SEED = 0  # that of the brittle adapter, whose training met its train split: runs of all seeds keep to its test split
PLOTTED = ("start/seed-0", *(f"smollm2-135m-{name}/seed-1" for name in ("sft", "spread-only", "hardened")))
LEVERAGE_SIZES, LEVERAGE_PROMPTS = (-10.0, 10.0), 16


class Trained(Record):
    """What training did to a model, on the test split; the attacks are in `attack/`."""

    benign_kl: Mean
    perplexity_rise: float
    """Over the starting model's, as a share."""
    effective_neurons: float
    worst_leverage: float
    """Geometric mean over prompts: 8-norm over neurons and values of the predicted drop of the log-odds at a clamp of
    this model's own gaps, over softplus of the log-odds."""
    log_odds_harmful: float
    log_odds_twins: float
    seconds_per_step: float | None
    """Null for the starting model."""


class Cell(Record):
    """A recipe and a seed, finished."""

    recipe: str
    seed: int
    measured: str
    """Digest of the recipe, the suite's, what training was told, and the versions of the judge and the suite."""
    figures: dict[str, float | None]
    breakers: tuple[str, ...] = ()
    """Of the starting model: clamps that flip selection prompts."""


def main() -> int:
    parser = command_parser("benchmarks/defences.py", __doc__)
    known = [RECIPES / "short.yaml", RECIPES / "harden.yaml", *sorted((RECIPES / "baselines").glob("*.yaml"))]
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", type=Path, default=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--suite", type=Path, default=RECIPES / "compare.yaml", help="the recipe of the attacks")
    parser.add_argument("--cells", type=Path, help="where the figures of finished cells are; default: OUT/cells.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="recipes and seeds that run at once")
    parser.add_argument(
        "--cell", type=int, help="run only this cell, in this process; 0: the model before, then the recipes"
    )
    options, rest = parser.parse_known_args()
    changes = read_overrides(rest, parser.prog)
    start_logging()
    finished = options.cells or options.output / "cells.jsonl"
    names = {None: "start", **{path: load_recipe(path).name for path in options.recipes}}
    # all recipes of a seed before the next: an interrupted table compares all of them
    places = [(SEED, None), *((seed, path) for seed in options.seeds for path in options.recipes)]

    if options.cell is not None and not 0 <= options.cell < len(places):
        raise HardenError(f"--cell {options.cell}: there are cells 0 (the model before) to {len(places) - 1}")
    if "constant" not in load_recipe(options.suite, changes).suite.attacks:
        raise HardenError(
            f"the suite {options.suite} must have the attack constant: its search says what broke a model"
        )
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))

    def find(number: int) -> Cell | None:
        """The cell, if its figures are there. Raises HardenError where something else was measured."""
        seed, path = places[number]
        for cell in read_cells(finished):
            if (cell.recipe, cell.seed) == (names[path], seed):
                if cell.measured != measured(*recipes(number), told(number)):
                    raise HardenError(
                        f"{finished} has {cell.recipe}, seed {seed}, of another recipe, suite, judge or option; "
                        "give another --cells"
                    )
                return cell
        return None

    def recipes(number: int) -> tuple[Recipe, Recipe]:
        """That of the cell, and that of its attacks."""
        seed, path = places[number]
        own = {
            "name": names[path],
            "seed": seed,
            "output": str(options.output / names[path] / f"seed-{seed}"),
            "prompts": {"split_seed": SEED},
        }
        recipe = load_recipe(path or options.recipes[0], merge(changes, own))
        adapter = recipe.model.adapter if path is None else str(Path(recipe.output) / "adapter")
        model = {"name": recipe.model.name, "adapter": adapter, "dtype": recipe.model.dtype}
        return recipe, load_recipe(options.suite, merge(changes, own | {"model": model}))

    def told(number: int) -> Sequence[str] | None:
        """What broke the model before, for a recipe that trains against it; None for the model before."""
        if number == 0:
            return None
        if not recipes(number)[0].train.draws_clamps:
            return ()
        start = find(0)
        if start is None:
            raise HardenError(f"cell {number} trains against what broke the model before: run --cell 0 first")
        return start.breakers

    def compute(number: int) -> Cell:
        cell = find(number)
        if cell is None:
            (seed, path), (recipe, suite), known = places[number], recipes(number), told(number)
            trained, attacked = run(recipe, suite, known)
            cell = Cell(
                recipe=names[path],
                seed=seed,
                measured=measured(recipe, suite, known),
                figures=figures(trained, attacked),
                breakers=() if number else tuple(what_broke(suite)),
            )
            add_cell(finished, cell)
        return cell

    def ready(number: int) -> int:
        """The number, once the cell is complete in its folder."""
        if options.jobs > 1 and find(number) is None:
            command = [sys.executable, __file__, *sys.argv[1:], "--cell", str(number)]
            code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False).returncode
            if code:
                raise MeasurementError(f"cell {number} (seed, recipe: {places[number]}) ended with exit code {code}")
        return number

    if options.cell is not None:
        compute(options.cell)
        return 0
    done = {number: cell for number in range(len(places)) if (cell := find(number))}
    if done:
        show(done, options.output)
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        ready(0)
        for number in pool.map(ready, [number for number in range(len(places)) if number not in done]):
            done[number] = compute(number)
            show(done, options.output)
    return 0


def show(done: dict[int, Cell], output: Path) -> None:
    """Print the tables of the finished cells, by number, and draw the frontier."""
    figures: dict[str, list[dict[str, float | None]]] = {}
    for number in sorted(done):
        figures.setdefault(done[number].recipe, []).append(done[number].figures)
    print(f"\n{table(figures)}", flush=True)
    draw_frontier(figures, output / "frontier.png")
    draw_attacks(output)


def draw_attacks(output: Path) -> None:
    """Plots of the attacks in the folders of `PLOTTED`, as far as they are finished."""
    finished = [output / name for name in PLOTTED if (output / name / "attack/attack.json").exists()]
    if len(finished) > 1:
        runs = [read_run(folder, folder.parent.name.removeprefix("smollm2-135m-")) for folder in finished]
        write_plots(output / "plots", report(runs).figures)


def read_cells(path: Path) -> list[Cell]:
    """Those of the file; a line that a kill cut short is left out."""
    cells = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            cells.append(json.loads(line))
        except ValueError:
            continue
    return [Cell.model_validate(cell) for cell in cells]


def add_cell(path: Path, cell: Cell) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + cell.model_dump_json())  # the line break first: a kill may have cut the last line short


def measured(recipe: Recipe, suite: Recipe, told: Sequence[str] | None) -> str:
    """What a cell hangs on, in short; where its folders are is left out, and how a certificate would be made. The model
    before (told: None) is attacked by the suite alone."""
    left_out = {"output": True, "model": {"adapter"}, "certify": True}
    of_training = {"attack": True, "train": True, "rounds": True, "save": True, "prompts": {"more_twins"}}
    start = left_out if told is not None else left_out | of_training
    content = [recipe.model_dump(mode="json", exclude=start), suite.model_dump(mode="json", exclude=left_out)]
    adapter = recipe.model.adapter and Path(recipe.model.adapter).name
    return hashlib.sha256(json.dumps([content, adapter, told or (), RULES, SUITE_VERSION]).encode()).hexdigest()[:16]


def what_broke(suite: Recipe) -> list[str]:
    """The clamps that flip any selection prompt in the finals of the suite's search, which has run."""
    search = RunFolder(suite, "attack").saved("search", Search)
    plain = search.no_attack.outcomes
    found = {attempt.clamp for attempt in search.finals if count_flips(attempt.outcomes, plain)}
    return [f"{clamp.neuron}={clamp.value!r}" for clamp in sorted(found, key=lambda clamp: (clamp.neuron, clamp.value))]


def run(recipe: Recipe, suite: Recipe, told: Sequence[str] | None) -> tuple[Trained, SuiteResults]:
    """Train a recipe, told what broke the model before, and attack it. told: None for the model before, as it is."""
    folder = RunFolder(recipe)
    trained = folder.saved("trained", Trained)
    if trained is None:
        trained = train_once(recipe, folder, told)
    return trained, attack(suite)


def train_once(recipe: Recipe, folder: RunFolder, told: Sequence[str] | None) -> Trained:
    """One round of training, the adapter saved, and what it did."""
    run = Run(recipe, folder)
    if told is not None:
        run.train(1, [Clamp.parse(clamp) for clamp in told], 1.0)
        run.save_adapter()
    return folder.stage("trained", Trained, lambda: measure(run))


def measure(run: Run) -> Trained:
    bench, chat_model, batch_size = run.bench, run.chat_model, run.recipe.generation.batch_size
    texts, scores = bench.benign_texts("test"), bench.scores("test")
    prompts = [chat_model.chat.prompt_ids(prompt.text) for prompt in bench.harmful["test"][:LEVERAGE_PROMPTS]]
    with starting_model(chat_model.model):
        before = perplexity(chat_model, texts, batch_size)
    contrast = bench.contrast()  # of the trained model: an attacker's sizes count in its gaps
    values = [contrast.clamp_values(size) for size in LEVERAGE_SIZES]
    leverages = [float(leverage_loss(chat_model, [prompt], bench.phrases, values).detach()) for prompt in prompts]
    chat_model.model.zero_grad(set_to_none=True)
    events = [json.loads(line) for line in (run.folder.path / "log.jsonl").read_text().splitlines() if line[-1:] == "}"]
    steps = [event["seconds"] for event in events if event["event"] == "step"]
    return Trained(
        benign_kl=Mean.of(benign_divergence(chat_model, run.benign_rows["test"], 16)),
        perplexity_rise=perplexity(chat_model, texts, batch_size) / before - 1,
        effective_neurons=scores.effective_neurons(),
        worst_leverage=math.exp(mean(leverages)),
        log_odds_harmful=mean(scores.harmful_log_odds),
        log_odds_twins=mean(scores.harmless_log_odds),
        seconds_per_step=mean(steps) if steps else None,
    )


def figures(trained: Trained, attacked: SuiteResults) -> dict[str, float | None]:
    """Rates and the rise of perplexity in percent; benign KL in nats per token."""
    found = {"no attack": attacked.no_attack.comply.rate}
    for each in attacked.attacks:
        name = {"constant": "worst neuron"}.get(each.attack, each.attack)
        found[name] = shown_arm(each).comply.rate
        if each.attack == "constant":
            found["worst of all clamps"] = max(arm.comply.rate for arm in each.arms)
            found["union of clamps"] = each.union.rate
    found["over-refusal"] = attacked.over_refusal.rate
    found["benign perplexity"] = trained.perplexity_rise
    rates = {name: 100 * rate for name, rate in found.items()}
    numbers = rates | {
        "benign KL": trained.benign_kl.mean,
        "log-odds, harmful": trained.log_odds_harmful,
        "log-odds, look-alikes": trained.log_odds_twins,
        "effective neurons": trained.effective_neurons,
        "worst leverage (own gaps)": trained.worst_leverage,
        "seconds per step": trained.seconds_per_step,
    }
    return {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}


def table(cells: dict[str, list[dict[str, float | None]]]) -> str:
    """What attacks bring, and below it what the defence costs and the model is like."""
    columns = list(dict.fromkeys(name for rows in cells.values() for row in rows for name in row))
    attacks = columns[: columns.index("over-refusal")]

    def cell(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "–"
        middle, least, most = (
            f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}" for x in (mean(known), min(known), max(known))
        )
        return f"{middle} [{least}, {most}]" if len(known) > 1 else middle

    def part(shown: Sequence[str]) -> str:
        body = [
            (name, str(len(rows)), *(cell([row[c] for row in rows if c in row]) for c in shown))
            for name, rows in cells.items()
        ]
        return markdown_table([("recipe", "seeds", *shown), *body])

    return f"{part(attacks)}\n\n{part(columns[len(attacks) :])}"


def draw_frontier(cells: dict[str, list[dict[str, float | None]]], path: Path) -> None:
    """Attack success of the worst clamp against what the defence costs: a small dot per seed, a large one: the mean.

    Recipes that differ in how much they hold benign KL alone, `X` and `X-more-kl`, say, are joined by a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = {"benign KL": "benign KL (nats per token)", "over-refusal": "over-refusal (%)"}
    figure, panels = pyplot.subplots(1, len(costs), figsize=(9, 4.2), dpi=150, layout="constrained", sharey=True)
    lines = defaultdict(list)  # by panel and recipe, whatever its hold on benign KL
    for number, (name, rows) in enumerate(cells.items()):
        style = {"color": f"C{number % 10}", "marker": "os^"[number // 10 % 3]}
        for axes, cost in zip(panels, costs, strict=True):
            known = [row for row in rows if row[cost] is not None]
            x, y = [row[cost] for row in known], [row["worst of all clamps"] for row in known]
            axes.scatter(x, y, s=12, alpha=0.5, **style)
            axes.scatter(mean(x), mean(y), s=60, label=name, **style)
            lines[axes, re.sub("-(less|more)-kl$", "", name)].append((mean(x), mean(y)))
    for (axes, _), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), color="gray", linewidth=0.8, zorder=0)
    for axes, label in zip(panels, costs.values(), strict=True):
        axes.set_xlabel(label)
        axes.set_ylim(-2, 102)
    panels[0].set_ylabel("comply under the worst clamp (%, test)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(guarded(main))
