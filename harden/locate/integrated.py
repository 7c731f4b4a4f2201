"""Integrated slopes: attribution along a path from a harmful prompt's activations to those of harmless ones.

A clamp overshoots, and a slope at the start does not see what happens on the way. For steps a in (0, 1), all neurons
are moved at once at the template's tokens t, layer after layer,

    h_t <- (1 - a) h_t + a (mean over harmless prompts of h_t)

and the slopes of `attribution` are averaged over the steps (integrated gradients, Sundararajan et al., arXiv
1703.01365, Eq. 1 and 3, midpoint rule; on inner units of language models Hanna et al., arXiv 2403.17806, and Marks et
al., arXiv 2403.19647, Eq. 3). Departures: h_t is what the moved layers below make of it, not the prompt's own, and
the backward pass runs through later neurons as if they were not moved; the path ends at the harmless mean, since no
model speaks with all neurons at a clamp's overshoot, and is extrapolated from there; a path of its own for each
neuron would cost more than clamping it (`exact`). Cost: `STEPS` forward and backward passes per harmful prompt,
beside one of each per harmless prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from harden.locate.attribution import Slopes
from harden.locate.backward import read_backward
from harden.models import ChatModel
from harden.refusal import RefusalPhrases

STEPS = 4


def read_integrated_slopes(
    chat_model: ChatModel,
    harmful: Sequence[str],
    harmless_means: Sequence[torch.Tensor],
    phrases: RefusalPhrases,
    batch_size: int,
) -> Slopes:
    """Mean of the slopes along the path to `harmless_means`, which are (tail, d_mlp) per layer.

    Raises MeasurementError if anything is not finite.
    """
    found = []
    for step in range(STEPS):
        moved = partial(_moved, chat_model, harmless_means, (step + 0.5) / STEPS)
        label = f"integrated {step + 1}/{STEPS}"
        found.append(read_backward(chat_model, harmful, phrases, batch_size, moved, label).slopes)
    return Slopes(sum(s.slope for s in found) / STEPS, sum(s.offset for s in found) / STEPS)


@contextmanager
def _moved(chat_model: ChatModel, targets: Sequence[torch.Tensor], share: float) -> Iterator[None]:
    """Inside, every down projection puts out what it does with its neurons moved `share` of the way at the tail of each
    prompt. What was read of a neuron is unmoved, and the slope in it is that at the moved place: a down projection is
    linear."""

    def mover(target: torch.Tensor):
        calls = 0

        def move(module, args, output):
            nonlocal calls
            calls += 1
            if calls > 1:  # the phrases' own pass
                return output
            h = args[0].detach().clone()
            h[:, -len(target) :] += share * (target.to(h) - h[:, -len(target) :])
            return output + (module.forward(h) - output).detach()

        return move

    with ExitStack() as hooks:
        for module, target in zip(chat_model.neurons.down_projections, targets, strict=True):
            hooks.enter_context(module.register_forward_hook(mover(target)))
        yield
