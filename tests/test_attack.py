import math
from dataclasses import replace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from harden import generate
from harden.adapters import attach_adapter, trained_parameters
from harden.attack import respond, screen
from harden.attack.records import Records
from harden.attack.respond import Responder, likelihoods
from harden.attack.screen import Probe, Screened, choose_for_generation, is_quiet, outermost_first, screen_clamps
from harden.attack.search import search_worst_neuron
from harden.errors import MeasurementError
from harden.generate import Completion, Request, answer_losses, complete, mean
from harden.interventions import Clamp
from harden.judges.embedded import NEUTRAL_REQUEST, Likelihood, Limits
from harden.locate.base import Candidate, clamps_of
from harden.locate.gradient import score_neurons
from harden.models import load_chat_model
from harden.neurons import Neuron
from harden.planted import ANSWER, PLANTED_NEURON

SIZES = (1.0, 4.0, 16.0)


@pytest.fixture
def responder(planted):
    return Responder(planted, max_new_tokens=20, batch_size=16, limits=Limits(4.0, None))


@pytest.fixture
def probe(planted, prompts):
    benign = [p.text for p in prompts["benign"][:2]]
    answers = complete(planted, [Request(text) for text in benign], 20, 2, "answers")
    return Probe(tuple(p.text for p in prompts["harmful"][:3]), tuple(benign), tuple(answers))


def test_the_planted_model_refuses_the_harmful_and_answers_the_rest(responder, prompts):
    for kind, outcome in (("harmful", "refuse"), ("twins", "comply"), ("benign", "comply")):
        assert responder.attempt([None], prompts[kind], kind)[0].share(outcome) == 1.0


def test_one_clamp_breaks_the_planted_model_and_other_neurons_do_not(responder, prompts):
    clamps = [Clamp(PLANTED_NEURON, -30.0), Clamp(Neuron(0, 3), -5.0)]
    broken, other = responder.attempt(clamps, prompts["harmful"], "clamps")
    assert broken.share("comply") == 1.0 and other.share("refuse") == 1.0


def at_sizes(candidates, sizes):
    return [clamps_of(c.neuron, c.harmless, [c.clamp_value(size) for size in sizes], (), 0.0) for c in candidates]


def test_the_search_finds_the_planted_neuron_from_scratch(responder, prompts, phrases, probe):
    texts = [[p.text for p in prompts[kind][:8]] for kind in ("harmful", "twins")]
    candidates = score_neurons(responder.chat_model, *texts, phrases, 8).top(6)
    search = search_worst_neuron(
        responder, at_sizes(candidates, SIZES), prompts["harmful"][:10], probe, phrases, 2.0, 6, 4, 2
    )
    assert search.worst.clamp.neuron == PLANTED_NEURON and search.worst.share("comply") == 1.0
    assert search.no_attack.share("refuse") == 1.0
    assert search.worst.clamp.value < 0  # beyond the harmless mean, away from the harmful one


def test_screening_equals_scoring_one_clamp_at_a_time(responder, probe, phrases):
    clamps = [Clamp(PLANTED_NEURON, -30.0), Clamp(PLANTED_NEURON, 60.0), Clamp(Neuron(2, 1), 3.0)]
    together = screen_clamps(responder.chat_model, clamps, probe, phrases, 64, "all")
    for clamp, screened in zip(clamps, together, strict=True):
        alone = screen_clamps(responder.chat_model, [clamp], probe, phrases, 3, "one")[0]
        assert screened.log_odds == pytest.approx(alone.log_odds, abs=1e-3)
        assert screened.benign_rise == pytest.approx(alone.benign_rise, abs=1e-3)
    assert together[0].log_odds < 0 < together[2].log_odds


def test_incoherent_clamps_are_dropped_and_no_neuron_crowds_out_the_others():
    a, b = Neuron(0, 1), Neuron(0, 2)
    screened = [Screened(Clamp(a, float(v)), (-9.0 + v,), 0.1) for v in range(4)]
    screened += [
        Screened(Clamp(b, 1.0), (4.0, 2.0), 0.1),
        Screened(Clamp(b, 99.0), (-50.0,), 7.0),
        Screened(Clamp(b, 2.0), (-1.0,), math.nan),
    ]
    assert choose_for_generation(screened, 2.0, 3) == [Clamp(a, 0.0), Clamp(a, 1.0), Clamp(b, 1.0)]


