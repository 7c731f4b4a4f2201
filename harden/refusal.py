"""Refusal log-odds: how likely the model is to open with a refusal (Kazemi et al., arXiv 2605.08513, Eq. 2).

p = probability that the answer opens with one of a set of phrases, teacher-forced after the chat template;
log-odds = log p / (1 - p). The phrases form a trie. With one forward pass over the prompts, and one short one
over the trie's inner paths on the cached keys and values, both log p and log (1 - p) are sums over its nodes, so
nothing is subtracted from 1 and no epsilon is needed: the gradient lives on where refusal is nearly certain.

The trie's inner paths are one short row per prompt, in which each token attends to the prompt and to its own path only;
where a model cannot be told so, they are rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harden.caches import attends_to_all, told_positions
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


Continuations = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""First token -> log-probabilities, given it, that a phrase is completed and that none is: each (batch,)."""


def refusal_log_odds(
    model, prompts: Batch, phrases: RefusalPhrases, continuations: Continuations | None = None
) -> torch.Tensor:
    """Refusal log-odds of each prompt: float32 of shape (batch,), differentiable.

    Interventions that are in force act on the phrase tokens as well. Cost: one forward pass over the prompts and one
    over the trie's inner paths, a token each. continuations: take what follows a first token from here, for the price
    of the first pass alone.
    """
    out = model(**prompts.inputs(), use_cache=True, logits_to_keep=1)
    if continuations is None:
        continuations = _continuations(model, prompts, out.past_key_values, phrases)
    refused, other = _split(phrases.nodes[0], out.logits[:, -1], continuations)
    return refused - other


def read_continuations(model, prompts: Batch, phrases: RefusalPhrases) -> Continuations:
    """What follows each phrase's first token, as the model is now."""
    out = model(**prompts.inputs(), use_cache=True, logits_to_keep=1)
    return _continuations(model, prompts, out.past_key_values, phrases)


def _continuations(model, prompts: Batch, cache, phrases: RefusalPhrases) -> Continuations:
    if not phrases.rows:
        return {}
    packed = _can_pack(model, cache, len(phrases.nodes) + prompts.attention_mask.shape[1])
    logits = (_packed_pass if packed else _row_pass)(model, prompts, cache, phrases)
    found = {}
    for node in reversed(phrases.nodes[1:]):  # longer paths stand behind their beginnings
        children = {token: found[(*node.path, token)] for token in node.continues}
        found[node.path] = _split(node, logits[node.path], children)
    return {path[0]: pair for path, pair in found.items() if len(path) == 1}


def _split(node: Node, logits: torch.Tensor, children: Continuations) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities that a phrase is completed from a node on, and that none is.

    logits: of the token after the node, (batch, vocab).
    """
    inside = torch.tensor(node.ends + node.continues, device=logits.device)
    outside = logits.index_fill(-1, inside, -torch.inf).float().logsumexp(-1)
    chosen = logits[:, inside].float()
    total = torch.logaddexp(outside, chosen.logsumexp(-1))
    ends, continues = (chosen - total[:, None]).split([len(node.ends), len(node.continues)], -1)
    refused, other = [ends.logsumexp(-1)] if node.ends else [], [outside - total]
    for token, log_prob in zip(node.continues, continues.unbind(-1), strict=True):
        completed, not_completed = children[token]
        refused.append(log_prob + completed)
        other.append(log_prob + not_completed)
    return torch.stack(refused).logsumexp(0), torch.stack(other).logsumexp(0)


def _can_pack(model, cache, length: int) -> bool:
    """Whether the model takes an attention mask for every pair of tokens, and positions that are not in a row."""
    config = model.config.get_text_config()
    takes_masks = config._attn_implementation.startswith(("eager", "sdpa"))
    return takes_masks and told_positions(model) and attends_to_all(model.config, cache, length)


def _packed_pass(model, prompts: Batch, cache, phrases: RefusalPhrases) -> dict[tuple[int, ...], torch.Tensor]:
    """Logits after each inner path, (batch, vocab): all paths in one row, each a token."""
    paths = [node.path for node in phrases.nodes[1:]]
    ids, seen = prompts.input_ids, prompts.attention_mask
    depth = torch.tensor([len(path) for path in paths], device=ids.device)
    on_path = torch.tensor([[path[: len(other)] == other for other in paths] for path in paths], device=ids.device)
    allowed = torch.cat([seen.bool()[:, None].expand(-1, len(paths), -1), on_path.expand(len(ids), -1, -1)], 2)
    mask = allowed[:, None]  # (batch, 1, paths, prompt + paths)
    if model.config.get_text_config()._attn_implementation == "eager":  # it adds its masks
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=torch.tensor([path[-1] for path in paths], device=ids.device).expand(len(ids), -1),
        attention_mask=mask,
        position_ids=prompts.position_ids[:, -1:] + depth,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return dict(zip(paths, logits.unbind(1), strict=True))


def _row_pass(model, prompts: Batch, cache, phrases: RefusalPhrases) -> dict[tuple[int, ...], torch.Tensor]:
    """The same with a row for each of the longest inner paths."""
    rows = phrases.rows
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
    following = logits.view(batch, n_rows, longest, -1)
    return {path[:n]: following[:, row, n - 1] for row, path in enumerate(rows) for n in range(1, len(path) + 1)}
