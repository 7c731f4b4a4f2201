"""Prompts: where they come from, and the disjoint train, selection and test splits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from harden.errors import HardenError

logger = logging.getLogger(__name__)

Split = Literal["train", "selection", "test"]
SPLITS: tuple[Split, ...] = ("train", "selection", "test")


@dataclass(frozen=True)
class Prompt:
    """A user's request; `twin` is the id of its partner in the other file, if it has one: of a harmful prompt its
    look-alike, of a look-alike its harmful prompt."""

    id: str
    category: str
    text: str
    twin: str | None = None

    @property
    def pair(self) -> str:
        """Shared by a harmful prompt and its benign twin; decides the split."""
        return min(self.id, self.id if self.twin is None else self.twin)


@dataclass(frozen=True)
class PromptSet:
    harmful: tuple[Prompt, ...]
    twins: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    more_twins: tuple[Prompt, ...] = ()
    """Further look-alikes, of another style; they need not be anyone's twins."""


def load_prompts(kind: str, path: str, column: str, subset: str | None, split: str) -> list[Prompt]:
    """Prompts from one source; `kind` is harmful, twins, more_twins, benign or refusals.

    path: `embedded`, a .jsonl/.json/.csv/.txt file, or a `datasets` hub id (then `subset` and `split` name its
    part). Texts that occur twice are kept once. Raises HardenError when the source is missing or empty, lacks the
    column, or holds something that is no text.
    """
    if path == "embedded":
        rows, column = _embedded(f"{kind}.jsonl"), "text"
    elif Path(path).suffix in (".jsonl", ".json", ".csv", ".txt"):
        rows = _read_file(Path(path))
    else:
        rows = _read_hub(path, subset, split)

    prompts: dict[str, Prompt] = {}
    names: set[str] = set()
    for number, row in enumerate(rows):
        if column not in row:
            raise HardenError(f"{kind} prompts: {path} has no column '{column}'; it has {', '.join(map(str, row))}")
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise HardenError(f"{kind} prompts: row {number + 1} of {path} has no text in column '{column}'")
        text = text.strip()
        name, twin = (str(row[key]) if row.get(key) not in (None, "") else None for key in ("id", "twin"))
        name = name or hashlib.sha256(text.encode()).hexdigest()[:12]
        if text not in prompts and name in names:
            raise HardenError(f"{kind} prompts: {path} has the id '{name}' twice")
        names.add(name)
        prompts.setdefault(text, Prompt(name, str(row.get("category") or "all"), text, twin))
    if not prompts:
        raise HardenError(f"{kind} prompts: {path} is empty")
    if len(prompts) < len(rows):
        logger.info("%s prompts: dropped %d repeated texts of %d", kind, len(rows) - len(prompts), len(rows))
    return list(prompts.values())


def split_prompts(
    prompts: Sequence[Prompt], train_share: float, selection_share: float, seed: int
) -> dict[Split, tuple[Prompt, ...]]:
    """Divide prompts into disjoint splits, in the same proportions in every category.

    Within a category the pairs are ordered by a seeded hash and cut, so that a harmful prompt and its twin fall
    into the same split whenever both sources hold the same pairs. Each split is ordered by hash too: any first n
    of it are a random sample. Raises HardenError if a split comes out empty.
    """
    splits = _divided(prompts, train_share, selection_share, seed)
    _check_filled(splits, train_share, selection_share)
    return {name: _ordered(members, seed) for name, members in splits.items()}


