"""The LoRA that is trained: attached, continued from a starting adapter, saved and restored.

The run trains one adapter named `default` on top of the base model. If it starts from an adapter, that one's
matrices become the first ranks of `default` (the rest starts at zero), so the saved result is a single PEFT adapter
for the base model. The starting adapter itself stays loaded, frozen, as `reference`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights

from harden.errors import HardenError
from harden.models import ChatModel, require_finite
from harden.neurons import find_neurons

TRAINED, REFERENCE = "default", "reference"


def attach_adapter(
    chat_model: ChatModel,
    rank: int,
    alpha: int,
    target_modules: Sequence[str],
    start: str | None,
    seed: int,
) -> None:
    """Wrap `chat_model.model` with the adapter to train, continuing the adapter `start` if given.

    The trained adapter has rank `rank`, or `rank` more than `start` has. Raises HardenError when `start` cannot be
    loaded, is no plain LoRA, or touches modules outside `target_modules`, or when no module matches.
    """
    start_config = _read_config(start) if start else None
    total_rank = rank + (start_config.r if start_config else 0)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=total_rank,
        lora_alpha=alpha * total_rank / rank,  # keeps the scale alpha / rank of the recipe
        target_modules="all-linear" if tuple(target_modules) == ("all-linear",) else list(target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(chat_model.model, config)
    except ValueError as error:
        raise HardenError(f"train.lora.target_modules {list(target_modules)}: {error}") from None
    if start_config:
        try:
            absent = model.load_adapter(start, REFERENCE, is_trainable=False).missing_keys
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise HardenError(f"adapter {start} does not fit model '{chat_model.name}': {reason}") from None
        if absent:
            raise HardenError(f"adapter {start} does not fit model '{chat_model.name}': it lacks {absent[0]}")
        _continue_reference(model, start)
    model.set_adapter(TRAINED)
    chat_model.model = model.eval()
    chat_model.neurons = find_neurons(model)


def check_adapter_folder(adapter: str) -> None:
    """Raises HardenError for a folder that holds no adapter, or a path without one: PEFT would look on the hub."""
    if not Path(adapter).exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", adapter):  # a hub id's form
        raise HardenError(f"there is no adapter folder {adapter}")
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        inside = Path(adapter) / "adapter"
        hint = f"; give {inside}" if inside.is_dir() else ""
        raise HardenError(f"{adapter} holds no adapter: there is no adapter_config.json in it{hint}")


def load_adapter(chat_model: ChatModel, adapter: str) -> None:
    """Wrap `chat_model.model` with a finished adapter of any PEFT kind, to be measured.

    It computes in the model's dtype, not in float32 as while it is trained, which in bfloat16 takes a scan a fifth
    longer. Its `starting_model` is the base model. Raises HardenError when it cannot be loaded or does not fit,
    MeasurementError when it is not finite.
    """
    check_adapter_folder(adapter)
    try:
        model = PeftModel.from_pretrained(chat_model.model, adapter, adapter_name=TRAINED, autocast_adapter_dtype=False)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HardenError(f"cannot load adapter '{adapter}' for model '{chat_model.name}': {reason}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT looks for the base model's config on the hub, in vain
        fitting = get_peft_model_state_dict(model, adapter_name=TRAINED).keys()
    odd = load_peft_weights(adapter, device="cpu").keys() ^ fitting
    if odd:
        raise HardenError(
            f"cannot load adapter '{adapter}' for model '{chat_model.name}': its weights do not match the model's "
            f"({len(odd)} names, {min(odd)} for one)"
        )
    require_finite(model, f"adapter '{adapter}'")
    chat_model.model = model.requires_grad_(False).eval()
    chat_model.neurons = find_neurons(model)


def _read_config(start: str) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(start)
    except (OSError, ValueError) as error:
        raise HardenError(f"cannot load adapter '{start}': {' '.join(str(error).split())[:200]}") from None
    odd = [name for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
           if getattr(config, name, None)]  # fmt: skip
    if config.peft_type != "LORA" or odd or config.bias != "none":
        raise HardenError(
            f"adapter '{start}' is no plain LoRA ({', '.join(odd) or config.peft_type}) and cannot be continued; "
            "merge it into the model and start from that"
        )
    return config


@torch.no_grad()
def _continue_reference(model: PeftModel, start: str) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if REFERENCE not in module.lora_A:
            continue
        if TRAINED not in module.lora_A:
            raise HardenError(f"adapter '{start}' changes {name}, which train.lora.target_modules leaves out")
        old_a, old_b = module.lora_A[REFERENCE].weight, module.lora_B[REFERENCE].weight
        rank = len(old_a)
        module.lora_A[TRAINED].weight[:rank] = old_a
        module.lora_B[TRAINED].weight[:, :rank] = old_b * (module.scaling[REFERENCE] / module.scaling[TRAINED])


def has_starting_model(model: torch.nn.Module) -> bool:
    """Whether `starting_model` is another model than the present one."""
    return isinstance(model, PeftModel)


@contextmanager
def starting_model(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is the one that the run started from: the base with the starting adapter, if any.

    A model without adapters is its own starting model.
    """
    if not has_starting_model(model):
        yield
    elif REFERENCE in model.peft_config:
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(TRAINED)
    else:
        with model.disable_adapter():
            yield


def trained_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """Parameters of the trained adapter. Raises HardenError if there are none."""
    parameters = [p for name, p in model.named_parameters() if f".{TRAINED}." in name and "lora_" in name]
    if not parameters:
        raise HardenError("train.lora.target_modules matches no module of the model")
    return parameters


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the trained adapter's tensors."""
    state = get_peft_model_state_dict(model, adapter_name=TRAINED)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def restore_adapter(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Put tensors from `adapter_state` back."""
    set_peft_model_state_dict(model, state, adapter_name=TRAINED)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the trained adapter in PEFT's format: `PeftModel.from_pretrained(base, folder)` gives this model."""
    model.save_pretrained(str(folder), selected_adapters=[TRAINED], save_embedding_layers=False)
