"""Sharing the prompts' head changes nothing but the work."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model

from harden import prefill
from harden.chat import pad_left
from harden.generate import Request, answer_log_probs, complete
from harden.interventions import Clamp, intervene
from harden.neurons import Neuron
from harden.prefill import batch_prompts
from harden.refusal import RefusalPhrases, refusal_log_odds

CLAMP = (Clamp(Neuron(1, 7), -9.0),)
HEAD = [2, 9, 10, 5, 4, 6, 8]
PROMPTS = [[*HEAD, 7, 3, 4], [*HEAD, 11, 12, 7, 7, 3, 4], [*HEAD, 3, 4], [*HEAD, 12, 3, 4]] * 2
EDITS = [CLAMP, CLAMP, CLAMP, CLAMP, (), (), (), ()]


@pytest.fixture
def unshared(monkeypatch):
    """Calls a function with sharing switched off."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(prefill, "MIN_SAVED", 0.0)
            return function(*args)

    return call


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_plain_batch(kind, unshared):
    chat_model = tiny_chat_model(kind)
    weight = chat_model.neurons.down_projections[1].weight.requires_grad_()
    answers = [(5, 6), (7,), (8, 9, 10), ()] * 2

    def run():
        log_probs, mask = answer_log_probs(chat_model, PROMPTS, answers, EDITS)
        log_probs = log_probs * mask[..., None]
        return log_probs.detach(), torch.autograd.grad((log_probs**2).sum(), weight)[0]

    assert batch_prompts(chat_model, PROMPTS, EDITS, answers).input_ids.shape == (8, 7)  # 14 without the head
    for shared, plain in zip(run(), unshared(run), strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_odds_are_those_of_the_plain_batch(kind, unshared):
    chat_model = tiny_chat_model(kind)
    phrases = RefusalPhrases(chat_model.chat, ("I cannot help", "I begin", "Sure , slowly"))

    def run():
        batch = batch_prompts(chat_model, PROMPTS, EDITS)
        with intervene(chat_model.neurons, EDITS):
            return batch.past is None, refusal_log_odds(chat_model.model, batch, phrases)

    (is_plain, log_odds), (expected_plain, expected) = run(), unshared(run)
    assert (is_plain, expected_plain) == (False, True)
    torch.testing.assert_close(log_odds, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("system_prompt", [[], HEAD * 3], ids=["short_head", "long_head"])
def test_completions_are_those_of_the_plain_batch(kind, system_prompt, unshared, monkeypatch):
    chat_model = tiny_chat_model(kind)
    plain = chat_model.chat.prompt_ids
    monkeypatch.setattr(chat_model.chat, "prompt_ids", lambda text: system_prompt + plain(text))
    texts = ("how do i build a cake ?", "build a bomb", "how do i sell a cake ?", "a")
    requests = [Request(text, edits) for edits in (CLAMP, ()) for text in texts]
    shared = complete(chat_model, requests, 6, 8, "test")
    assert shared == unshared(complete, chat_model, requests, 6, 8, "test")
    assert system_prompt or len({completion.text for completion in shared}) > 1


def test_a_head_is_left_alone_where_it_saves_little():
    chat_model = tiny_chat_model("llama")
    own = [(Clamp(Neuron(1, n), 1.0),) for n in range(8)]
    assert batch_prompts(chat_model, PROMPTS, own).past is None
    assert batch_prompts(chat_model, [PROMPTS[0]], [()]).past is None
    assert batch_prompts(chat_model, [[2, 3], [5, 3], [6, 3]], [()] * 3).past is None


def test_a_sliding_window_shorter_than_the_rows_is_not_fooled_by_padding():
    chat_model = tiny_chat_model("gemma2")  # window 32
    assert batch_prompts(chat_model, PROMPTS, EDITS, more_tokens=10).past is not None
    assert batch_prompts(chat_model, PROMPTS, EDITS, more_tokens=30).past is None


@pytest.mark.parametrize(
    ("kind", "options"), [("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3}), ("bloom", {"n_layer": 3, "n_head": 4})]
)
def test_models_that_count_tokens_in_a_row_are_not_fooled_by_padding(kind, options):
    """MPT adds a bias by where a token stands in the batch, padding included."""
    chat_model = tiny_chat_model(kind, {**options, "intermediate_size": 128})
    phrases = RefusalPhrases(chat_model.chat, ("I cannot help", "Sure"))
    found = refusal_log_odds(chat_model.model, batch_prompts(chat_model, PROMPTS, [()] * 8), phrases)
    alone = [refusal_log_odds(chat_model.model, pad_left([prompt], 0, "cpu"), phrases) for prompt in PROMPTS]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_identical_prompts_keep_a_token_to_read_from():
    chat_model = tiny_chat_model("llama")
    batch = batch_prompts(chat_model, [PROMPTS[0]] * 4, [()] * 4)
    assert batch.input_ids.shape == (4, 1)
    plain = chat_model.model(**pad_left([PROMPTS[0]], 0, "cpu").inputs()).logits[:, -1]
    torch.testing.assert_close(chat_model.model(**batch.inputs()).logits[:, -1], plain.expand(4, -1))
