"""Harden a model: `accelerate launch harden/train.py --config recipes/... [--train.learning_rate 1e-4 ...]`.

Exit codes: 0 done; 2 usage or configuration; 3 the run failed (a loss that is not finite, say); 130 interrupted.
A run that was interrupted is resumed by the same command.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from harden.errors import HardenError
from harden.recipe import Recipe, load_recipe, read_overrides


def main(arguments: list[str] | None = None) -> int:
    """Parse, load, run, print the table; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        recipe, print_only = parse(arguments)
        if print_only:
            print(recipe.to_yaml(), end="")
            return 0
        return run(recipe)
    except HardenError as error:
        rank = os.environ.get("RANK", "0")
        print(f"harden: {'' if rank == '0' else f'process {rank}: '}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("harden: interrupted; the same command resumes the run", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> tuple[Recipe, bool]:
    """The recipe with its overrides, and whether it is only to be printed."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of the recipe is an option too; `--help-keys` lists them.",
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe to run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--help-keys", action="store_true", help="list every key of a recipe and stop")
    known, rest = parser.parse_known_args(arguments)
    if known.help_keys:
        read_overrides(["--help"], "train.py")
    if known.config is None:
        raise HardenError("no recipe given: --config recipes/<model>/<what>.yaml")
    return load_recipe(known.config, read_overrides(rest, "train.py")), known.print_config


def run(recipe: Recipe) -> int:
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from harden import processes  # torch and transformers: only now, so that --help is instant
    from harden.report.card import summary_table, verdict_line
    from harden.rounds import harden

    results = harden(recipe)
    main_process = processes.is_main()
    processes.finish()
    if main_process:
        print(f"\n{recipe.name}\n\n{summary_table(results)}\n\n{verdict_line(results)}\n{recipe.output}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
