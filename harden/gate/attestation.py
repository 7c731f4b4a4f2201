"""What ties a verdict to a model's files: an in-toto statement, and the check that evidence and model belong together.

The statement is of type https://in-toto.io/Statement/v1 with the test-result predicate
(https://in-toto.io/attestation/test-result/v0.1). By itself it is not signed: see `signatures`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harden.errors import HardenError
from harden.gate.evidence import samples_jsonl
from harden.policy import ReleasePolicy
from harden.verdict import GateResults, Verdict, decide

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
ATTESTATION = "attestation.json"
SIGNATURES = MODEL_SIGNATURE, ATTESTATION_SIGNATURE = "model.sig", "attestation.sig"
COVERED = {
    "results.json", "verdict.json", "samples.jsonl", "policy.json", "recipe.yaml", "junit.xml", "environment.json",
    "README.md", "report.html", "model-card.md", "eval_results.yaml",
}  # fmt: skip


def statement(verdict: Verdict, files: Mapping[str, str], evidence: Mapping[str, str]) -> str:
    """The statement as JSON; files: sha256 by name; evidence: the text of each file beside it.

    Anything but a pass is FAILED, and so is a check that decided nothing: the predicate's WARNED means passed.
    """
    descriptors = [
        {"name": name, "digest": {"sha256": _digest(text.encode())}} for name, text in sorted(evidence.items())
    ]
    content = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "PASSED" if verdict.outcome == "pass" else "FAILED",
            "configuration": [entry for entry in descriptors if entry["name"] in ("policy.json", "recipe.yaml")],
            "passedTests": [check.name for check in verdict.checks if check.outcome == "pass"],
            "warnedTests": [],
            "failedTests": [check.name for check in verdict.checks if check.outcome != "pass"],
            "evidence": descriptors,
        },
    }
    return json.dumps(content, indent=1) + "\n"


def problems(folder: Path, files: Mapping[str, str]) -> list[str]:
    """What does not fit, one line each: evidence that changed, another model, a verdict that does not follow.

    files: sha256 by name of the model at hand. Raises HardenError where the folder holds no finished gate.
    """
    content = _read(folder / ATTESTATION)
    found = []
    try:
        subject = {entry["name"]: entry["digest"]["sha256"] for entry in content["subject"]}
        evidence = {entry["name"]: entry["digest"]["sha256"] for entry in content["predicate"]["evidence"]}
        result = content["predicate"]["result"]
    except (KeyError, TypeError):
        return [f"{ATTESTATION} is no statement of harden"]
    for name in sorted(subject.keys() | files.keys()):
        if subject.get(name) != files.get(name):
            what = "is new" if name not in subject else "is missing" if name not in files else "has changed"
            found.append(f"the model is another one: {name} {what}")
    for name, digest in sorted(evidence.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif _digest(path.read_bytes()) != digest:
            found.append(f"{name} has changed")
    missing = COVERED - evidence.keys()
    if missing or found:
        return [*found, *(f"{ATTESTATION} does not cover {name}" for name in sorted(missing))]
    return _contradictions(folder, result)


def attested_digest(folder: Path) -> str:
    """sha256 of the statement itself. Raises HardenError where there is none."""
    _read(folder / ATTESTATION)
    return _digest((folder / ATTESTATION).read_bytes())


def read_verdict(folder: Path) -> Verdict:
    """The verdict of a folder in which `problems` found none."""
    return Verdict.model_validate_json((folder / "verdict.json").read_bytes())


def _contradictions(folder: Path, result: str) -> list[str]:
    """Records are rewritten as easily as digests: the verdict must follow from them."""
    try:
        results = GateResults.model_validate_json((folder / "results.json").read_bytes())
        verdict = Verdict.model_validate_json((folder / "verdict.json").read_bytes())
        policy = ReleasePolicy.model_validate_json((folder / "policy.json").read_bytes())
    except ValueError as error:
        return [f"the records cannot be read: {' '.join(str(error).split())[:200]}"]
    compared = [check for check in verdict.checks if check.name.startswith("regression: ")]
    found = []
    again = decide(results, policy, compared)
    if _gist(again) != _gist(verdict):
        found.append("verdict.json does not follow from results.json and policy.json")
    if (verdict.outcome == "pass") != (result == "PASSED"):
        found.append(f"{ATTESTATION} and verdict.json disagree")
    if (folder / "samples.jsonl").read_text(encoding="utf-8") != samples_jsonl(results.suite):
        found.append("samples.jsonl does not follow from results.json")
    return found


def _gist(verdict: Verdict) -> Any:
    """What must follow, without the figures, which other versions of a library may round otherwise."""
    return verdict.outcome, verdict.exit_code, [(check.name, check.limit, check.outcome) for check in verdict.checks]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise HardenError(f"there is no folder {path.parent}") from None
        raise HardenError(f"{path.parent} holds no finished gate: there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise HardenError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
