"""What values of the recipe may be."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST_FLOAT = 3.4e38  # of float32


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("must not be 0")
    return value


def _address(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f"YAML read an address as the number {value}; put it in quotes, '1:17'")
    if isinstance(value, str) and not re.fullmatch(r"\d+:\d+", value):
        raise ValueError(f"'{value}' is no neuron address; write layer:index, for example '24:623'")
    return value


def _clamp(value: Any) -> Any:
    if not re.fullmatch(r"\d+:\d+=[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", str(value)):
        raise ValueError(f"'{value}' is no clamp; write layer:index=value, for example '24:623=-30.5'")
    if abs(float(value.partition("=")[2])) > LARGEST_FLOAT:
        raise ValueError(f"the value of '{value}' is too large")
    return value


Address = Annotated[str, BeforeValidator(_address)]
ClampText = Annotated[str, BeforeValidator(_clamp)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Sizes = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Strengths = tuple[Annotated[float, Field(gt=0)], ...]
Some = Annotated[tuple[float, ...], Field(min_length=1)]
NonZero = Annotated[float, AfterValidator(_not_zero)]
Locator = Literal[
    "gradient",
    "contrast",
    "effect_size",
    "activation_shift",
    "attribution",
    "attribution_to_mean",
    "attribution_to_stream",
    "relp",
    "graddrop",
    "integrated",
    "greedy",
    "tail",
    "exact",
    "random",
]
AttackName = Literal[
    "constant", "anchor", "zero", "mean", "scale", "topk", "prune", "direction", "layer_directions", "prefill",
    "concept",
]  # fmt: skip