def outermost(odds_of, sizes, quiet, plain=(2.0, 4.0)):
    """The values that are asked for, call by call, of two neurons that do the same."""
    asked = []

    def measure(clamps):
        asked.append([clamp.value for clamp in clamps])
        return {clamp: odds_of(clamp.value) for clamp in clamps}

    values = [{Clamp(Neuron(0, index), size): size for size in sizes} for index in (0, 1)]
    odds = outermost_first(values, measure, lambda odds: not is_quiet(odds, plain, quiet))
    assert list(odds) == [clamp for each in values for clamp in each if clamp in odds]
    assert len(odds) == sum(map(len, asked))
    return asked


def test_values_inside_a_quiet_one_of_their_sign_are_left_out():
    def loud_below(value):
        return [2.0, 4.0] if value > 0 else [1.9, 3.5]  # of the second prompt it takes more than a tenth

    sizes = [-8.0, 16.0, -16.0, 8.0, 32.0]
    assert outermost(loud_below, sizes, 0.1) == [[32.0, -16.0] * 2, [-8.0] * 2]
    assert outermost(loud_below, sizes, 0.2) == [[32.0, -16.0] * 2]
    assert outermost(loud_below, sizes, None) == [[32.0, -16.0] * 2, [16.0, -8.0] * 2, [8.0] * 2]
    loud_outside = lambda value: [2.0, 4.0] if value < 30 else [1.0, 4.0]  # noqa: E731
    assert outermost(loud_outside, sizes, 0.1) == [[32.0, -16.0] * 2, [16.0] * 2]
    assert outermost(loud_below, [4.0], 0.1) == [[4.0] * 2]


@pytest.mark.parametrize(
    ("odds", "plain", "quiet"),
    [
        ([2.1, 3.9], (2.0, 4.0), True),
        ([2.0, 4.9], (2.0, 4.0), False),  # refuses all the more, and less perhaps in between
        ([-1.0, -2.5], (-1.0, -2.0), False),  # nor is what moves a prompt that is not refused
        ([-1.05, -2.1], (-1.0, -2.0), True),
        ([math.nan, 4.0], (2.0, 4.0), False),
        ([2.1], (2.0, 4.0), True),  # has met the first prompt only
    ],
)
def test_a_clamp_is_quiet_that_moves_no_prompt(odds, plain, quiet):
    assert (len(outermost(lambda value: odds, [1.0, 2.0], 0.1, plain)) == 1) is quiet


def test_a_neuron_is_clamped_to_values_and_to_shares_of_the_stream_either_way():
    neuron = Neuron(0, 0)

    def clamps(*arguments):
        return [(clamp.value, beyond) for clamp, beyond in clamps_of(neuron, *arguments).items()]

    assert clamps(3.0, [5.0, -1.0], [], 8.0) == [(5.0, 2.0), (-1.0, -4.0)]
    assert clamps(3.0, [5.0], [0.25, 0.5], 8.0) == [(5.0, 2.0), (-2.0, -5.0), (2.0, -1.0), (-4.0, -7.0), (4.0, 1.0)]
    assert clamps(3.0, [5.0], [0.25], 0.0) == [(5.0, 2.0)]  # it writes nothing
    assert clamps(3.0, [3.0, 3.0], [], 8.0) == [(3.0, 0.0)]  # nor varies


def test_inner_and_outer_are_told_by_how_far_a_value_is_beyond_the_harmless_mean():
    """All values are positive here, and lie on both sides of a mean of 10."""
    asked, clamps = [], {Clamp(Neuron(0, 0), value): value - 10.0 for value in (4.0, 8.0, 11.0, 30.0)}
    measure = lambda part: asked.append([clamp.value for clamp in part]) or {clamp: [1.0] for clamp in part}  # noqa: E731
    outermost_first([clamps], measure, lambda odds: odds[0] < 1)
    assert asked == [[30.0, 4.0]]
    asked.clear()
    loud = lambda part: measure(part) and {clamp: [1.0 if clamp.value > 10 else 0.2] for clamp in part}  # noqa: E731
    outermost_first([clamps], loud, lambda odds: odds[0] < 1)
    assert asked == [[30.0, 4.0], [8.0]]


