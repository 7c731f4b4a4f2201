"""MLP neurons: their addresses, and finding every one of them in a model.

A neuron `layer:index` is one coordinate of the *input* of that layer's MLP down projection: act(gate) * up in
gated MLPs, act(fc_in) in plain ones (Kazemi, Chegini and Safi, arXiv 2605.08513, section 2).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harden.errors import HardenError

# Leaf names of MLP down projections, as the model families of transformers spell them.
DOWN_PROJECTION_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "feedforward")
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
LAYER_PATTERN = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.(.+)$")


@dataclass(frozen=True, order=True)
class Neuron:
    """Address of one MLP neuron, written `layer:index`, both counted from 0."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Neuron:
        """Read `layer:index`; HardenError if `text` is anything else."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None:
            raise HardenError(f"'{text}' is no neuron address; write layer:index, for example 24:623")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Block:
    """A decoder layer, and its modules that write into the residual stream: attention, and the MLP where it is one."""

    layer: nn.Module
    writers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class MlpNeurons:
    """All MLP neurons of a model: one down projection per layer and its number of inputs (d_mlp)."""

    down_projections: tuple[nn.Module, ...]
    widths: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def count(self) -> int:
        return sum(self.widths)

    def check(self, neuron: Neuron) -> None:
        """HardenError unless the model has this neuron."""
        if neuron.layer >= len(self.widths):
            raise HardenError(f"neuron {neuron}: the model has layers 0 to {len(self.widths) - 1}")
        if neuron.index >= self.widths[neuron.layer]:
            raise HardenError(f"neuron {neuron}: layer {neuron.layer} has neurons 0 to {self.widths[neuron.layer] - 1}")

    @contextmanager
    def read(self) -> Iterator[dict[int, torch.Tensor]]:
        """Record the neurons of the first forward pass inside the context.

        Yields a dict layer -> activations of shape (batch, seq, d_mlp), part of the autograd graph if there is
        one. Later passes (generated tokens, say) are not recorded.
        """
        activations: dict[int, torch.Tensor] = {}

        def recorder(layer: int):
            def record(_module, args):
                activations.setdefault(layer, args[0])

            return record

        with ExitStack() as hooks:
            for layer, module in enumerate(self.down_projections):
                hooks.enter_context(module.register_forward_pre_hook(recorder(layer)))
            yield activations


def find_neurons(model: nn.Module) -> MlpNeurons:
    """Find every MLP neuron of a decoder-only model, before or after PEFT wrapping.

    Raises HardenError when the neurons cannot all be reached: mixture-of-experts layers, a layer without a
    recognised down projection or with several, or a count that disagrees with the model's config.
    """
    config = model.config.get_text_config()
    _refuse_experts(model)
    found: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        match = LAYER_PATTERN.search(name)
        if match is None or not _is_projection(module):
            continue
        path = match[2].split(".")
        in_mlp = any(part in MLP_NAMES for part in path[:-1]) or len(path) == 1
        if in_mlp and path[-1] in DOWN_PROJECTION_NAMES:
            found[int(match[1])].append((name, module))
    n_layers = config.num_hidden_layers
    problem = next(
        (f"layer {layer} has {len(found[layer])}" for layer in range(n_layers) if len(found[layer]) != 1),
        None,
    )
    if problem or len(found) != n_layers:
        raise HardenError(
            f"{type(model).__name__}: cannot find exactly one MLP down projection in each of {n_layers} layers "
            f"({problem or f'found layers {sorted(found)}'}); known names are {', '.join(DOWN_PROJECTION_NAMES)}"
        )
    modules = tuple(found[layer][0][1] for layer in range(n_layers))
    widths = tuple(_input_width(module) for module in modules)
    expected = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if isinstance(expected, int) and any(width != expected for width in widths):
        raise HardenError(
            f"{type(model).__name__}: the config says {expected} neurons per layer, "
            f"the down projections take {sorted(set(widths))}: this architecture is not "
            "supported yet; use another model"
        )
    return MlpNeurons(modules, widths, tuple(_block(model, found[layer][0][0]) for layer in range(n_layers)))


def _block(model: nn.Module, down_projection: str) -> Block:
    layer = model.get_submodule(down_projection[: LAYER_PATTERN.search(down_projection).start(2) - 1])
    writers = [child for name, child in layer.named_children() if name in (*ATTENTION_NAMES, *MLP_NAMES)]
    return Block(layer, tuple(writers))


def _refuse_experts(model: nn.Module) -> None:
    for name, _ in model.named_modules():
        if name.split(".")[-1] in ("experts", "shared_expert", "block_sparse_moe"):
            raise HardenError(
                f"{type(model).__name__} has mixture-of-experts layers ('{name}'): their neurons cannot all be "
                "reached yet, and harden never scans half a model; use a dense model"
            )


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)  # a PEFT layer answers with its base layer's weight
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def _input_width(module: nn.Module) -> int:
    base = getattr(module, "base_layer", module)
    return base.nx if isinstance(base, Conv1D) else base.in_features
