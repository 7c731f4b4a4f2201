"""How long the exact scan takes, against three other ways to compute the same numbers, in one run.

    pip install -e '.[benchmarks]'
    python benchmarks/scan.py                      # a quarter of an hour on 2 cores
    python benchmarks/scan.py --only hooks         # without TransformerLens and nnsight

The numbers: refusal log-odds of harmful prompts, read off the last position's logits, with one neuron clamped. The
others run the whole model once per clamp over all (padded) prompts:

- hooks: a forward pre-hook on the down projection, logits of the last position only;
- TransformerLens: `TransformerBridge`, hook `blocks.{l}.mlp.hook_post`;
- nnsight: a trace that sets the down projection's input; once with all logits, which TransformerLens computes, too, and
  once with those of the last position only.

All ways take turns, `--rounds` times over; medians are compared. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from harden import bundled, processes
from harden.chat import Batch, pad_left
from harden.effects import log_odds_under
from harden.interventions import Clamp, intervene
from harden.models import ChatModel, load_chat_model
from harden.neurons import Neuron, find_neurons
from harden.prompts import load_prompts
from harden.recipe import Recipe
from harden.refusal import RefusalPhrases

OPENINGS = ("Sorry", "No", "Unfortunately", "I", "My", "That", "This")  # of one token each, so that one pass reads them
Way = Callable[[Clamp], torch.Tensor]
"""Refusal log-odds of all prompts under a clamp."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6, help="evenly spaced")
    parser.add_argument("--neurons", type=int, default=24, help="of each layer")
    parser.add_argument("--batch-size", type=int, default=192, help="rows of the scan: a clamp and a prompt each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", choices=("hooks", "TransformerLens", "nnsight", "nnsight-last"))
    options = parser.parse_args()
    processes.use_all_cores()
    chat_model = load_chat_model(options.model, options.dtype, processes.state().device)
    source = Recipe(name="x", output="x", model={"name": options.model}).prompts.harmful
    texts = [prompt.text for prompt in load_prompts("harmful", **source.model_dump())[: options.prompts]]
    phrases = RefusalPhrases(chat_model.chat, OPENINGS)
    if phrases.rows:
        raise SystemExit(f"this tokenizer splits one of {OPENINGS} into several tokens; choose others")
    batch = pad_left([chat_model.chat.prompt_ids(text) for text in texts], chat_model.chat.pad_id, chat_model.device)
    clamps = spread_clamps(chat_model, options.layers, options.neurons)

    def scan(these: list[Clamp]) -> torch.Tensor:
        return torch.tensor(log_odds_under(chat_model, these, texts, phrases, options.batch_size, "scan"))

    makers = {
        "hooks": hook_loop,
        "TransformerLens": transformer_lens,
        "nnsight": nnsight,
        "nnsight-last": partial(nnsight, logits_to_keep=1),
    }
    # each has the model as transformers loads it
    others = {name: makers[name](plain_copy(chat_model), batch, phrases) for name in options.only or makers}
    found = {
        name: torch.stack([way(clamp).cpu() for clamp in clamps[:: options.neurons]]) for name, way in others.items()
    }  # warm up
    expected = scan(clamps)
    for name, odds in found.items():
        difference = (odds - expected[:: options.neurons]).abs().max().item()
        print(f"{name}: log-odds differ from the scan's by at most {difference:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in ("harden", *others)}
    for _ in range(options.rounds):
        seconds["harden"].append(timed(lambda: scan(clamps)) / len(clamps))
        for name, way in others.items():
            part = clamps[:: max(1, options.neurons // 2)]  # every clamp costs them the same
            seconds[name].append(timed(lambda way=way, part=part: [way(clamp) for clamp in part]) / len(part))
    # fused attention is not counted on CPUs, and cannot be counted on a GPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        scan(clamps)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rate = counter.get_total_flops() / len(clamps) / medians["harden"]
    lengths = batch.attention_mask.sum(1)
    print(
        f"\n{options.model}, {options.dtype}, {chat_model.device.type}, {torch.get_num_threads()} threads; "
        f"{len(texts)} prompts of {int(lengths.min())} to {int(lengths.max())} tokens; {len(clamps)} neurons in "
        f"{options.layers} layers, {options.batch_size} rows at a time; median of {options.rounds} rounds\n"
    )
    print("| | seconds per neuron | times as long as the scan |\n| --- | --- | --- |")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"| {LABELS[name]()} | {median:.3f} [{low:.3f}, {high:.3f}] | {median / medians['harden']:.2f} |")
    peak = peak_rate(chat_model)
    print(f"\nmatrix products: {rate / 1e9:.0f} GFLOP/s in the scan, {rate / peak:.0%} of {peak / 1e9:.0f} at best")
    growth(chat_model, texts, phrases, options.batch_size)


LABELS = {
    "harden": lambda: "harden",
    "hooks": lambda: "hook loop, logits of the last position only",
    "TransformerLens": lambda: f"TransformerLens {version('transformer-lens')}, `TransformerBridge`",
    "nnsight": lambda: f"nnsight {version('nnsight')}",
    "nnsight-last": lambda: f"nnsight {version('nnsight')}, logits of the last position only",
}


def spread_clamps(chat_model: ChatModel, layers: int, neurons: int) -> list[Clamp]:
    """Clamps of the first neurons of layers in the middle of equal parts of the depth, so that the mean layer is the
    model's."""
    depth = len(chat_model.neurons.widths)
    chosen = [int((part + 0.5) * depth / layers) for part in range(layers)]
    return [Clamp(Neuron(layer, index), 20.0) for layer in chosen for index in range(neurons)]


def plain_copy(chat_model: ChatModel) -> ChatModel:
    model = AutoModelForCausalLM.from_pretrained(
        bundled.resolve(chat_model.name), dtype=chat_model.model.dtype, attn_implementation="sdpa"
    )
    model = model.requires_grad_(False).eval().to(chat_model.device)
    return ChatModel(chat_model.name, model, chat_model.tokenizer, chat_model.chat, find_neurons(model))


def read_log_odds(logits: torch.Tensor, phrases: RefusalPhrases) -> torch.Tensor:
    """From the logits of the last position, (batch, vocab), by the definition."""
    log_probs = logits.float().log_softmax(-1)
    refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    refusal[list(phrases.nodes[0].ends)] = True
    return log_probs[:, refusal].logsumexp(-1) - log_probs[:, ~refusal].logsumexp(-1)


def hook_loop(chat_model: ChatModel, batch: Batch, phrases: RefusalPhrases) -> Way:
    @torch.no_grad()
    def run(clamp: Clamp) -> torch.Tensor:
        with intervene(chat_model.neurons, [(clamp,)] * len(batch)):
            logits = chat_model.model(**batch.inputs(), use_cache=False, logits_to_keep=1).logits
        return read_log_odds(logits[:, -1], phrases)

    return run


def transformer_lens(chat_model: ChatModel, batch: Batch, phrases: RefusalPhrases) -> Way:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        chat_model.model.config._name_or_path,
        hf_model=chat_model.model,
        tokenizer=chat_model.tokenizer,
        device=str(chat_model.device),
        dtype=chat_model.model.dtype,
    )

    @torch.no_grad()
    def run(clamp: Clamp) -> torch.Tensor:
        def edit(activation, hook):
            activation[:, :, clamp.neuron.index] = clamp.value
            return activation

        logits = bridge.run_with_hooks(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            fwd_hooks=[(f"blocks.{clamp.neuron.layer}.mlp.hook_post", edit)],
        )
        return read_log_odds(logits[:, -1], phrases)

    return run


def nnsight(chat_model: ChatModel, batch: Batch, phrases: RefusalPhrases, **more) -> Way:
    from nnsight import LanguageModel

    model = LanguageModel(chat_model.model, tokenizer=chat_model.tokenizer)
    inputs = batch.inputs()

    @torch.no_grad()
    def run(clamp: Clamp) -> torch.Tensor:
        layer, index = clamp.neuron.layer, clamp.neuron.index
        with model.trace(inputs, use_cache=False, **more):
            model.model.layers[layer].mlp.down_proj.input[:, :, index] = clamp.value
            logits = model.lm_head.output.save()
        return read_log_odds(logits[:, -1], phrases)

    return run


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_rate(chat_model: ChatModel, n: int = 3072) -> float:
    """Floating-point operations per second of a large square matrix product, the best of five."""
    a = torch.randn(n, n, dtype=chat_model.model.dtype, device=chat_model.device)
    return max(2 * n**3 / timed(lambda: a @ a) for _ in range(5))


def growth(chat_model: ChatModel, texts: list[str], phrases: RefusalPhrases, batch_size: int) -> None:
    """How the scan's cost grows: with neurons, prompts, and layers above the clamp."""
    depth, half = len(chat_model.neurons.widths), max(1, len(texts) // 2)

    def cost(layer: int, neurons: int, prompts: int) -> float:
        clamps = [Clamp(Neuron(layer, index), 20.0) for index in range(neurons)]

        def scan() -> None:
            log_odds_under(chat_model, clamps, texts[:prompts], phrases, batch_size, "growth")

        scan()
        return timed(scan)

    print("\n| layer | neurons | prompts | seconds | per neuron and prompt |\n| --- | --- | --- | --- | --- |")
    whole, middle = len(texts), depth // 2
    of_neurons = [(middle, neurons, whole) for neurons in (12, 24, 48)]
    of_prompts = [(middle, 24, prompts) for prompts in (1, half, whole)]
    of_layers = [(layer, 24, whole) for layer in (0, depth // 4, middle, 3 * depth // 4, depth - 1)]
    for layer, neurons, prompts in dict.fromkeys([*of_neurons, *of_prompts, *of_layers]):
        seconds = cost(layer, neurons, prompts)
        print(f"| {layer} | {neurons} | {prompts} | {seconds:.2f} | {seconds / neurons / prompts:.4f} |")


if __name__ == "__main__":
    main()