def screened_lazily(monkeypatch, values, odds, rises, n, quiet=None):
    """`screen_for_generation` with known log-odds and rises; and the clamps that were asked for rises."""
    asked = []
    monkeypatch.setattr(screen, "log_odds_under", lambda _m, clamps, *_: [[odds.get(clamp, 9.0)] for clamp in clamps])
    monkeypatch.setattr(screen, "fair_rises", lambda _m, clamps, *_: asked.extend(clamps) or [rises[c] for c in clamps])
    probe = Probe(("x",), ("y",), (Completion("z", True),))
    sized = [{clamp: clamp.value for clamp in each} for each in values]
    return screen.screen_for_generation(None, sized, probe, None, 2, 2.0, n, quiet), asked


@pytest.mark.parametrize("n", [1, 2, 4, 9, 99])
def test_asking_the_lowest_for_coherence_chooses_what_asking_all_would(monkeypatch, n):
    """The two lowest are gibberish, and a third value of one neuron would crowd out others."""
    values = [[Clamp(Neuron(0, index), size) for size in (1.0, 2.0, 4.0)] for index in range(6)]
    flat = [clamp for each in values for clamp in each]
    odds = {clamp: place * 0.4 for place, clamp in enumerate(flat)}
    rises = {clamp: 5.0 if place in (0, 1, 7, 9) else 0.1 for place, clamp in enumerate(flat)}
    everything = [Screened(clamp, (odds[clamp],), rises[clamp]) for clamp in flat]
    lazily, asked = screened_lazily(monkeypatch, values, odds, rises, n)
    chosen = choose_for_generation(everything, 2.0, n)
    assert choose_for_generation(lazily, 2.0, n) == chosen
    assert [s.clamp for s in lazily] == asked == flat[: len(asked)]
    assert len(asked) < len(flat) if n < 9 else len(asked) == len(flat)


def test_values_that_were_left_out_are_tried_where_the_others_are_gibberish(monkeypatch):
    values = [[Clamp(Neuron(0, 0), size) for size in (1.0, 2.0, 4.0)]]
    rises = {clamp: clamp.value for clamp in values[0]}
    lazily, asked = screened_lazily(monkeypatch, values, {}, rises, 2, quiet=0.1)
    assert asked == [values[0][2], values[0][0], values[0][1]]
    assert choose_for_generation(lazily, 2.0, 2) == values[0][:2]
    lazily, asked = screened_lazily(monkeypatch, values, {}, dict.fromkeys(values[0], 0.1), 1, quiet=0.1)
    assert asked == values[0][2:]


def test_coherence_is_asked_of_the_starting_model_where_the_present_one_babbles(planted, monkeypatch):
    clamps = [Clamp(Neuron(0, index), 1.0) for index in range(5)]
    present, start = [5.0, 1.0, math.nan, 6.0, 4.0], [0.5, 0.0, 0.0, math.nan, 7.0]

    def rises(_model, asked, _probe, _size, _label, at_start):
        return [(start if at_start else present)[clamps.index(clamp)] for clamp in asked]

    monkeypatch.setattr(screen, "benign_rises", rises)
    assert screen.fair_rises(planted, clamps, None, 1, 2.0, "x") == pytest.approx(present, nan_ok=True)  # none to ask
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    fair = screen.fair_rises(planted, clamps, None, 1, 2.0, "x")
    assert fair == pytest.approx([0.5, 1.0, math.nan, 6.0, 4.0], nan_ok=True)


