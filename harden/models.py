"""Loading a chat model: by name, folder or hub id, with the adapter it starts from."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from harden import bundled
from harden.chat import Chat
from harden.errors import HardenError, MeasurementError
from harden.neurons import MlpNeurons, find_neurons

logger = logging.getLogger(__name__)


@dataclass
class ChatModel:
    """A model with what is needed to talk to it and to reach its neurons."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    neurons: MlpNeurons
    largest_batch: int | None = None
    """Rows that fit into memory at a time, known once more did not."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_chat_model(
    name: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatModel:
    """Load a model for evaluation, all parameters frozen.

    name: a bundled model (see `harden.bundled`), a local folder or a hub id; dtype: a torch dtype's name.
    Raises HardenError, with what to do, when it is missing, gated, corrupt, without chat template, or built so
    that its neurons cannot all be reached; MeasurementError where weights are not finite.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    source = str(bundled.resolve(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds; each is the user's to mend
        raise HardenError(f"cannot load model '{name}': {_explain(name, source, error)}") from None
    absent = sorted(report["missing_keys"])
    if absent:
        raise HardenError(
            f"cannot load model '{name}': {len(absent)} of its weights are missing ({', '.join(absent[:3])}); it is "
            "incomplete or no language model, fetch it again or give another"
        )
    require_finite(model, f"model '{name}'")
    model.requires_grad_(False).eval().to(device)
    eos = model.generation_config.eos_token_id
    eos_ids = (set(eos) if isinstance(eos, list) else {eos}) - {None}
    if model.get_output_embeddings() is not None:
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    model.generation_config = GenerationConfig()  # plain greedy: no penalties that the model's own file may ask for
    chat = Chat(tokenizer, eos_ids, chat_template_kwargs)
    neurons = find_neurons(model)
    logger.info("%s: %d layers, %d MLP neurons", name, len(neurons.widths), neurons.count)
    return ChatModel(name, model, tokenizer, chat, neurons)


def require_finite(model: nn.Module, what: str) -> None:
    """Raises MeasurementError for a weight that is NaN or infinite."""
    odd = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if odd:
        raise MeasurementError(f"{what}: its weights are not finite ({odd}), so nothing can be measured")


def _contiguous(_module, args):
    """The last positions of a batch are a view, for which a linear layer on the CPU reads all its weights row by row: a
    third of a short pass over many rows. `contiguous()` would leave the view of a single row as it is, for which the
    layer copies all its weights in bfloat16: half of a short pass."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def _explain(name: str, source: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if name in bundled.NAMES:
        return f"its cached copy is damaged ({reason[:200]}); delete {source} and run again"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({reason[:200]}); fetch it again"
    if (Path(name) / "adapter_config.json").is_file():
        return "the folder holds an adapter; give the model that it was made for, and this as model.adapter"
    if Path(name).is_dir():
        return f"the folder does not hold a usable transformers model ({reason[:300]})"
    if "gated" in reason.lower() or "401" in reason or "403" in reason:
        return "it is gated or private; accept its licence on the hub and run `hf auth login`"
    if isinstance(error, OSError):
        return (
            f"it is neither a bundled model ({', '.join(bundled.NAMES)}), nor a folder, nor a hub id that can be "
            f"reached from here; check the spelling and the network, or give a downloaded folder ({reason[:200]})"
        )
    return reason[:400]
