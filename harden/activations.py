"""Activations of every MLP neuron and of the residual stream, where the answer is decided or over a passage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from harden import processes
from harden.batches import in_batches
from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.generate import Request
from harden.interventions import intervene
from harden.models import ChatModel
from harden.neurons import Neuron


@dataclass(frozen=True)
class Activations:
    """Of some prompts, float32 on the CPU."""

    neurons: torch.Tensor
    """(prompts, all neurons), layer after layer."""
    stream: torch.Tensor
    """(prompts, layers, d_model): what leaves each decoder layer."""


@torch.no_grad()
def read_activations(
    chat_model: ChatModel, requests: Sequence[Request], batch_size: int, over_prefix: bool = False
) -> Activations:
    """Activations at the last prompt token, each request under its own interventions. Work is divided.

    over_prefix: the means over the tokens of each request's `prefix` instead. Raises MeasurementError if one is not
    finite. Cost: one forward pass per request.
    """

    def work(mine: list[Request]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return in_batches(chat_model, mine, batch_size, lambda part: _read_batch(chat_model, part, over_prefix))

    rows = processes.divide(list(requests), work)
    neurons, stream = torch.stack([n for n, _ in rows]), torch.stack([s for _, s in rows])
    if not (torch.isfinite(neurons).all() and torch.isfinite(stream).all()):
        raise MeasurementError("activations are not finite; is the model sound? try model.dtype float32")
    return Activations(neurons, stream)


def _read_batch(
    chat_model: ChatModel, requests: list[Request], over_prefix: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    chat = chat_model.chat
    prompts = [request.prompt_ids(chat) for request in requests]
    counted = [
        len(ids) - len(chat.prompt_ids(request.text)) if over_prefix else 1
        for ids, request in zip(prompts, requests, strict=True)
    ]
    batch = pad_left(prompts, chat.pad_id, chat_model.device)

    def read(h: torch.Tensor) -> torch.Tensor:
        """(batch, seq, width) -> (batch, width): the mean over each row's last counted tokens."""
        return torch.stack([row[-n:].float().mean(0) for row, n in zip(h, counted, strict=True)]).cpu()

    stream: dict[int, torch.Tensor] = {}
    neurons: dict[int, torch.Tensor] = {}

    def record_stream(layer: int):
        def record(_module, _args, output):
            stream[layer] = read(output[0] if isinstance(output, tuple) else output)

        return record

    def record_neurons(layer: int):
        def record(_module, args):
            neurons[layer] = read(args[0])

        return record

    with intervene(chat_model.neurons, [request.interventions for request in requests]), ExitStack() as hooks:
        for layer, block in enumerate(chat_model.neurons.blocks):  # behind the hooks that intervene
            hooks.enter_context(block.layer.register_forward_hook(record_stream(layer)))
            module = chat_model.neurons.down_projections[layer]
            hooks.enter_context(module.register_forward_pre_hook(record_neurons(layer)))
        chat_model.model(**batch.inputs(), use_cache=False, logits_to_keep=1)
    layers = range(len(chat_model.neurons.blocks))
    return list(
        zip(torch.cat([neurons[n] for n in layers], -1), torch.stack([stream[n] for n in layers], 1), strict=True)
    )


@torch.no_grad()
def template_activations(
    chat_model: ChatModel, neurons: Sequence[Neuron], texts: Sequence[str], batch_size: int
) -> torch.Tensor:
    """Natural activation of some neurons at the post-instruction template tokens: (texts, neurons, tail)."""
    tail, chat = chat_model.chat.template_tail, chat_model.chat

    def read(part: Sequence[str]) -> list[torch.Tensor]:
        batch = pad_left([chat.prompt_ids(text) for text in part], chat.pad_id, chat_model.device)
        found: dict[int, torch.Tensor] = {}

        def record(layer: int, indices: list[int]):
            return lambda _module, args: found.update({layer: args[0][:, -tail:, indices].float().cpu()})

        indices = {n.layer: [m.index for m in neurons if m.layer == n.layer] for n in neurons}
        with ExitStack() as hooks:
            for layer, wanted in indices.items():
                module = chat_model.neurons.down_projections[layer]
                hooks.enter_context(module.register_forward_pre_hook(record(layer, wanted)))
            chat_model.model(**batch.inputs(), use_cache=False, logits_to_keep=1)
        columns = [found[n.layer][:, :, indices[n.layer].index(n.index)] for n in neurons]
        return list(torch.stack(columns, 1).unbind())

    rows = processes.divide(list(texts), lambda mine: in_batches(chat_model, mine, batch_size, read))
    return torch.stack(rows)


def neuron_at(chat_model: ChatModel, place: int) -> Neuron:
    """The neuron at a column of `Activations.neurons`."""
    for layer, width in enumerate(chat_model.neurons.widths):
        if place < width:
            return Neuron(layer, place)
        place -= width
    raise IndexError(place)


def column_of(chat_model: ChatModel, neuron: Neuron) -> int:
    """Where `Activations.neurons` has a neuron."""
    return sum(chat_model.neurons.widths[: neuron.layer]) + neuron.index
