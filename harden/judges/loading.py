"""The judge that a recipe asks for."""

from __future__ import annotations

import torch

from harden.judges.base import Judge
from harden.judges.classifiers import ClassifierJudge
from harden.judges.endpoint import EndpointJudge
from harden.settings.measuring import SecondJudge


def load_judge(settings: SecondJudge, device: torch.device | str = "cpu") -> Judge:
    """Load a classifier onto `device`, or prepare to ask an endpoint. Raises HardenError where that cannot be done."""
    if settings.name == "endpoint":
        return EndpointJudge(**settings.model_dump(exclude={"name", "path"}))
    return ClassifierJudge(settings.name, settings.path, device)
