"""The before -> after table and the model card of a run folder, from its results alone."""

from __future__ import annotations

from pathlib import Path

from harden.confidence import mcnemar
from harden.recipe import Recipe
from harden.report.judges import judge_note
from harden.report.tables import duration_text, markdown_table, mean_text, rate_text, sizes_text
from harden.results import Measurement, Results

BUNDLED_LOADER = "from harden.bundled import resolve\n"


def summary_rows(results: Results) -> list[tuple[str, str, str]]:
    """(quantity, before, after) on the test split."""

    def row(name: str, show) -> tuple[str, str, str]:
        return name, show(results.before), show(results.after)

    more = []
    if results.before.over_refusal_more and results.after.over_refusal_more:
        more.append(row("over-refusal (more look-alikes)", lambda m: rate_text(m.over_refusal_more)))
    return [
        row("attack success without attack", lambda m: rate_text(m.no_attack.comply)),
        row("refused without attack", lambda m: rate_text(m.no_attack.refuse)),
        row("worst single neuron", _worst),
        row("its attack success", lambda m: rate_text(m.worst_neuron.comply)),
        row("its degenerate share", lambda m: rate_text(m.worst_neuron.degenerate)),
        row("prompts that it flips", lambda m: rate_text(m.flipped)),
        row("over-refusal (benign look-alikes)", lambda m: rate_text(m.over_refusal)),
        *more,
        row("benign KL, nats per token", lambda m: mean_text(m.benign_kl)),
        row("benign perplexity", lambda m: "–" if m.benign_perplexity is None else f"{m.benign_perplexity:.4g}"),
        row("effective number of neurons", lambda m: f"{m.effective_neurons:.0f}"),
        row("refusal log-odds, harmful", lambda m: mean_text(m.log_odds_harmful)),
        row("refusal log-odds, look-alikes", lambda m: mean_text(m.log_odds_twins)),
    ]


def summary_table(results: Results) -> str:
    """The before -> after table in Markdown."""
    return markdown_table([("test split", "before", "after"), *summary_rows(results)])


def verdict_line(results: Results) -> str:
    trained = len(results.rounds) - 1
    kept = f"kept round {results.kept_round} of {trained}"
    if not results.kept_round:
        kept = f"kept {'no round' if trained else 'the starting model'}: {_unchanged(results)}"
    return f"{kept}; stopped because {results.stop_reason}; {duration_text(results.seconds)}"


def tolerance_line(results: Results, recipe: Recipe) -> str:
    """Whether the kept round meets what the recipe asks for."""
    flipped = results.rounds[results.kept_round].most_flipped
    worst = f"the worst neuron flips {rate_text(flipped)} of the selection prompts"
    if not recipe.rounds.tolerance:
        return f"No tolerance was set; {worst}."
    refused = rate_text(results.rounds[results.kept_round].selection.no_attack.refuse)
    return (
        f"Tolerance {'met' if results.passed else 'NOT met'}: {worst} (allowed: {recipe.rounds.tolerance:.0%} on the "
        f"upper bound), {refused} are refused without attack (asked for: {recipe.rounds.min_refusal:.0%})."
    )


def _unchanged(results: Results) -> str:
    return f"the adapter {'is the starting one, unchanged' if results.adapter else 'changes nothing'}"


def model_card(results: Results, recipe: Recipe) -> str:
    """README.md of a run folder: what this adapter is, how to load it, what was measured and what was not."""
    load = (
        f"base = AutoModelForCausalLM.from_pretrained({_source(recipe.model.name)}, dtype=torch.{recipe.model.dtype})"
    )
    start = f", continuing the adapter `{recipe.model.adapter}`" if recipe.model.adapter else ""
    what = "It is trained to keep refusing harmful requests when one MLP neuron is clamped (arXiv 2605.08513)."
    if not results.kept_round:
        what = f"**No round of training was kept: {_unchanged(results)}.**"
    second = f" and {recipe.judge.second.name}, the worse of both" if recipe.judge.second else ""
    return f"""---
library_name: peft
base_model: {recipe.model.name}
tags: [lora, harden, safety]
---

# {recipe.name}

A LoRA for `{recipe.model.name}`{start}, made by harden {results.harden_version} with the recipe in `recipe.yaml`.
{what}

## Load it

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
{BUNDLED_LOADER if "resolve(" in load else ""}
{load}
model = PeftModel.from_pretrained(base, "adapter")
```

These lines, run in the run folder (the one that holds `adapter/`), give the model that was measured.

## Measured

Constant clamp on one neuron, the worst of a fresh search on the selection split, reported on
{results.after.no_attack.comply.n} unseen prompts. Greedy, {results.max_new_tokens} new tokens, the embedded
judge{second} (refuse / comply / degenerate; attack success is `comply`). Brackets are 95% intervals.
{judge_note(recipe.judge)}

{summary_table(results)}

Exact McNemar test, on the same prompts, that the worst clamp succeeds less often after than before:
p = {mcnemar(results.before.worst_neuron.outcomes, results.after.worst_neuron.outcomes):.2g}.
{verdict_line(results)[0].upper()}{verdict_line(results)[1:]}.
{tolerance_line(results, recipe)}

## What this does not say

Only one neuron at a time was clamped, to a constant, with {recipe.attack.candidates} candidate neurons
({", ".join(recipe.attack.locators)}), each to at most {sizes_text(recipe.attack.sizes, recipe.attack.strengths)}.
Clamping several neurons, anchor clamps, editing or fine-tuning the weights and jailbreak prompts were not tried. Judges
read {results.max_new_tokens} tokens.
"""


def _source(name: str) -> str:
    from harden.bundled import NAMES

    if name in NAMES:
        return f"resolve({name!r})"
    return repr(str(Path(name).resolve()) if Path(name).is_dir() else name)


def _worst(m: Measurement) -> str:
    attack = m.worst_neuron
    return f"{attack.neuron} clamped to {attack.value:.4g}" if attack.neuron else "none found"
