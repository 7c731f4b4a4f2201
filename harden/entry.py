"""What the entry points share: a recipe from the command line, logging, and errors as one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from harden.errors import HardenError
from harden.recipe import Recipe, load_recipe, read_overrides
from harden.schema import describe_keys

INTERRUPTED = 130


def guarded(run: Callable[[], int], resumes: bool = True) -> int:
    """The exit code of `run`; a user's mistake or a failed measurement becomes one line on stderr. resumes: whether the
    same command goes on after an interruption."""
    try:
        return run()
    except HardenError as error:
        rank = os.environ.get("RANK", "0")
        print(f"harden: {'' if rank == '0' else f'process {rank}: '}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"harden: interrupted{'; the same command resumes the run' if resumes else ''}", file=sys.stderr)
        return INTERRUPTED


def command_parser(program: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows the description as it stands and takes no abbreviated options."""
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def recipe_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = command_parser(program, description, "Every key of the recipe is an option too; `--help-keys` lists them.")
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe to run (required)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--help-keys", action="store_true", help="list every key of a recipe and stop")
    return parser


def parse_recipe(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[Recipe, argparse.Namespace]:
    """The recipe with its overrides, and the parser's own options."""
    known, rest = parser.parse_known_args(arguments)
    if known.help_keys:
        print("Every key of a recipe, as an option, with its default and its meaning.\n")
        print("\n".join(describe_keys(Recipe)))
        raise SystemExit
    pairs = zip(["", *rest], rest, strict=False)
    stray = [text for before, text in pairs if text.endswith((".yaml", ".yml")) and not before.startswith("--")]
    if known.config is None and stray:
        raise HardenError(f"'{stray[0]}' stands alone; give it as --config {stray[0]}")
    overrides = read_overrides(rest, parser.prog) if known.config or any(text.startswith("--") for text in rest) else {}
    if known.config is None:
        raise HardenError("no recipe given: --config recipes/<model>/<what>.yaml")
    return load_recipe(known.config, overrides), known


def start_logging() -> None:
    """Log to stderr, from the main process only."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
