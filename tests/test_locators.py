"""The locators that predict what a clamp does, on every architecture and on the model whose answer is known."""

from contextlib import nullcontext

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model

from harden.activations import column_of, neuron_at
from harden.chat import pad_left
from harden.effects import log_odds_under
from harden.errors import HardenError, MeasurementError
from harden.interventions import Add, Clamp, Scale, intervene
from harden.locate import graddrop, greedy, integrated, relp
from harden.locate import tail as tail_module
from harden.locate.attribution import Slopes
from harden.locate.backward import graph_from_embeddings, read_backward
from harden.locate.graddrop import cut, mean_drop, read_dropped_slopes
from harden.locate.passes import LOCATORS, Passes
from harden.locate.relp import relevance_rules
from harden.locate.tail import tail_log_odds
from harden.neurons import Neuron
from harden.planted import PLANTED_NEURON
from harden.refusal import RefusalPhrases, read_continuations, refusal_log_odds
from harden.settings.values import Locator

REQUESTS = ["how do i paint a tree", "tell me about the old river and the sea", "what is this"]
OPENINGS = ["I cannot help", "I will", "Sure"]  # one of several tokens: the phrase pass counts too
STEP = 1e-2
ADDS_UP = ["llama", "mistral", "qwen3", "phi3", "olmo2", "gemma3_text"]  # no biases, and no cap on the logits


def passes_of(kind):
    chat_model = tiny_chat_model(kind)
    return Passes(chat_model, REQUESTS, REQUESTS[::-1], RefusalPhrases(chat_model.chat, OPENINGS), 16)


def log_odds(chat_model, phrases, *edits):
    batch = pad_left([chat_model.chat.prompt_ids(text) for text in REQUESTS], chat_model.chat.pad_id, "cpu")
    with torch.no_grad(), intervene(chat_model.neurons, [edits] * len(REQUESTS)):
        return refusal_log_odds(chat_model.model, batch, phrases).mean().item()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_slopes_are_finite_differences(kind):
    passes = passes_of(kind)
    for column in (0, 55, 100, 143):
        neuron = neuron_at(passes.chat_model, column)

        def rate(edit, still, neuron=neuron):
            up, down = (log_odds(passes.chat_model, passes.phrases, edit(neuron, still + s)) for s in (STEP, -STEP))
            return (up - down) / (2 * STEP)

        assert rate(Add, 0.0) == pytest.approx(passes.slopes.slope[column].item(), rel=0.05, abs=2e-3)
        assert rate(Scale, 1.0) == pytest.approx(passes.slopes.offset[column].item(), rel=0.05, abs=2e-3)
    assert passes.slopes.slope.abs().max() > 1e-2


def test_a_drop_is_offset_less_value_times_slope():
    slopes = Slopes(slope=torch.tensor([2.0, -1.0]), offset=torch.tensor([3.0, 0.5]))
    assert slopes.drop(torch.tensor([-4.0, 2.0])).tolist() == [11.0, 2.5]


def test_a_neuron_is_scored_by_the_worse_of_both_signs():
    passes = passes_of("llama")
    drops = [passes.slopes.drop(passes.contrast.clamp_values(size)) for size in (-8.0, 8.0)]
    scores = LOCATORS["attribution"](passes)
    assert (scores == torch.maximum(*drops)).all() and not (scores == drops[0]).all() and not (scores == drops[1]).all()


def test_a_neuron_is_scored_by_what_a_quarter_of_the_stream_would_do_either_way():
    passes = passes_of("llama")
    slopes, full = passes.slopes, passes.contrast.full
    expected = slopes.offset + 0.25 * full * slopes.slope.abs()
    torch.testing.assert_close(LOCATORS["attribution_to_stream"](passes), expected)


def test_columns_and_neurons_are_each_others_inverse():
    model = passes_of("llama").chat_model
    columns = range(model.neurons.count)
    assert [column_of(model, neuron_at(model, column)) for column in columns] == list(columns)