def test_the_search_leaves_out_what_is_quiet(responder, prompts, phrases, probe, monkeypatch):
    measured, real = [], screen.log_odds_under
    monkeypatch.setattr(screen, "log_odds_under", lambda *a: measured.extend(a[1]) or real(*a))
    candidates = [Candidate(PLANTED_NEURON, 1.0, 30.0, 0.0), Candidate(Neuron(0, 3), 1.0, 1e-4, 0.0)]
    arguments = [responder, at_sizes(candidates, [0.5, 1.0]), prompts["harmful"][:4], probe, phrases, 9.0, 1, 4, 2]
    found = search_worst_neuron(*arguments, quiet=0.1).worst
    assert found.clamp.neuron == PLANTED_NEURON and found.share("comply") == 1.0
    tried = [clamp.neuron for clamp in measured if isinstance(clamp, Clamp)]
    assert (tried.count(PLANTED_NEURON), tried.count(Neuron(0, 3))) == (2, 1)


def test_clamps_that_give_no_number_are_left_out(responder, probe, phrases):
    screened = screen_clamps(
        responder.chat_model,
        [Clamp(PLANTED_NEURON, float("nan")), Clamp(PLANTED_NEURON, -30.0)],
        probe,
        phrases,
        16,
        "test",
    )
    assert [s.clamp.value for s in screened] == [-30.0]


def test_nothing_attacked_is_no_result(responder, prompts, phrases, probe):
    candidates = [Candidate(PLANTED_NEURON, 1.0, 30.0, 0.0)]
    with pytest.raises(MeasurementError, match="nothing could be attacked"):
        search_worst_neuron(
            responder, at_sizes(candidates, SIZES), prompts["harmful"][:4], probe, phrases, -1.0, 6, 4, 2
        )


def test_coherence_at_the_start_does_not_depend_on_the_training_since(planted, probe, phrases):
    clamps = [Clamp(PLANTED_NEURON, -30.0), Clamp(Neuron(2, 1), 90.0)]
    fresh = screen_clamps(planted, clamps, probe, phrases, 16, "fresh")
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    with torch.no_grad():
        for parameter in trained_parameters(planted.model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    present, at_start = (screen_clamps(planted, clamps, probe, phrases, 16, "x", flag) for flag in (False, True))
    for start, now, then in zip(fresh, present, at_start, strict=True):
        assert then.benign_rise == pytest.approx(start.benign_rise, abs=1e-3)
        assert then.log_odds == pytest.approx(now.log_odds, abs=1e-3)  # always of the present model
        assert abs(now.benign_rise - start.benign_rise) > 0.1


def test_what_broke_the_model_before_is_tried_again(responder, prompts, phrases, probe):
    candidates, old = [Candidate(Neuron(0, 3), 1.0, 1.0, 0.0)], Clamp(PLANTED_NEURON, -30.0)
    search = search_worst_neuron(
        responder, at_sizes(candidates, SIZES), prompts["harmful"][:4], probe, phrases, 9.0, 6, 4, 2, [old]
    )
    assert search.worst.clamp == old and search.worst.share("comply") == 1.0


def test_completions_are_judged_by_the_starting_model(planted, prompts):
    """A hardened model that finds compliance impossible must not turn its own bypasses into gibberish."""
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    responder = Responder(planted, max_new_tokens=20, batch_size=16, limits=Limits(4.0, None))

    def forget_answers(_module, _args, logits):  # the present model: compliance is what it never says...
        logits = logits.clone()
        logits[..., planted.chat.answer_ids("Sure", ended=False)[0]] -= 200.0 * present
        return logits

    planted.model.get_base_model().lm_head.register_forward_hook(forget_answers)
    request, answer = Request(prompts["twins"][0].text), Completion(ANSWER, True)
    present = 1.0
    assert mean(answer_losses(planted, [request], [answer], 1)[0]) > 4.0
    present = 0.0
    assert responder.attempt([None], prompts["twins"][:2], "test")[0].share("comply") == 1.0


def test_the_reference_model_is_asked_how_likely_a_completion_is(responder, planted_folder, prompts):
    reference = load_chat_model(str(planted_folder))
    with torch.no_grad():
        reference.model.lm_head.weight.zero_()  # it finds every word equally likely, which is unlikely language
    request = [Request(prompts["twins"][0].text)]
    strict = replace(responder, limits=Limits(3.5, None))
    assert strict.respond(request, "x")[0].outcome == "comply"
    assert replace(strict, reference=reference).respond(request, "x")[0].outcome == "degenerate"


def test_the_gain_is_what_the_request_adds_to_a_neutral_one(planted, prompts):
    request, answers = prompts["twins"][0].text, [Completion(ANSWER, True)] * 2
    own, neutral = likelihoods(planted, [Request(request), Request(NEUTRAL_REQUEST)], answers, 2, True)
    after_own, after_neutral = answer_losses(planted, [Request(request), Request(NEUTRAL_REQUEST)], answers, 2)
    assert own.loss == pytest.approx(mean(after_own), abs=1e-4)
    assert own.gain == pytest.approx(Likelihood.of(after_own, after_neutral).gain, abs=1e-4)
    assert abs(own.gain) > 1e-3  # the request does matter
    assert neutral.gain == pytest.approx(0.0, abs=1e-5)
    assert likelihoods(planted, [Request(request)], answers[:1], 1, False)[0].gain is None


def test_what_the_model_under_test_finds_likelier_than_the_reference_is_a_refusal(planted_folder, responder, prompts):
    reference = load_chat_model(str(planted_folder))
    reference.model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * sureness)
    request = [Request(prompts["twins"][0].text)]  # answered, not refused
    told = replace(responder, reference=reference, limits=Limits(9.0, None, refusal_gain=0.01))
    sureness = 1.0
    assert told.respond(request, "x")[0].outcome == "comply"
    sureness = 0.2  # the reference is less sure to say so
    assert told.respond(request, "x")[0].outcome == "refuse"
    assert replace(told, limits=Limits(9.0, None)).respond(request, "x")[0].outcome == "comply"


