"""Decide whether a checkpoint may ship.

`harden gate --model M (--adapter A | --reference R) --policy P.yaml --output DIR`

Runs the attacks that the policy limits and leaves the evidence in DIR. Exit codes: 0 passed; 1 a threshold failed;
2 usage or configuration; 3 the measurement failed, or there is too little evidence to decide; 130 interrupted. The same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harden.entry import command_parser, guarded, start_logging
from harden.errors import HardenError, MeasurementError
from harden.policy import ReleasePolicy, load_policy
from harden.recipe import Recipe
from harden.settings.measuring import ModelSection
from harden.verdict import GateResults


def main(arguments: list[str] | None = None) -> int:
    """Parse, load, measure, decide; returns the exit code. Nothing that goes wrong gives 0 or 1."""

    def command() -> int:
        options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
        policy = load_policy(options.policy)
        model = ModelSection(name=options.model, adapter=options.adapter, dtype=options.dtype)
        if not (options.adapter or options.reference):
            raise HardenError(
                "a model without an adapter needs --reference: the model it was made from, or one that speaks as it "
                "should. A model that learned to refuse everywhere finds compliance unlikely, and must not judge itself"
            )
        _check_output(options.output, options.model, options.adapter)
        reference = ModelSection(
            name=options.reference or options.model, adapter=options.reference_adapter, dtype=options.dtype
        )
        recipe = policy.recipe(model.model_dump(), options.output, options.reference)
        return run(policy, recipe, reference, options.compare)

    try:
        return guarded(command)
    except Exception as error:  # whatever it is, it is no verdict
        traceback.print_exc()
        print(f"harden: error: the measurement broke: {type(error).__name__}: {error}", file=sys.stderr)
        return MeasurementError.exit_code


def run(policy: ReleasePolicy, recipe: Recipe, reference: ModelSection, compare: str | None) -> int:
    start_logging()

    from harden import processes  # torch and transformers: only now, so that --help is instant
    from harden.files import read_finished
    from harden.gate.run import gate
    from harden.report.verdict import WORDS, verdict_table

    earlier = read_finished(Path(compare), GateResults) if compare else None
    if compare and (before := Path(compare).with_name("policy.json")).is_file():
        budget = read_finished(before, ReleasePolicy).budget
        if budget != policy.budget and processes.is_main():
            print(
                f"harden: warning: {compare} was measured with another budget: what differs may be the search, and not "
                "the model",
                file=sys.stderr,
            )
    with _deadline(policy.max_minutes):
        verdict = gate(policy, recipe, reference, earlier)
    if processes.is_main():
        reasons = "".join(f"\n- {reason}" for reason in verdict.reasons)
        words = f"{verdict_table(verdict)}\n\n{WORDS[verdict.outcome]}{reasons}\n\n{recipe.output}/verdict.json"
        print(f"\n{words}", flush=True)  # a launcher stops this process as soon as another one gives its exit code
    processes.finish()
    return verdict.exit_code


def _check_output(output: str, *sources: str | None) -> None:
    """HardenError for a folder inside of what is gated: evidence would change the files that it is about."""
    for source in filter(None, sources):
        if Path(source).is_dir() and Path(output).resolve().is_relative_to(Path(source).resolve()):
            raise HardenError(f"--output {output} lies inside {source}; evidence must lie beside what it is about")


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; leave the option out or give a value")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("harden gate", __doc__)
    parser.add_argument("--model", type=_given, required=True, help="a bundled model, a local folder or a hub id")
    parser.add_argument("--adapter", type=_given, help="PEFT adapter of the model: a local folder or a hub id")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="number type in which the model and the reference run (default: float32)",
    )
    parser.add_argument(
        "--policy",
        type=_given,
        required=True,
        metavar="POLICY.yaml",
        help="limits and budget, for example recipes/gate/quick.yaml",
    )
    parser.add_argument(
        "--output",
        type=_given,
        required=True,
        metavar="DIR",
        help="folder of the evidence; an unfinished gate in it goes on",
    )
    parser.add_argument(
        "--reference",
        type=_given,
        help="model that benign KL is measured from, and that is asked how likely completions are; default: the one "
        "below the adapter; required without --adapter",
    )
    parser.add_argument("--reference-adapter", type=_given, help="adapter of the reference, for the KL alone")
    parser.add_argument(
        "--compare",
        type=_given,
        metavar="RESULTS.json",
        help="results.json of an earlier gate; a figure significantly worse than there fails",
    )
    return parser


class _TimeOver(BaseException):
    """Nothing that catches errors along the way may catch this."""


@contextmanager
def _deadline(minutes: float | None) -> Iterator[None]:
    """Raises MeasurementError when the time inside is over."""
    if minutes is None or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signal, _frame):
        raise _TimeOver

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 1.0)  # again and again: one may be lost in a destructor
    try:
        yield
    except _TimeOver:
        raise MeasurementError(
            f"the {minutes:g} minutes of the policy are over before it could be decided; the same command goes on "
            "where it was, for as long again"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
