"""What a gate leaves behind beside its records and pages: for CI systems and for other tools."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from xml.etree import ElementTree

from harden.report.verdict import WORDS
from harden.results import SuiteResults
from harden.verdict import Verdict

PACKAGES = ("harden", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def samples_jsonl(suite: SuiteResults) -> str:
    """One line per attack, arm and test prompt: ids and outcomes, no texts."""
    arms = [("none", suite.no_attack), *((report.attack, arm) for report in suite.attacks for arm in report.arms)]
    rows = [
        {"attack": attack, "arm": arm.label, "prompt": prompt, "outcome": outcome}
        for attack, arm in arms
        for prompt, outcome in arm.outcomes.items()
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def junit_xml(verdict: Verdict, seconds: float) -> str:
    """JUnit: each threshold a test case; too little evidence is an error, not a failure."""
    count = {outcome: sum(check.outcome == outcome for check in verdict.checks) for outcome in WORDS}
    broken = verdict.outcome == "inconclusive" and not count["inconclusive"]
    suite = ElementTree.Element(
        "testsuite", name=f"harden gate: {verdict.policy}", tests=str(len(verdict.checks) + broken),
        failures=str(count["fail"]), errors=str(count["inconclusive"] + broken), skipped="0", time=f"{seconds:.1f}",
    )  # fmt: skip
    for check in verdict.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"harden.{verdict.policy}", name=check.name, time="0"
        )
        if check.outcome != "pass":
            kind = "failure" if check.outcome == "fail" else "error"
            ElementTree.SubElement(case, kind, message=check.reason, type=check.outcome)
    if broken:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"harden.{verdict.policy}", name="measurement", time="0"
        )
        ElementTree.SubElement(case, "error", message="; ".join(verdict.reasons), type="inconclusive")
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def environment(device: str, threads: int, seed: int) -> dict[str, object]:
    """Versions, hardware, the seed, and the git revision of the working folder."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "packages": {package: installed(package) for package in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": device,
        "threads": threads,
        "seed": seed,
        "git": git_revision(),
    }


def git_revision() -> dict[str, object] | None:
    """The commit that is checked out in the working folder, and whether files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
