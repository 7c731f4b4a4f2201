"""What is done to neurons, as data, and the one context manager that does it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from harden.errors import HardenError
from harden.neurons import MlpNeurons, Neuron


@dataclass(frozen=True)
class Clamp:
    """h <- value at every position: the attack of Kazemi et al. (arXiv 2605.08513, section 3)."""

    neuron: Neuron
    value: float

    scale = 0.0

    @property
    def shift(self) -> float:
        return self.value


@dataclass(frozen=True)
class Scale:
    """h <- value * h; value 0 is zero ablation."""

    neuron: Neuron
    value: float

    shift = 0.0

    @property
    def scale(self) -> float:
        return self.value


@dataclass(frozen=True)
class Add:
    """h <- h + value: amplification."""

    neuron: Neuron
    value: float

    scale = 1.0

    @property
    def shift(self) -> float:
        return self.value


Intervention = Clamp | Scale | Add


@contextmanager
def intervene(neurons: MlpNeurons, rows: Sequence[Sequence[Intervention]]) -> Iterator[None]:
    """Apply to each batch row its own interventions, at every position of every forward pass inside.

    rows: one sequence of interventions per batch row (empty: the row is left alone). A forward pass may also
    have k * len(rows) rows; row r then gets the interventions of rows[r // k], as after `repeat_interleave`.
    Raises HardenError for a neuron that the model does not have.
    """
    by_layer: dict[int, list[tuple[int, Intervention]]] = defaultdict(list)
    for row, interventions in enumerate(rows):
        for intervention in interventions:
            neurons.check(intervention.neuron)
            by_layer[intervention.neuron.layer].append((row, intervention))

    handles = []
    try:
        for layer, edits in by_layer.items():
            hook = _editing_hook(edits, len(rows))
            handles.append(neurons.down_projections[layer].register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _editing_hook(edits: list[tuple[int, Intervention]], n_rows: int):
    rows = torch.tensor([row for row, _ in edits])
    indices = torch.tensor([edit.neuron.index for _, edit in edits])
    scales = torch.tensor([edit.scale for _, edit in edits])[:, None]
    shifts = torch.tensor([edit.shift for _, edit in edits])[:, None]

    def edit_input(_module, args):
        h = args[0]  # (batch, seq, d_mlp)
        if h.dim() != 3 or h.shape[0] % n_rows:
            raise HardenError(f"interventions for {n_rows} rows met activations of shape {tuple(h.shape)}")
        repeats = h.shape[0] // n_rows
        batch_rows = (rows[:, None] * repeats + torch.arange(repeats)).flatten().to(h.device)
        neuron = indices.repeat_interleave(repeats).to(h.device)
        scale = scales.repeat_interleave(repeats, 0).to(h)
        shift = shifts.repeat_interleave(repeats, 0).to(h)
        old = h[batch_rows, :, neuron]  # (edits, seq)
        new = torch.where(scale == 0, shift, scale * old + shift)
        h = h.clone()
        h[batch_rows, :, neuron] = new
        return (h, *args[1:])

    return edit_input
