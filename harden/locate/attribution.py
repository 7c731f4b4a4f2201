"""Attribution patching: to first order, what moving a neuron does to refusal log-odds, for every neuron at once.

With h_t the neuron's activation at position t and g_t = d(log-odds)/dh_t, a constant clamp to m lowers the log-odds by

    drop(m) = sum over t of (h_t - m) g_t

(attribution patching, Nanda 2023; AtP in Kramar et al., arXiv 2403.00745). It is linear in m, so one pass gives it for
every value: `Slopes`. Departure: a constant is patched in at every position, not another prompt's activation. Cost: one
forward and one backward pass per harmful prompt. It misses neurons whose effect saturates or cancels; `graddrop` and
`relp` repair part of that, for more passes or other rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from harden import processes
from harden.batches import BACKWARD_ROWS, in_batches
from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.generate import progress_bar
from harden.locate.gradient import graph_from_embeddings
from harden.models import ChatModel
from harden.refusal import RefusalPhrases, refusal_log_odds


@dataclass(frozen=True)
class Slopes:
    """Means over prompts, float32 vectors over all neurons, layer after layer, on the CPU."""

    slope: torch.Tensor
    """d(log-odds)/dm of a constant clamp to m: the sum of g_t over positions."""
    offset: torch.Tensor
    """The sum of h_t g_t over positions."""

    def drop(self, values: torch.Tensor) -> torch.Tensor:
        """By how much the log-odds fall, to first order, if every neuron alone went to its value."""
        return self.offset - values * self.slope


def read_slopes(
    chat_model: ChatModel,
    requests: Sequence[str],
    phrases: RefusalPhrases,
    batch_size: int,
    rules: AbstractContextManager | None = None,
    label: str = "slopes",
) -> Slopes:
    """Slopes of the refusal log-odds on some requests; the refusal phrases' own positions count too.

    rules: what the backward pass runs under. Work is divided between processes. Raises MeasurementError if anything is
    not finite.
    """
    share = processes.my_share(requests)
    totals = [[torch.zeros(width, device=chat_model.device) for width in chat_model.neurons.widths] for _ in range(2)]
    with rules or nullcontext(), progress_bar(len(share), label) as bar:

        def add(rows) -> list[None]:
            for total, parts in zip(totals, _sums(chat_model, rows, phrases), strict=True):
                for layer, part in enumerate(parts):
                    total[layer] += part
            bar.update(len(rows))
            return [None] * len(rows)

        in_batches(chat_model, share, batch_size, add, BACKWARD_ROWS)
    slope, offset = (torch.cat([processes.total(layer) for layer in kind]).cpu() / len(requests) for kind in totals)
    if not (torch.isfinite(slope).all() and torch.isfinite(offset).all()):
        raise MeasurementError("gradients or activations are not finite; is the model sound?")
    return Slopes(slope, offset)


def _sums(chat_model, rows, phrases) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums over rows and positions of g and of h * g, each a list of (d_mlp,)."""
    chat = chat_model.chat
    weight = torch.tensor([weight for _, weight in rows], device=chat_model.device)
    prompts = pad_left([chat.prompt_ids(text) for text, _ in rows], chat.pad_id, chat_model.device)
    recorded: list[list[torch.Tensor]] = [[] for _ in chat_model.neurons.widths]

    def recorder(layer: int):
        return lambda _module, args: recorded[layer].append(args[0])

    handles = [
        module.register_forward_pre_hook(recorder(layer))
        for layer, module in enumerate(chat_model.neurons.down_projections)
    ]
    try:
        with graph_from_embeddings(chat_model.model):
            log_odds = refusal_log_odds(chat_model.model, prompts, phrases)  # of one pass, or of two
    finally:
        for handle in handles:
            handle.remove()
    passes = len(recorded[0])
    flat = [h for layer in recorded for h in layer]
    gradients = torch.autograd.grad((log_odds * weight).sum(), flat, allow_unused=True, materialize_grads=True)
    slopes, offsets = [], []
    for layer in range(len(recorded)):
        pairs = zip(recorded[layer], gradients[layer * passes : (layer + 1) * passes], strict=True)
        sums = [(g.float().sum((0, 1)), (h.detach().float() * g.float()).sum((0, 1))) for h, g in pairs]
        slopes.append(sum(slope for slope, _ in sums))
        offsets.append(sum(offset for _, offset in sums))
    return slopes, offsets
