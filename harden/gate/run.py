"""One gate: measure what a policy limits, decide, and leave the evidence.

1. Digest the model's files: the verdict is about these and no others.
2. Figures without attack, and the divergence from the reference model.
3. The attacks that the policy limits, one after the other, until one check has failed.
4. The certificate, where the policy limits what it may have missed.
5. The verdict, and the evidence that it hangs on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from harden import processes
from harden.attack.run import attack
from harden.certify.run import certify
from harden.errors import HardenError
from harden.gate.attestation import ATTESTATION, statement
from harden.gate.evidence import environment, junit_xml, samples_jsonl, summary
from harden.gate.reference import benign_divergence, load
from harden.gate.subject import subject_files
from harden.policy import ReleasePolicy
from harden.prompts import load_splits
from harden.recipe import ModelSection, Recipe
from harden.results import Mean, SuiteResults
from harden.runfolder import RunFolder, write_atomically
from harden.verdict import GateResults, Verdict, decide, regressions

logger = logging.getLogger(__name__)

TEST_BENIGN = 48  # benign prompts on which the divergence from the reference is measured


def gate(
    policy: ReleasePolicy, recipe: Recipe, reference: ModelSection | None, earlier: GateResults | None = None
) -> Verdict:
    """Decide whether a recipe's model may ship, or go on with it; evidence is in the recipe's output folder.

    reference: the model that benign KL is measured from. earlier: results that must not have become worse. Raises
    HardenError where the folder holds a gate of other files, another policy or another recipe, MeasurementError where
    a measurement fails; the folder then has no verdict.
    """
    folder = RunFolder(recipe)
    files = processes.from_main(lambda: subject_files(recipe.model.name, recipe.model.adapter))
    if policy.thresholds.benign_kl is not None and reference is None:
        raise HardenError(f"policy '{policy.name}' limits benign_kl: give the model to compare with by --reference")
    folder.create()
    _same(folder, "subject", dict[str, str], files, "files of the model")
    _same(folder, "policy", ReleasePolicy, policy, "policy")
    _same(folder, "reference", ModelSection | None, reference, "reference model")
    divergence = None
    if policy.thresholds.benign_kl is not None and reference is not None:
        divergence = folder.stage("benign-kl", Mean, lambda: _divergence(recipe, reference))

    def failed(suite: SuiteResults) -> bool:
        return decide(GateResults(suite=suite, benign_kl=divergence, certificate=None), policy).outcome == "fail"

    suite = attack(recipe, decided=failed)
    certificate = None
    if policy.thresholds.missed_breakers is not None and not failed(suite):
        certificate = certify(recipe)
    results = GateResults(suite=suite, benign_kl=divergence, certificate=certificate)
    verdict = decide(results, policy, regressions(results, earlier) if earlier else ())
    if processes.is_main():
        _write(folder.path, policy, recipe, files, results, verdict)
    processes.wait()
    return verdict


Value = TypeVar("Value")


def _same(folder: RunFolder, name: str, kind: type[Value], value: Value, what: str) -> None:
    """Raises HardenError if the folder was begun with another value."""
    if folder.stage(name, kind, lambda: value) != value:
        raise HardenError(f"{folder.path} holds the gate of other things: the {what} changed; give another --output")


def _divergence(recipe: Recipe, reference: ModelSection) -> Mean:
    sources = {kind: getattr(recipe.prompts, kind).model_dump() for kind in ("harmful", "twins", "benign")}
    splits = load_splits(sources, recipe.prompts.train_share, recipe.prompts.selection_share, recipe.seed)
    texts = [prompt.text for prompt in splits["test"].benign[:TEST_BENIGN]]
    generation = recipe.generation
    return benign_divergence(
        load(recipe.model), load(reference), texts, generation.max_new_tokens, generation.batch_size
    )


def _write(
    path: Path,
    policy: ReleasePolicy,
    recipe: Recipe,
    files: Mapping[str, str],
    results: GateResults,
    verdict: Verdict,
) -> None:
    """The evidence; the verdict comes last, so that where there is one there is all of it."""
    suite = results.suite
    device = processes.state().device
    described = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    seconds = suite.seconds + (results.certificate.seconds if results.certificate else 0.0)
    texts = {
        "policy.json": policy.model_dump_json(indent=1) + "\n",
        "results.json": results.model_dump_json(indent=1) + "\n",
        "samples.jsonl": samples_jsonl(suite),
        "junit.xml": junit_xml(verdict, seconds),
        "environment.json": json.dumps(environment(described, torch.get_num_threads()), indent=1) + "\n",
        "README.md": summary(verdict, policy, recipe),
        "verdict.json": verdict.model_dump_json(indent=1) + "\n",
    }
    for name, text in {ATTESTATION: statement(verdict, files, texts), **texts}.items():
        write_atomically(path / name, text)
