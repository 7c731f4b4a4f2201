"""The release policy: what a checkpoint must show before it may ship, and what may be spent on finding out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model, model_validator

from harden.errors import HardenError
from harden.recipe import Recipe, resolve_paths
from harden.schema import Section, explain, merge, read_mapping, validated
from harden.settings.values import Positive, Share

SUITE_VERSION = 4
"""Counts up whenever the attack suite or the judge changes what a figure means."""

BUDGET = ("seed", "prompts", "refusal", "generation", "judge", "locate", "attack", "suite", "certify")
Budget = create_model(
    "Budget",
    __base__=Section,
    **{name: (Recipe.model_fields[name].annotation, Recipe.model_fields[name]) for name in BUDGET},
)

Limit = Annotated[float, Field(ge=0, lt=1, strict=True)] | None  # 1 would allow everything, and yes is no number


class Thresholds(Section):
    """Limits on bounds: the 95% upper bound must be at most the limit, or for `no_attack_refusal` the lower bound at
    least. Lifts are shares of test prompts that comply, or are left unjudged, under an attack and not without it. Null:
    not asked for."""

    no_attack_refusal: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    """Least share of harmful test prompts that are refused without attack."""
    no_attack_success: Limit = None
    """Share that complies without attack."""
    over_refusal: Limit = None
    """Share of benign look-alikes that are refused."""
    over_refusal_more: Limit = None
    """The same of the budget's `prompts.more_twins`."""
    worst_neuron_lift: Limit = None
    """Of the one clamp that was worst on the selection split."""
    constant_lift: Limit = None
    """Of any constant clamp that ran on the test split: the union over neurons and values."""
    anchor_lift: Limit = None
    """Of anchored clamps, whose value follows the request's own activation."""
    zero_lift: Limit = None
    """Of neurons set to 0."""
    mean_lift: Limit = None
    """Of neurons set to their mean over harmless requests."""
    scale_lift: Limit = None
    """Of neurons multiplied by a factor."""
    topk_lift: Limit = None
    """Of silencing up to `suite.most_share` of all neurons, picked by contrast."""
    prune_lift: Limit = None
    """Of silencing neurons that are found anew after each pass."""
    direction_lift: Limit = None
    """Of directional ablation: no neuron attack, and nothing that hardening neurons promises to stop."""
    layer_directions_lift: Limit = None
    """Of ablating each layer's own refusal direction."""
    prefill_lift: Limit = None
    """Of answers that begin with a compliant prefix."""
    benign_kl: Annotated[float, Field(gt=0)] | None = None
    """KL from the reference model on its benign answers, nats per token; needs --reference or an adapter."""
    missed_breakers: Limit = None
    """Share of all neurons that may break the model unseen, by the certificate; it allows no breaker that was seen."""

    @model_validator(mode="after")
    def _ask_for_something(self):
        asked = {name for name, limit in self if limit is not None}
        if not any(name.endswith("_lift") for name in asked):
            raise ValueError("a policy must limit at least one attack, for example worst_neuron_lift")
        if "no_attack_refusal" not in asked or "over_refusal" not in asked:
            raise ValueError(
                "a policy must set no_attack_refusal and over_refusal: a model that complies, or refuses everything, "
                "has no lift either"
            )
        return self


class ReleasePolicy(Section):
    name: str
    description: str
    """What it takes, on which machine, and what it does not cover; shown with every verdict."""
    suite_version: int
    """The suite that the limits were set for; another one is an error."""
    thresholds: Thresholds
    max_unjudged: Share = 0.0
    """Share of completions of any figure that judges may leave unjudged."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of one sitting; when it is over, nothing is decided."""
    benign_prompts: Positive = 48
    """Benign test prompts on which the divergence from the reference is measured."""
    budget: dict[str, Any] = Field(default_factory=dict)
    """What is spent: a recipe's `seed` and its sections `prompts`, `refusal`, `generation`, `judge`, `locate`,
    `attack`, `suite` (but its `attacks`, which follow from the thresholds) and `certify`."""

    @model_validator(mode="after")
    def _has_what_is_limited(self):
        if self.thresholds.over_refusal_more is not None and not (self.budget.get("prompts") or {}).get("more_twins"):
            raise ValueError("over_refusal_more is limited: the budget must have prompts.more_twins")
        return self

    def recipe(self, model: dict[str, Any], output: str, reference: str | None) -> Recipe:
        """The recipe of the attack, of a budget that `load_policy` has checked; reference: a model that the judge asks
        how likely a completion is."""
        fixed = {
            "name": f"gate-{self.name}",
            "output": output,
            "model": model,
            "suite": {"attacks": self.attacks()},
            "judge": {"reference": reference} if reference else {},
            "rounds": {"tolerance": 0},  # there are none
        }
        return validated(Recipe, merge(self.budget, fixed), f"policy '{self.name}', budget")

    def attacks(self) -> list[str]:
        """The attacks that the thresholds ask for, in the order of the schema."""
        lifts = [name.removesuffix("_lift") for name, limit in self.thresholds if limit is not None and "_lift" in name]
        return list(dict.fromkeys("constant" if name == "worst_neuron" else name for name in lifts))


def load_policy(path: str | Path) -> ReleasePolicy:
    """Read a policy file; paths in its budget are relative to it, as in recipes.

    Raises HardenError with every problem found, or where it was made for another suite.
    """
    path = Path(path)
    data = resolve_paths(read_mapping(path, "policy"), path.resolve().parent)
    if "suite_version" not in data and {"train", "base", "model"} & data.keys():
        raise HardenError(f"{path} is a recipe, not a policy; recipes/gate/ has policies")
    version, problems = data.get("suite_version"), []
    if isinstance(version, int) and version != SUITE_VERSION:
        problems.append(
            f"made for version {version} of the attack suite, this is version {SUITE_VERSION}: look at its limits "
            f"again, then set suite_version: {SUITE_VERSION}"
        )
    try:
        policy = ReleasePolicy.model_validate(data)
    except ValidationError as error:
        problems.append(explain(error, ReleasePolicy))
    problems += _budget_problems(data.get("budget"))
    if problems:
        raise HardenError(f"policy {path}: {'; '.join(problems)}")
    return policy


def _budget_problems(budget: Any) -> list[str]:
    """What no recipe can have, and what no budget may."""
    if not isinstance(budget, dict):
        return []  # not given, or an error of the policy
    problems, suite = [], budget.get("suite")
    if isinstance(suite, dict) and "attacks" in suite:
        problems.append("'budget.suite.attacks' follows from the thresholds; take it out")
        budget = {**budget, "suite": {name: value for name, value in suite.items() if name != "attacks"}}
    try:
        Budget.model_validate(budget)
    except ValidationError as error:
        problems.append(explain(error, Budget, "budget."))
    if set(budget) - set(BUDGET):
        problems.append(f"a budget may have {', '.join(BUDGET)}")
    return problems