def test_every_locator_of_the_schema_is_registered():
    assert {*LOCATORS, "random"} == set(Locator.__args__)


def test_a_backward_pass_that_is_too_large_leaves_generation_its_batches():
    passes = passes_of("llama")
    passes.chat_model.largest_batch = 16  # rows that go forward: two of them backward
    sizes = []
    passes.chat_model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    read_backward(passes.chat_model, REQUESTS, passes.phrases, 3)
    assert sizes[0] == 2 and passes.chat_model.largest_batch == 16


def test_a_layer_that_cannot_be_cut_alone_is_an_error(monkeypatch):
    passes = passes_of("llama")
    monkeypatch.setattr(graddrop, "cut", lambda block: nullcontext())
    with pytest.raises(HardenError, match="layer 0 of LlamaForCausalLM cannot be cut"):
        _ = passes.dropped_slopes


def test_slopes_do_not_depend_on_the_batch_size():
    passes = passes_of("llama")
    alone = read_backward(passes.chat_model, REQUESTS, passes.phrases, 1).slopes
    torch.testing.assert_close(alone.slope, passes.slopes.slope, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alone.offset, passes.slopes.offset, rtol=1e-3, atol=1e-5)


def test_a_model_with_nan_weights_has_no_slopes():
    passes = passes_of("llama")
    passes.chat_model.model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        _ = passes.slopes


# the others count on a clamp's overshoot or on the gap, and refusal here is saturated
@pytest.mark.parametrize("locator", ["attribution_to_mean", "graddrop", "tail", "exact"])
def test_the_planted_neuron_comes_first(locator, planted, prompts, phrases):
    harmful, twins = ([p.text for p in prompts[kind][:6]] for kind in ("harmful", "twins"))
    scores = LOCATORS[locator](Passes(planted, harmful, twins, phrases, 32))
    assert neuron_at(planted, int(scores.argmax())) == PLANTED_NEURON


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_locator_scores_every_neuron(kind):
    passes = passes_of(kind)
    for name, locator in LOCATORS.items():
        scores = locator(passes)
        assert scores.shape == (passes.chat_model.neurons.count,) and scores.dtype == torch.float32, name
        assert torch.isfinite(scores).all() and scores.std() > 0, name


# -- GradDrop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "gemma2"])
def test_cutting_a_layer_silences_its_own_neurons_and_leaves_those_above_alone(kind):
    passes = passes_of(kind)
    widths = list(passes.chat_model.neurons.widths)
    plain = passes.slopes.slope.split(widths)
    before = log_odds(passes.chat_model, passes.phrases)
    for number, dropped in enumerate(read_dropped_slopes(passes.chat_model, REQUESTS, passes.phrases, 4)):
        found = dropped.slope.split(widths)
        assert (found[number] == 0).all()
        for above in range(number + 1, len(widths)):
            torch.testing.assert_close(found[above], plain[above], rtol=1e-3, atol=1e-5)
        for below in range(number):
            assert (found[below] - plain[below]).abs().max() > 1e-4
    with cut(passes.chat_model.neurons.blocks[0]):
        assert log_odds(passes.chat_model, passes.phrases) == before
    assert log_odds(passes.chat_model, passes.phrases) == before


def test_what_cancels_in_the_plain_slope_does_not_in_the_mean_of_the_dropped_ones():
    direct, through = 3.0, -3.0  # a neuron of layer 0 of three: straight to the log-odds, and through layer 1
    dropped = [Slopes(torch.tensor([0.0, slope]), torch.zeros(2)) for slope in (0.0, direct, direct + through)]
    assert mean_drop(dropped, [1, 1, 1], torch.tensor([1.0, 2.0])).tolist() == [0.0, 3.0]


