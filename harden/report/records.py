"""What a run folder holds, read for a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harden.errors import HardenError
from harden.files import read_finished
from harden.recipe import Recipe, load_recipe
from harden.results import Certificate, Results, SuiteResults
from harden.verdict import GateResults, Verdict


@dataclass(frozen=True)
class RunRecords:
    """The records of one run folder; at least one of `training`, `suite` and `certificate` is there."""

    name: str
    """What tells it from the other folders of a comparison."""
    recipe: Recipe
    training: Results | None = None
    suite: SuiteResults | None = None
    certificate: Certificate | None = None
    gate: GateResults | None = None
    verdict: Verdict | None = None


def read_run(folder: Path, name: str) -> RunRecords:
    """The records in a folder. Raises HardenError where it holds no finished run, or one that cannot be read."""
    gated = (folder / "verdict.json").exists()
    gate = read_finished(folder / "results.json", GateResults) if gated else None
    training = read_finished(folder / "results.json", Results) if not gated and _has(folder / "results.json") else None
    suite, certificate = (
        read_finished(path, kind) if _has(path := folder / part / file) else None
        for part, file, kind in (
            ("attack", "attack.json", SuiteResults),
            ("certificate", "certificate.json", Certificate),
        )
    )
    if gate is not None:
        suite, certificate = gate.suite, gate.certificate
    if training is None and suite is None and certificate is None:
        raise HardenError(
            f"{folder} holds no finished run: there is no results.json, attack/attack.json or "
            "certificate/certificate.json in it"
        )
    recipes = [folder / "recipe.yaml", folder / "attack/recipe.yaml", folder / "certificate/recipe.yaml"]
    recipe = next((path for path in recipes if path.exists()), None)
    if recipe is None:
        raise HardenError(f"{folder} holds results and no recipe.yaml that says how they came about")
    verdict = read_finished(folder / "verdict.json", Verdict) if gated else None
    return RunRecords(name, load_recipe(recipe), training, suite, certificate, gate, verdict)


def read_runs(folders: Iterable[Path]) -> list[RunRecords]:
    """The records of all folders, each named by as much of its path as tells it from the others."""
    folders = [folder.resolve() for folder in folders]
    if len(set(folders)) < len(folders):
        raise HardenError("a folder was given twice")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return [read_run(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _has(path: Path) -> bool:
    return path.exists()
