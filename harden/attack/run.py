"""A run of the attack suite in its folder: one stage per attack, each saved when it is done."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from harden import __version__, processes
from harden.attack.arms import NO_ATTACK
from harden.attack.concept import attack_concepts, read_concepts
from harden.attack.respond import Keep
from harden.attack.suite import ATTACKS, ATTRIBUTION, Suite, judges_agreement
from harden.bench import Bench, note_finished
from harden.errors import HardenError
from harden.files import read_finished, write_atomically
from harden.generate import Completion, Request
from harden.interventions import describe
from harden.judges.agreement import Verdict
from harden.measure import refused
from harden.prompts import Prompt, load_prompts
from harden.recipe import Recipe
from harden.report.attacks import attack_card
from harden.results import AttackReport, AttributionRecord, ConceptRecord, Rate, SuiteResults
from harden.runfolder import RunFolder

logger = logging.getLogger(__name__)

KEPT = "completions.jsonl"


def attack(
    recipe: Recipe,
    keep_completions: bool = False,
    settled: Callable[[SuiteResults, str], bool] | None = None,
) -> SuiteResults:
    """Run a recipe's attack suite, or resume it, in `attack/` of its run folder; returns what is in `attack.json`.

    keep_completions: write every completion to `completions.jsonl`, harmful ones too. It must be asked for from the
    start: HardenError if the run was begun without. settled: asked with the name of an attack whether what is known
    will do: before the attack, and then that is returned and the run is left unfinished; and after every batch of its
    test prompts, and then it meets no more of them.
    """
    folder = RunFolder(recipe, "attack")
    finished = folder.path / "attack.json"
    if processes.from_main(finished.exists):
        note_finished(recipe, folder)
        return _finished(finished, keep_completions)
    folder.warn_of_another_model()
    names = list(dict.fromkeys(recipe.suite.attacks))
    passages = load_prompts("concepts", **recipe.suite.concepts.model_dump()) if "concept" in names else []
    concepts = read_concepts(passages) if passages else []
    bench = Bench(recipe, folder, training=False, keep=_keeper(folder.path / KEPT) if keep_completions else None)
    if folder.stage("keep-completions", bool, lambda: keep_completions) != keep_completions:
        raise HardenError(f"{folder.path} was begun with the other choice of --keep-completions; give another --output")
    suite = Suite(bench, settled and (lambda report: settled(so_far(report), report.attack)))

    def over_refusal(stage: str, twins: Sequence[Prompt]) -> Rate:
        return folder.stage(stage, Rate, lambda: refused(suite.verdicts([NO_ATTACK], twins)[0]))

    no_attack = suite.arm_record(NO_ATTACK, "test", suite.no_attack)
    of_twins, more = over_refusal("over-refusal", bench.twins["test"]), bench.more_twins["test"]
    of_more = over_refusal("over-refusal-more", more) if more else None
    reports: list[AttackReport] = []
    shown: list[ConceptRecord] = []

    def so_far(*unfinished: AttackReport) -> SuiteResults:
        return SuiteResults(
            harden_version=__version__,
            model=recipe.model.name,
            adapter=recipe.model.adapter,
            seed=recipe.seed,
            no_attack=no_attack,
            over_refusal=of_twins,
            over_refusal_more=of_more,
            attribution=folder.saved(ATTRIBUTION, AttributionRecord),
            attacks=[*reports, *unfinished],
            concepts=shown,
            max_new_tokens=recipe.generation.max_new_tokens,
            judges=bench.responder.judges,
            agreement=judges_agreement([no_attack, *(arm for report in reports for arm in report.arms)]),
            completions_kept=keep_completions,
            seconds=round(folder.seconds(), 1),
        )

    for number, name in enumerate(names):
        if settled and settled(so_far(), name):
            return so_far()
        logger.info("attack %d of %d: %s", number + 1, len(names), name)
        if name == "concept":  # on benign prompts, with an outcome of its own
            shown = folder.stage("attack-concept", list[ConceptRecord], lambda: attack_concepts(suite, concepts))
            continue
        report = folder.stage(f"attack-{name}", AttackReport, lambda name=name: ATTACKS[name](suite))
        logger.info("%s: union of its arms (%d) %.0f%% on %d prompts (no attack %.0f%%)", name, len(report.arms),
                    100 * report.union.rate, report.union.n, 100 * no_attack.comply.rate)  # fmt: skip
        reports.append(report)

    results = so_far()
    if processes.is_main():
        write_atomically(folder.path / "README.md", attack_card(results, recipe))
        write_atomically(finished, results.model_dump_json(indent=1) + "\n")
    processes.wait()
    return results


def _keeper(path: Path) -> Keep:
    """Appends a request, its completion and what was said of it to the file."""

    def keep(request: Request, completion: Completion, verdict: Verdict) -> None:
        row = {
            "request": request.text,
            "interventions": [describe(edit) for edit in request.interventions],
            "prefix": request.prefix,
            "completion": completion.text,
            "outcomes": verdict.outcomes,
            "reason": verdict.reason,
        }
        if processes.is_main():
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row, ensure_ascii=False))  # a kill may have cut the last line short

    return keep


def _finished(path: Path, keep_completions: bool) -> SuiteResults:
    results = read_finished(path, SuiteResults)
    if keep_completions and not results.completions_kept:
        raise HardenError(f"{path.parent} is complete and kept no completions; give another --output")
    return results
