"""Clamps at the template's tokens only: an exact forward pass for every neuron, at a fifth of its price.

Where the answer is decided, a clamp acts through the tokens between the request and the answer (where Kazemi et al.,
arXiv 2605.08513, look for their neurons). Everything before them is computed once, without a clamp, and every neuron is
then clamped at those few tokens, from its layer upwards:

    drop(m) = log-odds - log-odds with h[t] <- m at the template's tokens t

Exact at those tokens, overshoot included, and blind to what a clamp does to the tokens before them. Of the refusal
phrases, what follows their first token is taken to be what it is without a clamp. Cost: a forward pass over the
template's tokens, from the neuron's layer upwards, per neuron, value and prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from harden import processes
from harden.caches import attends_to_all
from harden.chat import Batch, pad_left
from harden.effects import under_clamps
from harden.errors import HardenError
from harden.generate import progress_bar
from harden.interventions import Clamp, first_layer, intervene
from harden.models import ChatModel
from harden.refusal import Continuations, RefusalPhrases, read_continuations, refusal_log_odds


@torch.no_grad()
def tail_log_odds(
    chat_model: ChatModel,
    clamps: Sequence[Clamp],
    requests: Sequence[str],
    phrases: RefusalPhrases,
    batch_size: int,
    label: str,
) -> list[list[float]]:
    """Refusal log-odds of every request with every clamp at the template's tokens: (clamps, requests).

    Raises HardenError for a model whose layers do not all attend to the whole prompt. Work is divided.
    """
    chat = chat_model.chat
    prompts = [chat.prompt_ids(text) for text in requests]
    heads = pad_left([ids[: -chat.template_tail] for ids in prompts], chat.pad_id, chat_model.device)
    past = DynamicCache(config=chat_model.model.config)
    if not attends_to_all(chat_model.model.config, past, max(map(len, prompts))):
        name = type(chat_model.model).__name__
        raise HardenError(
            f"'tail' needs layers that attend to the whole prompt, and not every layer of {name} does; take it out of "
            "the locators"
        )
    whole = pad_left(prompts, chat.pad_id, chat_model.device)
    continuations = read_continuations(chat_model.model, whole, phrases)
    chat_model.model(**heads.inputs(), past_key_values=past, use_cache=True, logits_to_keep=1)
    ends = torch.tensor([ids[-chat.template_tail :] for ids in prompts], device=chat_model.device)

    def run(edits: Sequence[tuple[Clamp, ...]]) -> list[list[float]]:
        first = 0 if processes.sharded() else min((first_layer(edit) for each in edits for edit in each), default=0)
        batch = _repeat(ends, heads, past, len(edits), first)
        repeated = _repeat_continuations(continuations, len(edits))
        rows = [each for each in edits for _ in prompts]
        with intervene(chat_model.neurons, rows):
            log_odds = refusal_log_odds(chat_model.model, batch, phrases, repeated)
        return log_odds.view(len(edits), len(prompts)).tolist()

    def work(mine: list[Clamp]) -> list[list[float]]:
        with progress_bar(len(mine), label) as bar:
            return under_clamps(chat_model, mine, batch_size, len(prompts), run, bar.update)

    return processes.divide(list(clamps), work)


def _repeat(ends: torch.Tensor, heads: Batch, past: DynamicCache, n: int, first: int) -> Batch:
    """The prompts' ends behind their heads, n times over; layers below `first` get no keys and values to speak of."""
    mask = torch.cat([heads.attention_mask, torch.ones_like(ends)], 1)
    position = heads.position_ids[:, -1:] + 1 + torch.arange(ends.shape[1], device=ends.device)
    repeated = DynamicCache()
    for number, layer in enumerate(past.layers):
        keys, values = layer.keys, layer.values
        if number < first:
            keys = values = keys[:, :1, :, :1]
        repeated.update(keys.repeat(n, 1, 1, 1), values.repeat(n, 1, 1, 1), number)
    return Batch(ends.repeat(n, 1), mask.repeat(n, 1), position.repeat(n, 1), repeated)


def _repeat_continuations(continuations: Continuations, n: int) -> Continuations:
    return {token: (yes.repeat(n), no.repeat(n)) for token, (yes, no) in continuations.items()}
