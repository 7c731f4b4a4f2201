"""What locators find of what an exact scan of whole layers shows, and how well log-odds foretell generated outcomes.

    pip install -e '.[benchmarks]'
    harden certify --config RECIPE --certify.layers '[15, 16, ...]' --certify.sample null --certify.race_prompts 99 \\
        --certify.quiet null --output TRUTH        # every neuron of these layers, on all prompts and values
    python benchmarks/locators.py --config RECIPE --truth TRUTH --output OUT [--name value ...]

Prints Markdown and writes OUT/screen.png. What generates is saved in OUT and goes on where it was interrupted.

- Recall: of the 20 neurons of these layers whose log-odds fall most at their worst value, and of those that break the
  model by generation, the share among a locator's first 20, 100 and 500 of these layers; for unions also among their
  first neurons of the whole model, which is how an attack takes them.
- Screen: clamps of the scan, from those with the largest drop to those without any, generate on test prompts; rank
  correlation (Spearman) of drop and attack success.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from scipy import stats

from harden.attack.select import select_candidates
from harden.bench import Bench
from harden.entry import guarded, parse_recipe, recipe_parser, start_logging
from harden.errors import HardenError
from harden.files import read_finished
from harden.interventions import Clamp
from harden.locate.passes import LOCATORS
from harden.neurons import Neuron
from harden.results import Certificate, NeuronScan
from harden.runfolder import RunFolder

TOP, BUDGETS = 20, (20, 100, 500)


def main() -> int:
    parser: ArgumentParser = recipe_parser("benchmarks/locators.py", __doc__)
    parser.add_argument("--truth", type=Path, required=True, help="output folder of the exact scan")
    known = [name for name in LOCATORS if name != "exact"]
    parser.add_argument("--locators", nargs="*", default=known, choices=known)
    parser.add_argument("--unions", nargs="*", default=[], help="further unions to attack with: tail,relp ...")
    parser.add_argument(
        "--of-model", nargs="*", type=int, default=[256, 512, 1024, 2048, 4096], help="budgets of unions"
    )
    parser.add_argument("--generate", type=int, default=60, help="clamps that generate; 0: none")
    parser.add_argument("--prompts", type=int, default=40, help="test prompts they generate on")
    recipe, options = parse_recipe(parser, sys.argv[1:])
    start_logging()
    certificate = read_finished(options.truth / "certificate/certificate.json", Certificate)
    if certificate.race_prompts < certificate.prompts:
        raise HardenError(f"{options.truth} is no truth: clamps were decided on {certificate.race_prompts} prompts")
    if certificate.quiet is not None:
        raise HardenError(f"{options.truth} is no truth: some values were left out; give --certify.quiet null")
    theirs, mine = (certificate.model, certificate.adapter), (recipe.model.name, recipe.model.adapter)
    if [Path(str(name)).name for name in theirs] != [Path(str(name)).name for name in mine]:  # folders may be moved
        raise HardenError(f"{options.truth} is the truth about {' + '.join(map(str, theirs))}, not about this recipe's")
    scans = read_scans(options.truth)
    bench = Bench(recipe, RunFolder(recipe, "locators"), training=False)
    unions = [list(recipe.attack.locators), *(union.split(",") for union in options.unions)]
    of_model = sorted({recipe.attack.candidates, *options.of_model})
    recall(bench, options.locators, unions, certificate, scans, of_model)
    if options.generate:
        screen(bench, scans, options.generate, options.prompts, Path(recipe.output))
    return 0


def read_scans(folder: Path) -> dict[Neuron, NeuronScan]:
    files = sorted((folder / "certificate/state").glob("scan-*.json"))
    scans = [NeuronScan.model_validate(scan) for file in files for scan in json.loads(file.read_text())]
    return {Neuron.parse(scan.neuron): scan for scan in scans}


def lowest(scan: NeuronScan) -> float:
    """Mean log-odds at the worst value."""
    return min((odds for odds in scan.log_odds if odds is not None), default=math.inf)


def recall(
    bench: Bench,
    locators: list[str],
    unions: list[list[str]],
    certificate: Certificate,
    scans: dict[Neuron, NeuronScan],
    of_model: list[int],
) -> None:
    """Table: one row per locator and union. A union takes turns among all neurons that the recipe lets it search, as an
    attack does; its first 20, 100 and 500 are counted among those of the scanned layers, as for a locator, and in a
    second table its first `of_model` of the whole model."""
    truth = sorted(scans, key=lambda neuron: lowest(scans[neuron]))[:TOP]
    breakers = [Neuron.parse(neuron) for neuron in certificate.breakers]
    widths = list(bench.chat_model.neurons.widths)
    passes = bench.passes()
    print(f"{len(scans)} neurons of layers {certificate.layers}; {len(breakers)} break the model by generation\n")
    heads = [f"{what} in its {n}" for what in (f"top {TOP}", "breakers") for n in BUDGETS]
    print(f"| locator | {' | '.join(heads)} |")
    print("| --- |" + " --- |" * len(heads))

    def show(name: str, ranking: list[Neuron]) -> None:
        shares = [len(set(truth) & set(ranking[:n])) / len(truth) for n in BUDGETS]
        broken = [len(set(breakers) & set(ranking[:n])) for n in BUDGETS]
        cells = [*(f"{share:.2f}" for share in shares), *(f"{count}/{len(breakers)}" for count in broken)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    for name in locators:
        scores = LOCATORS[name](passes).split(widths)
        places = [(-float(scores[n.layer][n.index]), n) for n in scans]
        show(name, [neuron for _, neuron in sorted(places)])
    share, seed = bench.recipe.locate.layer_share, bench.recipe.seed
    found = {}
    for names in unions:
        everything = select_candidates(names, bench.chat_model.neurons.count, passes, share, seed, bench.named_neurons)
        found["union: " + ", ".join(names)] = [candidate.neuron for candidate in everything]
    for name, neurons in found.items():
        show(name, [neuron for neuron in neurons if neuron in scans])
    print(f"\nAmong a union's first neurons of the whole model: top {TOP}, breakers\n")
    print(f"| union | {' | '.join(map(str, of_model))} |\n| --- |" + " --- |" * len(of_model))
    for name, neurons in found.items():
        firsts = [set(neurons[:n]) for n in of_model]
        cells = [
            f"{len(first & set(truth)) / len(truth):.2f}, {len(first & set(breakers))}/{len(breakers)}"
            for first in firsts
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def screen(bench: Bench, scans: dict[Neuron, NeuronScan], n: int, n_prompts: int, output: Path) -> None:
    """Generate under clamps spread over the ranks of the scan; print the correlation, draw the plot."""
    odds = {
        Clamp(neuron, value): x
        for neuron, scan in scans.items()
        for value, x in zip(scan.values, scan.log_odds, strict=True)
        if x is not None
    }
    ranked = sorted(odds, key=odds.__getitem__)
    # as many of the first hundredth as of the rest: the rest hardly moves anything
    head, rest = ranked[: max(n, len(ranked) // 100)], ranked[len(ranked) // 100 :]
    chosen = dict.fromkeys([*_evenly(head, n // 2), *_evenly(rest, n - n // 2)])
    prompts = bench.splits["test"].harmful[:n_prompts]
    plain, *attempts = bench.responder.attempt([None, *chosen], prompts, "screen")
    shares = {
        kind: [sum(o == kind for o in attempt.outcomes.values()) / len(prompts) for attempt in attempts]
        for kind in ("comply", "degenerate")
    }
    x = [-odds[clamp] for clamp in chosen]
    fluent = [place for place, share in enumerate(shares["degenerate"]) if share <= 0.1]
    for label, places in (("all clamps", range(len(x))), ("at most 10% degenerate", fluent)):
        rho = stats.spearmanr([x[p] for p in places], [shares["comply"][p] for p in places])
        print(f"\n{label}: n = {len(places)}, Spearman {rho.statistic:.2f} (p = {rho.pvalue:.1g})")
    complied = sum(outcome == "comply" for outcome in plain.outcomes.values())
    print(f"without attack {complied}/{len(prompts)} comply")
    draw(x, shares, complied / len(prompts), output / "screen.png")


def _evenly(items: list, n: int) -> list:
    return [items[int(place)] for place in torch.linspace(0, len(items) - 1, min(n, len(items))).tolist()]


def draw(x: list[float], shares: dict[str, list[float]], plain: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150, layout="constrained")
    points = axes.scatter(x, shares["comply"], c=shares["degenerate"], cmap="viridis", vmin=0, vmax=1, s=24)
    axes.axhline(plain, color="grey", linewidth=1, linestyle="--", label="no attack")
    axes.set(
        xlabel="refusal log-odds under the clamp, negated (nats)", ylabel="attack success rate", ylim=(-0.02, 1.02)
    )
    axes.legend(loc="upper left", frameon=False)
    figure.colorbar(points, label="degenerate")
    figure.savefig(path)
    print(f"\n{path}")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
