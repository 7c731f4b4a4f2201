"""Defences compared: each recipe trained from several seeds and attacked afresh by the same suite.

    python benchmarks/defences.py --output OUT [--recipes RECIPE.yaml ...] [--seeds 0 1 2] [--attack RECIPE.yaml] \\
        [--train.steps 34 ...]

Options of a recipe change all of them alike, the suite's too. Everything is a run folder OUT/<name>/seed-<n>, goes on
where it was interrupted, and is read again when it is complete. Prints a Markdown table, one row per recipe: the mean
over the seeds and, in brackets, the least and the most. All figures are of the test split, on the seed's own prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harden.attack.run import attack
from harden.entry import command_parser, guarded, start_logging
from harden.recipe import Recipe, load_recipe, read_overrides
from harden.report.attacks import shown_arm
from harden.report.tables import markdown_table
from harden.results import Results, SuiteResults
from harden.rounds import harden
from harden.schema import merge

RECIPES = Path(__file__).parents[1] / "recipes/smollm2-135m"


def main() -> int:
    parser = command_parser("benchmarks/defences.py", __doc__)
    known = [RECIPES / "harden.yaml", *sorted((RECIPES / "baselines").glob("*.yaml"))]
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", type=Path, default=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attack", type=Path, default=RECIPES / "attack.yaml", help="the suite's recipe")
    options, rest = parser.parse_known_args()
    changes = read_overrides(rest, parser.prog)
    start_logging()
    rows: list[dict[str, list[float]]] = []
    names = []
    for path in options.recipes:
        figures: dict[str, list[float]] = {}
        name = load_recipe(path).name
        for seed in options.seeds:
            folder = options.output / name / f"seed-{seed}"
            recipe = load_recipe(path, merge(changes, {"seed": seed, "output": str(folder)}))
            for kind, figure in run(recipe, options.attack, changes).items():
                figures.setdefault(kind, []).append(figure)
        names.append(name)
        rows.append(figures)
        print(f"\n{table(names, rows)}", flush=True)
    return 0


def run(recipe: Recipe, suite: Path, changes: dict) -> dict[str, float]:
    """Train a recipe, attack what came of it with the suite of another; the figures."""
    trained = harden(recipe)
    folder = Path(recipe.output)
    about = {"name": recipe.model.name, "adapter": str(folder / "adapter"), "dtype": recipe.model.dtype}
    attacked = attack(load_recipe(suite, merge(changes, {"seed": recipe.seed, "output": str(folder), "model": about})))
    return figures(trained, attacked, folder)


def figures(trained: Results, attacked: SuiteResults, folder: Path) -> dict[str, float]:
    """Rates in percent; benign KL in nats per token."""
    found = {"no attack": attacked.no_attack.comply.rate}
    for report in attacked.attacks:
        name = {"constant": "worst neuron"}.get(report.attack, report.attack)
        found[name] = shown_arm(report).comply.rate
        if report.attack == "constant":
            found["union of values"] = report.union.rate
    found["over-refusal"] = attacked.over_refusal.rate
    percent = {name: 100 * rate for name, rate in found.items()}
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    steps = [event["seconds"] for event in events if event["event"] == "step"]
    return percent | {
        "benign KL": trained.after.benign_kl.mean,
        "effective neurons": trained.after.effective_neurons,
        "seconds per step": sum(steps) / len(steps) if steps else float("nan"),
    }


def table(names: Sequence[str], rows: Sequence[dict[str, list[float]]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(values: Sequence[float] | None) -> str:
        if not values:
            return "–"
        mean = sum(values) / len(values)
        return f"{mean:.3g} [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else f"{mean:.3g}"

    body = [(name, *(cell(row.get(column)) for column in columns)) for name, row in zip(names, rows, strict=True)]
    return markdown_table([("recipe", *columns), *body])


if __name__ == "__main__":
    sys.exit(guarded(main))