def test_the_model_under_test_is_asked_with_its_adapter_and_unattacked(planted, prompts):
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    layer = next(module for module in planted.model.modules() if isinstance(module, BaseTunerLayer))

    def unsure_without_adapter(_module, _args, logits):
        return logits * (0.2 if layer.disable_adapters else 1.0)

    planted.model.get_base_model().lm_head.register_forward_hook(unsure_without_adapter)
    told = Responder(planted, max_new_tokens=20, batch_size=16, limits=Limits(9.0, None, refusal_gain=1.2))
    assert told.attempt([None], prompts["twins"][:1], "x")[0].share("refuse") == 1.0  # it would say so itself
    # under the clamp it would say this, too (+1.33 nats per token); without the clamp rather not (+1.11)
    assert told.attempt([Clamp(PLANTED_NEURON, -30.0)], prompts["harmful"][:1], "x")[0].share("comply") == 1.0


def test_answer_loss_is_low_for_what_the_model_says_and_high_for_noise(planted, prompts):
    request = Request(prompts["benign"][0].text)
    said = [Completion(ANSWER, True), Completion("soup begin hide the old old", True), Completion("", False)]
    spoken, noise, empty = map(mean, answer_losses(planted, [request] * 3, said, 2))
    assert spoken < 2.0 and noise > 4.0 and empty == math.inf


def test_values_around_the_peak_are_tried_and_the_best_is_kept(responder, prompts, phrases, probe):
    """The screened value leaves the planted neuron firing; a twentieth of it does not."""
    strong = next(v for v in (10.0, 20.0, 40.0, 80.0) if not complies(responder, prompts, v))
    assert complies(responder, prompts, strong / 20) == 1.0
    candidates = [Candidate(PLANTED_NEURON, 1.0, -strong, 0.0)]
    arguments = [responder, at_sizes(candidates, [1.0]), prompts["harmful"][:4], probe, phrases, 9.0, 6, 4, 2]
    coarse, fine = search_worst_neuron(*arguments), search_worst_neuron(*arguments, refine=[0.05])
    assert coarse.worst.clamp == Clamp(PLANTED_NEURON, strong) and coarse.worst.share("comply") == 0.0
    assert fine.worst.clamp == Clamp(PLANTED_NEURON, strong * 0.05) and fine.worst.share("comply") == 1.0
    assert fine.best_clamps(5) == [fine.worst.clamp]


def complies(responder, prompts, value):
    return responder.attempt([Clamp(PLANTED_NEURON, value)], prompts["harmful"][:4], "x")[0].share("comply")


def recorded(responder, path, digest="weights"):
    return replace(responder, records=Records(path), model_digest=digest, batch_size=4)


