"""GradDrop: attribution patching in which a later layer cannot cancel a neuron (AtP*, arXiv 2403.00745, Eq. 11).

A neuron's direct effect on the log-odds and its effect through a later layer may cancel to first order, though not at
a clamp's size. For each layer in turn, what its attention and its MLP write is cut out of the backward pass, and the
score is the mean of |drop| over the layers that are cut, but the neuron's own. Departures: |.| is taken of the mean
over prompts, not prompt by prompt, and it counts a clamp that raises refusal like one that lowers it. Cost: one forward
and one backward pass per harmful prompt and layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from harden.errors import HardenError
from harden.locate.attribution import Slopes
from harden.locate.backward import read_backward
from harden.models import ChatModel
from harden.neurons import Block
from harden.refusal import RefusalPhrases


def read_dropped_slopes(
    chat_model: ChatModel, requests: Sequence[str], phrases: RefusalPhrases, batch_size: int
) -> list[Slopes]:
    """The slopes with each layer cut out in turn.

    Raises HardenError where a layer cannot be cut alone: its MLP is not one module, or adds the residual stream itself.
    """
    blocks, widths = chat_model.neurons.blocks, list(chat_model.neurons.widths)
    dropped = []
    for number, block in enumerate(blocks):
        label = f"GradDrop {number + 1}/{len(blocks)}"
        dropped.append(read_backward(chat_model, requests, phrases, batch_size, partial(cut, block), label).slopes)
        by_layer = dropped[-1].slope.split(widths)
        if by_layer[number].any() or (number and not by_layer[number - 1].any()):
            raise HardenError(
                f"layer {number} of {type(chat_model.model).__name__} cannot be cut out of a backward pass alone; take "
                "'graddrop' out of the locators"
            )
    return dropped


def mean_drop(dropped: Sequence[Slopes], widths: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Mean of |drop| over the layers that were cut, without the neuron's own: float32 (all neurons,).

    Of a model of one layer, which leaves nothing to cut, all zeros.
    """
    total = sum(slopes.drop(values).abs() for slopes in dropped)  # a neuron has no slope where its own layer is cut
    return total / max(1, len(widths) - 1)


@contextmanager
def cut(block: Block) -> Iterator[None]:
    """Inside, nothing flows back through what a block's attention and MLP write; forward passes are as ever."""

    def detach(_module, _args, output):
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    with ExitStack() as hooks:
        for module in block.writers:
            hooks.enter_context(module.register_forward_hook(detach))
        yield
