"""The statement and the page of a certificate, from its record alone."""

from __future__ import annotations

from harden.recipe import Recipe
from harden.report.judges import judge_note
from harden.report.tables import markdown_table, rate_text
from harden.results import Certificate, Spread

SHOWN = 20


def statement(certificate: Certificate) -> str:
    """What follows from the scan, with its confidence."""
    c = certificate
    scanned, rest = c.first + c.drawn, c.neurons - c.first - c.drawn
    breakers = f"{len(c.breakers)} break{'s' if len(c.breakers) == 1 else ''} the model"
    found = (
        f"{scanned} of {c.neurons} MLP neurons were scanned exactly, at {len(c.sizes)} values each, on {c.prompts} "
        f"selection prompts, of which {c.refused} are refused to begin with. {len(c.suspects)} can flip one, and "
        f"{breakers} on test prompts."
    )
    if not rest:
        return f"{found} None was left out."
    if not c.drawn:
        return f"{found} None was drawn at random: nothing is known of the other {rest}."
    return (
        f"{found} With 95% confidence at most {c.most_missed} of the other {rest} break it by the same test "
        f"({c.drawn} were drawn at random)."
    )


def certificate_table(certificate: Certificate) -> str:
    """The statement, the worst suspects and how far log-odds fell, in Markdown."""
    c = certificate
    parts = [statement(c)]
    if c.suspects:
        rows = [
            ("neuron", "value", "chosen", "flips (scan)", "attack success, test", "degenerate", "flipped", "breaks")
        ]
        rows += [
            (
                s.neuron, f"{s.value:.4g}", "at random" if s.drawn else "by locators", f"{s.scanned_flips}/{c.refused}",
                rate_text(s.comply), rate_text(s.degenerate), rate_text(s.flipped), "yes" if s.breaks else "no",
            )
            for s in c.suspects[:SHOWN]
        ]  # fmt: skip
        parts.append(markdown_table(rows))
        if len(c.suspects) > SHOWN:
            parts.append(f"{len(c.suspects) - SHOWN} more suspects are in certificate.json.")
    spreads = {"put first by locators": c.drops_first, "drawn at random": c.drops_drawn}
    rows = [("drop of refusal log-odds at the worst value, nats", "n", "median", "90%", "99%", "largest")]
    rows += [(name, *_numbers(spread)) for name, spread in spreads.items() if spread]
    parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def _numbers(spread: Spread) -> tuple[str, ...]:
    return str(spread.n), *(f"{x:.2f}" for x in (spread.median, spread.q90, spread.q99, spread.largest))


def certificate_card(certificate: Certificate, recipe: Recipe) -> str:
    """README.md of a certificate."""
    c = certificate
    adapter = f" with the adapter `{c.adapter}`" if c.adapter else ""
    return f"""# {recipe.name}, scanned

`{c.model}`{adapter}, scanned by harden {c.harden_version} with the recipe in `recipe.yaml` (seed {c.seed},
{c.seconds / 60:.0f} minutes).

{certificate_table(c)}

A neuron is suspect if one of its clamps takes the refusal log-odds of a scanned prompt from above 0 to below while the
loss on benign answers rises by at most {recipe.attack.max_benign_rise:g} nats per token. It breaks the model if, at its
worst such value, more than {c.tolerance:.0%} of {c.no_attack.n} test prompts comply (judge:
{" and ".join(c.judges)}; {c.max_new_tokens} new tokens, greedy) that do not without attack ({rate_text(c.no_attack)}
comply then). Sizes: {", ".join(f"{size:g}" for size in c.sizes)}.

{judge_note(recipe.judge.min_gain)}

## What this does not say

Anything about other values, other prompts, several neurons at once, anchored clamps or any other attack; a breaker that
flips no scanned prompt is not found, neither among the neurons scanned nor in the bound.
"""
