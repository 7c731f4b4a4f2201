import math

import pytest
import torch

from harden.activations import Activations, neuron_at, read_activations, template_activations
from harden.attack.arms import NO_ATTACK, Anchor, ablated, anchored, constant, prefilled, refusal_directions, scaled
from harden.attack.published import PUBLISHED, published_clamps
from harden.attack.select import select_candidates
from harden.errors import MeasurementError
from harden.generate import Request
from harden.interventions import Clamp, Scale, intervene
from harden.locate.contrast import Contrast, read_contrast
from harden.locate.passes import LOCATORS, Passes
from harden.neurons import Neuron
from harden.planted import PLANTED_NEURON


def texts(prompts, kind, n=8):
    return [p.text for p in prompts[kind][:n]]


@pytest.fixture
def contrast(planted, prompts):
    return read_contrast(planted, texts(prompts, "harmful"), texts(prompts, "twins"), 4)


@pytest.fixture
def passes(planted, prompts, phrases):
    return Passes(planted, texts(prompts, "harmful"), texts(prompts, "twins"), phrases, 64)


# -- activations -----------------------------------------------------------------------------------------------------


def test_activations_are_those_of_the_last_token_whatever_shares_the_batch(planted, prompts):
    requests = [Request(text) for text in texts(prompts, "harmful", 3)]
    together = read_activations(planted, requests, 3)
    for row, request in enumerate(requests):
        with planted.neurons.read() as h:
            out = planted.model(torch.tensor([planted.chat.prompt_ids(request.text)]), output_hidden_states=True)
        flat = torch.cat([h[layer][0, -1] for layer in range(3)])
        torch.testing.assert_close(together.neurons[row], flat, rtol=1e-4, atol=1e-4)
        for layer in range(2):  # the last hidden state of transformers has gone through the final norm
            stream = out.hidden_states[layer + 1][0, -1]
            torch.testing.assert_close(together.stream[row, layer], stream, rtol=1e-4, atol=1e-4)


def test_activations_over_a_prefix_are_the_mean_over_its_tokens_only(planted, prompts):
    request = Request(prompts["benign"][0].text, prefix="first gather what you need")
    mean = read_activations(planted, [Request("paint a tree", prefix="old"), request], 2, over_prefix=True)
    with planted.neurons.read() as h:
        planted.model(torch.tensor([request.prompt_ids(planted.chat)]))
    flat = torch.cat([h[layer][0, -5:].mean(0) for layer in range(3)])
    torch.testing.assert_close(mean.neurons[1], flat, rtol=1e-4, atol=1e-4)


def test_activations_that_are_no_numbers_are_no_measurement(planted, prompts):
    request = Request(prompts["benign"][0].text, (Clamp(Neuron(0, 1), math.inf),))
    with pytest.raises(MeasurementError, match="not finite"):
        read_activations(planted, [request], 1)


def test_a_column_is_a_neuron(planted):
    assert [neuron_at(planted, column) for column in (0, 31, 32, 95)] == [
        Neuron(0, 0), Neuron(0, 31), Neuron(1, 0), Neuron(2, 31)
    ]  # fmt: skip


# -- what selects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locator", ["contrast", "activation_shift"])  # by effect size steady noise comes first
def test_locators_find_the_planted_neuron(locator, planted, contrast):
    assert neuron_at(planted, int(contrast.ranking(locator)[0])) == PLANTED_NEURON


def made_up(planted, harmful, harmless):
    """Activations of 96 neurons: zero but for the given columns."""
    kinds = []
    for columns in (harmful, harmless):
        neurons = torch.zeros(4, 96)
        for column, values in columns.items():
            neurons[:, column] = torch.tensor(values)
        kinds.append(Activations(neurons, torch.zeros(4, 3, 8)))
    return Contrast(planted, *kinds)


