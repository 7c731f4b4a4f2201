import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_chat_model

from harden.adapters import (
    adapter_state,
    attach_adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
    starting_model,
    trained_parameters,
)
from harden.errors import HardenError
from harden.models import load_chat_model

IDS = torch.tensor([[2, 29, 30, 31, 61, 32, 41, 3, 4]])


def shaken(chat_model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(chat_model.model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return chat_model


def logits(chat_model):
    with torch.no_grad():
        return chat_model.model(IDS).logits


@pytest.fixture
def saved(planted_folder, tmp_path):
    chat_model = load_chat_model(str(planted_folder))
    attach_adapter(chat_model, 4, 16, ("all-linear",), None, 0)
    save_adapter(shaken(chat_model).model, tmp_path / "start")
    return tmp_path / "start", logits(chat_model)


def test_a_fresh_adapter_changes_nothing(planted):
    before = logits(planted)
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    assert torch.equal(logits(planted), before)


def test_the_saved_adapter_is_the_measured_model(planted_folder, saved):
    folder, expected = saved
    loaded = PeftModel.from_pretrained(load_chat_model(str(planted_folder)).model, str(folder))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)


def test_a_measured_adapter_computes_in_the_models_dtype(planted_folder, saved):
    folder, expected = saved
    chat_model = load_chat_model(str(planted_folder), "bfloat16")
    load_adapter(chat_model, str(folder))
    assert {parameter.dtype for parameter in chat_model.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(chat_model).float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_a_continued_adapter_starts_where_the_old_one_ended_and_is_saved_as_one(planted_folder, saved, tmp_path):
    folder, expected = saved
    chat_model = load_chat_model(str(planted_folder))
    attach_adapter(chat_model, 3, 5, ("all-linear",), str(folder), 0)
    torch.testing.assert_close(logits(chat_model), expected, rtol=1e-4, atol=1e-4)
    shaken(chat_model, 2)
    with starting_model(chat_model.model):
        torch.testing.assert_close(logits(chat_model), expected, rtol=1e-4, atol=1e-4)
    save_adapter(chat_model.model, tmp_path / "next")
    loaded = PeftModel.from_pretrained(load_chat_model(str(planted_folder)).model, str(tmp_path / "next"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits(chat_model))
    assert loaded.peft_config["default"].r == 7


def test_only_the_trained_adapter_learns(planted_folder, saved):
    chat_model = load_chat_model(str(planted_folder))
    attach_adapter(chat_model, 3, 5, ("all-linear",), str(saved[0]), 0)
    with starting_model(chat_model.model):
        pass
    learning = {name for name, p in chat_model.model.named_parameters() if p.requires_grad}
    assert learning and all(".default." in name for name in learning)
    assert len(learning) == len(trained_parameters(chat_model.model))


def test_state_round_trip(planted):
    attach_adapter(planted, 4, 8, ("all-linear",), None, 0)
    state, before = adapter_state(planted.model), logits(planted)
    assert not torch.equal(logits(shaken(planted)), before)
    restore_adapter(planted.model, state)
    assert torch.equal(logits(planted), before)


def test_an_adapter_that_touches_more_than_the_recipe_is_refused(planted, saved):
    with pytest.raises(HardenError, match="target_modules leaves out"):
        attach_adapter(planted, 3, 5, ("q_proj",), str(saved[0]), 0)


def test_an_adapter_of_another_model_is_refused(saved):
    with pytest.raises(HardenError, match="does not fit model"):
        attach_adapter(tiny_chat_model("llama"), 3, 5, ("all-linear",), str(saved[0]), 0)


def test_an_adapter_that_lacks_matrices_is_refused(planted, saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, saved[0] / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(HardenError, match="does not fit model.*lacks"):
        attach_adapter(planted, 3, 5, ("all-linear",), str(saved[0]), 0)


def test_a_missing_adapter_and_unmatched_targets_are_errors(planted, tmp_path):
    with pytest.raises(HardenError, match="cannot load adapter"):
        attach_adapter(planted, 3, 5, ("all-linear",), str(tmp_path / "none"), 0)
    with pytest.raises(HardenError, match="target_modules"):
        attach_adapter(planted, 3, 5, ("no_such_module",), None, 0)
