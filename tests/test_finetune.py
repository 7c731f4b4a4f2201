import random
from dataclasses import replace

import pytest
import torch

import harden.finetune as finetune
from harden.activations import read_activations, template_activations
from harden.adapters import adapter_state, attach_adapter
from harden.adversary import Adversary, Weighed, draw_strong_clamp, refresh, weigh_clamps
from harden.attack import screen
from harden.attack.arms import Anchor
from harden.attack.screen import Probe
from harden.context import RoundContext, Start, TrainingData
from harden.errors import MeasurementError
from harden.finetune import backward, learning_rate_factor, read_start, train_round
from harden.generate import Completion, Request
from harden.interventions import Clamp
from harden.locate.gradient import score_neurons
from harden.locate.strength import full_strength
from harden.models import load_chat_model
from harden.neurons import Neuron
from harden.objective.ceiling import Ceiling
from harden.objective.refusal import shortfall
from harden.objective.rows import Row
from harden.planted import ANSWER, PLANTED_NEURON, REFUSAL
from harden.settings.training import TrainSection

SMALL = {
    "steps": 6, "learning_rate": 1e-2, "checkpoint_every": 2, "refusal": {"rows": 4}, "spread": {"weight": 0.05},
    "benign": {"rows": 2},
}  # fmt: skip


def settings(**changes):
    return TrainSection.model_validate({**SMALL, **changes})


@pytest.fixture
def data(planted, prompts):
    chat = planted.chat
    harmful, twins, benign = (prompts[kind][:8] for kind in ("harmful", "twins", "benign"))
    answer = tuple(chat.answer_ids(ANSWER))
    return TrainingData(
        harmful=tuple(tuple(chat.prompt_ids(p.text)) for p in harmful),
        refusals=(tuple(chat.answer_ids(REFUSAL)),),
        twins=tuple(tuple(chat.prompt_ids(p.text)) for p in twins),
        more_twins=(),
        benign=tuple(Row(tuple(chat.prompt_ids(p.text)), answer) for p in benign),
        harmful_texts=tuple(p.text for p in harmful),
        twin_texts=tuple(p.text for p in twins),
        texts=tuple(Row((ids[0],), tuple(ids[1:])) for ids in (planted.tokenizer(p.text)["input_ids"] for p in benign)),
        probe=Probe((harmful[0].text,), (benign[0].text,), (Completion(ANSWER, True),)),
    )


def round_context(chat_model, data, phrases, section, past_breakers=(), **start):
    return RoundContext(chat_model, data, phrases, section, 2.0, past_breakers, 16, Start(**start))


PAST = [Clamp(PLANTED_NEURON, -30.0)]


def run(chat_model, data, phrases, checkpoint, log=None, **changes):
    events = [] if log is None else log
    train_round(round_context(chat_model, data, phrases, settings(**changes), PAST), 0, 1, checkpoint, events.append)
    return events


def adapted(chat_model):
    attach_adapter(chat_model, 4, 8, ("all-linear",), None, 0)
    return chat_model


def test_the_loss_under_clamps_falls(planted, data, phrases, tmp_path):
    events = run(adapted(planted), data, phrases, tmp_path / "c.pt", steps=30)
    first, last = (sum(e["refusal"] for e in part) for part in (events[:5], events[-5:]))
    assert last < 0.7 * first and len(events) == 30


def test_switched_off_terms_do_not_run(planted, data, phrases, tmp_path):
    off = {"clamps": {"share": 0}, "spread": {"weight": 0}, "benign": {"weight": 0}}
    events = run(adapted(planted), data, phrases, tmp_path / "c.pt", **off)
    assert events and all("refusal" in e and not {"spread", "benign_kl"} & e.keys() for e in events)


