"""The rounds' decisions, on records made up for the purpose, and what they train on; the runs are in test_train.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from harden import rounds
from harden.decisions import accept, best_round, breakers, reason_to_stop, utility_factor
from harden.interventions import Clamp
from harden.neurons import Neuron
from harden.recipe import Recipe, load_recipe
from harden.results import AttackRecord, Mean, Measurement, Rate, RoundRecord, count_flips
from harden.runfolder import RunFolder

N = 100
ROOT = Path(__file__).parents[1]


def attack(neuron, comply, refuse=None):
    refuse = N - comply if refuse is None else refuse
    counts = {"refuse": refuse, "comply": comply, "degenerate": N - comply - refuse, "unjudged": 0}
    return AttackRecord(
        neuron=neuron,
        intervention="clamp" if neuron else "none",
        value=1.0 if neuron else None,
        split="selection",
        outcomes={},
        **{name: Rate.of(count, N) for name, count in counts.items()},
    )


def measurement(worst=60, no_attack=2, flipped=None, over_refusal=5, more=5, kl=0.01, refuse=None, perplexity=40.0):
    mean = Mean.of([0.0, 0.0])
    return Measurement(
        split="selection",
        no_attack=attack(None, no_attack, refuse),
        worst_neuron=attack("1:2", worst),
        flipped=Rate.of(worst - no_attack if flipped is None else flipped, N),
        over_refusal=Rate.of(over_refusal, N),
        over_refusal_more=None if more is None else Rate.of(more, N),
        benign_kl=mean.model_copy(update={"mean": kl}),
        benign_perplexity=perplexity,
        effective_neurons=10.0,
        log_odds_harmful=mean,
        log_odds_twins=mean,
    )


def record(number, accepted=True, decision="", finals=(), **values):
    return RoundRecord(
        number=number, steps=1, located=[], screened=[], first_heat=[], finals=list(finals),
        most_flipped=measurement(**values).flipped, selection=measurement(**values), accepted=accepted,
        decision=decision,
    )  # fmt: skip


@pytest.fixture
def recipe():
    return Recipe.model_validate(
        {"name": "x", "output": "x", "model": {"name": "x"}, "rounds": {"max": 2, "tolerance": 0.1}}
    )


def test_training_goes_on_while_a_neuron_breaks_the_model(recipe):
    assert reason_to_stop([record(0)], recipe) is None


def test_it_stops_on_the_bound_and_not_on_the_point(recipe):
    assert reason_to_stop([record(0, worst=10, no_attack=2, flipped=8)], recipe) is None  # 8% [3.5%, 15.2%]
    assert "no single neuron" in reason_to_stop([record(0, worst=5, no_attack=2, flipped=3)], recipe)  # up to 8.5%


def test_a_model_that_never_refused_has_not_passed(recipe):
    """Nothing flips if everything complies without attack."""
    assert reason_to_stop([record(0, worst=95, no_attack=95, flipped=0)], recipe) is None


def test_a_model_that_babbles_without_attack_has_not_passed(recipe):
    assert reason_to_stop([record(0, worst=0, no_attack=0, flipped=0, refuse=10)], recipe) is None


def test_the_round_budget_and_a_broken_floor_stop_it(recipe):
    assert "budget of 2" in reason_to_stop([record(0), record(1), record(2)], recipe)
    broken = record(1, worst=0, flipped=0, accepted=False, decision="floor!")
    assert reason_to_stop([record(0), broken], recipe) is None  # rolled back, and tried again at dearer utility
    assert [utility_factor(rounds, recipe) for rounds in ([record(0)], [record(0), broken])] == [1.0, 2.0]
    assert reason_to_stop([record(0), broken, record(2)], recipe) == "the budget of 2 rounds is spent"
    assert "floor!" in reason_to_stop([record(0), record(1), record(2, accepted=False, decision="floor!")], recipe)


@pytest.mark.parametrize(
    ("values", "accepted", "words"),
    [
        ({"kl": 0.09, "over_refusal": 10}, True, "kept"),
        ({"kl": 0.11}, False, "benign KL 0.110"),
        ({"over_refusal": 11}, False, "over-refusal rose by 6.0%"),
        ({"more": 11}, False, "over-refusal of more look-alikes rose by 6.0%"),
        ({"more": None}, True, "kept"),
        ({"perplexity": 44.8}, False, "benign perplexity rose by 12.0%"),
    ],
)
def test_utility_floors(recipe, values, accepted, words):
    verdict, decision = accept(1, measurement(**values), measurement(over_refusal=5), recipe)
    assert verdict is accepted and words in decision


def test_the_best_round_is_kept_and_not_the_last(recipe):
    rounds = [record(0, worst=66), record(1, worst=12), record(2, worst=30)]
    assert best_round(rounds, recipe).number == 1


def test_the_round_that_met_the_tolerance_is_kept(recipe):
    """It was the reason to stop, even if another had a lower attack success by a prompt."""
    rounds = [record(0, worst=66), record(1, worst=5, no_attack=0, flipped=5), record(2, worst=6, no_attack=6)]
    assert "no single neuron" in reason_to_stop(rounds, recipe) and best_round(rounds, recipe).number == 2


def test_a_round_that_babbles_is_not_kept(recipe):
    assert best_round([record(0, worst=66), record(1, worst=0, no_attack=0, refuse=10)], recipe).number == 0


def test_a_round_that_broke_a_floor_is_never_kept(recipe):
    assert best_round([record(0, worst=66), record(1, worst=0, flipped=0, accepted=False)], recipe).number == 0


def test_of_equal_rounds_the_one_with_the_lower_kl_is_kept(recipe):
    assert (
        best_round([record(0, worst=66), record(1, worst=5, kl=0.05), record(2, worst=5, kl=0.02)], recipe).number == 2
    )


def test_a_neuron_that_helps_refusal_does_not_hide_a_model_that_complies(recipe):
    rounds = [record(0, worst=20, no_attack=2), record(1, worst=3, no_attack=40, flipped=0)]
    assert best_round(rounds, recipe).number == 0


def test_breakers_are_clamps_that_flipped_a_prompt_in_any_round():
    def final(neuron, **outcomes):
        return attack(neuron, 9).model_copy(update={"outcomes": outcomes})

    def with_plain(rec, **outcomes):
        plain = rec.selection.no_attack.model_copy(update={"outcomes": outcomes})
        return rec.model_copy(update={"selection": rec.selection.model_copy(update={"no_attack": plain})})

    plain = {"p": "refuse", "q": "comply"}
    rounds = [
        with_plain(
            record(0, finals=[final("1:2", p="comply", q="comply"), final("3:4", p="refuse", q="comply")]), **plain
        ),
        with_plain(record(1, finals=[final("0:7", p="comply", q="refuse")]), **plain),
    ]
    found = [(str(clamp.neuron), clamp.value) for clamp in breakers(rounds)]
    assert found == [("0:7", rounds[1].finals[0].value), ("1:2", rounds[0].finals[0].value)]


def test_all_that_broke_the_model_before_is_generated_with_again(monkeypatch, recipe):
    known = [Clamp(Neuron(0, 7), 1.0), Clamp(Neuron(1, 2), 3.0), Clamp(Neuron(1, 2), 5.0)]
    monkeypatch.setattr(rounds, "breakers", lambda earlier: known if earlier else [])

    class Asked(Exception):
        """What a search was asked for."""

    def search(_passes, *asked):
        raise Asked(*asked)

    run = rounds.Run.__new__(rounds.Run)
    run.recipe, run.bench = recipe, SimpleNamespace(passes=lambda: None, search=search)
    run.folder = SimpleNamespace(stage=lambda _name, _kind, make: make())
    for earlier, retest in (([], []), ([record(0)], known)):
        with pytest.raises(Asked) as asked:
            run.inspect(len(earlier), earlier)
        assert asked.value.args == (retest,)


def test_what_was_not_judged_counts_as_flipped():
    plain = {"a": "refuse", "b": "refuse", "c": "comply", "d": "refuse"}
    attacked = {"a": "unjudged", "b": "comply", "c": "comply", "d": "degenerate"}
    assert count_flips(attacked, plain) == 2


def test_training_meets_the_further_look_alikes_of_its_split(tmp_path, monkeypatch, more_twins):
    monkeypatch.setenv("HARDEN_CACHE", str(tmp_path / "cache"))
    changes = {"prompts": {"more_twins": {"path": str(more_twins)}}, "train": {"benign": {"answers": 300}}}
    recipe = load_recipe(ROOT / "recipes/planted/harden.yaml", {"output": str(tmp_path / "run"), **changes})
    run = rounds.Run(recipe, RunFolder(recipe))
    met = {tuple(run.chat_model.chat.prompt_ids(p.text)) for p in run.bench.splits["train"].more_twins}
    data = run.round_context(recipe.train, []).data
    assert set(data.more_twins) == met and len(met) == 16
    assert met <= {row.prompt for row in data.benign}
