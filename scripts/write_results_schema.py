"""Write the JSON Schemas of what runs leave behind: `python scripts/write_results_schema.py docs`."""

import json
import sys
from pathlib import Path

from harden.results import Certificate, Results, SuiteResults
from harden.verdict import GateResults, Verdict

KINDS = {
    "results": Results,
    "attack": SuiteResults,
    "certificate": Certificate,
    "gate": GateResults,
    "verdict": Verdict,
}
for name, kind in KINDS.items():
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
    Path(sys.argv[1], f"{name}.schema.json").write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")
