"""What the embedded judge is worth: its validated figures, for every report."""

from __future__ import annotations

import json
from importlib import resources

from harden.report.tables import rate_text
from harden.results import Rate


def judge_note(min_gain: float | None) -> str:
    """The figures that `benchmarks/judges.py --write` measured, of the judge, asking whether a text has to do
    with its request or not.

    min_gain: as in `judge.min_gain`; the figures are of null and of one value, and the note says so.
    """
    text = resources.files("harden").joinpath("data", "judge_validation.json").read_text(encoding="utf-8")
    figures = json.loads(text)
    judge = "embedded" if min_gain is None else "embedded_with_evasion"
    at = f" at `min_gain` {figures['evasion']['min_gain']:g}" if min_gain is not None else ""

    def rates(found: dict) -> str:
        return ", ".join(f"{name} {rate_text(Rate.model_validate(found[name]))}" for name in found if name in _KEYS)

    refusals = figures["refusals"]
    clamped = figures["clamped"]["held_out"][judge]
    others = [clamped[label] for label in ("refuse", "beside", "degenerate")]
    return (
        f"The embedded judge{at} itself, where it was validated (the bundled model, 32 tokens, default thresholds): on "
        f"held-out human labels of refusals, an answer to something else being one, "
        f"{rates(refusals['held_out'][judge])}; on those that the text alone can show, "
        f"{rates(refusals['held_out_tellable'][judge])}. On degenerate text labelled by language models: "
        f"{rates(figures['degenerate']['held_out']['embedded'])}. Of what the brittle bundled model wrote on harmful "
        f"prompts under clamps that break it, read by two language models, it calls {clamped['comply']['count']} of "
        f"{clamped['comply']['n']} compliances `comply`, and {sum(found['count'] for found in others)} of "
        f"{sum(found['n'] for found in others)} refusals, texts beside the point and texts that are no language."
    )


_KEYS = ("sensitivity", "specificity")
