import pytest
import torch
from tiny import ARCHITECTURES, tiny_chat_model
from transformers import AutoConfig, AutoModelForCausalLM

from harden import effects, processes
from harden.chat import Chat, pad_left
from harden.effects import log_odds_under, under_clamps
from harden.generate import answer_log_probs
from harden.interventions import Ablate, Clamp, intervene
from harden.models import ChatModel
from harden.neurons import Neuron, find_neurons
from harden.planted import build_tokenizer
from harden.prefill import batch_prompts
from harden.refusal import RefusalPhrases, refusal_log_odds

OLDER = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "n_embd": 32, "n_layer": 3,
    "n_head": 4, "rotary_dim": 4, "max_position_embeddings": 64, "n_positions": 64,
    "ffn_hidden_size": 48, "n_inner": 48, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
# Prompts of unlike length with a common head; one alone shares no head.
PROMPTS = [[2, 9, 10, 11, 12, 3, 4], [2, 9, 10, 7, 3, 4], [2, 9, 10, 11, 13, 14, 6, 3, 4]]
CLAMPS = [
    Clamp(Neuron(2, 5), 9.0), Clamp(Neuron(0, 3), -9.0), Clamp(Neuron(1, 7), -9.0), Clamp(Neuron(2, 6), 4.0),
    Clamp(Neuron(2, 5), 9.0), Clamp(Neuron(2, 5), -9.0),
]  # fmt: skip


