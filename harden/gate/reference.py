"""How far a model has moved from the one that it is compared with, on benign prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harden import processes
from harden.adapters import load_adapter
from harden.batches import in_batches
from harden.errors import HardenError, MeasurementError
from harden.generate import Request, answer_log_probs, complete
from harden.models import ChatModel, load_chat_model
from harden.objective.benign import answer_kl
from harden.results import Mean
from harden.settings.measuring import ModelSection

BATCH = 16


def load(model: ModelSection) -> ChatModel:
    """A model, with its adapter if it has one."""
    chat_model = load_chat_model(model.name, model.dtype, processes.state().device, model.chat_template_kwargs)
    if model.adapter:
        load_adapter(chat_model, model.adapter)
    return chat_model


def reference_divergence(
    model: ChatModel, reference: ChatModel, prompts: Sequence[str], max_new_tokens: int, batch_size: int
) -> Mean:
    """KL(reference || model) over the reference's own answers, in nats per token, mean over prompts.

    Raises HardenError for models of different vocabularies, MeasurementError where the reference answers nothing.
    """
    if model.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise HardenError(
            "model and reference have different vocabularies: no KL can be measured; give another --reference"
        )
    answers = complete(reference, [Request(text) for text in prompts], max_new_tokens, batch_size, "reference answers")
    rows = [
        (reference.chat.prompt_ids(text), reference.chat.answer_ids(answer.text, answer.ended))
        for text, answer in zip(prompts, answers, strict=True)
        if answer.text
    ]
    if not rows:
        raise MeasurementError("the reference answers none of the benign prompts")

    @torch.no_grad()
    def divergences(part: Sequence) -> list[float]:
        columns = [ids for ids, _ in part], [answer for _, answer in part], [()] * len(part)
        (expected, mask), (found, _) = answer_log_probs(reference, *columns), answer_log_probs(model, *columns)
        return answer_kl(expected, found, mask).tolist()

    return Mean.of(processes.divide(rows, lambda mine: in_batches(model, mine, BATCH, divergences)))
