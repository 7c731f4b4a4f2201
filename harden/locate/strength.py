"""How strong a clamp is: what the neuron then writes, in norms of the residual stream behind its layer.

Activation gaps do not say. Requests hardly move some neurons, and no sensible multiple of such a gap breaks anything,
while the same neuron may break the model at a quarter of the stream's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from harden.models import ChatModel

CHUNK = 1024  # neurons whose writes are measured at once


@torch.no_grad()
def full_strength(chat_model: ChatModel, stream: torch.Tensor) -> torch.Tensor:
    """The activation at which each neuron writes a vector as long as the residual stream: (neurons,), float32, CPU.

    stream: (prompts, layers, d_model), what leaves each decoder layer (`Activations.stream`); its norm is the mean over
    the prompts. A norm that stands behind the down projection (Gemma 2 and 3, OLMo 2) is left out. 0 for a neuron that
    writes nothing, or so little that the model's type cannot hold the activation. Cost: a forward pass, and one of
    every down projection over all units.
    """
    norms = stream.norm(dim=-1).mean(0)
    parts = [norm / writes for norm, writes in zip(norms, _write_norms(chat_model), strict=True)]
    full = torch.cat(parts).nan_to_num(0.0, posinf=0.0)
    return full.masked_fill(full > torch.finfo(chat_model.model.dtype).max, 0.0)


def _write_norms(chat_model: ChatModel) -> list[torch.Tensor]:
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
    ids = torch.tensor([chat_model.chat.prompt_ids("Hello")], device=chat_model.device)
    with ExitStack() as hooks:
        for layer, (module, width) in enumerate(zip(neurons.down_projections, neurons.widths, strict=True)):
            hooks.enter_context(module.register_forward_hook(measure(layer, width)))
        chat_model.model(input_ids=ids, logits_to_keep=1)
    return [norms[layer] for layer in range(len(norms))]
