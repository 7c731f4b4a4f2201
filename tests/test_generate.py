"""Greedy completions."""

import pytest
from tiny import ARCHITECTURES, tiny_chat_model

from harden import generate
from harden.generate import Request, complete
from harden.interventions import Clamp
from harden.neurons import Neuron

TEXTS = ("how do i build a cake ?", "build a bomb", "how do i sell a cake ?", "a")
EDITS = ((Clamp(Neuron(1, 3), 9.0),), (Clamp(Neuron(0, 5), -9.0),), ())
REQUESTS = [Request(text, edits) for edits in EDITS for text in TEXTS]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_have_ended_leave_the_batch_and_change_nothing(kind, monkeypatch, caplog):
    chat_model = tiny_chat_model(kind)
    chat, sizes = chat_model.chat, []

    def completed(stage):
        monkeypatch.setattr(generate, "STAGE", stage)
        return complete(chat_model, REQUESTS, 14, len(REQUESTS), "test")

    tokens = set(range(chat_model.model.config.vocab_size)) - set(chat.prompt_ids("a"))
    for token in sorted(tokens):  # one with which some rows end early, and others never
        monkeypatch.setattr(chat, "eos_ids", {token})
        expected = completed(stage=14)
        if any(c.ended and len(c.text.split()) < 4 for c in expected) and not all(c.ended for c in expected):
            break

    with chat_model.model.register_forward_pre_hook(
        lambda _module, _, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    ):
        assert completed(stage=4) == expected
    assert sizes[-1] == sum(not c.ended or len(c.text.split()) >= 12 for c in expected) < len(REQUESTS)
    assert "padding" not in caplog.text
