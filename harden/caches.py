"""What a cache of keys and values allows to be done with it."""

from __future__ import annotations

import inspect

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def only_attends(cache: DynamicCache) -> bool:
    """Whether every layer is an attention layer, whose keys and values are a row's own: rows can be left out.

    A cache without a fixed list of layers makes attention layers as it goes.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def told_positions(model) -> bool:
    """Whether the model is told at which position each token stands, and takes nothing else for it.

    Models that take no positions (MPT, Bloom), or add a bias by distance (Falcon can), count tokens in a row: padding
    between two tokens would move them apart.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # below an adapter
    alibi = getattr(model.config.get_text_config(), "alibi", False)
    return "position_ids" in inspect.signature(inner.forward).parameters and not alibi


def attends_to_all(config, cache: DynamicCache, length: int) -> bool:
    """Whether every layer is an attention layer that sees all of `length` tokens: padding may stand anywhere then, and
    attention masks decide alone. (Recurrent layers, and windows that are shorter, say no.)"""
    window = getattr(config.get_text_config(), "sliding_window", None) or float("inf")
    return only_attends(cache) and window >= length
