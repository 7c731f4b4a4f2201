"""Tiny random models of many architectures, speaking the planted model's words."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harden.chat import Chat
from harden.models import ChatModel
from harden.neurons import find_neurons
from harden.planted import build_tokenizer, vocabulary

COMMON = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 32, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 4},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "starcoder2": {},
    "phi": {},
}
GPT2_ALIASES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(kind: str, options: dict | None = None):
    settings = {**COMMON, **(ARCHITECTURES.get(kind, {}) if options is None else options)}
    if kind == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in (*GPT2_ALIASES, "intermediate_size", "head_dim")}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def tiny_chat_model(kind: str, options: dict | None = None) -> ChatModel:
    model, tokenizer = tiny_model(kind, options), build_tokenizer()
    return ChatModel(kind, model, tokenizer, Chat(tokenizer, {3}), find_neurons(model))