def test_the_twins_of_a_step_are_those_of_its_harmful_prompts(planted, data, phrases, monkeypatch, caplog):
    harmful, twins = [], []
    refusal, rise = finetune.refusal_loss, finetune.refusal_rise
    monkeypatch.setattr(finetune, "refusal_loss", lambda m, rows: (harmful.extend(rows), refusal(m, rows))[1])
    monkeypatch.setattr(finetune, "refusal_rise", lambda m, rows, *p: (twins.extend(rows), rise(m, rows, *p))[1])
    twin_of = dict(zip(data.harmful, data.twins, strict=True))
    model = adapted(planted)

    def step(data, seed=3, **term):
        harmful.clear(), twins.clear()
        section = settings(refusal={"rows": 4}, twins={"weight": 2, **term})
        context = replace(round_context(model, data, phrases, section), batch_size=3)
        context = replace(context, start=read_start(context, "seed"))
        return backward(context, Adversary(), 1, random.Random(seed), {})[0]

    assert step(data, below=0.5)["twins"] == pytest.approx(0.5, abs=1e-4)  # nothing was trained yet
    assert step(data)["twins"] == pytest.approx(0.0, abs=1e-4)
    drawn = [row.prompt for row in harmful]
    assert twins == [twin_of[prompt] for prompt in drawn]
    step(replace(data, twins=tuple(t if p == drawn[1] else None for p, t in twin_of.items())))
    assert twins == [twin_of[drawn[1]]]
    more = replace(data, more_twins=tuple(row.prompt for row in data.benign[:4]))  # a third of all look-alikes
    assert step(more, below=0.5)["twins"] == pytest.approx(0.5, abs=1e-4)
    assert len(twins) == 4 and twins[:3] == [twin_of[prompt] for prompt in drawn[:3]] and twins[3] in more.more_twins
    few = replace(data, more_twins=more.more_twins[:1])  # a ninth of all look-alikes: one of four rows in some steps
    met = [sum(row in few.more_twins for row in twins) for seed in range(12) if step(few, seed)]
    assert set(met) == {0, 1}
    alone = replace(more, twins=(None,) * len(data.harmful))
    assert step(alone, rows=3) and len({*twins} & {*more.more_twins}) == len(twins) == 3
    assert "train.twins has no effect" not in caplog.text
    assert "twins" not in step(replace(alone, more_twins=())) and not twins
    assert "train.twins has no effect" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "clamps": {"share": 0.75, "relocate_every": 2, "replay": True, "groups": 0.5, "random": 3, "anchors": 0.5},
            "benign": {"rows": 2, "ceiling": 1e-6}, "twins": {"weight": 0.1, "ceiling": 0.1},
        },
        {
            "clamps": {"share": 0.25, "relocate_every": 4}, "leverage": {"weight": 0.1, "every": 2},
            "mask": {"share": 0.25, "relocate_every": 2}, "direction": {"share": 0.5, "relocate_every": 4},
        },
        {
            "clamps": {"share": 0.5, "relocate_every": 4},
            "margin": {"weight": 0.5, "rows": 4, "attacked": True}, "benign": {"rows": 2, "texts": 2},
            "fail_closed": {"weight": 0.5, "rows": 4},
        },
        {"clamps": {"share": 0}, "mask": {"share": 1, "locator": "random"}, "benign": {"clamped": 0.5}},
    ],
)  # fmt: skip
def test_an_interrupted_round_ends_like_an_undisturbed_one(planted, planted_folder, data, phrases, tmp_path, changes):
    whole = adapted(planted)
    run(whole, data, phrases, tmp_path / "whole.pt", **changes)

    class Killed(Exception):
        pass

    class Kill(list):
        def append(self, event):
            if event["step"] == 5:  # after the checkpoint of step 4
                raise Killed

    with pytest.raises(Killed):
        run(adapted(load_chat_model(str(planted_folder))), data, phrases, tmp_path / "c.pt", log=Kill(), **changes)
    resumed = adapted(load_chat_model(str(planted_folder)))
    events = run(resumed, data, phrases, tmp_path / "c.pt", **changes)
    assert [e["step"] for e in events] == [5, 6]
    for name, tensor in adapter_state(whole.model).items():
        assert torch.equal(tensor, adapter_state(resumed.model)[name]), name


