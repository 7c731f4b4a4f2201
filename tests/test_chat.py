import pytest
from tiny import tiny_chat_model

from harden.chat import Chat, pad_left
from harden.errors import HardenError
from harden.planted import build_tokenizer


def test_the_template_tail_is_what_follows_the_request():
    chat = tiny_chat_model("llama").chat
    ids = chat.prompt_ids("build a cake")
    assert chat.tokenizer.convert_ids_to_tokens(ids[-chat.template_tail :]) == ["<end>", "<assistant>"]
    assert chat.tokenizer.convert_ids_to_tokens([chat.end_of_turn]) == ["<end>"]


def test_an_answer_ends_its_turn_unless_it_was_cut():
    chat = tiny_chat_model("llama").chat
    assert chat.answer_ids("Sure") == [*chat.answer_ids("Sure", ended=False), chat.end_of_turn]


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(HardenError, match="no chat template"):
        Chat(tokenizer, {3})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<user> hello <end>", "renders two different requests alike"),
        ("{{ messages[0]['content'] }}", "no token between"),
    ],
)
def test_templates_that_lose_the_request_or_its_end_are_refused(template, message):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(HardenError, match=message):
        Chat(tokenizer, {3})


def test_padding_is_on_the_left_and_positions_start_at_the_first_token():
    batch = pad_left([[7], [8, 9, 10]], 0, "cpu")
    assert batch.input_ids.tolist() == [[0, 0, 7], [8, 9, 10]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]
