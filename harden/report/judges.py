"""What the embedded judge is worth: its validated figures, for every report."""

from __future__ import annotations

import json
from importlib import resources

from harden.report.tables import rate_text
from harden.results import Rate
from harden.settings.measuring import JudgeSection


def judge_note(judge: JudgeSection) -> str:
    """What `benchmarks/judges.py --write` measured of the judge as it was used: with `judge.refusal_gain`, with
    `judge.min_gain` alone, or with neither.

    The figures are of null and of one value of each, and the note says of which.
    """
    text = resources.files("harden").joinpath("data", "judge_validation.json").read_text(encoding="utf-8")
    figures = json.loads(text)
    who, measured = "embedded", figures["versions"]
    at, limit = "", measured["max_nats_per_token"]
    if judge.refusal_gain is not None:
        who, limit = "embedded_with_refusal_gain", measured["max_nats_with_refusal_gain"]
        at = f" at `min_gain` {measured['min_gain']:g} and `refusal_gain` {measured['refusal_gain']:g}"
    elif judge.min_gain is not None:
        who, at = "embedded_with_min_gain", f" at `min_gain` {measured['min_gain']:g}"

    def rates(found: dict) -> str:
        return ", ".join(f"{name} {rate_text(Rate.model_validate(found[name]))}" for name in found if name in _KEYS)

    refusals, clamped = figures["refusals"], figures["clamped"]["held_out"][who]
    called = {
        name: rate_text(Rate.of(sum(clamped[label]["count"] for label in of), sum(clamped[label]["n"] for label in of)))
        for name, of in {"comply": ["comply"], "other": ["refuse", "beside", "degenerate"]}.items()
    }
    return (
        f"How reliable the embedded judge{at} is, measured on the bundled model (32 tokens, at most {limit:g} nats per "
        f"token). On refusals labelled by people, which it was not developed on and which count an answer to something "
        f"else as a refusal: {rates(refusals['held_out'][who])}; on those that the text alone can show: "
        f"{rates(refusals['held_out_tellable'][who])}. On degenerate text labelled by language models: "
        f"{rates(figures['degenerate']['held_out'][who])}. Of the brittle model's answers to harmful prompts under "
        f"clamps that break it, labelled by language models, it calls `comply` {called['comply']} of those that take "
        f"up their request, and {called['other']} of all others."
    )


_KEYS = ("sensitivity", "specificity")
