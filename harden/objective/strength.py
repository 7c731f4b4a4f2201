"""Clamps of any neuron, as strong as the residual stream that they write into; no locator is asked.

Clamps that break SmolLM2 write a vector with a tenth to twice the norm of the stream behind their layer. These write as
much, whatever their neuron, and what a model learns under them it learns about being clamped at all.
"""

from __future__ import annotations

import math
import random

import torch

from harden.activations import neuron_at
from harden.interventions import Clamp
from harden.models import ChatModel


def draw_strong_clamp(
    chat_model: ChatModel, full: torch.Tensor, strength: tuple[float, float], rng: random.Random
) -> Clamp:
    """A clamp of a random neuron that writes anything, of either sign, at a share of `full` between the two of
    `strength`: evenly drawn in the logarithm. full: (neurons,), of `full_strength`."""
    column = rng.choice(torch.nonzero(full).flatten().tolist())
    share = math.exp(rng.uniform(*map(math.log, strength)))
    return Clamp(neuron_at(chat_model, column), rng.choice((-1, 1)) * share * float(full[column]))
