import pytest
import torch

from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.interventions import Add, intervene
from harden.locate import backward
from harden.locate.gradient import score_neurons
from harden.planted import PLANTED_NEURON
from harden.refusal import refusal_log_odds


def score(planted, prompts, phrases, n=6, batch_size=4):
    texts = [[p.text for p in prompts[kind][:n]] for kind in ("harmful", "twins")]
    return score_neurons(planted, *texts, phrases, batch_size)


def test_the_planted_neuron_is_found_first_by_far(planted, prompts, phrases):
    best, second = score(planted, prompts, phrases).top(2)
    assert best.neuron == PLANTED_NEURON and best.score > 100 * second.score
    assert best.harmful > 10 and best.harmless < 1


def test_refusal_that_hangs_on_one_neuron_has_one_effective_neuron(planted, prompts, phrases):
    assert score(planted, prompts, phrases).effective_neurons() == pytest.approx(1.0, abs=0.1)


def test_the_score_does_not_depend_on_the_batch_size(planted, prompts, phrases):
    one, all_at_once = (score(planted, prompts, phrases, batch_size=size) for size in (1, 12))
    for a, b in zip(one.score, all_at_once.score, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert one.harmful_log_odds == pytest.approx(all_at_once.harmful_log_odds, abs=1e-3)


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_counted_once(planted, prompts, phrases, monkeypatch):
    expected, sizes, real = score(planted, prompts, phrases, batch_size=6), [], refusal_log_odds

    def small(model, batch, phrases):
        sizes.append(len(batch.input_ids))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return real(model, batch, phrases)

    monkeypatch.setattr(backward, "refusal_log_odds", small)
    halved = score(planted, prompts, phrases, batch_size=6)
    assert sizes == [6, 3, 3, 3, 3]
    for layer in range(len(expected.score)):
        torch.testing.assert_close(halved.score[layer], expected.score[layer], rtol=1e-3, atol=1e-5)
    assert halved.harmful_log_odds == pytest.approx(expected.harmful_log_odds, abs=1e-3)


def test_the_score_is_the_formula_with_gradients_by_finite_difference(planted, prompts, phrases):
    """score = max over t of (dL/dh[harmful] + dL/dh[harmless]) * (h[harmless] - h[harmful]), one prompt of each."""
    neuron, step = PLANTED_NEURON, 0.5
    texts = prompts["harmful"][0].text, prompts["twins"][0].text
    tail = planted.chat.template_tail
    gradient, activation = torch.zeros(tail), []
    for text in texts:
        batch = pad_left([planted.chat.prompt_ids(text)], 0, "cpu")
        with planted.neurons.read() as h, torch.no_grad():
            planted.model(**batch.inputs())
        activation.append(h[neuron.layer][0, -tail:, neuron.index])
        for token in range(tail):
            gradient[token] -= (
                nudged(planted, batch, phrases, neuron, token - tail, step)
                - nudged(planted, batch, phrases, neuron, token - tail, -step)
            ) / (2 * step)
    expected = (gradient * (activation[1] - activation[0])).max()
    scores = score_neurons(planted, texts[:1], texts[1:], phrases, 2)
    assert float(scores.score[neuron.layer][neuron.index]) == pytest.approx(float(expected), rel=0.02)


def nudged(chat_model, batch, phrases, neuron, position, amount):
    """Refusal log-odds with one neuron raised at one prompt position (not at the phrase's tokens)."""

    def nudge(_module, args):
        h = args[0].clone()
        if h.shape[1] == batch.input_ids.shape[1]:
            h[:, position, neuron.index] += amount
        return (h,)

    handle = chat_model.neurons.down_projections[neuron.layer].register_forward_pre_hook(nudge)
    try:
        with torch.no_grad():
            return float(refusal_log_odds(chat_model.model, batch, phrases)[0])
    finally:
        handle.remove()


def test_only_the_first_share_of_the_layers_is_searched(planted, prompts, phrases):
    found = score(planted, prompts, phrases).top(10, layer_share=1 / 3)
    assert {candidate.neuron.layer for candidate in found} == {0}


def test_a_model_with_nan_weights_is_no_result(planted, prompts, phrases):
    planted.model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        score(planted, prompts, phrases)


def test_attribution_sees_what_adding_to_the_neuron_does(planted, prompts, phrases):
    """Raising the planted neuron raises the log-odds: its attribution is positive."""
    scores = score(planted, prompts, phrases)
    assert float(scores.attribution[PLANTED_NEURON.layer][PLANTED_NEURON.index]) > 0
    batch = pad_left([planted.chat.prompt_ids(prompts["harmful"][0].text)], 0, "cpu")
    plain = refusal_log_odds(planted.model, batch, phrases)
    with intervene(planted.neurons, [(Add(PLANTED_NEURON, -20.0),)]):
        assert refusal_log_odds(planted.model, batch, phrases) < plain
