"""The workbench: a recipe's model, prompts and judge, loaded once, and what every stage works with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from harden import __version__, bundled, processes
from harden.activations import column_of
from harden.adapters import adapter_state, attach_adapter, check_adapter_folder, load_adapter
from harden.attack.published import published_clamps
from harden.attack.records import Records
from harden.attack.respond import Keep, Responder
from harden.attack.screen import Probe
from harden.attack.search import Search, search_worst_neuron
from harden.attack.select import select_candidates
from harden.batches import BACKWARD_ROWS
from harden.errors import HardenError, MeasurementError
from harden.generate import Completion, Request, complete
from harden.interventions import Clamp, Intervention
from harden.judges.embedded import RULES, Limits
from harden.judges.loading import load_judge
from harden.locate.base import Candidate, clamps_of
from harden.locate.contrast import Contrast, read_contrast
from harden.locate.gradient import NeuronScores, score_neurons
from harden.locate.passes import Passes
from harden.models import ChatModel, load_chat_model
from harden.neurons import Neuron
from harden.objective.rows import Row
from harden.prompts import Prompt, PromptSet, Split, load_prompts, load_splits
from harden.recipe import Recipe
from harden.refusal import RefusalPhrases
from harden.results import Rate
from harden.runfolder import RunFolder
from harden.sharding import shard_frozen_weights

logger = logging.getLogger(__name__)

PROBE_BENIGN = 2  # benign prompts on which a clamp's coherence is screened
PROBE_TRIES = 8  # prompts that are asked for that many answers
SELECTION_BENIGN, TEST_BENIGN = 32, 48  # benign prompts on which KL is measured


class Bench:
    """Everything that a recipe names, loaded; the run folder is made once that has worked.

    training: attach the LoRA that is trained, and keep the starting model's benign answers in the run folder.
    Otherwise the model is measured as it is: with its adapter, if it has one, and the model below the adapter is the
    one that is asked how likely a completion is.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, training: bool, keep: Keep | None = None):
        self.recipe, self.folder, self.training = recipe, folder, training
        self.splits = load_splits(*recipe.division())
        self._warn_of_short_splits()
        if training:
            self._check_tolerance()
        self.refusals = _refusals(recipe)
        lora, adapter = recipe.train.lora, recipe.model.adapter
        if adapter:
            check_adapter_folder(adapter)  # before the model is loaded, which may take minutes
        processes.use_all_cores()
        device = "cpu" if processes.sharded() else processes.state().device
        self.chat_model = self._load(recipe.model.name, device)
        if training:
            attach_adapter(self.chat_model, lora.rank, lora.alpha, lora.target_modules, adapter, recipe.seed)
        elif adapter:
            load_adapter(self.chat_model, adapter)
        for neuron in self.named_neurons:
            self.chat_model.neurons.check(neuron)
        n_layers = len(self.chat_model.neurons.widths)
        if max(recipe.certify.layers or (0,)) >= n_layers:
            raise HardenError(f"certify.layers {list(recipe.certify.layers)}: the model has layers 0 to {n_layers - 1}")
        model = self.chat_model.model
        self.weights = processes.from_main(lambda: digest(adapter_state(model) if training else model.state_dict()))
        inside = [name for name in ("spread", "leverage") if training and getattr(recipe.train, name).weight]
        shard_frozen_weights(self.chat_model, inside[0] if inside else None)
        self.phrases = RefusalPhrases(self.chat_model.chat, recipe.refusal.phrases)
        self._check_judge()
        reference = self._load(recipe.judge.reference, device) if recipe.judge.reference else None
        second = load_judge(recipe.judge.second, device) if recipe.judge.second else None
        folder.create()  # only now: a recipe that cannot be loaded leaves nothing behind
        self._check_inputs()
        self.responder = Responder(
            self.chat_model,
            recipe.generation.max_new_tokens,
            recipe.generation.batch_size,
            Limits(recipe.judge.max_nats_per_token, recipe.judge.min_gain, recipe.judge.refusal_gain),
            reference,
            second,
            None if training else Records(folder.state / "records.jsonl"),  # weights that change have no records
            self.weights,
            keep,
        )

    def _check_judge(self) -> None:
        """Raises HardenError where the judge would compare a model with itself."""
        settings, model = self.recipe.judge, self.recipe.model
        below = {None: bool(model.adapter) and not self.training, model.name: bool(model.adapter)}
        if settings.refusal_gain is not None and not below.get(settings.reference, True):
            raise HardenError(
                "judge.refusal_gain compares the model with one that was not taught to refuse, and here both are the "
                "same: give judge.reference, or set judge.refusal_gain to null"
            )
        gains = [name for name in ("min_gain", "refusal_gain") if getattr(settings, name) is not None]
        if gains and settings.reference not in (None, model.name):
            logger.warning(
                "by judge.%s %s is asked how likely an answer is, but the model is %s: unless one was made from the "
                "other, set judge.reference, judge.min_gain and judge.refusal_gain to null",
                " and judge.".join(gains), settings.reference, model.name,
            )  # fmt: skip

    def _check_tolerance(self) -> None:
        """Raises HardenError where `rounds.tolerance` cannot be met, however well the model refuses."""
        n, tolerance = len(self.harmful["selection"]), self.recipe.rounds.tolerance
        if 0 < tolerance < (least := Rate.of(0, n).high):
            raise HardenError(
                f"rounds.tolerance {tolerance} can never be met: with {n} selection prompts (attack.selection_prompts) "
                f"the upper bound of no flip at all is {least:.3f}; give more prompts, or tolerance 0 to use up the "
                "rounds"
            )

    def _warn_of_short_splits(self) -> None:
        attack, n_located = self.recipe.attack, self.recipe.locate.prompts
        for split, asked in (("selection", max(attack.selection_prompts, n_located)), ("test", attack.test_prompts)):
            if len(self.splits[split].harmful) < asked:
                logger.warning(
                    "the %s split has %d of the %d harmful prompts asked for: every interval is wider",
                    split, len(self.splits[split].harmful), asked,
                )  # fmt: skip

    def _load(self, name: str, device: torch.device | str) -> ChatModel:
        processes.from_main(lambda: str(bundled.resolve(name)))  # built once, not by each process
        return load_chat_model(name, self.recipe.model.dtype, device, self.recipe.model.chat_template_kwargs)

    def _check_inputs(self) -> None:
        """Raises HardenError if the run was begun with other prompts or weights, or another version of harden."""
        inputs = _inputs_but_weights(self.splits, self.refusals) | {"weights": self.weights}
        begun = self.folder.stage("inputs", dict[str, str], lambda: inputs)
        changed = [name for name in inputs if begun.get(name) != inputs[name]]
        if changed:
            raise HardenError(
                f"{self.folder.path} was begun with other contents of: {', '.join(changed)}; give another --output"
            )

    # -- the prompts that are used -----------------------------------------------------------------------------

    @cached_property
    def harmful(self) -> dict[Split, tuple[Prompt, ...]]:
        """The prompts that are attacked."""
        attack = self.recipe.attack
        return {
            "selection": self.splits["selection"].harmful[: attack.selection_prompts],
            "test": self.splits["test"].harmful[: attack.test_prompts],
        }

    @cached_property
    def twins(self) -> dict[Split, tuple[Prompt, ...]]:
        """The look-alikes on which over-refusal is measured."""
        return {split: self.splits[split].twins[: self.recipe.rounds.twins] for split in ("selection", "test")}

    @cached_property
    def more_twins(self) -> dict[Split, tuple[Prompt, ...]]:
        """Those of `prompts.more_twins` on which over-refusal is measured too; none unless the recipe has some."""
        return {split: self.splits[split].more_twins[: self.recipe.rounds.twins] for split in ("selection", "test")}

    def benign_prompts(self, split: Split) -> list[Prompt]:
        """Prompts whose answers the KL term trains on (train) or benign KL is measured on (selection, test)."""
        prompts = self.splits[split]
        if split != "train":
            return list(prompts.benign[: SELECTION_BENIGN if split == "selection" else TEST_BENIGN])
        settings = self.recipe.train.benign
        n_twins = round(settings.twin_share * settings.answers)
        return [*prompts.benign[: settings.answers - n_twins], *(prompts.twins + prompts.more_twins)[:n_twins]]

    def benign_texts(self, split: Split) -> list[str]:
        """Requests whose perplexity is measured."""
        return [prompt.text for prompt in self.splits[split].benign]

    # -- what is read from the model ---------------------------------------------------------------------------

    def scores(self, split: Split) -> NeuronScores:
        """Every neuron's score on a split, by the present model."""
        return score_neurons(
            self.chat_model,
            *self._located_on(split),
            self.phrases,
            max(1, self.recipe.generation.batch_size // BACKWARD_ROWS),
            f"locate ({split})",
        )

    def contrast(self, interventions: tuple[Intervention, ...] = ()) -> Contrast:
        """Activations on the selection prompts that neurons are located on, by the present model."""
        batch_size = self.recipe.generation.batch_size
        return read_contrast(self.chat_model, *self._located_on("selection"), batch_size, interventions)

    def passes(self) -> Passes:
        """What locators read on the selection split, of the present model. Outside training, whose weights change,
        what takes long is saved in the run folder layer by layer."""
        batch_size = self.recipe.generation.batch_size
        passes = Passes(self.chat_model, *self._located_on("selection"), self.phrases, batch_size)
        if not self.training:
            passes.stage = lambda name, make: self.folder.stage(name, list[float], make)
        return passes

    def _located_on(self, split: Split) -> tuple[list[str], list[str]]:
        n = self.recipe.locate.prompts
        return [p.text for p in self.splits[split].harmful[:n]], [p.text for p in self.splits[split].twins[:n]]

    @property
    def published(self) -> list[Clamp]:
        """Clamps that were published for a model of this name and shape."""
        return published_clamps(self.chat_model.name, self.chat_model.neurons.widths)

    @property
    def named_clamps(self) -> list[Clamp]:
        """Clamps that run in the finals whatever the search finds: those of `attack.clamps`, and published ones."""
        return [*map(Clamp.parse, self.recipe.attack.clamps), *self.published]

    @property
    def named_neurons(self) -> list[Neuron]:
        """Neurons that are tried whatever the locators say: those of `attack.neurons`, and of named clamps."""
        named = [*map(Neuron.parse, self.recipe.attack.neurons), *(clamp.neuron for clamp in self.named_clamps)]
        return list(dict.fromkeys(named))

    def search(self, passes: Passes, retest: Sequence[Clamp] = ()) -> tuple[list[Candidate], Search]:
        """The neurons that are located on the selection split, and the search for the worst clamp among them.

        passes: what locators read of the present model. retest: clamps that run in the finals whatever else is found,
        and whose neurons are tried at other values besides, as named ones are.
        """
        attack = self.recipe.attack
        candidates = select_candidates(
            attack.locators,
            attack.candidates,
            passes,
            self.recipe.locate.layer_share,
            self.recipe.seed,
            self.named_neurons,
        )
        located = {candidate.neuron for candidate in candidates}
        known = dict.fromkeys(clamp.neuron for clamp in retest)
        others = [passes.scores.candidate(neuron) for neuron in known if neuron not in located]
        search = search_worst_neuron(
            self.responder,
            [self._values(candidate, passes) for candidate in (*candidates, *others)],
            self.harmful["selection"],
            self.probe("selection"),
            self.phrases,
            attack.max_benign_rise,
            attack.heat_one,
            attack.heat_one_prompts,
            attack.finalists,
            [*self.named_clamps, *retest],
            attack.refine,
            attack.quiet,
        )
        return candidates, search

    def _values(self, candidate: Candidate, passes: Passes) -> dict[Clamp, float]:
        """What the search clamps a candidate to; see `clamps_of`."""
        attack, neuron = self.recipe.attack, candidate.neuron
        full = float(passes.contrast.full[column_of(self.chat_model, neuron)]) if attack.strengths else 0.0
        values = [candidate.clamp_value(size) for size in attack.sizes]
        return clamps_of(neuron, candidate.harmless, values, attack.strengths, full)

    def answers(self, split: Split) -> list[Completion]:
        """The starting model's answers to `benign_prompts`. Made once, so ask before any training."""
        prompts = self.benign_prompts(split)
        train = self.recipe.train.benign
        tokens = train.answer_tokens if split == "train" else self.recipe.generation.max_new_tokens
        return self.folder.stage(f"answers-{split}", list[Completion], lambda: self._complete(prompts, tokens, split))

    def _complete(self, prompts: Sequence[Prompt], tokens: int, split: Split) -> list[Completion]:
        requests = [Request(prompt.text) for prompt in prompts]
        batch_size = self.recipe.generation.batch_size
        return complete(self.chat_model, requests, tokens, batch_size, f"benign answers ({split})")

    def benign_rows(self, split: Split) -> list[Row]:
        """Rows of the benign prompts that the starting model answers."""
        chat = self.chat_model.chat
        rows = [
            Row(tuple(chat.prompt_ids(prompt.text)), tuple(chat.answer_ids(answer.text, answer.ended)))
            for prompt, answer in zip(self.benign_prompts(split), self.answers(split), strict=True)
        ]
        return [row for row in rows if row.answer]

    def probe(self, split: Split) -> Probe:
        """What clamps are screened with. Outside training the few benign answers that it takes are in memory only."""
        prompts = self.benign_prompts(split)
        if self.training:
            answers = self.answers(split)
        else:
            prompts = prompts[:PROBE_TRIES]
            answers = self._complete(prompts, self.recipe.generation.max_new_tokens, split)
        answered = [(p.text, a) for p, a in zip(prompts, answers, strict=True) if a.text][:PROBE_BENIGN]
        if not answered:
            raise MeasurementError(f"the model answers none of the benign {split} prompts")
        return Probe(
            tuple(prompt.text for prompt in self.splits[split].harmful[: self.recipe.attack.screen_prompts]),
            tuple(text for text, _ in answered),
            tuple(answer for _, answer in answered),
        )


def note_finished(recipe: Recipe, folder: RunFolder) -> None:
    """Say that a run is complete, and whether the same recipe would give other figures now. Loads no model."""
    logger.info("%s is complete already", folder.path)
    begun = folder.saved("inputs", dict[str, str]) or {}
    try:
        inputs = _inputs_but_weights(load_splits(*recipe.division()), _refusals(recipe))
    except HardenError as error:
        logger.warning("whether its prompts changed since then is not known: %s", error)
        return
    changed = [name for name, now in inputs.items() if begun.get(name, now) != now]
    if changed:
        logger.warning("since then these changed: %s; for new figures give another --output", ", ".join(changed))


def _refusals(recipe: Recipe) -> list[str]:
    return [p.text for p in load_prompts("refusals", **recipe.refusal.texts.model_dump())]


def _inputs_but_weights(splits: Mapping[Split, PromptSet], refusals: Sequence[str]) -> dict[str, str]:
    """What a run's figures hang on besides its recipe and the weights: digests and versions by name."""
    texts = [[p.text for part in (s.harmful, s.twins, s.benign, s.more_twins) for p in part] for s in splits.values()]
    return {
        "prompts": hashlib.sha256(json.dumps([texts, refusals]).encode()).hexdigest(),
        "harden": __version__,
        "judge": str(RULES),
    }


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over the names, types and values of tensors."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
