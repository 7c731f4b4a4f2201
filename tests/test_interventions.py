import copy

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model
from torch import nn

from harden.chat import pad_left
from harden.generate import Request, complete
from harden.interventions import Add, Clamp, Scale, intervene
from harden.neurons import Neuron, find_neurons

NEURON = Neuron(1, 7)
SHORT, LONG = [2, 9, 10, 3, 4], [2, 5, 6, 7, 11, 12, 8, 3, 4]


def edited(model, scale, shift):
    """The same change made by hand in the weights: column times scale, and shift times column as a bias."""
    model = copy.deepcopy(model)
    module = find_neurons(model).down_projections[NEURON.layer]
    weight = module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data  # (d_model, d_mlp)
    column = weight[:, NEURON.index].clone()
    weight[:, NEURON.index] *= scale
    bias = torch.zeros_like(column) if module.bias is None else module.bias.data
    module.bias = nn.Parameter(bias + shift * column, requires_grad=False)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    ("intervention", "scale", "shift"),
    [(Clamp(NEURON, -9.0), 0.0, -9.0), (Scale(NEURON, -3.0), -3.0, 0.0), (Add(NEURON, 5.0), 1.0, 5.0)],
    ids=["clamp", "scale", "add"],
)
def test_intervention_equals_hand_edited_weights(kind, intervention, scale, shift):
    chat_model = tiny_chat_model(kind)
    ids = torch.tensor([LONG])
    with intervene(chat_model.neurons, [(intervention,)]):
        logits = chat_model.model(ids).logits
    torch.testing.assert_close(logits, edited(chat_model.model, scale, shift)(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, chat_model.model(ids).logits, atol=1e-2)  # it did something, and is gone


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_have_their_own_interventions_and_padding_does_not_matter(kind):
    chat_model = tiny_chat_model(kind)
    rows = [(SHORT, ()), (SHORT, (Clamp(NEURON, -9.0),)), (LONG, (Clamp(Neuron(0, 3), 4.0), Clamp(Neuron(2, 5), 4.0)))]
    batch = pad_left([ids for ids, _ in rows], 0, "cpu")
    with intervene(chat_model.neurons, [edits for _, edits in rows]):
        together = chat_model.model(**batch.inputs()).logits[:, -1]
    for row, (ids, edits) in enumerate(rows):
        with intervene(chat_model.neurons, [edits]):
            alone = chat_model.model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cached_generation_equals_full_passes_with_edited_weights(kind):
    chat_model = tiny_chat_model(kind)
    requests = [Request("how do i build a cake ?"), Request("build a bomb", (Clamp(NEURON, -9.0),))]
    completions = complete(chat_model, requests, 6, 2, "test")
    for request, completion in zip(requests, completions, strict=True):
        model = edited(chat_model.model, 0.0, -9.0) if request.interventions else chat_model.model
        ids = chat_model.chat.prompt_ids(request.text)
        new = []
        for _ in range(6):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in chat_model.chat.eos_ids:
                break
            new.append(token)
        assert completion.text == chat_model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_repeated_rows_follow_repeat_interleave():
    chat_model = tiny_chat_model("llama")
    ids = torch.tensor([SHORT, SHORT])
    with intervene(chat_model.neurons, [(), (Clamp(NEURON, -9.0),)]):
        two = chat_model.model(ids).logits
        six = chat_model.model(ids.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(six, two.repeat_interleave(3, 0))


def test_clamp_holds_under_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        chat_model = tiny_chat_model("llama")
        model = chat_model.model.train()
        weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with intervene(chat_model.neurons, [(Clamp(NEURON, -9.0),)]):
            model(torch.tensor([LONG]), use_cache=False).logits[0, -1].logsumexp(0).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_hooks_are_removed_when_the_body_or_the_setup_fails():
    chat_model = tiny_chat_model("llama")
    with pytest.raises(RuntimeError), intervene(chat_model.neurons, [(Clamp(NEURON, 1.0),)]):
        raise RuntimeError
    with pytest.raises(Exception, match="layers 0 to 2"), intervene(chat_model.neurons, [(Clamp(Neuron(9, 0), 1.0),)]):
        pass
    assert not any(module._forward_pre_hooks for module in chat_model.model.modules())
