"""Clamps of any neuron, as strong as the residual stream that they write into; no locator is asked.

Clamps that break SmolLM2 write a vector with a tenth to twice the norm of the stream behind their layer. These write as
much, whatever their neuron, and what a model learns under them it learns about being clamped at all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch

from harden.activations import neuron_at, read_activations
from harden.generate import Request
from harden.interventions import Clamp
from harden.models import ChatModel

CHUNK = 1024  # neurons whose writes are measured at once


@torch.no_grad()
def full_strength(chat_model: ChatModel, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """The activation at which each neuron writes a vector as long as the residual stream: (neurons,), float32, CPU.

    The stream is that behind the neuron's layer at the last prompt token, its norm the mean over `texts`. A norm that
    stands behind the down projection (Gemma 2 and 3, OLMo 2) is left out. 0 for a neuron that writes nothing.
    """
    stream = read_activations(chat_model, [Request(text) for text in texts], batch_size).stream.norm(dim=-1).mean(0)
    parts = [norm / writes for norm, writes in zip(stream, _write_norms(chat_model, texts[0]), strict=True)]
    return torch.cat(parts).nan_to_num(0.0, posinf=0.0)


def draw_strong_clamp(
    chat_model: ChatModel, full: torch.Tensor, strength: tuple[float, float], rng: random.Random
) -> Clamp:
    """A clamp of a random neuron that writes anything, of either sign, at a share of `full` between the two of
    `strength`: evenly drawn in the logarithm."""
    column = rng.choice(torch.nonzero(full).flatten().tolist())
    share = math.exp(rng.uniform(*map(math.log, strength)))
    return Clamp(neuron_at(chat_model, column), rng.choice((-1, 1)) * share * float(full[column]))


def _write_norms(chat_model: ChatModel, text: str) -> list[torch.Tensor]:
    """By layer, the norm of what each neuron writes per unit of activation: (d_mlp,). Measured during a forward pass,
    when sharded weights are whole."""
    norms: dict[int, torch.Tensor] = {}

    def measure(layer: int, width: int) -> Callable:
        def hook(module, args, _output):
            nothing = module.forward(args[0].new_zeros(1, width))
            parts = []
            for start in range(0, width, CHUNK):
                units = args[0].new_zeros(min(CHUNK, width - start), width)
                units.diagonal(start).fill_(1.0)
                parts.append((module.forward(units) - nothing).float().norm(dim=-1).cpu())
            norms[layer] = torch.cat(parts)

        return hook

    neurons = chat_model.neurons
    handles = [
        module.register_forward_hook(measure(layer, width))
        for layer, (module, width) in enumerate(zip(neurons.down_projections, neurons.widths, strict=True))
    ]
    try:
        ids = torch.tensor([chat_model.chat.prompt_ids(text)], device=chat_model.device)
        chat_model.model(input_ids=ids, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [norms[layer] for layer in range(len(norms))]
