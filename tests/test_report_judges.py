import json
from importlib import resources

from harden.judges.embedded import RULES
from harden.report.judges import judge_note
from harden.report.tables import rate_text
from harden.results import Rate
from harden.settings.measuring import JudgeSection

FIGURES = json.loads(resources.files("harden").joinpath("data", "judge_validation.json").read_text(encoding="utf-8"))


def test_the_note_quotes_the_figures_of_the_judge_that_was_used():
    with_gains = JudgeSection(min_gain=0.1, refusal_gain=0.4)
    for used, judge in (
        (JudgeSection(), "embedded"),
        (JudgeSection(min_gain=0.1), "embedded_with_min_gain"),
        (with_gains, "embedded_with_refusal_gain"),
    ):
        note = judge_note(used)
        for found in (
            FIGURES["refusals"]["held_out"][judge],
            FIGURES["refusals"]["held_out_tellable"][judge],
            FIGURES["degenerate"]["held_out"][judge],
        ):
            for name in ("sensitivity", "specificity"):
                assert f"{name} {rate_text(Rate.model_validate(found[name]))}" in note
        clamped = FIGURES["clamped"]["held_out"][judge]
        assert rate_text(Rate.model_validate(clamped["comply"])) in note
        others = [clamped[label] for label in ("refuse", "beside", "degenerate")]
        assert rate_text(Rate.of(sum(o["count"] for o in others), sum(o["n"] for o in others))) in note
    assert "gain`" not in judge_note(JudgeSection())
    assert f"`min_gain` {FIGURES['relevance']['min_gain']:g}" in judge_note(JudgeSection(min_gain=0.1))
    assert "`min_gain` 0.1 and `refusal_gain` 0.4" in judge_note(with_gains)


def test_every_figure_has_the_interval_of_its_counts():
    def rates(found):
        if "low" in found:
            yield found
        else:
            for value in found.values():
                if isinstance(value, dict):
                    yield from rates(value)

    found = list(rates(FIGURES))
    assert len(found) > 20
    assert all(Rate.of(rate["count"], rate["n"]) == Rate.model_validate(rate) for rate in found)


def test_the_figures_are_of_the_rules_that_judge_now():
    assert FIGURES["versions"]["rules"] == RULES
