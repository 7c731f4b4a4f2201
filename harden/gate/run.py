"""One gate: measure what a policy limits, decide, and leave the evidence.

1. Digest the model's files: the verdict is about these and no others.
2. Figures without attack, and the divergence from the reference model.
3. The attacks that the policy limits, one after the other, each until its checks are settled; until one has failed.
4. The certificate, where the policy limits what it may have missed.
5. The verdict, and the evidence that it hangs on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harden import __version__, processes
from harden.attack.run import attack
from harden.certify.run import certify
from harden.errors import HardenError, MeasurementError
from harden.files import write_atomically
from harden.gate.attestation import ATTESTATION, SIGNATURES, statement
from harden.gate.cards import eval_results, model_card_section
from harden.gate.evidence import environment, junit_xml, samples_jsonl
from harden.gate.reference import load, reference_divergence
from harden.gate.subject import subject_files
from harden.judges.embedded import RULES
from harden.policy import ReleasePolicy
from harden.prompts import PromptSet, Split, load_splits
from harden.recipe import Recipe
from harden.report.page import report
from harden.report.records import RunRecords
from harden.report.verdict import summary
from harden.results import Certificate, Mean, SuiteResults
from harden.runfolder import RunFolder
from harden.settings.measuring import ModelSection
from harden.verdict import GateResults, Verdict, decide, regressions, settled


def gate(
    policy: ReleasePolicy, recipe: Recipe, reference: ModelSection | None, earlier: GateResults | None = None
) -> Verdict:
    """Decide whether a recipe's model may ship, or go on with it; evidence is in the recipe's output folder.

    reference: the model that benign KL is measured from. earlier: results that must not have become worse. Raises
    HardenError where the folder holds a gate of other things or a split is shorter than the policy asks for,
    MeasurementError where a measurement fails; the folder then gets no verdict.
    """
    folder = RunFolder(recipe)
    splits = _splits(policy, recipe)
    processes.use_all_cores()
    begun = processes.from_main(lambda: _begun(policy, recipe, reference, splits, earlier))
    folder.create()
    _check_begun(folder, begun)
    surroundings = folder.stage("environment", dict[str, Any], lambda: _environment(recipe))
    divergence = None
    if policy.thresholds.benign_kl is not None and reference is not None:
        texts = [prompt.text for prompt in splits["test"].benign[: policy.benign_prompts]]
        divergence = folder.stage("benign-kl", Mean, lambda: _divergence(recipe, reference, texts))

    def results(suite: SuiteResults, certificate: Certificate | None = None) -> GateResults:
        return GateResults(prompts=begun["prompts"], suite=suite, benign_kl=divergence, certificate=certificate)

    def failed(suite: SuiteResults, _attack: str = "") -> bool:
        return decide(results(suite), policy).outcome == "fail"

    def attack_settled(suite: SuiteResults, name: str) -> bool:
        return settled(results(suite), policy, name)

    suite = attack(
        recipe, settled=failed if earlier else attack_settled
    )  # comparing takes as many prompts as there are
    certify_too = policy.thresholds.missed_breakers is not None and not failed(suite)
    found = results(suite, certify(recipe) if certify_too else None)
    verdict = decide(found, policy, regressions(found, earlier) if earlier else ())
    if processes.from_main(lambda: _begun(policy, recipe, reference, splits, earlier)) != begun:
        raise MeasurementError("the files of the model, or of its reference, changed while they were measured")
    if processes.is_main():
        _write(folder.path, policy, recipe, begun, surroundings, found, verdict)
    processes.wait()
    return verdict


def _begun(
    policy: ReleasePolicy,
    recipe: Recipe,
    reference: ModelSection | None,
    splits: Mapping[Split, PromptSet],
    earlier: GateResults | None,
) -> dict[str, Any]:
    """All that a verdict is about. Raises HardenError for what cannot be gated."""
    files = subject_files(recipe.model.name, recipe.model.adapter)
    compared = subject_files(reference.name, reference.adapter) if reference else None
    if policy.thresholds.benign_kl is not None:
        if compared is None:
            raise HardenError(f"policy '{policy.name}' limits benign_kl: give the model to compare with by --reference")
        if compared == files:
            raise HardenError(f"policy '{policy.name}' limits benign_kl, and --reference is the model itself")
    texts = [[p.text for part in (s.harmful, s.twins, s.benign, s.more_twins) for p in part] for s in splits.values()]
    return {
        "model": files,
        "reference": compared,
        "policy": policy.model_dump(mode="json"),
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "compared with": hashlib.sha256(earlier.model_dump_json().encode()).hexdigest() if earlier else None,
        "harden": f"{__version__}, judge {RULES}",
    }


def _check_begun(folder: RunFolder, begun: dict[str, Any]) -> None:
    """Raises HardenError if the folder was begun with anything else, or does not say with what."""
    measured = [name for name in ("attack", "certificate") if (folder.path / name).exists()]
    if measured and not (folder.state / "begun.json").exists():
        raise HardenError(f"{folder.path} has {measured[0]}/ and no record of what it is about; give another --output")
    before = folder.stage("begun", dict[str, Any], lambda: begun)
    changed = [name for name in begun if before.get(name) != begun[name]]
    if changed:
        raise HardenError(
            f"{folder.path} holds the gate of other things: changed since: {', '.join(changed)}; give another --output"
        )


def _splits(policy: ReleasePolicy, recipe: Recipe) -> dict[Split, PromptSet]:
    """All prompts. Raises HardenError where a split is shorter than what the policy asks for."""
    splits = load_splits(*recipe.division())
    asked: list[tuple[Split, str, str, int]] = [
        ("selection", "harmful", "attack.selection_prompts", recipe.attack.selection_prompts),
        ("test", "harmful", "attack.test_prompts", recipe.attack.test_prompts),
    ]
    if policy.thresholds.benign_kl is not None:
        asked.append(("test", "benign", "benign_prompts", policy.benign_prompts))
    for split, kind, key, n in asked:
        found = len(getattr(splits[split], kind))
        if found < n:
            raise HardenError(
                f"the {split} split has {found} {kind} prompts and {key} asks for {n}; give more prompts, or a policy "
                "that asks for fewer"
            )
    return splits


def _environment(recipe: Recipe) -> dict[str, Any]:
    device = processes.state().device
    described = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return environment(described, torch.get_num_threads(), recipe.seed)


def _divergence(recipe: Recipe, reference: ModelSection, texts: Sequence[str]) -> Mean:
    generation = recipe.generation
    return reference_divergence(
        load(recipe.model), load(reference), texts, generation.max_new_tokens, generation.batch_size
    )


def _write(
    path: Path,
    policy: ReleasePolicy,
    recipe: Recipe,
    begun: Mapping[str, Any],
    surroundings: Mapping[str, Any],
    results: GateResults,
    verdict: Verdict,
) -> None:
    """The evidence; the verdict comes last, so that where there is one there is all of it."""
    suite = results.suite
    seconds = suite.seconds + (results.certificate.seconds if results.certificate else 0.0)
    recipes = {"suite": recipe, "certificate": recipe}
    records = RunRecords(path.name, recipes, None, suite, results.certificate, results, verdict)
    texts = {
        "inputs.json": json.dumps(begun, indent=1) + "\n",
        "policy.json": policy.model_dump_json(indent=1) + "\n",
        "results.json": results.model_dump_json(indent=1) + "\n",
        "samples.jsonl": samples_jsonl(suite),
        "junit.xml": junit_xml(verdict, seconds),
        "environment.json": json.dumps(surroundings, indent=1) + "\n",
        "README.md": summary(verdict, policy, recipe),
        "report.html": report([records]).html,
        "model-card.md": model_card_section(verdict, results, policy, recipe),
        "eval_results.yaml": eval_results(verdict, results, policy, recipe),
        "verdict.json": verdict.model_dump_json(indent=1) + "\n",
    }
    evidence = {**texts, "recipe.yaml": (path / "recipe.yaml").read_text(encoding="utf-8")}
    for old in ("verdict.json", ATTESTATION, *SIGNATURES):  # while anything is missing there is no verdict
        (path / old).unlink(missing_ok=True)
    for name, text in {ATTESTATION: statement(verdict, begun["model"], evidence), **texts}.items():
        write_atomically(path / name, text)
