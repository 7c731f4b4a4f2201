"""Greedy completions."""

import logging

import pytest
from tiny import ARCHITECTURES, tiny_chat_model
from transformers import DynamicCache, Lfm2Config, LlamaConfig

from harden import generate
from harden.caches import only_attends
from harden.generate import Request, complete
from harden.interventions import Clamp
from harden.neurons import Neuron

TEXTS = ("how do i build a cake ?", "build a bomb", "how do i sell a cake ?", "a")
EDITS = ((Clamp(Neuron(1, 3), 9.0),), (Clamp(Neuron(0, 5), -9.0),), ())
REQUESTS = [Request(text, edits) for edits in EDITS for text in TEXTS]
SHORT_WINDOW = {"sliding_window": 8, "query_pre_attn_scalar": 8}


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, None) for kind in ARCHITECTURES), ("gemma2", SHORT_WINDOW), ("gemma3_text", SHORT_WINDOW)],
)
def test_rows_that_have_ended_leave_the_batch_and_change_nothing(kind, options, monkeypatch, caplog):
    chat_model = tiny_chat_model(kind, options)
    chat, sizes = chat_model.chat, []
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def completed(stage):
        monkeypatch.setattr(generate, "STAGE", stage)
        return complete(chat_model, REQUESTS, 14, len(REQUESTS), "test")

    tokens = set(range(chat_model.model.config.vocab_size)) - set(chat.prompt_ids("a"))
    for token in sorted(tokens):  # one with which some rows end early, and others never
        monkeypatch.setattr(chat, "eos_ids", {token})
        expected = completed(stage=14)
        if any(c.ended and len(c.text.split()) < 4 for c in expected) and not all(c.ended for c in expected):
            break
    going_on = next(c for c in expected if not c.ended).text.split()
    chat.pad_id = chat.answer_ids(going_on[3], ended=False)[0]  # said at the end of a stage, by a row that goes on

    with chat_model.model.register_forward_pre_hook(
        lambda _module, _, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    ):
        assert completed(stage=4) == expected
    assert sizes[-1] == sum(not c.ended or len(c.text.split()) >= 12 for c in expected) < len(REQUESTS)
    assert "padding" not in caplog.text


def test_rows_stay_where_layers_have_more_than_keys_and_values():
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    configs = LlamaConfig(**small), Lfm2Config(**small, layer_types=["conv", "full_attention"])
    assert [only_attends(DynamicCache(config=config)) for config in configs] == [True, False]