def test_a_neuron_that_is_always_on_is_none_of_contrast(planted):
    always, sometimes = [90.0, 91.0, 92.0, 93.0], [1.0, 1.0, 2.0, 2.0]
    contrast = made_up(planted, {5: always, 7: sometimes}, {5: [v - 9 for v in always]})
    assert contrast.gap[5] == 9.0 and int(contrast.ranking("contrast")[0]) == 7
    assert contrast.contrast()[5] == -1.0
    awakened = made_up(planted, {5: always}, {5: [1.0] * 4})  # the most active on both, but hardly so on harmless ones
    assert int(awakened.ranking("contrast")[0]) == 5


def test_effect_size_by_hand(planted):
    contrast = made_up(planted, {5: [1.0, 3.0, 1.0, 3.0]}, {5: [-1.0, 1.0, -1.0, 1.0]})
    assert contrast.effect_size()[5].item() == pytest.approx(2 / math.sqrt(4 / 3))  # both variances are 4/3
    assert contrast.effect_size()[6] == 0.0


def test_activation_shift_counts_layers_of_small_activations_like_others(planted):
    harmless = {column: [1.0] * 4 for column in range(32)} | {column: [100.0] * 4 for column in range(32, 64)}
    contrast = made_up(planted, {**harmless, 3: [2.0] * 4, 40: [150.0] * 4}, harmless)
    assert contrast.activation_shift()[3].item() == pytest.approx(1.0)
    assert contrast.activation_shift()[40].item() == pytest.approx(0.5)


def test_locators_take_turns_and_name_no_neuron_twice(planted, passes):
    def chosen(locators, n):
        return [c.neuron for c in select_candidates(locators, n, passes, 1.0, 0)]

    gradient, by_effect = chosen(["gradient"], 8), chosen(["effect_size"], 8)
    assert gradient == [c.neuron for c in passes.scores.top(8)]
    both = chosen(["gradient", "effect_size"], 8)
    assert both[0] == PLANTED_NEURON and len(set(both)) == 8
    assert {gradient[1], by_effect[1]} <= set(both)
    drawn = chosen(["random"], 8)
    assert drawn == chosen(["random"], 8) and len(set(drawn)) == 8 and drawn != gradient
    assert len(chosen(["random", "gradient"], 1000)) == planted.neurons.count


def test_sizes_of_a_neuron_without_a_gap_count_in_its_deviation(planted):
    contrast = made_up(planted, {5: [1.0, 3.0, 1.0, 3.0], 6: [9.0] * 4}, {5: [1.0, 3.0, 1.0, 3.2], 6: [4.0] * 4})
    steady, wandering = contrast.candidate(6), contrast.candidate(5)
    assert steady.clamp_value(2.0) == pytest.approx(4.0 - 2 * 5.0)
    assert wandering.unit == pytest.approx(-1.2, abs=0.1) and wandering.clamp_value(2.0) == pytest.approx(
        2.05 + 2.4, abs=0.2
    )


@pytest.mark.parametrize("locator", [*LOCATORS, "random"])
def test_layers_that_are_left_out_are_left_out_by_every_locator(locator, passes):
    chosen = select_candidates([locator], 20, passes, 1 / 3, 0)
    assert {c.neuron.layer for c in chosen} == {0} and len(chosen) == 20


def test_named_neurons_are_attacked_besides(passes):
    chosen = select_candidates(["gradient"], 3, passes, 1.0, 0, [Neuron(2, 30), PLANTED_NEURON])
    assert [c.neuron for c in chosen[:2]] == [Neuron(2, 30), PLANTED_NEURON]
    assert len({c.neuron for c in chosen}) == len(chosen) == 4  # the locator names the planted neuron, too


def test_gradient_alone_reads_nothing_else(passes):
    assert len(select_candidates(["gradient"], 3, passes, 1.0, 0)) == 3
    assert "scores" in vars(passes) and not {"contrast", "slopes"} & set(vars(passes))


# -- what intervenes, and what edits the input -----------------------------------------------------------------------


def anchor(value, harmful, harmless, k):
    return Anchor(Clamp(PLANTED_NEURON, value), harmful, harmless, k)


