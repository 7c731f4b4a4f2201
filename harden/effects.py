"""Exact effects of interventions, without computing again what they cannot change.

A clamp in layer l leaves everything below layer l as it is. What leaves each layer is recorded once, without a clamp,
and a pass under clamps of layer l begins there: the layers below only hand the recorded residual stream on. The result
is that of a full pass, up to rounding; the cost is the share of the layers from l upwards. Of the last layer's MLP only
the positions whose logits are read are computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from transformers import Cache

from harden import processes
from harden.batches import in_batches
from harden.generate import progress_bar
from harden.interventions import Intervention, first_layer, intervene
from harden.models import ChatModel
from harden.neurons import MlpNeurons
from harden.prefill import batch_prompts
from harden.refusal import RefusalPhrases, refusal_log_odds

Result = TypeVar("Result")
Run = Callable[[Sequence[tuple[Intervention, ...]]], list[Result]]
LayerOutput = torch.Tensor | tuple  # the residual stream, (batch, seq, d_model), alone or first in a tuple


def log_odds_under(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    harmful: Sequence[str],
    phrases: RefusalPhrases,
    batch_size: int,
    label: str,
) -> list[list[float]]:
    """Exact refusal log-odds of every request under every clamp: (clamps, requests). Work is divided.

    No pass has more than `batch_size` rows, a row being a clamp and a request.
    """
    parts = [harmful[start : start + batch_size] for start in range(0, len(harmful), batch_size)]

    def work(mine: list[Intervention]) -> list[list[float]]:
        rows: list[list[float]] = [[] for _ in mine]
        with progress_bar(len(parts) * len(mine), label) as bar:
            for part in parts:
                run = partial(_log_odds, chat_model, harmful=part, phrases=phrases)
                more = under_clamps(chat_model, mine, batch_size, len(part), run, bar.update)
                rows = [row + odds for row, odds in zip(rows, more, strict=True)]
        return rows

    # Dealt out in turns: clamps stand in the order of their layers, and those of low layers cost most.
    turns = range(processes.count())
    dealt = [place for turn in turns for place in range(turn, len(clamps), len(turns))]
    found = dict(zip(dealt, processes.divide([clamps[place] for place in dealt], work), strict=True))
    return [found[place] for place in range(len(clamps))]


def _log_odds(chat_model: ChatModel, edits, harmful: Sequence[str], phrases: RefusalPhrases) -> list[list[float]]:
    """Of each harmful request, for each tuple of interventions."""
    prompts = [chat_model.chat.prompt_ids(text) for text in harmful]
    rows = [each for each in edits for _ in prompts]
    batch = batch_prompts(chat_model, prompts * len(edits), rows, more_tokens=len(phrases.nodes))
    with intervene(chat_model.neurons, rows):
        log_odds = refusal_log_odds(chat_model.model, batch, phrases)
    return log_odds.view(len(edits), len(prompts)).tolist()


@torch.no_grad()
def under_clamps(
    chat_model: ChatModel,
    clamps: Sequence[Intervention],
    batch_size: int,
    rows_per_clamp: int,
    run: Run,
    done: Callable[[int], None],
) -> list[Result]:
    """`run([(clamp,), ...])` for all clamps, those of one layer together in batches of rows: results in their order.

    Any intervention will do; one that acts on all layers is run from the first.

    run: gives one result per tuple of interventions; it must run the same forward passes, with rows multiplied, for
    any number of them, and `run([()])` is what is recorded; its passes have `rows_per_clamp` rows a clamp. done: told
    how many clamps are finished, for a progress bar. A batch that does not fit into memory is halved; under FSDP every
    pass is a full one, and all processes run equally many. On an accelerator, where small batches cost as much as large
    ones, those of neighbouring layers share a batch, which begins at the lowest of them.
    """
    by_layer: dict[int, list[int]] = defaultdict(list)
    first_place: dict[Intervention, int] = {}
    for place, clamp in enumerate(clamps):
        if processes.sharded():
            by_layer[0].append(place)
        elif first_place.setdefault(clamp, place) == place:  # equal ones once: heads are shared by what is distinct
            by_layer[first_layer(clamp)].append(place)
    with _recording(chat_model.neurons) as recorded:
        if set(by_layer) - {0}:
            run([()])
    groups = [by_layer[layer] for layer in sorted(by_layer)]
    if groups and layers_share_batches(chat_model):
        groups = [[place for group in groups for place in group]]
    results: dict[int, Result] = {}
    for places in groups:

        def run_part(part: Sequence[int]) -> list[Result]:
            layer = 0 if processes.sharded() else min(first_layer(clamps[place]) for place in part)
            with _starting_at(chat_model.neurons, layer, recorded), _last_mlp_where_it_is_read(chat_model):
                found = run([(clamps[place],) for place in part])
            done(len(part))
            return found

        at_a_time = max(1, batch_size // rows_per_clamp)
        results.update(zip(places, in_batches(chat_model, places, at_a_time, run_part, rows_per_clamp), strict=True))
    return [results[first_place.get(clamp, place)] for place, clamp in enumerate(clamps)]


def layers_share_batches(chat_model: ChatModel) -> bool:
    """Whether clamps of several layers go into one batch: where it is launches that cost, not arithmetic."""
    return chat_model.device.type != "cpu"


@contextmanager
def _recording(neurons: MlpNeurons) -> Iterator[list[list[LayerOutput]]]:
    """Yields what leaves each layer, pass by pass: recorded[layer][pass]."""
    recorded: list[list[LayerOutput]] = [[] for _ in neurons.blocks]

    def recorder(passes: list[LayerOutput]):
        def record(_module, _args, output):
            passes.append((output[0], *[None] * (len(output) - 1)) if isinstance(output, tuple) else output)

        return record

    with ExitStack() as hooks:
        for block, passes in zip(neurons.blocks, recorded, strict=True):
            hooks.enter_context(block.layer.register_forward_hook(recorder(passes)))
        yield recorded


@contextmanager
def _starting_at(neurons: MlpNeurons, layer: int, recorded: list[list[LayerOutput]]) -> Iterator[None]:
    """Inside, the layers below `layer` compute nothing: the last of them hands on what was recorded, pass by pass.

    Each still takes its place in the cache of keys and values, since models read the length of what is cached there.
    """

    def skip(number: int):
        passes = iter(recorded[number])

        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            if cache is not None:
                nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                cache.update(nothing, nothing, number)
            output = next(passes)
            residual = output[0] if isinstance(output, tuple) else output
            if number == layer - 1:
                hidden = residual.repeat(hidden.shape[0] // len(residual), 1, 1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return forward

    patched = [block.layer for block in neurons.blocks[:layer]]
    before = [module.__dict__.get("forward") for module in patched]
    try:
        for number, module in enumerate(patched):
            module.forward = skip(number)
        yield
    finally:
        for module, forward in zip(patched, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def _last_mlp_where_it_is_read(chat_model: ChatModel) -> Iterator[None]:
    """Inside, the last MLP puts out zeros at positions whose logits are not asked for: nothing else reads them."""
    down = chat_model.neurons.down_projections[-1]
    mlp = next((w for w in chat_model.neurons.blocks[-1].writers if any(m is down for m in w.modules())), None)
    if mlp is None:
        yield
        return
    compute, asked = mlp.forward, 0  # 0: all positions

    def note(_module, _args, kwargs):
        nonlocal asked
        asked = kwargs.get("logits_to_keep", 0)

    def forward(x, *args, **kwargs):
        if args or kwargs or not asked or x.shape[1] <= asked:  # Bloom and MPT hand the residual stream in, too
            return compute(x, *args, **kwargs)
        return torch.nn.functional.pad(compute(x[:, -asked:].contiguous()), (0, 0, x.shape[1] - asked, 0))

    had_its_own = "forward" in mlp.__dict__
    try:
        mlp.forward = forward
        with chat_model.model.register_forward_pre_hook(note, with_kwargs=True):
            yield
    finally:
        if had_its_own:
            mlp.forward = compute
        else:
            del mlp.forward
