"""The head that all prompts of a batch share, computed once for every distinct set of interventions.

A chat template opens each prompt with the same tokens: with a system prompt, often half of a short request's. An
intervention acts on them too, so their keys and values differ between interventions, but not between prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from harden import processes
from harden.caches import attends_to_all, told_positions
from harden.chat import Batch, pad_left
from harden.interventions import Intervention, intervene
from harden.models import ChatModel

MIN_SAVED = 0.5  # share of the head's rows that must fall away: a pass of its own costs something too


def batch_prompts(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[tuple[Intervention, ...]],
    answers: Sequence[Sequence[int]] | None = None,
    more_tokens: int = 0,
) -> Batch:
    """A left-padded batch of prompts, each with its answer if given, whose shared head is in `Batch.past`.

    interventions: one tuple per row; the caller applies them to the rest of the batch. more_tokens: how many tokens
    the caller will append. The logits are those of the plain batch up to rounding. The head is not shared where that
    saves little, or could change the result: padding then stands behind the head, which sliding windows shorter than
    the rows, recurrent layers and models that count tokens instead of being told positions would notice.
    Differentiable.
    """
    chat = chat_model.chat
    rows = [[*p, *a] for p, a in zip(prompts, answers or [()] * len(prompts), strict=True)]
    distinct = list(dict.fromkeys(interventions))
    head = _common_head(prompts)
    longest = max(map(len, rows)) + more_tokens
    past = DynamicCache(config=chat_model.model.config)
    saves = head and len(distinct) <= MIN_SAVED * len(rows) and not processes.sharded()
    if not (saves and told_positions(chat_model.model) and attends_to_all(chat_model.model.config, past, longest)):
        return pad_left(rows, chat.pad_id, chat_model.device)
    ids = torch.tensor(head, device=chat_model.device).expand(len(distinct), -1)
    with intervene(chat_model.neurons, distinct):
        chat_model.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    number = {edits: n for n, edits in enumerate(distinct)}
    past.batch_select_indices(torch.tensor([number[edits] for edits in interventions], device=chat_model.device))
    rest = pad_left([row[len(head) :] for row in rows], chat.pad_id, chat_model.device)
    seen = rest.attention_mask.new_ones(len(rows), len(head))
    return Batch(rest.input_ids, torch.cat([seen, rest.attention_mask], 1), rest.position_ids + len(head), past)


def _common_head(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The longest common beginning, at least one token short of the shortest prompt."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return list(first[:n])
