"""Refusal log-odds: how likely the model is to open with a refusal (Kazemi et al., arXiv 2605.08513, Eq. 2).

p = probability that the answer opens with one of a set of phrases, teacher-forced after the chat template;
log-odds = log p / (1 - p). The phrases form a trie. With one forward pass over the prompts, and one short one
over the trie's inner paths on the cached keys and values, both log p and log (1 - p) are sums over its nodes, so
nothing is subtracted from 1 and no epsilon is needed: the gradient lives on where refusal is nearly certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harden.chat import Batch, Chat
from harden.errors import HardenError


@dataclass(frozen=True)
class Node:
    """An inner node of the trie: the tokens that lead to it, and those that leave it."""

    path: tuple[int, ...]
    ends: tuple[int, ...]
    """Tokens that complete a phrase."""
    continues: tuple[int, ...]
    """Tokens that lead to another inner node."""


class RefusalPhrases:
    """A set of opening phrases as a token trie. A phrase that extends another one adds nothing and is dropped."""

    def __init__(self, chat: Chat, phrases: Sequence[str]):
        paths = {tuple(chat.answer_ids(phrase, ended=False)) for phrase in phrases} - {()}
        if not paths:
            raise HardenError("refusal.phrases is empty: there is nothing to measure refusal by")
        leaves = {p for p in paths if not any(p[:n] in paths for n in range(1, len(p)))}
        inner = sorted({leaf[:n] for leaf in leaves for n in range(len(leaf))})
        self.nodes = [
            Node(
                path,
                tuple(sorted({p[-1] for p in leaves if p[:-1] == path})),
                tuple(sorted({p[-1] for p in inner if p and p[:-1] == path})),
            )
            for path in inner
        ]
        # The longest inner paths hold all the others.
        self.rows = [p for p in inner if p and not any(q != p and q[: len(p)] == p for q in inner)]


def refusal_log_odds(model, prompts: Batch, phrases: RefusalPhrases) -> torch.Tensor:
    """Refusal log-odds of each prompt: float32 of shape (batch,), differentiable.

    Interventions that are in force act on the phrase tokens as well. Cost: one forward pass over the prompts and
    len(phrases.rows) short rows per prompt.
    """
    batch = len(prompts)
    out = model(**prompts.inputs(), use_cache=True, logits_to_keep=1)
    root = out.logits[:, -1].float().log_softmax(-1)  # (batch, vocab)
    next_log_probs = {(): root}  # inner path -> log-probabilities of the token after it
    path_log_prob = {(): root.new_zeros(batch)}
    if phrases.rows:
        following = _phrase_pass(model, prompts, out.past_key_values, phrases.rows)
        for row, path in enumerate(phrases.rows):
            for n in range(1, len(path) + 1):
                prefix = path[:n]
                if prefix not in next_log_probs:
                    before = prefix[:-1]
                    path_log_prob[prefix] = path_log_prob[before] + next_log_probs[before][:, prefix[-1]]
                    next_log_probs[prefix] = following[:, row, n - 1]

    refused, other = [], []
    for node in phrases.nodes:
        log_probs = next_log_probs[node.path]
        here = path_log_prob[node.path]
        if node.ends:
            refused.append(here + log_probs[:, list(node.ends)].logsumexp(-1))
        rest = log_probs.clone()
        rest[:, list(node.ends + node.continues)] = -torch.inf
        other.append(here + rest.logsumexp(-1))
    return torch.stack(refused).logsumexp(0) - torch.stack(other).logsumexp(0)


def _phrase_pass(model, prompts: Batch, cache, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Log-probabilities after each token of each row: (batch, rows, longest row, vocab)."""
    batch, n_rows, longest = len(prompts), len(rows), max(map(len, rows))
    device = prompts.input_ids.device
    tokens = torch.tensor([row + (row[-1],) * (longest - len(row)) for row in rows], device=device)
    cache.batch_repeat_interleave(n_rows)
    mask = prompts.attention_mask.repeat_interleave(n_rows, 0)
    start = prompts.position_ids[:, -1:].repeat_interleave(n_rows, 0) + 1
    logits = model(
        input_ids=tokens.repeat(batch, 1),
        attention_mask=torch.cat([mask, mask.new_ones(batch * n_rows, longest)], 1),
        position_ids=start + torch.arange(longest, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits.float().log_softmax(-1).view(batch, n_rows, longest, -1)
