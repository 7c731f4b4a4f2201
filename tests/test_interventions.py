import copy

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model
from torch import nn

from harden.chat import pad_left
from harden.errors import HardenError
from harden.generate import Request, complete
from harden.interventions import Ablate, Add, Clamp, Scale, describe, intervene
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


def test_two_edits_of_one_neuron_in_a_row_are_an_error():
    chat_model = tiny_chat_model("llama")
    apart = [(Clamp(NEURON, 1.0),), (Add(NEURON, 1.0), Add(Neuron(NEURON.layer, NEURON.index + 1), 1.0))]
    with intervene(chat_model.neurons, apart):
        pass
    twice = [(Clamp(NEURON, 1.0), Add(NEURON, 1.0))]
    with pytest.raises(HardenError, match=f"one edit of neuron {NEURON}"), intervene(chat_model.neurons, twice):
        pass


def test_hooks_are_removed_when_the_body_or_the_setup_fails():
    chat_model = tiny_chat_model("llama")
    with pytest.raises(RuntimeError), intervene(chat_model.neurons, [(Clamp(NEURON, 1.0),)]):
        raise RuntimeError
    with pytest.raises(Exception, match="layers 0 to 2"), intervene(chat_model.neurons, [(Clamp(Neuron(9, 0), 1.0),)]):
        pass
    assert not any(module._forward_pre_hooks for module in chat_model.model.modules())


def directions_of(chat_model, seed=0):
    torch.manual_seed(seed)
    directions = torch.randn(len(chat_model.neurons.blocks), 32)
    return directions / directions.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_ablated_direction_is_gone_from_its_rows_only(kind):
    chat_model = tiny_chat_model(kind)
    directions = directions_of(chat_model)
    seen = {}
    for number, block in enumerate(chat_model.neurons.blocks):
        assert len(block.writers) >= 1

        def record(_module, _args, output, number=number):
            seen[number] = output[0] if isinstance(output, tuple) else output

        block.layer.register_forward_hook(record)
    batch = pad_left([LONG, LONG, SHORT], 0, "cpu")
    plain = chat_model.model(**batch.inputs()).logits
    before = dict(seen)
    with intervene(chat_model.neurons, [(), (Ablate("r", directions),), (Clamp(NEURON, 2.0),)]):
        logits = chat_model.model(**batch.inputs()).logits
        outputs = {n: block_output(block, chat_model, batch) for n, block in enumerate(chat_model.neurons.blocks)}
    torch.testing.assert_close(logits[0], plain[0])
    assert not torch.allclose(logits[1], plain[1], atol=1e-2)
    for number in before:
        along = (outputs[number][1] * directions[number]).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-4, rtol=0)
        assert ((before[number][1] * directions[number]).sum(-1).abs() > 1e-3).any()
    torch.testing.assert_close(chat_model.model(**batch.inputs()).logits, plain)  # no hook is left


def block_output(block, chat_model, batch):
    """What leaves a layer while interventions are in force: this hook runs after theirs."""
    box = []
    handle = block.layer.register_forward_hook(lambda _m, _a, o: box.append(o[0] if isinstance(o, tuple) else o))
    chat_model.model(**batch.inputs())
    handle.remove()
    return box[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_ablating_one_direction_everywhere_equals_weights_that_cannot_write_it(kind):
    """Arditi et al., section 2.4: where no norm stands between a module and the residual stream."""
    chat_model = tiny_chat_model(kind)
    r = directions_of(chat_model)[0]
    ids = torch.tensor([LONG])
    with intervene(chat_model.neurons, [(Ablate("r", r.expand(len(chat_model.neurons.blocks), -1)),)]):
        ablated = chat_model.model(ids).logits

    edited = copy.deepcopy(chat_model.model)
    keep = torch.eye(len(r)) - torch.outer(r, r)
    body = next(m for m in edited.modules() if hasattr(m, "layers") or hasattr(m, "h"))
    for module in edited.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data = module.weight.data @ keep
    for layer in getattr(body, "layers", None) or body.h:
        for name, module in layer.named_modules():
            if name.split(".")[-1] in ("o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj"):
                weight = module.weight.data
                module.weight.data = weight @ keep if type(module).__name__ == "Conv1D" else keep @ weight
                if module.bias is not None:
                    module.bias.data = module.bias.data @ keep
    edited.get_output_embeddings().weight = nn.Parameter(chat_model.model.get_output_embeddings().weight)
    torch.testing.assert_close(ablated, edited(ids).logits, rtol=1e-3, atol=1e-3)


def test_interventions_are_told_apart_by_their_description():
    directions = torch.eye(3, 4)
    edits = [Clamp(NEURON, 1.0), Clamp(NEURON, 1.5), Scale(NEURON, 1.0), Add(NEURON, 1.0), Clamp(Neuron(1, 8), 1.0)]
    edits += [Ablate("a", directions), Ablate("b", directions)]
    assert len({describe(edit) for edit in edits}) == len(edits)
    assert describe(edits[1]) == "clamp 1:7 1.5"
    with pytest.raises(HardenError, match="one direction"), intervene(None, [edits[-2:]]):
        pass
