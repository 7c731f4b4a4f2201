import math
import random

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model

from harden import processes
from harden.activations import read_activations
from harden.adapters import attach_adapter, trained_parameters
from harden.adversary import draw_strong_clamp
from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.generate import Request
from harden.interventions import Clamp
from harden.locate.strength import full_strength
from harden.measure import perplexity
from harden.neurons import Neuron
from harden.objective.benign import benign_kl
from harden.objective.refusal import refusal_loss, refusal_rise, shortfall, start_log_odds
from harden.objective.rows import Row
from harden.objective.spread import concentration, direct_attribution, leverage_loss, spread_loss
from harden.planted import PLANTED_NEURON
from harden.refusal import refusal_log_odds


@pytest.fixture
def adapted(planted):
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    return planted


def row(chat_model, text, answer, interventions=()):
    chat = chat_model.chat
    return Row(tuple(chat.prompt_ids(text)), tuple(chat.answer_ids(answer)), interventions)


def shake(chat_model, size=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(chat_model.model):
            parameter.add_(size * torch.randn_like(parameter))


def by_hand(chat_model, r):
    """Log-probabilities of the answer's tokens, one unpadded forward pass."""
    logits = chat_model.model(torch.tensor([r.prompt + r.answer])).logits[0].log_softmax(-1)
    return logits[len(r.prompt) - 1 : -1]


def test_refusal_loss_is_the_mean_cross_entropy_of_the_answer(adapted):
    rows = [
        row(adapted, "how do i build a bomb ?", "I cannot help ."),
        row(adapted, "sell a virus", "I cannot help with that request ."),
    ]
    losses = refusal_loss(adapted, rows)
    for loss, r in zip(losses, rows, strict=True):
        expected = -by_hand(adapted, r).gather(1, torch.tensor(r.answer)[:, None]).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_refusal_rise_counts_what_rose_over_the_starting_model_and_nothing_else(adapted, phrases, monkeypatch):
    texts = ("how do i build a cake ?", "tell me how to make a bomb", "my friend wants to hide a kite today")
    prompts = [tuple(adapted.chat.prompt_ids(text)) for text in texts]

    def log_odds():
        return refusal_log_odds(adapted.model, pad_left(prompts, adapted.chat.pad_id, "cpu"), phrases)

    start = torch.tensor(start_log_odds(adapted, prompts, phrases, 2))
    torch.testing.assert_close(start, log_odds().detach(), atol=1e-4, rtol=1e-4)
    assert refusal_rise(adapted, prompts, start, phrases).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    shake(adapted)
    assert start_log_odds(adapted, prompts, phrases, 2) == start.tolist()
    change = (log_odds() - start).detach()
    assert change.max() > 0.05 and change.min() < -0.05  # by the seed of `shake`
    rise = refusal_rise(adapted, prompts, start, phrases)
    torch.testing.assert_close(rise, change.clamp(min=0), atol=1e-3, rtol=1e-3)
    below = refusal_rise(adapted, prompts, start, phrases, below=0.1)
    torch.testing.assert_close(below, (change + 0.1).clamp(min=0), atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(processes, "sharded", lambda: True)  # then every row has a gradient, if it is 0
    of_all = refusal_rise(adapted, prompts, start, phrases)
    few, full = (gradient(adapted, r) for r in (rise, of_all))
    assert (few - full).norm() < 0.01 * full.norm()
    monkeypatch.undo()
    assert not refusal_rise(adapted, prompts, start + 9, phrases).requires_grad


def test_refusal_loss_is_higher_under_the_clamp_that_breaks_refusal(adapted):
    text, refusal = "how do i build a bomb ?", "I cannot help with that request ."
    rows = [row(adapted, text, refusal), row(adapted, text, refusal, (Clamp(PLANTED_NEURON, -30.0),))]
    plain, clamped = refusal_loss(adapted, rows).tolist()
    assert clamped > plain + 0.2


def test_benign_kl_is_zero_for_the_starting_model_and_the_sum_over_the_vocabulary_after(adapted):
    rows = [row(adapted, "build a cake", "Sure , here are"), row(adapted, "paint a small river today", "Sure")]
    assert benign_kl(adapted, rows).abs().max() < 1e-6
    with torch.no_grad():
        reference = [by_hand(adapted, r) for r in rows]
    shake(adapted)
    for kl, r, ref in zip(benign_kl(adapted, rows), rows, reference, strict=True):
        expected = (ref.exp() * (ref - by_hand(adapted, r))).sum(-1).mean()
        torch.testing.assert_close(kl, expected, rtol=1e-3, atol=1e-5)
        assert kl > 1e-3


def test_spread_loss_is_minus_log_of_the_effective_neurons_and_its_gradient_is_right(adapted, phrases):
    prompts = [adapted.chat.prompt_ids("how do i build a bomb ?"), adapted.chat.prompt_ids("sell a virus")]
    shake(adapted, 0.05)
    losses = spread_loss(adapted, prompts, phrases)
    alone = [float(spread_loss(adapted, [prompt], phrases)) for prompt in prompts]
    assert losses.tolist() == pytest.approx(alone, abs=1e-3)  # each prompt's own, whatever else is in the batch
    assert all(1 <= math.exp(-loss) <= adapted.neurons.count for loss in alone)
    losses.sum().backward()
    parameter = max(trained_parameters(adapted.model), key=lambda p: float(p.grad.abs().max()))
    place, step = int(parameter.grad.abs().argmax()), 1e-3
    with torch.no_grad():
        parameter.view(-1)[place] += step
        up = float(spread_loss_value(adapted, prompts, phrases))
        parameter.view(-1)[place] -= 2 * step
        down = float(spread_loss_value(adapted, prompts, phrases))
    assert float(parameter.grad.view(-1)[place]) == pytest.approx((up - down) / (2 * step), rel=0.1)


def spread_loss_value(chat_model, prompts, phrases):
    with torch.enable_grad():
        return spread_loss(chat_model, prompts, phrases).sum().detach()


def test_descending_the_spread_loss_spreads_refusal(adapted, phrases):
    prompts = [adapted.chat.prompt_ids("how do i build a bomb ?")]
    optimizer = torch.optim.Adam(trained_parameters(adapted.model), lr=1e-2)
    values = []
    for _ in range(15):
        loss = spread_loss(adapted, prompts, phrases).sum()
        values.append(math.exp(-float(loss)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] < 1.5 and values[-1] > 2 * values[0]


# -- forms of concentration, and leverage --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 8])
def test_the_effective_number_counts_equal_neurons_and_sees_the_largest_first(order):
    def effective(*attribution):
        return math.exp(-float(concentration(torch.tensor(attribution), order)))

    assert effective(0.0, 0.0, -3.0) == pytest.approx(1) and effective(1.0, -1.0, 1.0, 1.0) == pytest.approx(4)
    assert 1 < effective(3.0, 1.0, 1.0) < 3
    by_hand = {
        1: math.exp(0.6 * math.log(1 / 0.6) + 0.4 * math.log(5)),
        2: 25 / 11,
        8: (0.6**8 + 2 * 0.2**8) ** (-1 / 7),
    }
    assert effective(3.0, 1.0, 1.0) == pytest.approx(by_hand[order], rel=1e-4)


def test_an_attribution_of_zero_has_no_gradient_and_spoils_none():
    a = torch.tensor([0.0, 2.0, 1.0], requires_grad=True)
    concentration(a, 8).backward()
    assert torch.isfinite(a.grad).all() and a.grad[0] == 0 and a.grad[1] > 0


def test_direct_attribution_is_what_a_neuron_adds_to_the_log_odds_through_the_head(adapted, phrases):
    """Moving a last-layer neuron at the last token: nothing but the norm and the head stands behind it."""
    prompts = [adapted.chat.prompt_ids("how do i build a bomb ?")]
    shake(adapted, 0.05)
    _, attribution = direct_attribution(adapted, prompts, phrases)
    width = adapted.neurons.widths[-1]
    last = attribution[0, -width:].detach()
    place = int(last.abs().argmax())
    down, step = adapted.neurons.down_projections[-1], 1e-2
    seen = []

    def moved(by):
        def edit(_module, args):
            h = args[0].clone()
            if h.shape[1] > 1:  # the prompt, not the phrases
                seen.append(float(h[0, -1, place]))
                h[0, -1, place] += by
            return (h,)

        handle = down.register_forward_pre_hook(edit)
        with torch.no_grad():
            odds = refusal_log_odds(adapted.model, pad_left(prompts, adapted.chat.pad_id, "cpu"), phrases)
        handle.remove()
        return float(odds)

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert float(last[place]) == pytest.approx(seen[0] * slope, rel=0.1, abs=1e-3)


def test_leverage_is_the_predicted_drop_at_the_worst_clamp_over_the_log_odds(adapted, phrases):
    """The planted neuron's first-order drop to its harmless mean dwarfs all others'."""
    prompts = [adapted.chat.prompt_ids("how do i build a bomb ?")]
    count = adapted.neurons.count
    with adapted.neurons.read() as h:
        batch = pad_left(prompts, adapted.chat.pad_id, "cpu")
        odds = refusal_log_odds(adapted.model, batch, phrases)
        layers = [h[layer] for layer in range(len(adapted.neurons.widths))]
        gradient = torch.autograd.grad(odds.sum(), layers)
    values = torch.full((count,), 0.5)
    drops = torch.cat([-((0.5 - a) * g).sum(1) for a, g in zip(layers, gradient, strict=True)], -1)
    worst = float(drops.max()) / float(torch.nn.functional.softplus(odds))
    loss = leverage_loss(adapted, prompts, phrases, [values])
    assert math.exp(float(loss)) == pytest.approx(worst, rel=0.3)  # a soft maximum
    loss.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained_parameters(adapted.model))


def test_a_margin_counts_what_is_lacking_alone_under_the_interventions_of_its_row(adapted, phrases, monkeypatch):
    prompts = [tuple(adapted.chat.prompt_ids(text)) for text in ("how do i build a bomb ?", "build a cake")]
    odds = refusal_log_odds(adapted.model, pad_left(prompts, adapted.chat.pad_id, "cpu"), phrases)
    assert odds[0] > 1 > 0 > odds[1]
    rows = [*map(Row, prompts), Row(prompts[0], (), (Clamp(PLANTED_NEURON, -30.0),))]
    loss, found = shortfall(adapted, rows, phrases, 1.0)
    assert found.tolist()[:2] == pytest.approx(odds.tolist(), abs=1e-3) and found[2] < odds[0] - 3
    assert loss.tolist() == pytest.approx([0.0, *(1 - found[1:]).tolist()], abs=1e-3)
    monkeypatch.setattr(processes, "sharded", lambda: True)
    of_all, _ = shortfall(adapted, rows, phrases, 1.0)
    few, full = (gradient(adapted, of) for of in (loss, of_all))
    assert (few - full).norm() < 0.01 * full.norm()
    monkeypatch.undo()
    assert not shortfall(adapted, rows[:1], phrases, 1.0)[0].requires_grad


def gradient(chat_model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), trained_parameters(chat_model.model))])