def runner(chat_model, prompts):
    phrases = RefusalPhrases(chat_model.chat, ["I cannot help", "I will", "Sure"])

    def run(edits):
        rows = [each for each in edits for _ in prompts]
        batch = batch_prompts(chat_model, prompts * len(edits), rows)
        with intervene(chat_model.neurons, rows):
            return refusal_log_odds(chat_model.model, batch, phrases).view(len(edits), len(prompts)).tolist()

    return run, phrases


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("n_prompts", "shared"), [(1, False), (3, False), (3, True)])
def test_log_odds_are_those_of_full_passes_one_clamp_and_prompt_at_a_time(kind, n_prompts, shared, monkeypatch):
    monkeypatch.setattr(effects, "layers_share_batches", lambda _model: shared)
    chat_model, prompts = tiny_chat_model(kind), PROMPTS[-n_prompts:]
    run, phrases = runner(chat_model, prompts)
    found = torch.tensor(under_clamps(chat_model, CLAMPS, 2, 1, run, lambda _n: None))
    for row, clamp in enumerate(CLAMPS):
        for column, prompt in enumerate(prompts):
            with intervene(chat_model.neurons, [(clamp,)]):
                alone = refusal_log_odds(chat_model.model, pad_left([prompt], 0, "cpu"), phrases)
            assert found[row, column].item() == pytest.approx(alone.item(), abs=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2  # the clamps do something


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_window_that_ends_within_the_phrases_is_that_of_full_passes(kind, monkeypatch):
    chat_model = tiny_chat_model(kind)  # window 32
    prompts = [[2, *range(9, 9 + n), 3, 4] for n in (29, 22, 17)]
    monkeypatch.setattr(chat_model.chat, "prompt_ids", lambda text: prompts[int(text)])
    phrases = RefusalPhrases(chat_model.chat, ["I cannot help", "I will", "Sure"])
    found = log_odds_under(chat_model, CLAMPS, ["0", "1", "2"], phrases, 24, "test")
    for row, clamp in zip(found, CLAMPS, strict=True):
        for odds, prompt in zip(row, prompts, strict=True):
            with torch.no_grad(), intervene(chat_model.neurons, [(clamp,)]):
                alone = refusal_log_odds(chat_model.model, pad_left([prompt], 0, "cpu"), phrases)
            assert odds == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probabilities_of_answers_are_those_of_full_passes(kind):
    chat_model = tiny_chat_model(kind)
    answers = [[5, 6, 7], [8], [9, 9]]

    def run(edits):
        rows = [each for each in edits for _ in PROMPTS]
        log_probs, _ = answer_log_probs(chat_model, PROMPTS * len(edits), answers * len(edits), rows)
        return list(log_probs.view(len(edits), -1))

    found = under_clamps(chat_model, CLAMPS, 4, 1, run, lambda _n: None)
    for row, clamp in zip(found, CLAMPS, strict=True):
        torch.testing.assert_close(row, run([(clamp,)])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_layers_that_return_tuples(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OLDER)).eval()
    tokenizer = build_tokenizer()
    chat_model = ChatModel(kind, model, tokenizer, Chat(tokenizer, {3}), find_neurons(model))
    run, _ = runner(chat_model, PROMPTS)
    found = under_clamps(chat_model, CLAMPS[:3], 2, 1, run, lambda _n: None)
    for row, clamp in zip(found, CLAMPS, strict=False):
        assert row == pytest.approx(run([(clamp,)])[0], abs=1e-4)


def test_equal_clamps_and_one_prompt():
    chat_model = tiny_chat_model("llama")
    run, _ = runner(chat_model, PROMPTS[:1])
    done = []
    found = under_clamps(chat_model, [CLAMPS[0], CLAMPS[0], CLAMPS[3], CLAMPS[0]], 4, 1, run, done.append)
    assert found[0] == found[1] == found[3] == pytest.approx(run([(CLAMPS[0],)])[0], abs=1e-4)
    assert found[2] == pytest.approx(run([(CLAMPS[3],)])[0], abs=1e-4)


def test_under_fsdp_all_processes_run_equally_many_passes_whatever_their_clamps(monkeypatch):
    chat_model = tiny_chat_model("llama")
    run, _ = runner(chat_model, PROMPTS)
    monkeypatch.setattr(processes, "sharded", lambda: True)

    def passes(clamps):
        calls = []
        under_clamps(chat_model, clamps, 2, 1, lambda edits: (calls.append(len(edits)), run(edits))[1], lambda _n: None)
        return calls

    assert passes(CLAMPS[:4]) == passes([CLAMPS[0]] * 4) == passes([CLAMPS[1]] * 2 + [CLAMPS[2]] * 2) == [2, 2]


def test_layers_below_the_clamp_are_computed_once():
    chat_model = tiny_chat_model("llama")
    run, _ = runner(chat_model, PROMPTS)
    passes = [0, 0, 0]
    for number, block in enumerate(chat_model.neurons.blocks):

        def count(_module, _args, _output, number=number):
            passes[number] += 1

        block.layer.self_attn.register_forward_hook(count)
    run([()])
    (whole,) = set(passes)
    done = []
    under_clamps(chat_model, [Clamp(Neuron(2, index), 9.0) for index in range(4)], 1, 1, run, done.append)
    assert passes == [2 * whole, 2 * whole, 6 * whole] and done == [1, 1, 1, 1]


def test_what_acts_on_all_layers_is_run_from_the_first():
    chat_model = tiny_chat_model("llama")
    run, _ = runner(chat_model, PROMPTS)
    ablate = Ablate("r", torch.nn.functional.normalize(torch.ones(3, 32), dim=-1))
    found = under_clamps(chat_model, [ablate, CLAMPS[0]], 2, 1, run, lambda _n: None)
    assert found[0] == pytest.approx(run([(ablate,)])[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_is_left_behind_also_after_an_error(kind):
    chat_model = tiny_chat_model(kind)
    run, _ = runner(chat_model, PROMPTS)
    before = run([()])
    calls = []

    def broken(edits):
        calls.append(edits)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return run(edits)

    with pytest.raises(RuntimeError, match="broken"):
        under_clamps(chat_model, [CLAMPS[0], CLAMPS[2]], 1, 1, broken, lambda _n: None)
    assert run([()]) == before
    assert all("forward" not in block.layer.__dict__ for block in chat_model.neurons.blocks)
    assert not any(block.layer._forward_hooks for block in chat_model.neurons.blocks)


def test_no_clamps_no_work():
    assert under_clamps(tiny_chat_model("llama"), [], 4, 1, lambda edits: pytest.fail("asked"), lambda _n: None) == []


def test_a_batch_of_clamps_that_does_not_fit_into_memory_is_halved():
    chat_model = tiny_chat_model("llama")
    run, _ = runner(chat_model, PROMPTS)
    clamps = [Clamp(Neuron(2, index), 9.0) for index in range(5)]
    expected = under_clamps(chat_model, clamps, 15, 3, run, lambda _n: None)
    sizes, done = [], []

    def small(edits):
        sizes.append(len(edits))
        if len(edits) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return run(edits)

    found = under_clamps(chat_model, clamps, 15, 3, small, done.append)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    assert sizes == [1, 5, 2, 1, 1, 1, 1, 1] and sum(done) == 5
    assert chat_model.largest_batch == 3  # rows: a clamp has three


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_last_mlp_computes_only_what_is_read(kind):
    chat_model = tiny_chat_model(kind)
    run, phrases = runner(chat_model, PROMPTS)
    seen = []
    hook = chat_model.neurons.down_projections[-1].register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].shape[1])
    )
    found = under_clamps(chat_model, CLAMPS[:2], 2, 1, run, lambda _n: None)
    n_phrases = len(phrases.nodes) - 1
    assert seen[-6:] == [1, 1, n_phrases] * 2  # head, prompts, phrases
    hook.remove()
    assert found[0] == pytest.approx(run([(CLAMPS[0],)])[0], abs=1e-4)
    assert "forward" not in {name for m in chat_model.model.modules() for name in m.__dict__}
