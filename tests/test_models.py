import json

import pytest
from safetensors.torch import load_file, save_file
from tiny import COMMON, MIXTURES, tiny_model

from harden.errors import HardenError
from harden.models import load_chat_model
from harden.planted import build_tokenizer


def test_the_planted_model_loads_frozen(planted):
    assert planted.neurons.widths == (32, 32, 32)
    assert not planted.model.training and not any(p.requires_grad for p in planted.model.parameters())


def test_an_unknown_name_says_what_a_name_can_be():
    with pytest.raises(HardenError, match="neither a bundled model .smollm2-135m-instruct.*nor a folder, nor a hub id"):
        load_chat_model("no-such/model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(HardenError, match="does not hold a usable transformers model"):
        load_chat_model(str(tmp_path))


def test_truncated_weights(planted_folder, tmp_path):
    for path in planted_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(HardenError, match="damaged|usable"):
        load_chat_model(str(tmp_path))


def test_weights_that_are_missing(planted_folder, tmp_path):
    for path in planted_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HardenError, match=r"1 of its weights are missing .model.layers.1.mlp.down_proj.weight"):
        load_chat_model(str(tmp_path))


def test_a_damaged_cache_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HARDEN_CACHE", str(tmp_path))
    load_chat_model("planted-neuron")
    next(tmp_path.rglob("model.safetensors")).unlink()
    with pytest.raises(HardenError, match=f"cached copy is damaged.*delete {tmp_path}"):
        load_chat_model("planted-neuron")


def test_a_model_without_a_chat_template(planted_folder, tmp_path):
    for path in planted_folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(HardenError, match="no chat template"):
        load_chat_model(str(tmp_path))


def test_a_mixture_of_experts_is_refused_whole(tmp_path):
    tiny_model("qwen3_moe", {**COMMON, **MIXTURES["qwen3_moe"]}).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(HardenError, match="mixture-of-experts"):
        load_chat_model(str(tmp_path))
