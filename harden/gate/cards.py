"""What a gate measured, in formats of the Hugging Face hub: a section of the model card, and evaluation results."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from harden.policy import ReleasePolicy
from harden.recipe import Recipe
from harden.report.attacks import shown_arm
from harden.report.verdict import HOW_TO_READ, LIMITS, WORDS, verdict_table
from harden.results import Mean, Rate
from harden.verdict import GateResults, Verdict

NAMES = {
    "no_attack_success": "attack success without attack",
    "no_attack_refusal": "harmful requests refused without attack",
    "over_refusal": "benign look-alikes refused",
    "benign_kl": "benign KL to the reference model, nats per token",
}


def figures(results: GateResults) -> dict[str, Rate | Mean]:
    """What is reported, by task: rates over prompts, 0 to 1; of an attack the arm that reports show."""
    suite = results.suite
    found: dict[str, Rate | Mean] = {
        "no_attack_success": suite.no_attack.comply,
        "no_attack_refusal": suite.no_attack.refuse,
        "over_refusal": suite.over_refusal,
    }
    found |= {f"{attack.attack}_success": shown_arm(attack).comply for attack in suite.attacks}
    return found | ({"benign_kl": results.benign_kl} if results.benign_kl else {})


def eval_results(results: GateResults, policy: ReleasePolicy, recipe: Recipe) -> str:
    """YAML for `.eval_results/` of a model repository. A dataset that is not on the hub is named by its digest."""
    name, revision = _dataset(recipe, results)
    entries = [
        EvalResultEntry(dataset_id=name, dataset_revision=revision, task_id=task, value=_value(figure),
                        notes=f"{_interval(figure)}; {_conditions(results, policy)}")
        for task, figure in figures(results).items()
    ]  # fmt: skip
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def model_card_section(verdict: Verdict, results: GateResults, policy: ReleasePolicy, recipe: Recipe) -> str:
    """A model card's metadata (`model-index`) and a section for its text."""
    name, revision = _dataset(recipe, results)
    metrics = [
        EvalResult(task_type="text-generation", dataset_type=name, dataset_name=name, dataset_revision=revision,
                   metric_type=task, metric_name=_name(task), metric_value=_value(figure))
        for task, figure in figures(results).items()
    ]  # fmt: skip
    title = Path(recipe.model.adapter or recipe.model.name).name
    data = ModelCardData(model_name=title, eval_results=metrics)
    lines = "\n".join(f"- {_name(task)}: {_interval(figure)}" for task, figure in figures(results).items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n## Release gate: {WORDS[verdict.outcome]}\n\n"
        f"Measured by {_conditions(results, policy)}.\n\n{verdict_table(verdict)}\n\n{HOW_TO_READ}\n\n{lines}\n\n"
        f"{LIMITS}\n"
    )


def _name(task: str) -> str:
    return NAMES.get(task) or f"attack success, {task.removesuffix('_success')}"


def _dataset(recipe: Recipe, results: GateResults) -> tuple[str, str]:
    """Name and revision of the harmful prompts; the revision is the digest of all texts."""
    path = recipe.prompts.harmful.path
    if path == "embedded":
        return "harden-embedded-prompts", results.prompts
    return ("local-prompts" if Path(path).suffix else path), results.prompts


def _conditions(results: GateResults, policy: ReleasePolicy) -> str:
    suite = results.suite
    return (
        f"harden {suite.harden_version}, policy {policy.name}, suite {policy.suite_version}, seed {suite.seed}, judge "
        f"{' and '.join(suite.judges)}, greedy, {suite.max_new_tokens} new tokens"
    )


def _value(figure: Rate | Mean) -> float:
    return round(figure.rate if isinstance(figure, Rate) else figure.mean, 4)


def _interval(figure: Rate | Mean) -> str:
    return f"{_value(figure):.3g}, 95% interval {figure.low:.3g} to {figure.high:.3g}, n={figure.n}"
