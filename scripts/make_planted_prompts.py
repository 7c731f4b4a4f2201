"""Write the planted model's prompts and refusals: `python scripts/make_planted_prompts.py recipes/planted`."""

import json
import sys
from pathlib import Path

from harden.planted import TRAINED_REFUSALS, planted_prompts

folder = Path(sys.argv[1])
rows = {**planted_prompts(), "refusals": [{"text": text} for text in TRAINED_REFUSALS]}
for kind, members in rows.items():
    text = "".join(json.dumps(row) + "\n" for row in members)
    (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    print(f"{folder / kind}.jsonl: {len(members)} rows")
