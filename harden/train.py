"""Harden a model: `harden train --config RECIPE.yaml [--train.learning_rate 1e-4 ...]`, or in several processes
`accelerate launch harden/train.py --config RECIPE.yaml ...`.

Exit codes: 0 done; 2 usage or configuration; 3 the run failed (a loss that is not finite, say); 130 interrupted.
A run that was interrupted is resumed by the same command.
"""

from __future__ import annotations

import sys

from harden.entry import guarded, parse_recipe, recipe_parser, start_logging
from harden.recipe import Recipe


def main(arguments: list[str] | None = None, program: str = "train.py") -> int:
    """Parse, load, run, print the table; returns the exit code."""

    def command() -> int:
        recipe, options = parse_recipe(
            recipe_parser(program, __doc__), sys.argv[1:] if arguments is None else arguments
        )
        if options.print_config:
            print(recipe.to_yaml(), end="")
            return 0
        return run(recipe)

    return guarded(command)


def run(recipe: Recipe) -> int:
    start_logging()

    from harden import processes  # torch and transformers: only now, so that --help is instant
    from harden.report.card import summary_table, tolerance_line, verdict_line
    from harden.rounds import harden

    results = harden(recipe)
    main_process = processes.is_main()
    processes.finish()
    if main_process:
        print(
            f"\n{recipe.name}\n\n{summary_table(results)}\n\n{verdict_line(results)}\n{tolerance_line(results, recipe)}"
        )
        made = f"README.md, report.html, results.json, adapter/{', model/' if recipe.save.merged else ''}"
        print(f"{recipe.output}: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
