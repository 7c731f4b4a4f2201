"""RelP: attribution with relevance rules in place of gradients (arXiv 2508.21258).

What leaves a non-linear piece is written as its input times a coefficient, and the coefficient is held constant in the
backward pass (rules after Ali et al. 2022 for norms and attention, Jafari et al. 2024 and Arras et al. 2019 for the
rest):

- a norm's scale (layer norms keep their centring),
- an activation function: act(x) = x * (act(x) / x),
- attention's probabilities, so that nothing flows through queries and keys,
- a gated MLP's product: half of it flows to either factor.

A logit is then linear in the embeddings, and in a model without biases coefficients times inputs add up to it. Cost:
that of `attribution`. The rules reach what they can name: a norm is a module whose class is called one, an activation a
module without parameters inside an MLP, and attention is ruled where it runs through transformers' `sdpa` (not in
Gemma 2, for one). Where a piece is not reached, its plain gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from harden.models import ChatModel
from harden.neurons import MLP_NAMES

CONSTANT_PROBABILITIES = "sdpa_constant_probabilities"  # whoever asks what masks it takes reads the name


def _attend(module, query, key, value, *args, **kwargs):
    return sdpa_attention_forward(module, query.detach(), key.detach(), value, *args, **kwargs)


AttentionInterface.register(CONSTANT_PROBABILITIES, _attend)
AttentionMaskInterface.register(CONSTANT_PROBABILITIES, sdpa_mask)


@contextmanager
def relevance_rules(chat_model: ChatModel) -> Iterator[None]:
    """Inside, backward passes follow the rules; forward passes give what they always give, up to rounding."""
    model, config = chat_model.model, chat_model.model.config.get_text_config()
    attention = config._attn_implementation
    with ExitStack() as inside:
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Norm"):
                inside.enter_context(module.register_forward_hook(_constant_scale))
            elif _is_activation(name, module):
                inside.enter_context(module.register_forward_hook(_constant_ratio))
        for projection, block in zip(chat_model.neurons.down_projections, chat_model.neurons.blocks, strict=True):
            if _is_gated(block.layer, projection):
                inside.enter_context(projection.register_forward_pre_hook(_half))
        if attention == "sdpa":
            inside.callback(setattr, config, "_attn_implementation", attention)
            config._attn_implementation = CONSTANT_PROBABILITIES
        yield


def _is_activation(name: str, module: nn.Module) -> bool:
    path = name.split(".")
    leaf = next(module.children(), None) is None and next(module.parameters(), None) is None
    return leaf and "act" in path[-1] and any(part in MLP_NAMES for part in path[:-1])


def _is_gated(layer: nn.Module, down_projection: nn.Module) -> bool:
    """Whether the MLP's other projections put out twice as much as the down projection takes in."""
    mlp = next(m for m in layer.modules() if any(child is down_projection for child in m.children()))
    others = [child for child in mlp.children() if child is not down_projection and hasattr(child, "weight")]
    width = getattr(getattr(down_projection, "base_layer", down_projection), "in_features", None)
    return width is not None and sum(getattr(child, "out_features", 0) for child in others) == 2 * width


def _ratio(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The coefficient output / x, held constant; 0 where x is."""
    return torch.where(x == 0, 0, output / x).detach()


def _constant_ratio(_module, args, output):
    return args[0] * _ratio(output, args[0])


def _constant_scale(module, args, output):
    x = args[0]
    if not type(module).__name__.endswith("LayerNorm"):
        return x * _ratio(output, x)
    bias = getattr(module, "bias", None)
    centred, bias = x - x.mean(-1, keepdim=True), 0 if bias is None else bias
    return centred * _ratio(output - bias, centred) + bias


def _half(_module, args):
    return (0.5 * args[0] + 0.5 * args[0].detach(), *args[1:])