def test_what_a_step_draws_is_pinned(planted, data, phrases, monkeypatch):
    """Published figures hang on it: a change here makes the shipped recipes train another run."""
    rows = []
    refusal, benign = finetune.refusal_loss, finetune.benign_kl
    monkeypatch.setattr(finetune, "refusal_loss", lambda m, mine: (rows.extend(mine), refusal(m, mine))[1])
    monkeypatch.setattr(finetune, "benign_kl", lambda m, mine: (rows.extend(mine), benign(m, mine))[1])
    adversary = Adversary([weighed_clamp(Neuron(1, n), weight=n + 1.0) for n in range(4)])
    data = replace(data, refusals=tuple((n,) for n in range(9, 29)))
    backward(round_context(adapted(planted), data, phrases, settings()), adversary, 1, random.Random(3), {})
    drawn = [
        (
            data.harmful.index(row.prompt),
            row.answer[0],
            row.interventions[0].neuron.index if row.interventions else None,
        )
        for row in rows[:4]
    ]
    assert drawn == DRAWN
    assert [next(n for n, row in enumerate(data.benign) if row == mine) for mine in rows[4:]] == DRAWN_BENIGN


DRAWN = [(3, 20, 3), (4, 24, 3), (6, 11, None), (1, 28, None)]
DRAWN_BENIGN = [0, 6]


