"""Exact patching: every neuron clamped alone, with forward passes of the whole prompt. The truth that others estimate.

    drop(m) = log-odds - log-odds with h <- m at every position

Cost: a forward pass, from the neuron's layer upwards, per neuron, value and prompt: too dear but for small models. As a
locator it serves to measure the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from harden.effects import log_odds_under
from harden.errors import MeasurementError
from harden.generate import mean
from harden.interventions import Clamp
from harden.models import ChatModel
from harden.neurons import Neuron
from harden.refusal import RefusalPhrases


def layer_drops(
    chat_model: ChatModel,
    layer: int,
    values: Sequence[torch.Tensor],
    requests: Sequence[str],
    plain: float,
    phrases: RefusalPhrases,
    batch_size: int,
    label: str,
    measure: Callable[..., list[list[float]]] = log_odds_under,
) -> list[float]:
    """By how much the mean log-odds of some requests fall at the worst value, for each neuron of a layer: (d_mlp,).

    values: float (d_mlp,), one tensor per size; plain: the mean without a clamp; measure: gives log-odds as
    `log_odds_under` does. A value that gives no number counts as no drop. Raises MeasurementError if `plain` is none.
    """
    if plain != plain:
        raise MeasurementError("refusal log-odds are not finite; is the model sound? try model.dtype float32")
    width = chat_model.neurons.widths[layer]
    clamps = [Clamp(Neuron(layer, index), float(value[index])) for index in range(width) for value in values]
    rows = measure(chat_model, clamps, requests, phrases, batch_size, f"{label}: layer {layer}")
    drops = torch.tensor([plain - mean(row) for row in rows])
    return drops.nan_to_num(0.0, 0.0, 0.0).view(width, len(values)).amax(1).tolist()