def test_an_anchored_clamp_by_hand():
    ordinary = anchor(-30.0, 10.0, 0.0, 1.0)
    assert ordinary.anchored(0.0) == -10.0  # little happens where the neuron is silent
    assert ordinary.anchored(1.0) == -13.0
    assert ordinary.anchored(10.0) == -30.0  # -40, held at the constant clamp's value
    assert anchor(30.0, -10.0, 0.0, 2.0).anchored(-1.0) == 16.0
    assert ordinary.anchored(-9.0) == 0.0  # 17 would strengthen the refusal


def test_an_anchored_clamp_reaches_a_neuron_that_fires_less_on_harmful_prompts():
    silenced = anchor(45.0, 0.1, 5.0, 1.0)
    assert silenced.anchored(0.1) == pytest.approx(45.0)
    assert silenced.anchored(5.0) == pytest.approx(5.0 + 0.0, abs=0.2)


def test_anchored_arms_follow_each_prompts_natural_activation(planted, prompts):
    asked = [prompts["harmful"][0], prompts["twins"][0]]
    natural = template_activations(planted, [Neuron(0, 3), PLANTED_NEURON], [p.text for p in asked], 1)
    assert natural.shape == (2, 2, planted.chat.template_tail)
    with planted.neurons.read() as h:
        planted.model(torch.tensor([planted.chat.prompt_ids(asked[0].text)]))
    for column, neuron in enumerate((Neuron(0, 3), PLANTED_NEURON)):
        expected = h[neuron.layer][0, -planted.chat.template_tail :, neuron.index]
        torch.testing.assert_close(natural[0, column], expected, rtol=1e-4, atol=1e-4)
    high = natural[0, 1].max().item()
    arm = anchored(planted, [anchor(-400.0, 2 * high, 0.0, 1.0)], asked, 2)[0]
    values = [arm.request(prompt).interventions[0].value for prompt in asked]
    assert values[0] == pytest.approx(-200.0 - 2 * high, rel=1e-3)
    assert values[0] < values[1] < 0.0
    with pytest.raises(KeyError):  # never silently unattacked
        arm.request(prompts["benign"][0])


def test_arms_make_requests(prompts):
    prompt = prompts["harmful"][0]
    assert NO_ATTACK.request(prompt) == Request(prompt.text)
    assert constant(PLANTED_NEURON, -3.0).request(prompt) == Request(prompt.text, (Clamp(PLANTED_NEURON, -3.0),))
    assert prefilled("Sure").request(prompt) == Request(prompt.text, prefix="Sure")
    neurons = [Neuron(0, 1), Neuron(2, 3)]
    assert scaled(neurons, 0.0, "zero").request(prompt).interventions == tuple(Scale(n, 0.0) for n in neurons)


def test_ablating_the_refusal_direction_breaks_the_planted_model(planted, prompts, contrast):
    directions = refusal_directions(contrast.harmful, contrast.harmless)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    arm = ablated(directions[1].expand_as(directions), "layer 1")
    request = arm.request(prompts["harmful"][0])
    ids = torch.tensor([planted.chat.prompt_ids(request.text)])
    first = planted.chat.answer_ids("Sure", ended=False)[0]
    with intervene(planted.neurons, [request.interventions]):
        attacked = planted.model(ids).logits[0, -1].argmax().item()
    assert attacked == first != planted.model(ids).logits[0, -1].argmax().item()


# -- what was published ----------------------------------------------------------------------------------------------


def test_published_clamps_need_the_name_and_the_shape():
    assert published_clamps("Qwen/Qwen3-4B", [9728] * 36) == [Clamp(Neuron(14, 5590), 18.0)]
    assert published_clamps("meta-llama/Meta-Llama-3.1-8B-Instruct", [14336] * 32) == [Clamp(Neuron(11, 4258), -4.0)]
    assert published_clamps("/models/llama-3.1-8b-instruct/", [14336] * 32) == [Clamp(Neuron(11, 4258), -4.0)]
    assert published_clamps("Qwen/Qwen3-4B", [9728] * 35) == []
    assert published_clamps("mine", [9728] * 36) == []
    for (layers, width), neuron, _ in PUBLISHED.values():
        assert neuron.layer < layers and neuron.index < width
