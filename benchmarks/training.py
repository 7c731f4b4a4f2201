"""What a training step costs, against a plain LoRA fine-tuning step on the same rows, in one run.

    python benchmarks/training.py [--config RECIPE.yaml] [--rounds 3] [--only NAME ...]

Plain: transformers and peft as they come, cross-entropy of the answers of as many harmful and benign rows (refusals and
the model's own answers), one padded batch, AdamW. The others are the recipe with some of its terms; the terms of
`spread` and `leverage` on all harmful rows of every step. Each runs `train.clamps.relocate_every` steps, so that
locating and weighing clamps counts once. Every way is a process of its own, all take turns, `--rounds` times over;
medians and, in brackets, the least and the most. Memory: the peak of the process, model included, while it trains (on a
GPU what torch allocated). Prints Markdown. Linux only.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harden.adapters import trained_parameters
from harden.entry import guarded, parse_recipe, recipe_parser, start_logging
from harden.files import read_finished
from harden.finetune import train_round
from harden.objective.rows import Row
from harden.recipe import Recipe
from harden.report.tables import markdown_table
from harden.results import Record
from harden.rounds import Run
from harden.runfolder import RunFolder
from harden.schema import merge

PLAIN = "plain"
OFF = {
    **{name: {"weight": 0} for name in ("spread", "leverage", "twins", "margin", "fail_closed")},
    **{name: {"share": 0} for name in ("clamps", "mask", "direction")},
    "benign": {"texts": 0, "clamped": 0},
}
MARGIN = {"weight": 0.2, "target": 8, "rows": None, "attacked": False}


def ways(recipe: Recipe) -> dict[str, dict]:
    """What each way changes in `train`."""
    rows = harmful_rows(recipe)
    off = {**OFF, "refusal": {"rows": rows}}
    each = {"weight": 0.05, "rows": rows, "every": 1}
    return {
        PLAIN: {},
        "refusal, benign KL": off,
        "and requests alone": {**off, "benign": {"texts": 4, "clamped": 0}},
        "and a hinge on twins": {**off, "twins": {"weight": 0.05, "rows": None}},
        "and a margin": {**off, "margin": MARGIN},
        "and clamps": {**off, "clamps": {}},
        "and masks": {**off, "mask": {"share": 0.75, "relocate_every": recipe.train.clamps.relocate_every}},
        "and spread (gradient)": {**off, "spread": {**each, "attribution": "gradient"}},
        "and spread (direct)": {**off, "spread": {**each, "attribution": "direct"}},
        "and leverage": {**off, "leverage": each},
        "the recipe": {},
    }


def harmful_rows(recipe: Recipe) -> int:
    """Harmful rows of a step: those of the refusal term and, where it has its own, those of the margin."""
    margin = recipe.train.margin
    return recipe.train.refusal.rows + ((margin.rows or 0) if margin.weight else 0)


class Cost(Record):
    seconds: float
    """Per step, of the mean step."""
    peak: int
    """Bytes."""


def main() -> int:
    parser = recipe_parser("benchmarks/training.py", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="ways besides plain")
    parser.add_argument("--way", help="measure this one in this process, into --result")
    parser.add_argument("--result", type=Path)
    recipe, options = parse_recipe(parser, sys.argv[1:])
    if options.way:
        cost = plain(recipe) if options.way == PLAIN else measured(recipe)
        options.result.write_text(cost.model_dump_json())
        return 0
    start_logging()
    wanted = [name for name in ways(recipe) if name == PLAIN or not options.only or name in options.only]
    costs: dict[str, list[Cost]] = {name: [] for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in wanted:
                costs[name].append(in_a_process(recipe, name, Path(folder) / f"{number}-{wanted.index(name)}"))
            print(f"\n{table(costs)}", flush=True)
    return 0


def in_a_process(recipe: Recipe, way: str, folder: Path) -> Cost:
    folder.mkdir()
    changed = merge(recipe.model_dump(mode="json"), {"output": str(folder / "run"), "train": ways(recipe)[way]})
    steps = {"train": {"steps": recipe.train.clamps.relocate_every}}
    (folder / "recipe.yaml").write_text(json.dumps(merge(changed, steps)))  # JSON is YAML
    result = folder / "cost.json"
    command = [sys.executable, __file__, "--config", str(folder / "recipe.yaml"), "--way", way, "--result", str(result)]
    subprocess.run(command, check=True)
    return read_finished(result, Cost)


def measured(recipe: Recipe) -> Cost:
    run = Run(recipe, RunFolder(recipe))
    events: list[dict] = []
    forget_peak()
    context = run.round_context(recipe.train, past_breakers=[])
    train_round(context, recipe.seed, 1, run.folder.state / "checkpoint.pt", events.append)
    return Cost(seconds=statistics.mean(event["seconds"] for event in events), peak=peak())


def plain(recipe: Recipe) -> Cost:
    run = Run(recipe, RunFolder(recipe))
    model, chat = run.chat_model.model, run.chat_model.chat
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=recipe.train.learning_rate)
    settings, rng = recipe.train, random.Random(recipe.seed)
    forget_peak()
    seconds = []
    for _ in range(settings.steps):
        began = time.monotonic()
        rows = [
            Row(prompt, rng.choice(run.data.refusals)) for prompt in rng.sample(run.data.harmful, harmful_rows(recipe))
        ]
        rows += rng.sample(run.data.benign, settings.benign.rows)
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        ids = torch.full((len(rows), longest), chat.pad_id)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            tokens = torch.tensor([*row.prompt, *row.answer])
            ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
            labels[place, len(row.prompt) : len(tokens)] = tokens[len(row.prompt) :]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        model(**{name: value.to(run.chat_model.device) for name, value in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(model), settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    return Cost(seconds=statistics.mean(seconds), peak=peak())


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is of loading


def peak() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def table(costs: dict[str, list[Cost]]) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"

    base = [statistics.median(numbers) for numbers in zip(*((c.seconds, c.peak) for c in costs[PLAIN]), strict=True)]
    rows = [("a step of", "seconds", "times plain", "peak memory, GiB", "times plain")]
    for name, found in costs.items():
        if found:
            seconds, memory = [c.seconds for c in found], [c.peak for c in found]
            rows.append((
                name, spread(seconds), f"{statistics.median(seconds) / base[0]:.2f}",
                spread([bytes_ / 2**30 for bytes_ in memory]), f"{statistics.median(memory) / base[1]:.2f}",
            ))  # fmt: skip
    return markdown_table(rows)


if __name__ == "__main__":
    sys.exit(guarded(main))