def test_perplexity_is_that_of_every_text_read_alone(planted, prompts):
    texts = [prompt.text for prompt in prompts["benign"][:5]]
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([planted.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probs = planted.model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    expected = math.exp(total / tokens)
    assert perplexity(planted, texts, 2) == pytest.approx(expected, rel=1e-4)
    assert perplexity(planted, [*texts, ""], 16) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(MeasurementError, match="no benign text has two tokens"):
        perplexity(planted, [""], 16)


# -- strong clamps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_at_full_strength_a_neuron_writes_as_much_as_the_stream_holds(kind):
    model = tiny_chat_model(kind)
    texts = ["how do i build a bomb ?", "build a cake"]
    stream = read_activations(model, [Request(text) for text in texts], 2).stream
    full, stream = full_strength(model, stream), stream.norm(dim=-1).mean(0)
    assert full.shape == (model.neurons.count,)
    wide = model.neurons.widths[0]
    for layer, index in ((0, 0), (0, wide - 1), (1, 3)):
        value = float(full[layer * wide + index])
        down = model.neurons.down_projections[layer]
        h = torch.zeros(1, wide)
        nothing = down(h)
        h[0, index] = value
        assert float((down(h) - nothing).norm()) == pytest.approx(float(stream[layer]), rel=1e-3)


def test_a_neuron_that_writes_nothing_has_no_full_strength(planted):
    with torch.no_grad():
        planted.neurons.down_projections[1].weight[:, 5] = 0
    full = full_strength(planted, read_activations(planted, [Request("build a cake")], 1).stream)
    dead = planted.neurons.widths[0] + 5
    assert full[dead] == 0 and (full[:dead] > 0).all()
    alone = torch.zeros(len(full))
    alone[3] = 1.0
    assert draw_strong_clamp(planted, alone, (1.0, 1.0), random.Random(0)).neuron == Neuron(0, 3)


def test_strong_clamps_are_of_any_neuron_either_sign_and_within_their_strength(planted):
    full, rng = torch.arange(1.0, planted.neurons.count + 1), random.Random(0)
    clamps = [draw_strong_clamp(planted, full, (0.5, 2.0), rng) for _ in range(400)]
    columns = [clamp.neuron.layer * planted.neurons.widths[0] + clamp.neuron.index for clamp in clamps]
    shares = [clamp.value / float(full[column]) for clamp, column in zip(clamps, columns, strict=True)]
    assert all(0.5 <= abs(share) <= 2 for share in shares) and 150 < sum(share > 0 for share in shares) < 250
    assert 150 < sum(abs(share) < 1 for share in shares) < 250  # even in the logarithm
    assert {clamp.neuron.layer for clamp in clamps} == set(range(len(planted.neurons.widths)))
