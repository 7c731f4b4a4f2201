"""Chat rendering: prompts, answers, the template tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import Cache

from harden.errors import HardenError


@dataclass(frozen=True)
class Batch:
    """Left-padded token rows, each tensor (batch, seq); padding has attention 0 and the position of the first token.

    With `past`, a head of tokens that all rows share is computed already: `attention_mask` covers it, (batch,
    head + seq), and the other two begin behind it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past: Cache | None = None

    def inputs(self) -> dict[str, Any]:
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return inputs if self.past is None else {**inputs, "past_key_values": self.past}

    def __len__(self) -> int:
        return len(self.input_ids)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> Batch:
    """Batch token sequences of unequal length, padded on the left so that all of them end together."""
    length = max(map(len, sequences))
    missing = [length - len(sequence) for sequence in sequences]
    rows = zip(missing, sequences, strict=True)
    ids = torch.tensor([[*[pad_id] * n, *sequence] for n, sequence in rows], dtype=torch.long)
    mask = (torch.arange(length) >= torch.tensor(missing)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device))


class Chat:
    """Renders requests and answers with a tokenizer's chat template.

    Raises HardenError when the tokenizer has no chat template, or one that leaves the request out.
    """

    def __init__(self, tokenizer, eos_ids: set[int], template_kwargs: dict[str, Any] | None = None):
        if not tokenizer.chat_template:
            raise HardenError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; harden works on chat models, "
                "use an instruction-tuned model or add a chat_template to tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        self.eos_ids = (eos_ids | {tokenizer.eos_token_id}) - {None}
        if not self.eos_ids:
            raise HardenError(f"the tokenizer of '{tokenizer.name_or_path}' has no end-of-sequence token; give it one")
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.eos_ids)
        tail = self._common_tail("Hello there, my friend", "What is two plus 5?")
        self.template_tail = len(tail)
        """Number of post-instruction template tokens: those after the request, before the answer."""
        default = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(self.eos_ids)
        self.end_of_turn = next((token for token in tail if token in self.eos_ids), default)

    def prompt_ids(self, request: str) -> list[int]:
        """Tokens of a one-turn conversation, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request}],
            add_generation_prompt=True,
            return_dict=True,
            **self.template_kwargs,
        )["input_ids"]

    def answer_ids(self, answer: str, ended: bool = True) -> list[int]:
        """Tokens of an answer, with the end-of-turn token unless it was cut short."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_of_turn] if ended else ids

    def _common_tail(self, request: str, other: str) -> list[int]:
        try:
            a, b = self.prompt_ids(request), self.prompt_ids(other)
        except (TemplateError, TypeError, ValueError) as error:
            raise HardenError(
                f"the chat template cannot render a request ({error}); check it and model.chat_template_kwargs"
            ) from None
        if a == b:
            raise HardenError(
                "the chat template renders two different requests alike: it leaves out the user's message; correct "
                "chat_template in the model's tokenizer files"
            )
        n = 0
        while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
            n += 1
        if n == 0:
            raise HardenError("the chat template puts no token between a request and its answer; check it")
        return a[-n:]
