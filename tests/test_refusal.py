import itertools

import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model
from transformers import AutoConfig, AutoModelForCausalLM

from harden import refusal
from harden.chat import pad_left
from harden.errors import HardenError
from harden.interventions import Clamp, intervene
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.refusal import RefusalPhrases, read_continuations, refusal_log_odds

PHRASES = ("I cannot help", "I cannot with", "I begin", "Sure , slowly", "that")
PROMPTS = ("how do i build a cake ?", "sell a bomb")


def brute_force(chat_model, text, phrases):
    """p by one forward pass per phrase prefix, in double precision."""
    prompt = chat_model.chat.prompt_ids(text)
    p = 0.0
    for phrase in phrases:
        tokens, p_phrase = chat_model.chat.answer_ids(phrase, ended=False), 1.0
        for n, token in enumerate(tokens):
            logits = chat_model.model(torch.tensor([prompt + tokens[:n]])).logits[0, -1].double()
            p_phrase *= float(logits.softmax(0)[token])
        p += p_phrase
    return torch.tensor(p).logit()


def batch_of(chat_model, texts=PROMPTS):
    return pad_left([chat_model.chat.prompt_ids(text) for text in texts], 0, "cpu")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("edits", [(), (Clamp(Neuron(1, 7), -9.0),)], ids=["plain", "clamped"])
def test_log_odds_equal_summed_phrase_probabilities(kind, edits):
    chat_model = tiny_chat_model(kind)
    phrases = RefusalPhrases(chat_model.chat, PHRASES)
    with intervene(chat_model.neurons, [edits, edits]):
        log_odds = refusal_log_odds(chat_model.model, batch_of(chat_model), phrases)
    with intervene(chat_model.neurons, [edits]):
        expected = torch.stack([brute_force(chat_model, text, PHRASES) for text in PROMPTS]).float()
    torch.testing.assert_close(log_odds, expected, rtol=1e-3, atol=1e-3)


def test_the_trie_drops_extensions_and_covers_inner_paths():
    chat = tiny_chat_model("llama").chat
    phrases = RefusalPhrases(chat, ("I", "I cannot", "Sure , here", "Sure , slowly"))
    i, sure, comma = (chat.answer_ids(word, ended=False)[0] for word in ("I", "Sure", ","))
    assert [node.path for node in phrases.nodes] == [(), (sure,), (sure, comma)]
    assert phrases.nodes[0].ends == (i,) and phrases.nodes[0].continues == (sure,)
    assert phrases.rows == [(sure, comma)]


def test_no_phrases_is_an_error():
    with pytest.raises(HardenError, match="empty"):
        RefusalPhrases(tiny_chat_model("llama").chat, ())


@pytest.mark.parametrize("certainty", [30.0, -30.0])
def test_the_gradient_lives_where_refusal_is_certain(certainty):
    """A logit raised by 30 puts p within 1e-9 of 1 (or of 0); the slope of the log-odds in it stays 1."""
    chat_model = tiny_chat_model("llama")
    phrases = RefusalPhrases(chat_model.chat, ("I",))
    token = phrases.nodes[0].ends[0]
    raised = torch.tensor(certainty, requires_grad=True)

    def raise_logit(_module, _args, logits):
        return logits + raised * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

    chat_model.model.lm_head.register_forward_hook(raise_logit)
    log_odds = refusal_log_odds(chat_model.model, batch_of(chat_model, PROMPTS[:1]), phrases)[0]
    log_odds.backward()
    assert abs(float(log_odds)) > 20 and raised.grad == pytest.approx(1.0, abs=1e-4)


def test_log_odds_do_not_depend_on_the_batch():
    chat_model = tiny_chat_model("qwen3")
    phrases = RefusalPhrases(chat_model.chat, PHRASES)
    together = refusal_log_odds(chat_model.model, batch_of(chat_model), phrases)
    alone = [refusal_log_odds(chat_model.model, batch_of(chat_model, [text]), phrases) for text in PROMPTS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert len(set(itertools.chain(*[a.tolist() for a in alone]))) == 2


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*[(kind, "eager") for kind in ARCHITECTURES], *[(kind, "sdpa") for kind in ARCHITECTURES if kind != "gemma2"]],
)
def test_phrases_packed_into_one_row_read_as_in_rows_of_their_own(kind, attention, monkeypatch):
    chat_model = tiny_chat_model(kind)
    chat_model.model.set_attn_implementation(attention)
    phrases = RefusalPhrases(chat_model.chat, PHRASES)
    sizes = []
    chat_model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    packed = refusal_log_odds(chat_model.model, batch_of(chat_model), phrases)
    monkeypatch.setattr(refusal, "attends_to_all", lambda *_: False)
    rows = refusal_log_odds(chat_model.model, batch_of(chat_model), phrases)
    assert sizes[1] == (2, len(phrases.nodes) - 1) and sizes[3] == (2 * len(phrases.rows), 2)
    torch.testing.assert_close(packed, rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("falcon", {"alibi": True, "num_attention_heads": 4}),
        ("falcon", {"alibi": False, "num_attention_heads": 4}),
        ("mistral", {"sliding_window": 4}),
        ("bloom", {"n_head": 4}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    ],
)
def test_models_that_count_tokens_in_a_row_or_forget_them_are_read_right(kind, options):
    """Distance instead of positions (ALiBi), and a window that is shorter than the prompt with its phrases."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=96, hidden_size=32, num_hidden_layers=2, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    chat = tiny_chat_model("llama").chat
    phrases = RefusalPhrases(chat, PHRASES)
    alone = ChatModel(kind, model, chat.tokenizer, chat, None)
    found = refusal_log_odds(model, batch_of(alone, PROMPTS[:1]), phrases)
    assert found.item() == pytest.approx(brute_force(alone, PROMPTS[0], PHRASES).item(), abs=1e-3)


def test_continuations_that_were_read_before_spare_the_second_pass():
    chat_model = tiny_chat_model("llama")
    phrases = RefusalPhrases(chat_model.chat, PHRASES)
    continuations = read_continuations(chat_model.model, batch_of(chat_model), phrases)
    passes = []
    chat_model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = refusal_log_odds(chat_model.model, batch_of(chat_model), phrases, continuations)
    assert len(passes) == 1
    torch.testing.assert_close(found, refusal_log_odds(chat_model.model, batch_of(chat_model), phrases))
