"""Sharding the frozen weights of a model that does not fit on one device (FSDP2).

Asked for by an `accelerate` configuration with distributed_type FSDP. Only the frozen base is sharded, layer by
layer; the adapters are small and stay whole on every process, so gradients, checkpoints and saving work as without.
"""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard

from harden import processes
from harden.errors import HardenError
from harden.models import ChatModel

logger = logging.getLogger(__name__)


def shard_frozen_weights(chat_model: ChatModel, differentiated: str | None) -> None:
    """Shard the base under `chat_model.model` (on the CPU), in place, if the launch asks for FSDP.

    differentiated: a loss term that takes a second derivative, if one is on. HardenError then: FSDP2 frees a layer's
    weights before it is taken.
    """
    if not processes.sharded():
        return
    if differentiated:
        raise HardenError(
            f"train.{differentiated} needs a second derivative, and FSDP frees a layer's weights before it is taken: "
            f"set train.{differentiated}.weight to 0"
        )
    model = chat_model.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    n_layers = len(chat_model.neurons.widths)
    layers = next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)
    if layers is None:
        raise HardenError(f"{type(base).__name__}: no list of {n_layers} layers found to shard; launch without FSDP")
    adapters = {parameter for name, parameter in base.named_parameters() if "lora_" in name}
    for layer in layers:
        fully_shard(layer, ignored_params=adapters)
    fully_shard(base, ignored_params=adapters)
    for parameter in adapters:
        parameter.data = parameter.data.to(processes.state().device)
    logger.info("sharded the frozen weights over %d processes (FSDP2)", processes.count())
