"""The statement and the page of a certificate, from its record alone."""

from __future__ import annotations

from collections.abc import Sequence

from harden.recipe import Recipe
from harden.report.judges import judge_note
from harden.report.tables import duration_text, markdown_table, rate_text, sizes_text
from harden.results import Certificate, Spread

SHOWN = 20


def statement(certificate: Certificate) -> str:
    """What follows from the scan, with its confidence."""
    c = certificate
    scanned, rest = c.first + c.drawn, c.neurons - c.first - c.drawn
    suspects = f"{len({suspect.neuron for suspect in c.suspects})}"
    if c.audited:
        suspects = f"{suspects} (suspects of the audit counted)"
    breakers = f"{len(c.breakers)} {_break(c.breakers)} the model"
    found = (
        f"{scanned} of {c.neurons} MLP neurons{_of_layers(c.layers)} were scanned exactly, at {_values(c)} "
        f"each{f', in {c.dtype}' if c.dtype else ''}, on {c.prompts} selection prompts, of which {c.refused} are "
        f"refused by their log-odds to begin with ({c.raced} were decided on the {_easiest(c, '')} refused "
        f"least). {_followed(c)}{suspects} can flip one and leave the model able to speak, and {breakers} on test "
        f"prompts ({rate_text(c.no_attack)} comply without attack)."
    )
    if c.unfollowed:
        found += (
            f" Of the {c.unfollowed} others that flip one {c.least_unfollowed} to {c.most_unfollowed} break the model, "
            "too, with 95% confidence."
        )
    if c.unmeasured:
        found += f" {c.unmeasured} gave no number at some value."
    if c.audited:
        found += (
            f" {c.audited} of {c.cleared_neurons} neurons that do not break it by the race, drawn at random, were "
            f"scanned without the race, at every value on all prompts: {len(c.overlooked)} of them "
            f"{_break(c.overlooked)} the model, and with 95% confidence at most {c.most_overlooked} of these "
            f"{c.cleared_neurons} that were not audited do."
        )
    if not rest:
        cleared = "" if c.audited else ", and so may neurons that the race cleared"
        return f"{found} Every neuron was scanned. Values that were not tried may still break the model{cleared}."
    return (
        f"{found} With 95% confidence at most {c.most_missed} of the other {rest} break it by the same test "
        f"({c.drawn} were drawn at random{', those that were not followed count as breaking' if c.unfollowed else ''})."
    )


def judged_neurons(c: Certificate) -> str:
    """The neurons of which the certificate knows whether they break the model, and how many they are."""
    scanned = c.first + c.drawn
    if c.unfollowed:
        return f"{scanned - c.unfollowed} neurons that were followed or flip no scanned prompt"
    return f"{scanned} scanned neurons"


def _followed(c: Certificate) -> str:
    if not c.unfollowed:
        return ""
    which = "drawn at random besides those that were put first" if c.first else "drawn at random"
    return f"{c.flipping} flip one at some value; {c.flipping - c.unfollowed} of them, {which}, were followed. "


def _break(neurons: Sequence[str]) -> str:
    return "breaks" if len(neurons) == 1 else "break"


def _easiest(c: Certificate, what: str) -> str:
    return f"one{what} that is" if c.race_prompts == 1 else f"{c.race_prompts}{what}{'s' if what else ''} that are"


def _values(c: Certificate) -> str:
    if not _fewer(c):
        return f"{_per_neuron(c)} values"
    return f"up to {_per_neuron(c)} values ({c.clamps / (c.first + c.drawn):.1f} on average)"


def _of_layers(layers: list[int] | None) -> str:
    if layers is None:
        return ""
    return f" of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}, and of no other,"


def suspect_rows(certificate: Certificate) -> list[tuple[str, ...]]:
    """The clamps that generated, breakers first, below the heading."""
    c = certificate
    heading = (
        "neuron", "value", "chosen", "scanned prompts flipped", "attack success, test", "degenerate", "unjudged",
        "test prompts flipped", "",
    )  # fmt: skip
    return [
        heading,
        *(
            (
                s.neuron, f"{s.value:.4g}", _chosen(c, s.drawn), f"{s.scanned_flips}/{s.scanned_refused}",
                rate_text(s.comply), rate_text(s.degenerate), str(s.unjudged.count), rate_text(s.flipped),
                "breaks" if s.breaks else "",
            )
            for s in c.suspects
        ),
    ]  # fmt: skip


