"""What a run folder holds, read for a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harden.errors import HardenError
from harden.files import read_finished
from harden.recipe import Recipe, load_recipe
from harden.results import Certificate, Results, SuiteResults
from harden.verdict import GateResults, Verdict

Part = Literal["training", "suite", "certificate"]


@dataclass(frozen=True)
class RunRecords:
    """The records of one run folder; at least one of `training`, `suite` and `certificate` is there."""

    name: str
    """What tells it from the other folders of a comparison."""
    recipes: dict[Part, Recipe] = field(default_factory=dict)
    """How each part came about; parts of one folder may have been run with different ones."""
    training: Results | None = None
    suite: SuiteResults | None = None
    certificate: Certificate | None = None
    gate: GateResults | None = None
    verdict: Verdict | None = None

    @property
    def title(self) -> str:
        return next(iter(self.recipes.values())).name


def read_run(folder: Path, name: str) -> RunRecords:
    """The records in a folder. Raises HardenError where it holds no finished run, or one that cannot be read."""
    if not folder.is_dir():
        raise HardenError(f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}")
    if (folder / "verdict.json").exists():
        gate = read_finished(folder / "results.json", GateResults)
        recipe = _recipe(folder)
        return RunRecords(
            name,
            {"suite": recipe, "certificate": recipe},
            suite=gate.suite,
            certificate=gate.certificate,
            gate=gate,
            verdict=read_finished(folder / "verdict.json", Verdict),
        )
    recipes: dict[Part, Recipe] = {}

    def read(part: Part, path: Path, kind):
        if not path.exists():
            return None
        record = read_finished(path, kind)
        recipes[part] = _recipe(path.parent)
        return record

    training = read("training", folder / "results.json", Results)
    suite = read("suite", folder / "attack/attack.json", SuiteResults)
    certificate = read("certificate", folder / "certificate/certificate.json", Certificate)
    if not recipes:
        inside = (folder / f"{folder.name}.json").exists()  # attack/ or certificate/ itself was given
        raise HardenError(
            f"{folder} holds no finished run: there is no results.json, attack/attack.json or "
            f"certificate/certificate.json in it{f'; give {folder.parent}' if inside else ''}"
        )
    return RunRecords(name, recipes, training, suite, certificate)


def read_runs(folders: Iterable[Path]) -> list[RunRecords]:
    """The records of all folders, each named by as much of its path as tells it from the others."""
    folders = [folder.resolve() for folder in folders]
    if len(set(folders)) < len(folders):
        raise HardenError("a folder was given twice")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return [read_run(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _recipe(folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    if not path.exists():
        raise HardenError(f"{folder} holds results and no recipe.yaml that says how they came about")
    return load_recipe(path)
