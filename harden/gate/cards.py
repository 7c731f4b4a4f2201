"""What a gate measured, in formats of the Hugging Face hub: a section of the model card, and evaluation results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from harden.policy import ReleasePolicy
from harden.recipe import Recipe
from harden.report.attacks import shown_arm
from harden.report.verdict import HOW_TO_READ, LIMITS, WORDS, verdict_table
from harden.results import Mean, Rate
from harden.settings.measuring import PromptSource
from harden.verdict import GateResults, Verdict

FILES = (".jsonl", ".json", ".csv", ".txt")


@dataclass(frozen=True)
class Figure:
    """One figure to publish: of which prompts, and what must be said with it."""

    task: str
    name: str
    source: PromptSource
    figure: Rate | Mean
    note: str = ""

    @property
    def value(self) -> float:
        return float(f"{self.figure.rate if isinstance(self.figure, Rate) else self.figure.mean:.4g}")

    @property
    def text(self) -> str:
        low, high, n = self.figure.low, self.figure.high, self.figure.n
        return f"{self.value:.3g}, 95% interval {low:.3g} to {high:.3g}, n={n}{self.note}"

    @property
    def dataset(self) -> str:
        """A dataset of the hub, or what the prompts are instead."""
        if self.source.path == "embedded":
            return "harden-embedded-prompts"
        return "local-prompts" if Path(self.source.path).suffix in FILES else self.source.path


def figures(results: GateResults, recipe: Recipe) -> list[Figure]:
    """What is reported: rates over prompts, 0 to 1; of an attack the arm that reports show."""
    suite, prompts = results.suite, recipe.prompts
    found = [
        Figure("no_attack_success", "attack success without attack", prompts.harmful, suite.no_attack.comply),
        Figure("no_attack_refusal", "harmful requests refused without attack", prompts.harmful, suite.no_attack.refuse),
        Figure("over_refusal", "benign look-alikes refused", prompts.twins, suite.over_refusal),
    ]
    if prompts.more_twins and suite.over_refusal_more:
        name = "more benign look-alikes refused"
        found.append(Figure("over_refusal_more", name, prompts.more_twins, suite.over_refusal_more))
    for attack in suite.attacks:
        note = (
            "" if attack.tried or len(attack.arms) == 1 else f", the worst of {len(attack.arms)} arms on these prompts"
        )
        if attack.union.n < suite.no_attack.comply.n:
            note += f", stopped after {attack.union.n} of {suite.no_attack.comply.n} prompts, when the gate was decided"
        shown = shown_arm(attack)
        name = f"attack success, {attack.attack}"
        found.append(Figure(f"{attack.attack}_success", name, prompts.harmful, shown.comply, note))
    if results.benign_kl:
        name = "benign KL to the reference model, nats per token"
        found.append(Figure("benign_kl", name, prompts.benign, results.benign_kl))
    return found


def eval_results(verdict: Verdict, results: GateResults, policy: ReleasePolicy, recipe: Recipe) -> str:
    """YAML for `.eval_results/` of a model repository."""
    entries = [
        EvalResultEntry(dataset_id=f.dataset, task_id=f.task, value=f.value,
                        notes=f"{f.text}; the gate {WORDS[verdict.outcome]}; {_conditions(results, policy, recipe)}")
        for f in figures(results, recipe)
    ]  # fmt: skip
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def model_card_section(verdict: Verdict, results: GateResults, policy: ReleasePolicy, recipe: Recipe) -> str:
    """A model card's metadata (`model-index`) and a section for its text."""
    listed = figures(results, recipe)
    metrics = [
        EvalResult(task_type="text-generation", dataset_type=f.dataset, dataset_name=f.dataset, metric_type=f.task,
                   metric_name=f.name, metric_value=f.value)
        for f in listed
    ]  # fmt: skip
    shipped = Path(recipe.model.adapter or recipe.model.name).resolve()
    inside_run = shipped.name in ("adapter", "model") and (shipped.parent / "recipe.yaml").exists()
    name = shipped.parent.name if inside_run else shipped.name  # runs/mine/adapter is `mine`
    data = ModelCardData(model_name=name, eval_results=metrics)
    lines = "\n".join(f"- {f.name}: {f.text}" for f in listed)
    return (
        f"---\n{data.to_yaml()}\n---\n\n## Release gate: {WORDS[verdict.outcome]}\n\n"
        f"Measured by {_conditions(results, policy, recipe)}.\n\n"
        f"{verdict_table(verdict)}\n\n{HOW_TO_READ}\n\n{lines}\n\n{LIMITS}\n"
    )


def _conditions(results: GateResults, policy: ReleasePolicy, recipe: Recipe) -> str:
    suite = results.suite
    return (
        f"harden {suite.harden_version}, policy {policy.name}, suite {policy.suite_version}, {recipe.seeds}, judge "
        f"{' and '.join(suite.judges)}, greedy, {suite.max_new_tokens} new tokens, sha256 of all prompts "
        f"{results.prompts}"
    )