def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_last_good_checkpoint(
    planted, data, phrases, tmp_path, monkeypatch
):
    real, calls = finetune.refusal_loss, []

    def broken(chat_model, rows):
        calls.append(1)
        return real(chat_model, rows) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(finetune, "refusal_loss", broken)
    with pytest.raises(MeasurementError, match="round 1, step 4: the loss is not finite"):
        run(adapted(planted), data, phrases, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 2 and all(torch.isfinite(t).all() for t in saved["adapter"].values())


def weighed_clamp(neuron, value=1.0, weight=1.0, benign_rise=0.0, harmful=1.0, harmless=0.0, floor=0.0):
    return Weighed(Clamp(neuron, value), weight, benign_rise, harmful, harmless, floor)


def weighed(chat_model, data, phrases, max_benign_rise=2.0, **clamps):
    candidates = score_neurons(chat_model, data.harmful_texts, data.twin_texts, phrases, 16).top(24)
    context = replace(
        round_context(chat_model, data, phrases, settings(clamps=clamps)), max_benign_rise=max_benign_rise
    )
    return weigh_clamps(context, candidates, {})


def test_clamps_that_break_the_model_are_drawn_more_often(planted, data, phrases):
    found = weighed(adapted(planted), data, phrases)
    planted_weight = max(w.weight for w in found if w.clamp.neuron == PLANTED_NEURON)
    others = [w.weight for w in found if w.clamp.neuron != PLANTED_NEURON]
    assert planted_weight > 1.0 and max(others) < 0.2


def test_without_a_coherent_clamp_rows_are_trained_unclamped(planted, data, phrases):
    found = weighed(adapted(planted), data, phrases, max_benign_rise=-9.0)
    assert found == [] and Adversary(found).draw(random.Random(0)) == ()


def refreshed(chat_model, data, phrases, adversary, step, known=(), full=None, **changes):
    context = round_context(chat_model, data, phrases, settings(**changes), known, full=full)
    return refresh(context, adversary, step, random.Random(step))


def test_clamps_are_also_drawn_at_shares_of_full_strength(planted, data, phrases):
    model = adapted(planted)
    full = torch.linspace(1, 2, model.neurons.count)
    terms = {"pool": 3, "sizes": (8,), "strengths": (0.25, 0.5), "floor": 0.1}
    found = refreshed(model, data, phrases, Adversary(), 0, full=full, clamps=terms)
    drawn = [w.clamp for w in found.clamps]
    by_layer = full.split(list(model.neurons.widths))
    found = refreshed(model, data, phrases, Adversary(), 0, clamps=terms | {"strengths": ()})
    without = {w.clamp for w in found.clamps}
    strong = [clamp for clamp in drawn if clamp not in without]
    assert strong and without <= {*drawn}
    for clamp in strong:
        share = clamp.value / float(by_layer[clamp.neuron.layer][clamp.neuron.index])
        assert share == pytest.approx((1 if share > 0 else -1) * (0.25 if abs(share) < 0.4 else 0.5))


def test_strengths_alone_have_full_strength_measured(planted, data, phrases, tmp_path):
    clamps = {"share": 0.5, "pool": 2, "strengths": (0.5,)}
    run(adapted(planted), data, phrases, tmp_path / "checkpoint.pt", steps=2, clamps=clamps)  # raises without it


def test_clamps_that_were_kept_are_not_asked_for_coherence_again(planted, data, phrases, monkeypatch):
    model, asked = adapted(planted), []
    real = screen.benign_rises
    monkeypatch.setattr(
        screen, "benign_rises", lambda m, clamps, *rest: (asked.append(clamps), real(m, clamps, *rest))[1]
    )
    first = refreshed(model, data, phrases, Adversary(), 0, clamps={"pool": 3})
    resumed = Adversary.from_state(first.to_state())
    again = refreshed(model, data, phrases, resumed, 0, clamps={"pool": 3})  # the same prompts, locators and weights
    assert first.clamps and {weighed.clamp for weighed in first.clamps} <= {*asked[0]}
    assert [clamp for clamp in asked[1] if any(clamp == weighed.clamp for weighed in first.clamps)] == []
    assert [(w.clamp, w.benign_rise) for w in again.clamps] == [(w.clamp, w.benign_rise) for w in first.clamps]


def test_known_breakers_and_neurons_at_random_join_the_pool(planted, data, phrases):
    model = adapted(planted)

    def pool(step=0, known=(), **clamps):
        found = refreshed(model, data, phrases, Adversary(), step, known, clamps={"pool": 1, **clamps})
        return {weighed.clamp.neuron for weighed in found.clamps}

    alone = pool()
    assert len(alone) == 1 and pool(known=[Clamp(Neuron(2, 30), 0.125)]) == {*alone, Neuron(2, 30)}
    drawn = [pool(step, random=5) for step in (0, 20)]
    assert all(alone < neurons and len(neurons) > 3 for neurons in drawn) and drawn[0] != drawn[1]
    assert len(pool(random=10**6)) > 90  # all there are, but for incoherent ones


def test_a_clamp_of_an_earlier_round_is_drawn_at_its_value_however_well_it_is_resisted(planted, data, phrases):
    model, past = adapted(planted), Clamp(Neuron(2, 30), 0.125)  # it breaks nothing
    found = refreshed(model, data, phrases, Adversary(), 0, [past], clamps={"pool": 1, "floor": 0.01})
    for _ in range(9):
        found.learn([(weighed.clamp, 30.0) for weighed in found.clamps], settings())
    weights = {weighed.clamp: weighed.weight for weighed in Adversary.from_state(found.to_state()).clamps}
    others = [weight for clamp, weight in weights.items() if clamp.neuron == past.neuron and clamp != past]
    assert weights[past] == pytest.approx(0.1, abs=1e-3)
    assert others and max(others) == pytest.approx(0.01, abs=1e-3)


def test_a_clamp_of_an_earlier_round_is_left_out_where_the_start_only_babbles_under_it(planted, data, phrases):
    model, past = adapted(planted), Clamp(PLANTED_NEURON, -1e4)
    drawn = {weighed.clamp for weighed in refreshed(model, data, phrases, Adversary(), 0, [past]).clamps}
    assert past not in drawn and PLANTED_NEURON in {clamp.neuron for clamp in drawn}


@pytest.mark.parametrize(
    ("weigh_by", "of_positive", "weight"),
    [
        ("chance", (40.0, -10.0), 0.5),
        ("chance", (0.0, 0.0), 0.25),
        ("shortfall", (40.0, -10.0), 0.5),
        ("shortfall", (1.0, 3.0), 0.5),
        ("shortfall", (4.0, 4.0), 0.0),
        ("shortfall", (-1.0, -90.0), 1.0),
    ],
)
def test_a_clamp_weighs_what_it_does_averaged_over_prompts(
    planted, data, phrases, monkeypatch, weigh_by, of_positive, weight
):
    """Of each prompt, not of the mean log-odds, which are high where one prompt of two is refused very surely."""
    monkeypatch.setattr(
        screen, "log_odds_under", lambda _, clamps, *rest: [of_positive if c.value > 0 else (40, 40) for c in clamps]
    )
    found = weighed(adapted(planted), data, phrases, weigh_by=weigh_by)
    turning, holding = ({w.weight for w in found if (w.clamp.value > 0) is positive} for positive in (True, False))
    assert turning and max(holding) == pytest.approx(0.02)
    assert max(turning) == pytest.approx(0.02 + weight, abs=1e-4)


def test_a_breaker_is_replayed_ever_after(planted, data, phrases):
    """Also where the locator forgets it and its clamps have stopped to work."""
    model, hole = adapted(planted), Neuron(2, 30)
    for replay in (False, True):
        adversary = Adversary(breakers=[hole])
        for step in (20, 40):
            adversary = refreshed(model, data, phrases, adversary, step, clamps={"pool": 1, "replay": replay})
            assert (hole in {weighed.clamp.neuron for weighed in adversary.clamps}) is replay
            assert set(adversary.breakers) == {hole, PLANTED_NEURON}
    assert refreshed(model, data, phrases, adversary, 41, clamps={"pool": 1}) == adversary  # nothing is due


@pytest.mark.parametrize("every", [None, 3])
def test_a_mask_holds_the_neurons_of_the_largest_effect_and_is_found_anew_when_due(planted, data, phrases, every):
    off = {"share": 0}
    term = {"share": 0.5, "neurons": 0.04, "relocate_every": every, "locator": "activation_shift"}
    model = adapted(planted)
    found = refreshed(model, data, phrases, Adversary(), 0, clamps=off, mask=term)
    assert len(found.masked) == 4 and PLANTED_NEURON in found.masked  # of 96
    other = Adversary(masked=[Neuron(0, 0)])
    assert (refreshed(model, data, phrases, other, 3, clamps=off, mask=term) == other) is (every is None)
    assert refreshed(model, data, phrases, other, 4, clamps=off, mask=term) == other


def test_the_rows_of_a_step_are_attacked_in_their_shares(planted, data, phrases):
    model = adapted(planted)
    parts = {"clamps": {"share": 0.25}, "mask": {"share": 0.25, "neurons": 0.1}, "direction": {"share": 0.25}}
    section = settings(refusal={"rows": 4}, **parts)
    adversary = refreshed(model, data, phrases, Adversary(), 0, **parts)
    text = data.harmful_texts[0]
    context = round_context(model, data, phrases, section)
    rows = [adversary.row(context, random.Random(0), number, 4, text) for number in range(4)]
    assert [type(row[0]).__name__ if row else None for row in rows] == ["Clamp", "Scale", "Ablate", None]
    assert len(rows[1]) == 10 and {edit.value for edit in rows[1]} == {0.0}
    dropout = settings(refusal={"rows": 4}, clamps={"share": 0}, mask={"share": 1, "neurons": 0.1, "locator": "random"})
    context = round_context(model, data, phrases, dropout)
    drawn = [Adversary().row(context, random.Random(seed), 0, 8, "x") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({edit.neuron for edit in drawn[2]}) == 10


def test_a_clamp_that_is_resisted_by_now_is_drawn_less_and_one_that_works_more():
    one, other, third = (Clamp(Neuron(0, n), 5.0) for n in range(3))
    adversary = Adversary([weighed_clamp(clamp.neuron, 5.0, weight=0.5, floor=0.02) for clamp in (one, other, third)])
    adversary.learn([(one, 30.0), (other, -30.0), (None, -30.0), (Clamp(Neuron(1, 0), 5.0), -30.0)], settings())
    weights = [weighed.weight for weighed in adversary.clamps]
    assert weights == pytest.approx([0.26, 0.76, 0.5])


def test_what_a_row_met_at_a_nearer_value_counts_for_the_clamp_that_was_drawn():
    drawn, other = (weighed_clamp(Neuron(0, 3), value, weight=0.5, harmless=1.0) for value in (11.0, 7.0))
    adversary, rng = Adversary([drawn, other]), random.Random(0)
    for _ in range(9):
        nearer = drawn.nearer(rng, 0.2)
        assert 3.0 <= nearer.value <= 11.0
        undrawn = Clamp(nearer.neuron, nearer.value)
        adversary.learn([(nearer, -30.0), (undrawn, 30.0)], settings())
    assert [weighed.weight for weighed in adversary.clamps] == pytest.approx([1.0, 0.5], abs=1e-2)


def test_rows_are_clamped_at_values_between_the_nearest_and_the_weighed_one(planted, data, phrases, monkeypatch):
    benign, clamped = finetune.benign_kl, []

    def keep(chat_model, rows):
        clamped.extend(edit for row in rows for edit in row.interventions)
        return benign(chat_model, rows)

    monkeypatch.setattr(finetune, "benign_kl", keep)
    adversary = Adversary([weighed_clamp(PLANTED_NEURON, -30.0, harmless=10.0)])
    section = settings(
        refusal={"weight": 0},
        margin={"weight": 1, "rows": 8, "attacked": True},
        clamps={"share": 1.0, "nearest": 0.6},
        benign={"rows": 6, "clamped": 1.0},
    )
    _, met = backward(round_context(adapted(planted), data, phrases, section), adversary, 1, random.Random(3), {})
    for clamps, n in (([clamp for clamp, _ in met], 8), (clamped, 6)):
        assert {clamp.neuron for clamp in clamps} == {PLANTED_NEURON}
        values = [clamp.value for clamp in clamps]
        assert len(set(values)) == n and -30 <= min(values) < -20 < max(values) <= 10 - 0.6 * 40


def test_the_margin_has_rows_of_its_own_and_tells_what_they_met(planted, data, phrases):
    model, adversary = adapted(planted), Adversary([weighed_clamp(PLANTED_NEURON, -30.0)])
    term = {"weight": 1, "rows": 5, "target": 2.0, "attacked": True}
    section = settings(refusal={"rows": 2}, margin=term, clamps={"share": 0.4}, benign={"weight": 0})
    losses, met = backward(round_context(model, data, phrases, section), adversary, 1, random.Random(3), {})
    assert [clamp for clamp, _ in met] == [Clamp(PLANTED_NEURON, -30.0)] * 2 + [None] * 3
    short = [max(0.0, 2.0 - log_odds) for _, log_odds in met]
    assert losses["margin"] == pytest.approx(sum(short) / 5, abs=1e-4) and min(short[:2]) > 0 == max(short[2:])
    section = settings(margin={**term, "attacked": False})
    plain, none = backward(round_context(model, data, phrases, section), adversary, 1, random.Random(3), {})
    assert plain["margin"] == 0.0 and none == []


def test_requests_alone_are_held_to_the_starting_model(planted, planted_folder, data, phrases, tmp_path):
    """The same steps with and without their rows: with them, the model says less else of requests alone."""
    left = []
    for rows in (0, 4):
        model = adapted(load_chat_model(str(planted_folder)))
        benign = {"weight": 4, "rows": 2, "texts": rows}
        events = run(model, data, phrases, tmp_path / f"{rows}.pt", steps=20, benign=benign)
        with torch.no_grad():
            left.append(float(finetune.benign_kl(model, data.texts).mean()))
    assert events[0]["text_kl"] == pytest.approx(0, abs=1e-6) and left[1] < 0.7 * left[0]


def test_shares_of_more_than_all_rows_are_an_error():
    with pytest.raises(ValueError, match=r"1.2 together; at most 1"):
        settings(clamps={"share": 0.6}, mask={"share": 0.6})


def test_groups_clamp_different_neurons_that_are_coherent_together():
    one, again, other = weighed_clamp(Neuron(0, 1)), weighed_clamp(Neuron(0, 1), 2.0), weighed_clamp(Neuron(0, 2))
    loud, louder = (weighed_clamp(Neuron(1, n), benign_rise=1.5) for n in range(2))
    adversary = Adversary([one, again, other, loud, louder])
    drawn = [adversary.draw(random.Random(seed), size=4, max_benign_rise=2.0) for seed in range(60)]
    assert {len(group) for group in drawn} == {3}  # one of the loud, and both others
    assert all(len({member.clamp.neuron for member in group}) == 3 for group in drawn)
    assert len(Adversary([one, again]).draw(random.Random(0), size=2)) == 1


def test_groups_and_anchors_are_drawn_in_their_shares(planted, data, phrases):
    adversary = Adversary([weighed_clamp(Neuron(0, n), 5.0, harmful=0.5) for n in range(4)])
    section = settings(clamps={"groups": 0.5, "group_size": 3, "anchors": 0.25})
    context = round_context(planted, data, phrases, section)
    text = data.harmful_texts[0]
    drawn = [adversary.clamped(context, random.Random(seed), text) for seed in range(80)]
    assert {len(clamps) for clamps in drawn} == {1, 3} and 25 < sum(len(clamps) == 3 for clamps in drawn) < 55
    anchored = [clamps for clamps in drawn if any(clamp.value != 5.0 for clamp in clamps)]
    assert 8 < len(anchored) < 32 and all(0.0 <= clamp.value <= 5.0 for clamps in anchored for clamp in clamps)
    natural = template_activations(planted, [Neuron(0, 0)], [text], 1)[0, 0]
    wanted = {Anchor(Clamp(Neuron(0, 0), 5.0), 0.5, 0.0, k).anchored(float(natural.max())) for k in (1.0, 2.0)}
    assert {clamp.value for clamps in anchored for clamp in clamps if clamp.neuron == Neuron(0, 0)} <= wanted


def test_an_adversary_survives_a_checkpoint(tmp_path):
    adversary = Adversary(
        [weighed_clamp(Neuron(1, 2), -3.5, 0.25, 0.5), weighed_clamp(Neuron(0, 9), 4.0, 1.0, 0.0, 2.0, 1.0)],
        [Neuron(1, 2)], [Neuron(2, 3)], torch.eye(3),
    )  # fmt: skip
    torch.save(adversary.to_state(), tmp_path / "a.pt")
    again = Adversary.from_state(torch.load(tmp_path / "a.pt", weights_only=True))
    assert torch.equal(again.directions, adversary.directions)
    assert replace(again, directions=None) == replace(adversary, directions=None)


TERMS = ("refusal", "benign_kl", "margin", "fail_closed", "leverage", "spread")


@pytest.mark.parametrize(
    ("term", "name"),
    [
        ({"margin": {"weight": 1, "target": 9}}, "margin"),
        ({"fail_closed": {"weight": 1, "rows": 6}}, "fail_closed"),
        ({"leverage": {"weight": 0.1, "every": 1}}, "leverage"),
        ({"spread": {"weight": 0.1, "every": 1, "order": 8}}, "spread"),
        ({"spread": {"weight": 0.1, "every": 1, "order": 1, "attribution": "direct"}}, "spread"),
    ],
)
def test_each_term_can_be_trained_alone_and_falls(planted, data, phrases, tmp_path, term, name):
    off = {"refusal": {"weight": 0}, "benign": {"weight": 0}, "spread": {"weight": 0}, "clamps": {"share": 0}}
    events = run(adapted(planted), data, phrases, tmp_path / "c.pt", steps=12, **{**off, **term})
    assert {name} == {key for key in events[0] if key in TERMS}
    assert sum(e[name] for e in events[-3:]) < sum(e[name] for e in events[:3])


def test_fail_closed_rows_are_benign_and_harmful_each_under_a_clamp_of_its_own(planted, data, phrases, monkeypatch):
    rows = []
    monkeypatch.setattr(finetune, "shortfall", lambda m, mine, *rest: (rows.extend(mine), shortfall(m, mine, *rest))[1])
    section = settings(fail_closed={"weight": 1, "rows": 8, "benign_share": 0.25, "strength": (0.5, 2)})
    full = torch.ones(planted.neurons.count)
    context = round_context(adapted(planted), data, phrases, section, full=full)
    backward(context, Adversary(), 1, random.Random(3), {})
    benign = {row.prompt for row in data.benign}
    assert [row.prompt in benign for row in rows] == [True] * 2 + [False] * 6
    clamps = [clamp for row in rows for clamp in row.interventions]
    assert len({clamp.neuron for clamp in clamps}) > 4 and all(0.5 <= abs(clamp.value) <= 2 for clamp in clamps)


def test_a_model_that_fails_closed_refuses_what_is_benign_under_a_clamp_and_answers_it_without(
    planted, data, phrases, tmp_path
):
    model = adapted(planted)
    requests = [Request(text) for text in data.harmful_texts[:4]]
    full, rng = full_strength(model, read_activations(model, requests, 4).stream), random.Random(0)
    plain = [Row(row.prompt) for row in data.benign]
    clamped = [replace(row, interventions=(draw_strong_clamp(model, full, (1.0, 2.0), rng),)) for row in 2 * plain]

    def log_odds(rows):
        with torch.no_grad():
            return float(shortfall(model, rows, phrases, 0.0)[1].mean())

    assert max(map(log_odds, (plain, clamped))) < -2
    changes = {"fail_closed": {"weight": 0.3, "rows": 16}, "benign": {"weight": 20, "rows": 8}, "twins": {"weight": 1}}
    run(model, data, phrases, tmp_path / "c.pt", steps=120, clamps={"share": 0}, spread={"weight": 0}, **changes)
    assert log_odds(plain) < -2 and log_odds(clamped) > 2


def test_benign_rows_can_be_clamped(planted, data, phrases, monkeypatch):
    rows = []
    real = finetune.benign_kl
    monkeypatch.setattr(finetune, "benign_kl", lambda m, mine: (rows.extend(mine), real(m, mine))[1])
    section = settings(benign={"rows": 4, "clamped": 0.5})
    adversary = Adversary([weighed_clamp(PLANTED_NEURON, -30.0)])
    backward(round_context(adapted(planted), data, phrases, section), adversary, 1, random.Random(3), {})
    assert [len(row.interventions) for row in rows] == [1, 1, 0, 0]


def test_a_ceiling_makes_a_term_dearer_while_it_is_above_it_and_not_for_ever():
    ceiling = Ceiling(0.1)
    for _ in range(10):
        ceiling.update(0.05)
    assert ceiling.factor == 1.0
    for _ in range(12):
        ceiling.update(0.4)
    grown = ceiling.factor
    assert 2.0 < grown < 4.0
    for _ in range(99):
        ceiling.update(9.0)
    assert ceiling.factor == 16.0
    for _ in range(200):
        ceiling.update(0.0)
    assert ceiling.factor == 1.0


def test_a_ceiling_on_the_benign_term_holds_it_down(planted, planted_folder, data, phrases, tmp_path):
    """Same steps, same weight: with a ceiling far below what it costs, the model ends nearer to where it began."""
    kl = []
    for ceiling in (None, 1e-4):
        model = adapted(load_chat_model(str(planted_folder)))
        benign = {"weight": 0.05, "ceiling": ceiling}
        events = run(model, data, phrases, tmp_path / f"{ceiling}.pt", steps=30, benign=benign)
        kl.append(sum(event["benign_kl"] for event in events[-5:]))
    assert events[-1]["utility_factors"]["benign_kl"] > 5.0 and kl[1] < 0.6 * kl[0]


def test_the_learning_rate_warms_up_and_decays():
    section = settings(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, section) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) < 1.0 and factors[99] == pytest.approx(0.109)
    assert factors.index(max(factors)) == 9


def test_golden_losses(planted, data, phrases):
    """A change that should not change the numbers must not. Remake with the values that the failure prints."""
    context = round_context(adapted(planted), data, phrases, settings())
    adversary = Adversary([weighed_clamp(PLANTED_NEURON, -30.0)])
    losses = [backward(context, adversary, step, random.Random(step), {})[0] for step in range(2)]
    assert losses[0] == pytest.approx({"refusal": GOLDEN[0], "benign_kl": 0.0, "spread": GOLDEN[1]}, abs=2e-3)
    assert losses[1] == pytest.approx({"refusal": GOLDEN[2], "benign_kl": 0.0}, abs=2e-3)


GOLDEN = (2.5719, -0.0116, 2.5774)  # refusal and spread of the first rows, refusal of the second
