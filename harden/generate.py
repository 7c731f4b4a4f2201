"""Greedy completions under per-row interventions, and how likely the unattacked model finds a completion."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

from harden import processes
from harden.batches import in_batches
from harden.caches import only_attends
from harden.chat import Chat, pad_left
from harden.interventions import Intervention, intervene
from harden.models import ChatModel
from harden.prefill import batch_prompts

STAGE = 4  # new tokens after which completions that have ended leave the batch; saves a sixth of a CPU's time


@dataclass(frozen=True)
class Request:
    """One row of work: a user's request, answered under these interventions, behind a given beginning."""

    text: str
    interventions: tuple[Intervention, ...] = ()
    prefix: str = ""
    """Beginning of the answer that is put into the model's mouth; no part of the completion."""

    def prompt_ids(self, chat: Chat) -> list[int]:
        return [*chat.prompt_ids(self.text), *(chat.answer_ids(self.prefix, ended=False) if self.prefix else ())]


@dataclass(frozen=True)
class Completion:
    text: str
    ended: bool
    """The model ended its turn; False: it was cut at the token limit."""


@torch.no_grad()
def complete(
    chat_model: ChatModel, requests: Sequence[Request], max_new_tokens: int, batch_size: int, label: str
) -> list[Completion]:
    """Greedy completions, in the order of the requests, each under its own interventions.

    Rows of like length share a batch. Work is divided between processes. `label` names the progress bar.
    """

    def work(mine: list[Request]) -> list[Completion]:
        prompts = [request.prompt_ids(chat_model.chat) for request in mine]
        order = sorted(range(len(mine)), key=lambda row: len(prompts[row]))
        with progress_bar(len(mine), label) as bar:

            def finish(rows: Sequence[int]) -> list[Completion]:
                batch = [(prompts[row], mine[row].interventions) for row in rows]
                finished = _complete_batch(chat_model, batch, max_new_tokens)
                finished = [  # behind a prefix a leading space belongs to the first word
                    c if mine[row].prefix else replace(c, text=c.text.lstrip())
                    for row, c in zip(rows, finished, strict=True)
                ]
                bar.update(len(rows))
                return finished

            completions = dict(zip(order, in_batches(chat_model, order, batch_size, finish), strict=True))
        return [completions[row] for row in range(len(mine))]

    return processes.divide(requests, work)


def _complete_batch(chat_model, batch, max_new_tokens) -> list[Completion]:
    """On a CPU, where a step costs as much as it has rows, those that have ended leave the batch: up to rounding, that
    changes nothing."""
    chat, model = chat_model.chat, chat_model.model
    interventions = [edits for _, edits in batch]
    prompts = batch_prompts(chat_model, [ids for ids, _ in batch], interventions, more_tokens=max_new_tokens)
    inputs, stage = prompts.inputs(), max_new_tokens
    past = inputs.get("past_key_values", DynamicCache(config=model.config))
    if chat_model.device.type == "cpu" and not processes.sharded() and only_attends(past):
        inputs["past_key_values"], stage = past, STAGE
    answers: list[list[int]] = [[] for _ in batch]
    open_rows, left = list(range(len(batch))), max_new_tokens
    while open_rows and left:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(stage, left),
            pad_token_id=min(chat.eos_ids),  # behind what has ended; a clamped model may say chat.pad_id and go on
            eos_token_id=sorted(chat.eos_ids),
        )
        with intervene(chat_model.neurons, [interventions[row] for row in open_rows]):
            tokens = model.generate(**inputs, generation_config=config, synced_gpus=processes.sharded())
        new = tokens[:, inputs["input_ids"].shape[1] :]
        for row, ids in zip(open_rows, new.tolist(), strict=True):
            answers[row] += ids
        left -= config.max_new_tokens
        going_on = [place for place, row in enumerate(open_rows) if not chat.eos_ids & set(answers[row])]
        open_rows = [open_rows[place] for place in going_on]
        if open_rows and left:
            inputs = _next_inputs(inputs, new, torch.tensor(going_on, device=new.device))
    completions = []
    for row in answers:
        end = next((n for n, token in enumerate(row) if token in chat.eos_ids), None)
        text = chat_model.tokenizer.decode(row[:end], skip_special_tokens=True)
        completions.append(Completion(text.rstrip(), ended=end is not None))
    return completions


