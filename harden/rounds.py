"""The method: locate, attack, train, attack again from scratch, until no single neuron defeats refusal.

Neurons, clamp values and the kept round are chosen on the selection split. The test split is measured twice, before
and after, and nothing is chosen on it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig

from harden import __version__, bundled, processes
from harden.adapters import adapter_state, restore_adapter, save_adapter
from harden.bench import Bench, note_finished
from harden.context import RoundContext, TrainingData
from harden.decisions import accept, best_round, breakers, clamp_of, meets_tolerance, reason_to_stop, utility_factor
from harden.errors import HardenError
from harden.files import read_finished, write_atomically, write_folder
from harden.finetune import train_round
from harden.interventions import Clamp
from harden.measure import attack_record, measure, neuron_records, screen_records
from harden.models import load_chat_model
from harden.objective.rows import Row
from harden.recipe import Recipe
from harden.report.card import model_card
from harden.report.page import report
from harden.report.records import RunRecords
from harden.report.writing import write_page
from harden.results import Measurement, Rate, Results, RoundRecord, count_flips
from harden.runfolder import RunFolder
from harden.settings.training import TrainSection

logger = logging.getLogger(__name__)

TEXT_TOKENS = 64  # of a request that is trained on alone, behind its first: each costs two rows of the vocabulary


def harden(recipe: Recipe) -> Results:
    """Run a recipe, or resume it, in its run folder; returns what is in `results.json`."""
    folder = RunFolder(recipe)
    finished = folder.path / "results.json"
    if processes.from_main(finished.exists):
        note_finished(recipe, folder)
        return read_finished(finished, Results)
    run = Run(recipe, folder)

    rounds = [run.inspect(0, [])]
    before = run.measure_test(0, rounds[0])
    while (stop_reason := reason_to_stop(rounds, recipe)) is None:
        run.restore(next(record.number for record in reversed(rounds) if record.accepted))
        run.train(len(rounds), breakers(rounds), utility_factor(rounds, recipe))
        rounds.append(run.inspect(len(rounds), rounds))
    kept = best_round(rounds, recipe)
    run.restore(kept.number)
    after = run.measure_test(kept.number, kept)

    results = Results(
        harden_version=__version__,
        run=recipe.name,
        model=recipe.model.name,
        adapter=recipe.model.adapter,
        seed=recipe.seed,
        before=before,
        after=after,
        rounds=rounds,
        kept_round=kept.number,
        passed=meets_tolerance(kept, recipe),
        stop_reason=stop_reason,
        max_new_tokens=recipe.generation.max_new_tokens,
        processes=processes.count(),
        seconds=round(folder.seconds(), 1),
    )
    run.save(results)
    return results


class Run:
    """A recipe at work: the model, the prompts and the folder, and the steps of the method on them."""

    def __init__(self, recipe: Recipe, folder: RunFolder):
        self.recipe, self.folder = recipe, folder
        self.bench = Bench(recipe, folder, training=True)
        self.chat_model, self.responder = self.bench.chat_model, self.bench.responder
        self._keep_adapter(0)
        self.benign_rows = {name: self.bench.benign_rows(name) for name in ("selection", "test")}
        self.data = self._training_data()

    # -- the steps ---------------------------------------------------------------------------------------------

    def inspect(self, number: int, earlier: Sequence[RoundRecord]) -> RoundRecord:
        """Search the present model for its worst neuron and measure it on the selection split.

        The search starts from scratch; clamps that broke the model in an earlier round are generated with again.
        """
        recipe, bench = self.recipe, self.bench

        def make() -> RoundRecord:
            passes = bench.passes()
            located, search = bench.search(passes, breakers(earlier))
            measurement = measure(
                self.responder,
                "selection",
                search.no_attack,
                search.worst,
                bench.twins["selection"],
                bench.more_twins["selection"],
                self.benign_rows["selection"],
                bench.benign_texts("selection"),
                passes.scores,
            )
            most = max(count_flips(a.outcomes, search.no_attack.outcomes) for a in search.finals)
            accepted, decision = accept(number, measurement, earlier[0].selection if earlier else None, recipe)
            return RoundRecord(
                number=number,
                steps=recipe.train.steps if number else 0,
                utility_factor=utility_factor(earlier, recipe),
                located=neuron_records(located),
                screened=screen_records(search),
                first_heat=[attack_record(attempt, "selection") for attempt in search.first_heat],
                finals=[attack_record(attempt, "selection") for attempt in search.finals],
                most_flipped=Rate.of(most, len(bench.harmful["selection"])),
                selection=measurement,
                accepted=accepted,
                decision=decision,
            )

        record = self.folder.stage(f"round-{number}/inspect", RoundRecord, make)
        worst = record.selection.worst_neuron
        logger.info(
            "round %d, selection split: worst neuron %s at %.4g, attack success %s (no attack %s); %s",
            number, worst.neuron, worst.value, f"{worst.comply.rate:.0%}",
            f"{record.selection.no_attack.comply.rate:.0%}", record.decision,
        )  # fmt: skip
        return record

    def train(self, number: int, past_breakers: Sequence[Clamp], factor: float) -> None:
        """Train the present model for one round and keep its adapter.

        factor: on the weights of the terms that keep it as it was.
        """
        state, settings = self.folder.state / f"round-{number}", self.recipe.train
        state.mkdir(parents=True, exist_ok=True)
        utility = {
            name: term.model_copy(update={"weight": factor * term.weight})
            for name, term in (("benign", settings.benign), ("twins", settings.twins))
        }

        def make() -> int:
            context = self.round_context(settings.model_copy(update=utility), past_breakers)
            train_round(context, self.recipe.seed, number, state / "checkpoint.pt", self.folder.log)
            self._keep_adapter(number)
            return self.recipe.train.steps

        self.folder.stage(f"round-{number}/train", int, make)
        self.restore(number)

    def measure_test(self, number: int, record: RoundRecord) -> Measurement:
        """Measure the present model, under the clamp that was worst on the selection split, on the test split."""
        bench, clamp = self.bench, clamp_of(record.selection.worst_neuron)

        def make() -> Measurement:
            no_attack, attacked = self.responder.attempt([None, clamp], bench.harmful["test"], f"round {number}: test")
            return measure(
                self.responder,
                "test",
                no_attack,
                attacked,
                bench.twins["test"],
                bench.more_twins["test"],
                self.benign_rows["test"],
                bench.benign_texts("test"),
                bench.scores("test"),
            )

        return self.folder.stage(f"round-{number}/test", Measurement, make)

    def restore(self, number: int) -> None:
        """Make the model the one of a round."""
        state = torch.load(self.folder.state / f"round-{number}/adapter.pt", weights_only=True, map_location="cpu")
        restore_adapter(self.chat_model.model, state)

    def save(self, results: Results) -> None:
        """Write adapter/, model/ if asked for, README.md, results.json and report.html."""
        if processes.is_main():
            card = model_card(results, self.recipe)
            self.save_adapter(card)
            if self.recipe.save.merged:
                write_folder(self.folder.path / "model", self._save_merged)
            write_atomically(self.folder.path / "README.md", card)
            write_atomically(self.folder.path / "results.json", results.model_dump_json(indent=1) + "\n")
            page = report([RunRecords(self.folder.path.name, {"training": self.recipe}, training=results)])
            write_page(self.folder.path / "report.html", page.html)
        processes.wait()

    def save_adapter(self, card: str = "") -> None:
        """Write adapter/, with `card` as its README.md."""
        for config in self.chat_model.model.peft_config.values():
            config.base_model_name_or_path = self.recipe.model.name

        def write(part: Path) -> None:
            save_adapter(self.chat_model.model, part)
            write_atomically(part / "README.md", card)  # instead of PEFT's empty template

        write_folder(self.folder.path / "adapter", write)

    # -- what they work with -----------------------------------------------------------------------------------

    def round_context(self, settings: TrainSection, past_breakers: Sequence[Clamp]) -> RoundContext:
        return RoundContext(
            self.chat_model,
            self.data,
            self.bench.phrases,
            settings,
            self.recipe.attack.max_benign_rise,
            past_breakers,
            self.recipe.generation.batch_size,
        )

    def _training_data(self) -> TrainingData:
        chat, train = self.chat_model.chat, self.bench.splits["train"]
        twins = {twin.id: tuple(chat.prompt_ids(twin.text)) for twin in train.twins}
        return TrainingData(
            harmful=tuple(tuple(chat.prompt_ids(prompt.text)) for prompt in train.harmful),
            refusals=tuple(tuple(chat.answer_ids(refusal)) for refusal in self.bench.refusals),
            twins=tuple(twins.get(prompt.twin) for prompt in train.harmful),
            more_twins=tuple(tuple(chat.prompt_ids(twin.text)) for twin in train.more_twins),
            benign=tuple(self.bench.benign_rows("train")),
            harmful_texts=tuple(prompt.text for prompt in train.harmful),
            twin_texts=tuple(prompt.text for prompt in train.twins),
            probe=self.bench.probe("train"),
            texts=self._texts() if self.recipe.train.benign.texts else (),
        )

    def _texts(self) -> tuple[Row, ...]:
        """Benign training requests alone: the first token, and as an answer the next ones."""
        texts = self.bench.benign_texts("train")
        rows = [ids[: TEXT_TOKENS + 1] for ids in self.chat_model.tokenizer(texts)["input_ids"]]
        if not any(len(ids) > 1 for ids in rows):
            raise HardenError(
                "train.benign.texts: none of prompts.benign has two tokens; set it to 0 or give longer ones"
            )
        return tuple(Row(tuple(ids[:1]), tuple(ids[1:])) for ids in rows if len(ids) > 1)

    def _keep_adapter(self, number: int) -> None:
        path = self.folder.state / f"round-{number}" / "adapter.pt"
        if processes.is_main() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            torch.save(adapter_state(self.chat_model.model), part)
            part.replace(path)
        processes.wait()

    def _save_merged(self, folder: Path) -> None:
        """The base model with the adapter merged in; loaded anew, so that the measured model stays untouched."""
        base = load_chat_model(self.recipe.model.name, self.recipe.model.dtype)
        merged = PeftModel.from_pretrained(base.model, str(self.folder.path / "adapter")).merge_and_unload()
        with contextlib.suppress(OSError):  # not every model has one
            merged.generation_config = GenerationConfig.from_pretrained(str(bundled.resolve(self.recipe.model.name)))
        merged.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
