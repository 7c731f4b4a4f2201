"""One forward and one backward pass per prompt: what the gradient locators read from it, all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from harden import processes
from harden.batches import BACKWARD_ROWS, in_batches
from harden.chat import pad_left
from harden.errors import MeasurementError
from harden.generate import progress_bar
from harden.locate.attribution import Slopes
from harden.models import ChatModel
from harden.refusal import RefusalPhrases, refusal_log_odds


@dataclass(frozen=True)
class Backward:
    """Of some prompts. Per layer float32 (tail, d_mlp) on the CPU: means at the post-instruction template tokens."""

    activation: list[torch.Tensor]
    gradient: list[torch.Tensor]
    """Of the refusal log-odds."""
    product: list[torch.Tensor]
    """Gradient times activation, prompt by prompt."""
    slopes: Slopes
    """Over all positions, those of the refusal phrases included."""
    log_odds: list[float]
    """Refusal log-odds of each prompt."""


def read_backward(
    chat_model: ChatModel,
    requests: Sequence[str],
    phrases: RefusalPhrases,
    batch_size: int,
    rules: Callable[[], AbstractContextManager] = nullcontext,
    label: str = "locate",
) -> Backward:
    """Differentiate the refusal log-odds of some requests in every neuron.

    rules: makes what each batch's passes run under. Work is divided between processes. Raises MeasurementError if
    anything is not finite.
    """
    tail, device, widths = chat_model.chat.template_tail, chat_model.device, chat_model.neurons.widths
    share = processes.my_share(requests)
    totals = [[torch.zeros(tail, width, device=device) for width in widths] for _ in range(3)]
    totals += [[torch.zeros(width, device=device) for width in widths] for _ in range(2)]
    with progress_bar(len(share), label) as bar:

        def add(rows) -> list[float]:
            sums, log_odds = _sums(chat_model, rows, phrases, rules)
            for total, parts in zip(totals, sums, strict=True):  # all of the batch or, where memory ran out, none of it
                for layer, part in enumerate(parts):
                    total[layer] += part
            bar.update(len(rows))
            return log_odds

        odds = in_batches(chat_model, share, batch_size, add, BACKWARD_ROWS)
    means = [[(processes.total(layer) / len(requests)).cpu() for layer in kind] for kind in totals]
    for layer, parts in enumerate(zip(*means, strict=True)):
        if not all(torch.isfinite(part).all() for part in parts):
            raise MeasurementError(f"layer {layer}: gradients or activations are not finite; is the model sound?")
    activation, gradient, product, slope, offset = means
    slopes = Slopes(torch.cat(slope), torch.cat(offset))
    return Backward(activation, gradient, product, slopes, processes.gather(odds, len(requests)))


def _sums(chat_model, rows, phrases, rules) -> tuple[list[list[torch.Tensor]], list[float]]:
    """Sums over rows: of h, g and h * g at the template's tokens, of g and h * g over all positions; the log-odds."""
    tail = chat_model.chat.template_tail
    weight = torch.tensor([weight for _, weight in rows], device=chat_model.device)
    with rules():
        recorded, log_odds = differentiate(chat_model, [text for text, _ in rows], phrases, weight)
    layers = []
    for pairs in recorded:
        (h, g), both = pairs[0], [(h * g).sum(0) for h, g in pairs]
        layers.append(
            (
                torch.einsum("btn,b->tn", h[:, -tail:], weight),
                g[:, -tail:].sum(0),
                both[0][-tail:],
                sum(g.sum((0, 1)) for _, g in pairs),
                sum(product.sum(0) for product in both),
            )
        )
    return [list(kind) for kind in zip(*layers, strict=True)], log_odds.tolist()


def differentiate(
    chat_model: ChatModel, requests: Sequence[str], phrases: RefusalPhrases, weight: torch.Tensor
) -> tuple[list[list[tuple[torch.Tensor, torch.Tensor]]], torch.Tensor]:
    """Every neuron's activations, and in them the gradient of the requests' log-odds times `weight`, (batch,).

    Returns, per layer and forward pass (over the prompts and, where there is one, over the phrases), both as float32
    (batch, seq, d_mlp); and the log-odds, (batch,). What is in force around it counts.
    """
    chat = chat_model.chat
    prompts = pad_left([chat.prompt_ids(text) for text in requests], chat.pad_id, chat_model.device)
    recorded: list[list[torch.Tensor]] = [[] for _ in chat_model.neurons.widths]

    def recorder(layer: int):
        return lambda _module, args: recorded[layer].append(args[0])

    with graph_from_embeddings(chat_model.model), ExitStack() as hooks:
        # behind hooks that are there: a neuron's gradient is that of what the down projection takes in
        for layer, module in enumerate(chat_model.neurons.down_projections):
            hooks.enter_context(module.register_forward_pre_hook(recorder(layer)))
        log_odds = refusal_log_odds(chat_model.model, prompts, phrases)  # of one pass, or of two
    passes = len(recorded[0])
    flat = [h for layer in recorded for h in layer]
    gradients = torch.autograd.grad((log_odds * weight).sum(), flat, allow_unused=True, materialize_grads=True)
    pairs = [(h.detach().float(), g.float()) for h, g in zip(flat, gradients, strict=True)]
    return [pairs[start : start + passes] for start in range(0, len(pairs), passes)], log_odds.detach()


@contextmanager
def graph_from_embeddings(model) -> Iterator[None]:
    """Inside, the embeddings' output is the root of the autograd graph, so that a frozen model has gradients inside."""

    def root(_module, _args, output):
        return output if output.requires_grad else output.requires_grad_()

    with model.get_input_embeddings().register_forward_hook(root):
        yield