def load_splits(
    sources: dict[str, dict[str, Any]], train_share: float, selection_share: float, seed: int
) -> dict[Split, PromptSet]:
    """All splits of the sources {harmful, twins, benign}, each given as keyword arguments of `load_prompts`.

    A source more_twins may be among them: its look-alikes go where the harmful prompt (or its twin) goes that they name
    as `twin`; those that name none are divided like the others. Raises HardenError if a text stands in two sources or
    splits that must be disjoint, a pair in two splits, or if a split comes out empty.
    """
    prompts = {kind: load_prompts(kind, **source) for kind, source in sources.items()}
    prompts["harmful"], prompts["twins"] = (
        _paired(prompts[kind], prompts[other]) for kind, other in (("harmful", "twins"), ("twins", "harmful"))
    )
    more = _paired(prompts.pop("more_twins", []), prompts["harmful"])
    parts = {kind: split_prompts(prompts[kind], train_share, selection_share, seed) for kind in prompts}
    place = {prompt.id: name for kind in ("harmful", "twins") for name in SPLITS for prompt in parts[kind][name]}
    further = _divided([prompt for prompt in more if prompt.twin not in place], train_share, selection_share, seed)
    for prompt in more:
        if prompt.twin in place:
            further[place[prompt.twin]].append(prompt)
    if more:
        _check_filled(further, train_share, selection_share, " of more_twins")
    parts["more_twins"] = {name: _ordered(further[name], seed) for name in SPLITS}
    pairs: dict[str, str] = {}
    for split, prompt in [(s, p) for kind in ("harmful", "twins") for s in SPLITS for p in parts[kind][s]]:
        if prompt.twin and pairs.setdefault(prompt.pair, split) != split:
            raise HardenError(
                f"prompt '{prompt.id}' and its twin fall into different splits; give both the same category and keep "
                "the pairs of both files complete"
            )
    seen: dict[str, str] = {}
    for kind, splits in parts.items():
        for name, members in splits.items():
            for prompt in members:
                place = seen.setdefault(prompt.text, f"{kind}/{name}")
                if place != f"{kind}/{name}":
                    raise HardenError(f"prompt '{prompt.text[:60]}' stands in {place} and in {kind}/{name}; remove one")
    return {name: PromptSet(**{kind: parts[kind][name] for kind in parts}) for name in SPLITS}


def _divided(
    prompts: Sequence[Prompt], train_share: float, selection_share: float, seed: int
) -> dict[Split, list[Prompt]]:
    categories: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        categories[prompt.category].append(prompt)
    splits: dict[Split, list[Prompt]] = {name: [] for name in SPLITS}
    for members in categories.values():
        pairs = sorted({prompt.pair for prompt in members}, key=lambda pair: _rank(pair, seed))
        first, second = round(len(pairs) * train_share), round(len(pairs) * (train_share + selection_share))
        where: dict[str, Split] = {}
        for place, pair in enumerate(pairs):
            where[pair] = "train" if place < first else "selection" if place < second else "test"
        for prompt in members:
            splits[where[prompt.pair]].append(prompt)
    return splits


def _check_filled(splits: dict[Split, list[Prompt]], train_share: float, selection_share: float, of: str = "") -> None:
    total = sum(map(len, splits.values()))
    for name, members in splits.items():
        if not members:
            raise HardenError(
                f"the {name} split{of} is empty: {total} prompts are too few for shares of {train_share} and "
                f"{selection_share}; give more prompts or change prompts.train_share and prompts.selection_share"
            )


def _ordered(prompts: Iterable[Prompt], seed: int) -> tuple[Prompt, ...]:
    return tuple(sorted(prompts, key=lambda prompt: _rank(prompt.pair, seed)))


def _rank(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _paired(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, each with its twin also where only the twin names it."""
    named_by = {other.twin: other.id for other in others if other.twin is not None}
    return [p if p.twin is not None else replace(p, twin=named_by.get(p.id)) for p in prompts]


def _embedded(name: str) -> list[dict[str, Any]]:
    text = resources.files("harden").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [{"text": line} for line in text.split("\n") if line.strip()]
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        rows = json.loads(text) if path.suffix == ".json" else _json_lines(text)
        if isinstance(rows, (dict, str, int, float)) or rows is None:
            raise ValueError("it must hold a list")
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    except FileNotFoundError:
        raise HardenError(f"no such prompt file: {path}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise HardenError(f"cannot read prompt file {path}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise HardenError(f"prompt file {path} must hold texts or objects with named columns")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _read_hub(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(path, subset, split=split))
    except Exception as error:  # datasets raises many kinds; each is the user's to mend
        reason = " ".join(str(error).split())[:300]
        raise HardenError(
            f"cannot load data set '{path}' (subset {subset}, split {split}): {reason}; give a .jsonl, .json, .csv "
            "or .txt file instead if there is no network"
        ) from None