def _next_inputs(inputs: dict[str, Any], new: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    """Inputs that go on behind the new tokens, (batch, new), with these rows of the batch."""
    if len(rows) < len(new):
        inputs["past_key_values"].batch_select_indices(rows)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    return inputs | {
        "input_ids": new[rows, -1:],
        "attention_mask": mask[rows],
        "position_ids": inputs["position_ids"][rows, -1:] + new.shape[1],
    }


@torch.no_grad()
def answer_losses(
    chat_model: ChatModel, requests: Sequence[Request], answers: Sequence[Completion], batch_size: int
) -> list[list[float]]:
    """Negative log-likelihood, in nats, of each token of each answer to its request. Work is divided."""

    def work(mine: list[tuple[Request, Completion]]) -> list[list[float]]:
        return in_batches(chat_model, mine, batch_size, lambda part: batch_answer_losses(chat_model, part))

    return processes.divide(list(zip(requests, answers, strict=True)), work)


def batch_answer_losses(chat_model: ChatModel, batch: Sequence[tuple[Request, Completion]]) -> list[list[float]]:
    """`answer_losses` of one batch, on this process."""
    prompts = [request.prompt_ids(chat_model.chat) for request, _ in batch]
    answers = [chat_model.chat.answer_ids(answer.text, answer.ended) for _, answer in batch]
    losses, _ = answer_cross_entropy(chat_model, prompts, answers, [request.interventions for request, _ in batch])
    return [row[len(row) - len(answer) :] for row, answer in zip(losses.tolist(), answers, strict=True)]


def mean(values: Sequence[float]) -> float:
    """The mean; inf for no values: what was not said is infinitely unlikely."""
    return sum(values) / len(values) if values else float("inf")


def answer_cross_entropy(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    interventions: Sequence[tuple[Intervention, ...]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers' tokens, in nats: float32 (batch, longest answer), aligned to the right, 0 where
    `mask`, the second tensor, of the same shape, is 0. Differentiable.
    """
    log_probs, mask = answer_log_probs(chat_model, prompts, answers, interventions)
    targets, _ = answer_targets(answers, log_probs.device)
    return -log_probs.gather(-1, targets[..., None])[..., 0] * mask, mask


def answer_log_probs(
    chat_model: ChatModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    interventions: Sequence[tuple[Intervention, ...]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced next-token log-probabilities at the answers' tokens, each row under its own interventions.

    Returns float32 (batch, longest answer, vocab) and a 0/1 mask (batch, longest answer); both are aligned to the
    right, as the left-padded rows are. Differentiable.
    """
    _, mask = answer_targets(answers, chat_model.device)
    longest = mask.shape[1]
    batch = batch_prompts(chat_model, prompts, interventions, answers)
    with intervene(chat_model.neurons, interventions):
        out = chat_model.model(**batch.inputs(), use_cache=batch.past is not None, logits_to_keep=longest + 1)
    logits = out.logits[:, :-1]
    return logits.float().log_softmax(-1), mask


def answer_targets(answers: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-aligned token ids and their 0/1 mask, both (batch, longest answer)."""
    batch = pad_left([answer or [0] for answer in answers], 0, device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    return batch.input_ids, batch.attention_mask * (lengths > 0)[:, None]


def progress_bar(total: int, label: str) -> tqdm:
    """A bar on stderr, shown by the main process only; where stderr is no terminal, an update every half minute."""
    seen = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        disable=not processes.is_main(),
        dynamic_ncols=True,
        leave=not seen,  # a log keeps the finished bar, on a line of its own
        mininterval=0.1 if seen else 30,
        delay=0 if seen else 30,
    )
