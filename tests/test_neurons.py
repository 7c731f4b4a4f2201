import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, COMMON, MIXTURES, tiny_chat_model, tiny_model
from torch import nn

from harden.errors import HardenError
from harden.neurons import Neuron, find_neurons


def test_address_is_read_and_written():
    assert str(Neuron.parse("24:623")) == "24:623" and Neuron.parse(" 3:4 ") == Neuron(3, 4)


@pytest.mark.parametrize("text", ["24", "24:", "a:b", "1:2:3", "-1:2"])
def test_bad_address_is_refused(text):
    with pytest.raises(HardenError, match="layer:index"):
        Neuron.parse(text)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_neuron_is_found(kind):
    neurons = find_neurons(tiny_model(kind))
    assert neurons.widths == (48, 48, 48) and neurons.count == 144


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_read_neurons_are_what_the_down_projection_maps_to_the_mlp_output(kind):
    chat_model = tiny_chat_model(kind)
    outputs = {}
    for layer, module in enumerate(chat_model.neurons.down_projections):
        module.register_forward_hook(lambda _m, _a, out, layer=layer: outputs.update({layer: out}))
    with chat_model.neurons.read() as h:
        chat_model.model(torch.tensor([[2, 5, 6, 7, 3, 4]]))
    for layer, module in enumerate(chat_model.neurons.down_projections):
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T  # (d_mlp, d_model)
        expected = h[layer] @ weight + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(outputs[layer], expected)


def test_reading_records_the_first_pass_only_and_leaves_no_hook():
    chat_model = tiny_chat_model("llama")
    with chat_model.neurons.read() as h:
        chat_model.model(torch.tensor([[2, 5, 6]]))
        chat_model.model(torch.tensor([[2, 5, 6, 7, 8]]))
    assert h[0].shape == (1, 3, 48)
    assert not any(module._forward_pre_hooks for module in chat_model.model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_neurons_are_found_under_a_lora(kind):
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert find_neurons(model).widths == (48, 48, 48)


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixture_of_experts_is_refused(kind):
    with pytest.raises(HardenError, match="mixture-of-experts"):
        find_neurons(tiny_model(kind, {**COMMON, **MIXTURES[kind]}))


def test_a_layer_without_a_known_down_projection_is_refused():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.lowering, mlp.down_proj = mlp.down_proj, nn.Identity()
    with pytest.raises(HardenError, match="layer 1 has 0"):
        find_neurons(model)


def test_a_count_that_disagrees_with_the_config_is_refused():
    model = tiny_model("llama")
    model.config.intermediate_size = 50
    with pytest.raises(HardenError, match="config says 50"):
        find_neurons(model)


def test_neuron_out_of_range_is_refused():
    neurons = tiny_chat_model("llama").neurons
    for neuron, message in ((Neuron(3, 0), "layers 0 to 2"), (Neuron(0, 48), "neurons 0 to 47")):
        with pytest.raises(HardenError, match=message):
            neurons.check(neuron)
