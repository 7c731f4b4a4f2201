"""The house's rules: one-way imports, no module that shadows another, reports and recipes without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harden"

# A module imports only from lines above its own.
LAYERS = """
errors
files
neurons caches schema
settings.values
settings.measuring settings.training
confidence
interventions recipe results processes
policy
verdict
report.tables
report.judges
planted chat
bundled prompts judges.base refusal
judges.embedded judges.agreement judges.endpoint
models
prefill batches
generate adapters
effects
activations judges.classifiers locate.base locate.attribution locate.strength
locate.backward locate.contrast locate.exact locate.tail
locate.gradient locate.graddrop locate.relp locate.integrated locate.greedy
locate.passes judges.loading
attack.records attack.screen attack.select attack.arms attack.published
attack.respond
attack.search
objective.rows
context
adversary objective.refusal objective.benign objective.spread objective.ceiling
measure finetune sharding report.card report.figures report.records gate.reference gate.subject
report.attacks report.certificate report.verdict
report.columns
report.charts
report.page
report.writing
gate.evidence gate.cards
gate.attestation
runfolder
bench
decisions
attack.suite
attack.concept
certify.chunks
certify.suspects
certify.scan
certify.confirm
attack.run rounds certify.run
gate.run
entry
gate.signatures
gate.verify gate.sign
attack.command certify.command gate.command report.command train
cli
""".strip().splitlines()
LINE = {module: number for number, line in enumerate(LAYERS) for module in line.split()}


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "harden":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harden."):
            module = node.module.removeprefix("harden.")
            inside = [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in LINE]
            yield from inside or [module]
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("harden.") for a in node.names if a.name.startswith("harden."))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    assert name in LINE, f"give {name} a line in LAYERS"
    wrong = [other for other in imported_modules(path) if LINE[other] >= LINE[name]]
    assert wrong == []


def test_no_module_shadows_the_standard_library_or_a_dependency():
    """`accelerate launch harden/train.py` puts harden/ first on sys.path."""
    taken = set(sys.stdlib_module_names) | {"torch", "transformers", "peft", "accelerate", "datasets", "tokenizers"}
    assert [name_of(path) for path in PACKAGE.iterdir() if path.stem in taken] == []


@pytest.mark.parametrize(
    "module",
    [
        "harden.report.card",
        "harden.report.attacks",
        "harden.results",
        "harden.recipe",
        "harden.train",
        "harden.attack.command",
        "harden.certify.command",
        "harden.report.certificate",
        "harden.report.page",
        "harden.report.records",
        "harden.report.command",
        "harden.cli",
    ],
)
def test_reading_recipes_and_results_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
