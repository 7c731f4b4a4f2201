"""What is measured under many clamps, saved chunk by chunk, so that an interruption loses one chunk at most."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from harden.generate import progress_bar
from harden.interventions import Clamp
from harden.runfolder import RunFolder

CHUNK = 256  # clamps that are measured and saved together


def saved_in_chunks(
    folder: RunFolder,
    name: str,
    clamps: Sequence[Clamp],
    context: Sequence[Any],
    measure: Callable[[Sequence[Clamp]], list[list[float]]],
) -> dict[Clamp, list[float | None]]:
    """`measure(chunk)`, a row per clamp, of all clamps; None: no finite number. Clamps of a layer run together.

    A chunk's stage is named after what is in it and what the rows hang on besides: context, as JSON can hold it.
    """
    found: dict[Clamp, list[float | None]] = {}
    ordered = sorted(clamps, key=lambda clamp: (clamp.neuron, clamp.value))

    def finite(chunk: Sequence[Clamp]) -> list[list[float | None]]:
        return [[x if math.isfinite(x) else None for x in row] for row in measure(chunk)]

    with progress_bar(len(ordered), name) as bar:
        for start in range(0, len(ordered), CHUNK):
            chunk = ordered[start : start + CHUNK]
            content = json.dumps([list(context), [[str(clamp.neuron), clamp.value] for clamp in chunk]])
            stage = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
            rows = folder.stage(stage, list[list[float | None]], lambda chunk=chunk: finite(chunk))
            found |= zip(chunk, rows, strict=True)
            bar.update(len(chunk))
    return found