# -- RelP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADDS_UP)
def test_relevance_adds_up_to_the_output(kind):
    chat_model = tiny_chat_model(kind)
    ids = torch.tensor([chat_model.chat.prompt_ids(REQUESTS[1])])
    embeddings = []
    handle = chat_model.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: embeddings.append(out))
    try:
        with graph_from_embeddings(chat_model.model), relevance_rules(chat_model):
            logit = chat_model.model(ids).logits[0, -1, 7]
        plain = chat_model.model(ids).logits[0, -1, 7]
    finally:
        handle.remove()
    (coefficients,) = torch.autograd.grad(logit, embeddings[:1])
    assert logit.item() == pytest.approx(plain.item(), abs=1e-4)  # what goes forward does not change
    assert (coefficients * embeddings[0]).sum().item() == pytest.approx(logit.item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_neurons_relevance_is_that_of_what_the_down_projection_takes_in(kind, monkeypatch):
    """Half of a gated product flows to either factor, and all of it through the neuron. In the last layer no other
    product is above it."""

    def last_layer():
        return passes_of(kind).relevance_slopes.slope[-48:]

    found = last_layer()
    monkeypatch.setattr(relp, "_half", lambda _module, _args: None)
    torch.testing.assert_close(found, last_layer(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_rules_leave_no_trace_and_change_only_what_flows_back(kind):
    passes = passes_of(kind)
    chat_model = passes.chat_model
    before, attention = log_odds(chat_model, passes.phrases), chat_model.model.config._attn_implementation
    with relevance_rules(chat_model):
        assert log_odds(chat_model, passes.phrases) == pytest.approx(before, abs=1e-4)
    assert chat_model.model.config._attn_implementation == attention
    assert log_odds(chat_model, passes.phrases) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in chat_model.model.modules())
    assert (passes.relevance_slopes.slope - passes.slopes.slope).abs().max() > 1e-4


# -- integrated, tail, exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_path_that_leads_nowhere_has_the_plain_slopes(kind):
    """The way from one prompt's activations to the mean of that prompt alone."""
    passes = passes_of(kind)
    passes.harmful = passes.harmless = REQUESTS[:1]
    torch.testing.assert_close(passes.integrated_slopes.slope, passes.slopes.slope, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(passes.integrated_slopes.offset, passes.slopes.offset, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_at_the_end_of_the_path_the_tail_writes_what_the_means_would(kind):
    passes = passes_of(kind)
    neurons, tail = passes.chat_model.neurons, passes.chat_model.chat.template_tail
    means = [torch.full((tail, width), 0.3) for width in neurons.widths]
    module, h = neurons.down_projections[1], torch.randn(2, tail + 3, neurons.widths[1])
    before = log_odds(passes.chat_model, passes.phrases)
    with integrated._moved(passes.chat_model, means, 1.0):
        first, second = module(h), module(h)
        torch.testing.assert_close(first[:, -tail:], module.forward(means[1]).expand(2, -1, -1))
        torch.testing.assert_close(first[:, :-tail], module.forward(h)[:, :-tail])
        assert torch.equal(second, module.forward(h))  # the phrases' own pass
        assert log_odds(passes.chat_model, passes.phrases) != pytest.approx(before, abs=1e-3)
    assert log_odds(passes.chat_model, passes.phrases) == before


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tail_is_a_full_pass_with_the_clamp_at_the_templates_tokens(kind):
    chat_model = tiny_chat_model(kind)
    chat, tail = chat_model.chat, chat_model.chat.template_tail
    phrases = RefusalPhrases(chat, ["I", "Sure"])  # of one token: nothing follows
    clamps = [Clamp(Neuron(2, 5), 9.0), Clamp(Neuron(0, 3), -9.0), Clamp(Neuron(1, 7), -9.0), Clamp(Neuron(2, 6), 4.0)]
    found = tail_log_odds(chat_model, clamps, REQUESTS, phrases, 6, "tail")
    for row, clamp in zip(found, clamps, strict=True):

        def at_the_tail(_module, args, clamp=clamp):
            h = args[0].clone()
            h[:, -tail:, clamp.neuron.index] = clamp.value
            return (h, *args[1:])

        handle = chat_model.neurons.down_projections[clamp.neuron.layer].register_forward_pre_hook(at_the_tail)
        for text, value in zip(REQUESTS, row, strict=True):
            alone = refusal_log_odds(chat_model.model, pad_left([chat.prompt_ids(text)], 0, "cpu"), phrases)
            assert value == pytest.approx(alone.item(), abs=1e-4)
        handle.remove()
    assert max(abs(a - b) for a, b in zip(found[0], found[1], strict=True)) > 1e-2


def test_tail_takes_what_follows_a_first_token_from_the_model_without_a_clamp():
    chat_model = tiny_chat_model("llama")
    chat, phrases = chat_model.chat, RefusalPhrases(tiny_chat_model("llama").chat, OPENINGS)
    clamp = Clamp(Neuron(0, 3), 30.0)
    batch = pad_left([chat.prompt_ids(text) for text in REQUESTS], chat.pad_id, "cpu")
    continuations = read_continuations(chat_model.model, batch, phrases)

    def at_the_tail(_module, args):
        h = args[0].clone()
        h[:, -chat.template_tail :, 3] = 30.0
        return (h, *args[1:])

    handle = chat_model.neurons.down_projections[0].register_forward_pre_hook(at_the_tail)
    expected = refusal_log_odds(chat_model.model, batch, phrases, continuations)
    handle.remove()
    (found,) = tail_log_odds(chat_model, [clamp], REQUESTS, phrases, 6, "tail")
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    (whole,) = log_odds_under(chat_model, [clamp], REQUESTS, phrases, 6, "exact")
    assert found != pytest.approx(whole, abs=1e-2)


def test_tail_refuses_a_model_that_forgets(monkeypatch):
    passes = passes_of("llama")
    monkeypatch.setattr(tail_module, "attends_to_all", lambda *_: False)
    with pytest.raises(HardenError, match="take it out of the locators"):
        _ = passes.tail_drops


def test_exact_drops_are_the_larger_of_both_signs_and_kept_layer_by_layer():
    passes = passes_of("llama")
    kept = {}
    passes.stage = lambda name, make: kept.setdefault(name, make())
    drops = passes.exact_drops
    assert list(kept) == ["exact-000", "exact-001", "exact-002"] and sum(map(len, kept.values())) == len(drops)
    odds = passes.scores.harmful_log_odds
    easiest = sorted(REQUESTS, key=lambda text: abs(odds[REQUESTS.index(text)]))[:1]
    assert len({odd > 0 for odd in odds}) == 1  # or the order would count refused ones first
    column = 100
    neuron = neuron_at(passes.chat_model, column)
    values = [float(passes.contrast.clamp_values(size)[column]) for size in (-16.0, 16.0)]
    rows = log_odds_under(passes.chat_model, [Clamp(neuron, v) for v in values], easiest, passes.phrases, 4, "")
    plain = odds[REQUESTS.index(easiest[0])]
    assert drops[column].item() == pytest.approx(max(plain - row[0] for row in rows), abs=1e-4)
    passes.stage = lambda name, make: kept[name]
    del passes.exact_drops
    assert (passes.exact_drops == drops).all()


# -- greedy ----------------------------------------------------------------------------------------------------------


def strong_clamps(passes):
    """Both of every neuron, at the strength of `greedy`: those of the columns, negative ones first."""
    full = passes.contrast.full.tolist()
    values = [sign * greedy.STRENGTH * each for sign in (-1, 1) for each in full]
    return [Clamp(neuron_at(passes.chat_model, place % len(full)), value) for place, value in enumerate(values)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_drops_are_exact_and_the_larger_of_both_signs(kind):
    """It tries every clamp of a model this small."""
    passes = passes_of(kind)
    clamps, (request, plain) = strong_clamps(passes), passes._easiest(1)
    rows = log_odds_under(passes.chat_model, clamps, request, passes.phrases, 16, "all")
    expected = torch.tensor([plain - row[0] for row in rows]).view(2, -1).amax(0)
    torch.testing.assert_close(passes.greedy_drops, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_drops_are_predicted_from_the_slopes_under_a_clamp(kind):
    passes = passes_of(kind)
    chat_model, clamps = passes.chat_model, strong_clamps(passes)
    points = [3, 100]
    predicted = greedy._Clamps(chat_model, passes.contrast.full).predicted_drops(points, REQUESTS[0], passes.phrases)
    batch = pad_left([chat_model.chat.prompt_ids(REQUESTS[0])], chat_model.chat.pad_id, "cpu")

    def under(*edits):
        with torch.no_grad(), intervene(chat_model.neurons, [edits]):
            return refusal_log_odds(chat_model.model, batch, passes.phrases).item()

    n = chat_model.neurons.count
    for row, point in zip(predicted, points, strict=True):
        for column in (55, 139):
            neuron, value = neuron_at(chat_model, column), clamps[n + column].value
            slope, offset = (
                (under(clamps[point], edit(neuron, still + STEP)) - under(clamps[point], edit(neuron, still - STEP)))
                / (2 * STEP)
                for edit, still in ((Add, 0.0), (Scale, 1.0))
            )
            assert row[n + column].item() == pytest.approx(offset - value * slope, rel=0.05, abs=2e-3)
            assert row[column].item() == pytest.approx(offset + value * slope, rel=0.05, abs=2e-3)
    assert (predicted[0] - predicted[1]).abs().max() > 1e-3


def test_greedy_finds_the_planted_neuron_among_few_tries(planted, prompts, phrases, monkeypatch):
    """A third of its clamps: six at random, and thirty in each of two rounds."""
    tried = []
    for name, number in {"START": 2, "ROUNDS": 2, "PROPOSED": 30}.items():
        monkeypatch.setattr(greedy, name, number)
    monkeypatch.setattr(
        greedy, "log_odds_under", lambda m, clamps, *rest: (tried.extend(clamps), log_odds_under(m, clamps, *rest))[1]
    )
    harmful, twins = ([p.text for p in prompts[kind][:6]] for kind in ("harmful", "twins"))
    scores = Passes(planted, harmful, twins, phrases, 32).greedy_drops
    assert neuron_at(planted, int(scores.argmax())) == PLANTED_NEURON
    assert len(tried) == len(set(tried)) == 66 < 2 * planted.neurons.count / 2


def test_neurons_that_greedy_did_not_try_come_behind_in_the_order_of_their_proposals():
    #  clamps of neurons 0 to 4 are places 0 to 4 and 5 to 9
    scores = greedy._scores({1: 2.0, 6: 3.0, 5: -1.0}, [6, 9, 3, 4, 8], 5)
    assert scores.argsort(descending=True).tolist() == [1, 0, 4, 3, 2] and scores[:2].tolist() == [-1.0, 3.0]


def test_greedy_leaves_out_neurons_that_write_nothing():
    passes = passes_of("llama")
    full = passes.contrast.full.clone()
    full[:50] = 0.0
    (request,), plain = passes._easiest(1)
    scores = greedy.greedy_drops(passes.chat_model, full, request, plain, passes.phrases, 16)
    assert (scores[:50] < scores[50:].amin()).all()
    nothing = greedy.greedy_drops(passes.chat_model, torch.zeros_like(full), request, plain, passes.phrases, 16)
    assert not nothing.any()


def test_what_greedy_found_is_kept():
    passes = passes_of("llama")
    kept = {}
    passes.stage = lambda name, make: kept.setdefault(name, make())
    drops = passes.greedy_drops
    assert list(kept) == ["greedy"]
    passes.stage = lambda name, make: kept[name]
    del passes.greedy_drops
    assert (passes.greedy_drops == drops).all()


def test_a_backward_pass_is_shared():
    passes = passes_of("llama")
    count = []
    passes.chat_model.model.register_forward_pre_hook(lambda *_: count.append(1))
    _ = passes.scores, passes.slopes
    alone = len(count)
    _ = LOCATORS["gradient"](passes), passes.slopes
    assert len(count) == alone == 4 * 2  # prompts and phrases, harmful and harmless, in batches of two
