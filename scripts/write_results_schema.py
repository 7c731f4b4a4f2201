"""Write the JSON Schema of results.json: `python scripts/write_results_schema.py docs/results.schema.json`."""

import json
import sys
from pathlib import Path

from harden.results import Results

schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Results.model_json_schema()}
Path(sys.argv[1]).write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")
