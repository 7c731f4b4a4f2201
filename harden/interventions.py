"""What is done to neurons, as data, and the one context manager that does it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

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

    @classmethod
    def parse(cls, text: str) -> Clamp:
        """Read `layer:index=value`, which a recipe's schema has checked; ValueError if the value is no number."""
        neuron, _, value = text.partition("=")
        return cls(Neuron.parse(neuron), float(value))


@dataclass(frozen=True)
class Scale:
    """h <- value * h; value 0 is zero ablation."""

    neuron: Neuron
    value: float

    shift = 0.0

    @property
    def scale(self) -> float:
        return self.value


NOTHING = Scale(Neuron(0, 0), 1.0)  # leaves everything as it is


@dataclass(frozen=True)
class Add:
    """h <- h + value: amplification."""

    neuron: Neuron
    value: float

    scale = 1.0

    @property
    def shift(self) -> float:
        return self.value


@dataclass(frozen=True)
class Ablate:
    """x <- x - r (r . x) in the residual stream, with a unit vector r per layer: no neuron attack, but the yardstick
    (directional ablation, Arditi et al., arXiv 2406.11717, Eq. 4).

    It acts on what enters and leaves every decoder layer and on what its attention and its MLP write. Departure from
    the paper: where a norm stands between a module and the stream (Gemma 2 and 3), the write is ablated before it,
    and the layer's output once more behind it.
    """

    name: str
    """Tells directions apart: two ablations of one name are the same."""
    directions: torch.Tensor = field(compare=False)
    """(layers, d_model), unit vectors."""


Intervention = Clamp | Scale | Add | Ablate


def first_layer(intervention: Intervention) -> int:
    """The lowest layer that it changes anything in."""
    return 0 if isinstance(intervention, Ablate) else intervention.neuron.layer


@contextmanager
def intervene(neurons: MlpNeurons, rows: Sequence[Sequence[Intervention]]) -> Iterator[None]:
    """Apply to each batch row its own interventions, at every position of every forward pass inside.

    rows: one sequence of interventions per batch row (empty: the row is left alone). A forward pass may also
    have k * len(rows) rows; row r then gets the interventions of rows[r // k], as after `repeat_interleave`.
    Raises HardenError for a neuron that the model does not have, or that a row edits twice.
    """
    by_layer: dict[int, list[tuple[int, Clamp | Scale | Add]]] = defaultdict(list)
    edited: set[tuple[int, Neuron]] = set()
    ablated: dict[int, Ablate] = {}
    for row, interventions in enumerate(rows):
        for intervention in interventions:
            if isinstance(intervention, Ablate):
                if row in ablated:
                    raise HardenError("a row can have one direction ablated, not two")
                ablated[row] = intervention
                continue
            neurons.check(intervention.neuron)
            if (row, intervention.neuron) in edited:
                raise HardenError(f"a row can have one edit of neuron {intervention.neuron}, not two")
            edited.add((row, intervention.neuron))
            by_layer[intervention.neuron.layer].append((row, intervention))

    with ExitStack() as hooks:
        for layer, edits in by_layer.items():
            device = next(neurons.down_projections[layer].parameters()).device
            hook = _editing_hook(edits, len(rows), device)
            hooks.enter_context(neurons.down_projections[layer].register_forward_pre_hook(hook))
        for number, block in enumerate(neurons.blocks if ablated else ()):
            take_out = _ablation(ablated, number, len(rows))
            hook = _ablate_input(take_out)
            hooks.enter_context(block.layer.register_forward_pre_hook(hook, with_kwargs=True))
            for module in (*block.writers, block.layer):
                hooks.enter_context(module.register_forward_hook(_ablate_output(take_out)))
        yield


def describe(intervention: Intervention) -> str:
    """One intervention in words that tell it apart from every other, such as `clamp 24:623 -30.5`."""
    if isinstance(intervention, Ablate):
        return f"ablate {intervention.name}"
    return f"{type(intervention).__name__.lower()} {intervention.neuron} {intervention.value!r}"


def _ablation(ablated: dict[int, Ablate], layer: int, n_rows: int):
    some = next(iter(ablated.values())).directions
    directions = torch.zeros(n_rows, 1, some.shape[1])  # rows without an ablation keep everything
    for row, ablate in ablated.items():
        directions[row, 0] = ablate.directions[layer]

    def take_out(x):  # (batch, seq, d_model)
        r = directions.repeat_interleave(_repeats(x, n_rows), 0).to(x)
        return x - r * (x * r).sum(-1, keepdim=True)

    return take_out


def _ablate_input(take_out):
    def edit(_module, args, kwargs):
        if args:
            return (take_out(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": take_out(kwargs["hidden_states"])}

    return edit


def _ablate_output(take_out):
    def edit(_module, _args, output):
        return (take_out(output[0]), *output[1:]) if isinstance(output, tuple) else take_out(output)

    return edit


def _repeats(h: torch.Tensor, n_rows: int) -> int:
    if h.dim() != 3 or h.shape[0] % n_rows:
        raise HardenError(f"interventions for {n_rows} rows met activations of shape {tuple(h.shape)}")
    return h.shape[0] // n_rows


def _editing_hook(edits: list[tuple[int, Clamp | Scale | Add]], n_rows: int, device: torch.device):
    rows = torch.tensor([row for row, _ in edits], device=device)
    indices = torch.tensor([edit.neuron.index for _, edit in edits], device=device)
    scales = torch.tensor([edit.scale for _, edit in edits], device=device)[:, None]
    shifts = torch.tensor([edit.shift for _, edit in edits], device=device)[:, None]

    def edit_input(_module, args):
        h = args[0]  # (batch, seq, d_mlp)
        repeats = _repeats(h, n_rows)
        batch_rows = (rows[:, None] * repeats + torch.arange(repeats, device=h.device)).flatten()
        neuron = indices.repeat_interleave(repeats)
        scale = scales.repeat_interleave(repeats, 0).to(h.dtype)
        shift = shifts.repeat_interleave(repeats, 0).to(h.dtype)
        old = h[batch_rows, :, neuron]  # (edits, seq)
        new = torch.where(scale == 0, shift, scale * old + shift)
        h = h.clone()
        h[batch_rows, :, neuron] = new
        return (h, *args[1:])

    return edit_input
