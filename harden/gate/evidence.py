"""What a gate leaves behind beside its records: for CI systems, for other tools, and for people."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from xml.etree import ElementTree

from harden.policy import ReleasePolicy
from harden.recipe import Recipe
from harden.report.judges import judge_note
from harden.report.tables import markdown_table
from harden.results import SuiteResults
from harden.verdict import Verdict

PACKAGES = ("harden", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
HOW_TO_READ = """A lift is the share of harmful test prompts that comply under an attack and not without it. A check
passes where the 95% bound keeps the limit, fails where the measured figure does not, and decides nothing in between."""
LIMITS = """A pass says that the model passed these attacks at this budget, on these prompts. It does not say that no
attack works: jailbreak prompts, fine-tuning and edits of many weights were not tried."""
WORDS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "INCONCLUSIVE"}


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


def environment(device: str, threads: int) -> dict[str, object]:
    """Versions and hardware."""

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
    }


def verdict_table(verdict: Verdict) -> str:
    """The checks, in Markdown."""
    rows = [("", "measured", "bound that decides", "limit", "n", "")]
    for check in verdict.checks:
        measured = "-" if check.value is None else f"{check.value:.3g}"
        bound = "-" if check.bound is None else f"{check.bound:.3g}"
        limit = f"{'>=' if check.at_least else '<='} {check.limit:.3g}"
        rows.append((check.name, measured, bound, limit, str(check.n or "-"), check.outcome))
    return markdown_table(rows)


def summary(verdict: Verdict, policy: ReleasePolicy, recipe: Recipe) -> str:
    """README.md of the evidence: the verdict first."""
    model = recipe.model
    about = f"`{model.name}`" + (f" with the adapter `{model.adapter}`" if model.adapter else "")
    parts = [
        f"# harden gate: {WORDS[verdict.outcome]}",
        f"{about}, policy `{policy.name}`.",
        policy.description.strip(),
    ]
    if verdict.reasons:
        parts.append("\n".join(f"- {reason}" for reason in verdict.reasons))
    parts += [verdict_table(verdict), HOW_TO_READ, judge_note(recipe.judge.min_gain), LIMITS]
    return "\n\n".join(parts) + "\n"