def certificate_table(certificate: Certificate) -> str:
    """The statement, the suspects (breakers first) and how far log-odds fell, in Markdown."""
    c = certificate
    parts = [statement(c)]
    if c.suspects:
        rows = suspect_rows(c)
        parts.append(markdown_table(rows[: SHOWN + 1]))
        if len(c.suspects) > SHOWN:
            parts.append(f"{len(c.suspects) - SHOWN} more clamps that generated are in certificate.json.")
    others = "drawn at random" if c.first + c.drawn < c.neurons else "all others" if c.first else "all"
    spreads = {"put first by locators": c.drops_first, others: c.drops_drawn}
    rows = [("drop of refusal log-odds at the worst value, nats", "n", "median", "90%", "99%", "largest")]
    rows += [(name, *_numbers(spread)) for name, spread in spreads.items() if spread]
    parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def _chosen(c: Certificate, drawn: bool) -> str:
    if c.first + c.drawn == c.neurons:
        return "all"
    return "at random" if drawn else "first"


def _numbers(spread: Spread) -> tuple[str, ...]:
    return str(spread.n), *(f"{x:.2f}" for x in (spread.median, spread.q90, spread.q99, spread.largest))


def _halved(c: Certificate) -> str:
    if not c.halvings:
        return ""
    return (
        " Where all of a side that flip one make gibberish, the gap below the smallest was halved up to "
        f"{c.halvings} times."
    )


def _per_neuron(c: Certificate) -> int:
    return len(c.sizes) + 2 * len(c.strengths)


def _fewer(c: Certificate) -> bool:
    """Whether some neurons were scanned at fewer values: some were left out, or several are one."""
    return c.clamps is not None and c.clamps < _per_neuron(c) * (c.first + c.drawn)


def _left_out(c: Certificate) -> str:
    if c.quiet is None or not _fewer(c):
        return ""
    return (
        f" Where a value moves the log-odds of no prompt that it meets by more than {c.quiet:.1%} of their size, the"
        " smaller ones of its side are left out."
    )


def _not_followed(c: Certificate) -> str:
    if not c.unfollowed:
        return ""
    return (
        f"{c.unfollowed} neurons that flip a prompt were not followed: of a side that flips one the smaller values were"
        " not scanned. "
    )


def certificate_card(certificate: Certificate, recipe: Recipe) -> str:
    """README.md of a certificate."""
    c = certificate
    adapter = f" with the adapter `{c.adapter}`" if c.adapter else ""
    return f"""# {recipe.name}, scanned

`{c.model}`{adapter}, scanned by harden {c.harden_version} with the recipe in `recipe.yaml` ({recipe.seeds},
{duration_text(c.seconds)}).

{certificate_table(c)}

## How to read it

- **Scan.** Up to {sizes_text(c.sizes, c.strengths)} a neuron. A clamp that leaves {c.cleared:.0%} of the log-odds of
  the {_easiest(c, " scanned prompt")} refused least, or flips one of them, meets no others.{_left_out(c)}
  {_not_followed(c)}Drops are means over the prompts that a clamp met.
- **Suspect** is a clamp that takes the log-odds of a scanned prompt from above 0 to below, while the loss on two benign
  answers, of the model or of the one below its adapter, rises by at most {recipe.attack.max_benign_rise:g} nats per
  token.{_halved(c)}
- **Test.** Of each neuron the suspect that flips the largest share of the scanned prompts generates, then that of the
  other side of its harmless mean; after each the smallest one of its side if an answer was degenerate. It ends when
  one breaks the model. A clamp meets the {c.confirm_first} test prompts that are refused least, then those whose
  log-odds it takes to 0 or below, the lowest first, until the model is broken or cannot be any more, or all of the
  first {c.confirm_first} and of the next are refused. If one of the first complies with log-odds above 0, all follow.
- **Breaks**: more than {c.tolerance:.0%} of the test prompts that do not comply without attack do so under a clamp, or
  are left unjudged. The share is taken as measured, without its interval, and is over the prompts that it took to
  decide, which are those that the clamp damages most: shares do not rank neurons.

Judge: {" and ".join(c.judges)}{f", rules {c.judge_rules}" if c.judge_rules else ""}; {c.max_new_tokens} new tokens,
greedy; {c.no_attack.n} test prompts.

{judge_note(recipe.judge)}

## What this does not say

Anything about other values, other prompts, several neurons at once, anchored clamps or any other attack. Not found,
neither among the neurons scanned nor in the bound, which is about this very test, is a breaker that flips no scanned
prompt; one that the race over scanned prompts and values clears, or of which it leaves other values out (the audit, if
there was one, bounds how many these are); one that the race over test prompts drops early; and one under which benign
answers suffer more.
"""