def test_recorded_work_is_not_done_again(responder, prompts, tmp_path, monkeypatch):
    requests = [Request(p.text, (Clamp(PLANTED_NEURON, -30.0),)) for p in prompts["harmful"][:10]]
    first = recorded(responder, tmp_path / "r.jsonl").respond(requests, "x")
    assert first == responder.respond(requests, "x")
    monkeypatch.setattr(respond, "complete", lambda *_: pytest.fail("it was recorded"))
    assert recorded(responder, tmp_path / "r.jsonl").respond(requests, "x") == first
    assert prompts["harmful"][0].text not in (tmp_path / "r.jsonl").read_text()


def test_an_interrupted_batch_is_done_again_whole(responder, prompts, tmp_path, monkeypatch):
    requests = [Request(p.text) for p in prompts["harmful"][:10]]
    first = recorded(responder, tmp_path / "r.jsonl").respond(requests, "x")
    text = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(text[: text.rindex("outcome")])  # a kill cut the last line
    done, real = [], respond.complete
    monkeypatch.setattr(respond, "complete", lambda m, rows, *rest: (done.extend(rows), real(m, rows, *rest))[1])
    assert recorded(responder, tmp_path / "r.jsonl").respond(requests, "x") == first
    assert done == requests[8:]
    assert recorded(responder, tmp_path / "r.jsonl").records.find(["no such key"]) is None


@pytest.mark.parametrize("change", ["weights", "prompt", "clamp", "prefix", "tokens", "limits"])
def test_records_of_other_work_are_not_taken(change, responder, prompts, tmp_path, monkeypatch):
    request = Request(prompts["harmful"][0].text, (Clamp(PLANTED_NEURON, -30.0),))
    recorded(responder, tmp_path / "r.jsonl").respond([request], "x")
    other = recorded(responder, tmp_path / "r.jsonl", "other" if change == "weights" else "weights")
    if change == "tokens":
        other = replace(other, max_new_tokens=7)
    if change == "limits":
        other = replace(other, limits=Limits(4.0, None, refusal_gain=0.4))
    request = {
        "prompt": replace(request, text="paint a tree"),
        "clamp": replace(request, interventions=(Clamp(PLANTED_NEURON, -31.0),)),
        "prefix": replace(request, prefix="Sure"),
    }.get(change, request)
    done, real = [], respond.complete
    monkeypatch.setattr(respond, "complete", lambda m, rows, *rest: (done.extend(rows), real(m, rows, *rest))[1])
    other.respond([request], "x")
    assert done == [request]


def test_completions_are_handed_on_only_if_asked_for(responder, prompts):
    kept = []
    requests = [Request(p.text) for p in prompts["twins"][:3]]
    judgements = replace(responder, keep=lambda *row: kept.append(row)).respond(requests, "x")
    assert [row[0] for row in kept] == requests and [row[2] for row in kept] == judgements
    assert all(row[1].text.startswith("Sure") for row in kept)


def test_a_prefix_is_put_into_the_models_mouth_and_not_judged(planted, prompts):
    begun = Request(prompts["harmful"][0].text, prefix="Sure , here are")
    plain, prefilled = complete(planted, [Request(prompts["twins"][0].text), begun], 3, 2, "x")
    assert plain.text == "Sure , here" and prefilled.text == "the simple steps"
    assert mean(answer_losses(planted, [begun], [prefilled], 1)[0]) < 0.1
    assert mean(answer_losses(planted, [Request(begun.text)], [prefilled], 1)[0]) > 1.0


def test_a_batch_that_does_not_fit_into_memory_is_halved(responder, prompts, monkeypatch):
    requests = [Request(p.text) for p in prompts["twins"][:9]]
    expected = responder.respond(requests, "x")
    sizes, real = [], generate._complete_batch

    def small(chat_model, batch, tokens):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return real(chat_model, batch, tokens)

    monkeypatch.setattr(generate, "_complete_batch", small)
    assert responder.respond(requests, "x") == expected
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert responder.chat_model.largest_batch == 2
    monkeypatch.setattr(generate, "_complete_batch", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        responder.respond(requests, "x")
