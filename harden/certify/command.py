"""Scan a model's neurons exactly: `harden certify --config recipes/... [--sample N] [--certify.top N ...]`.

Scans the neurons that locators put first and N others drawn at random, generates with those that could flip a refusal,
and says which break the model and how many of the others may. Exit codes: 0 done, whatever was found; 2 usage or
configuration; 3 the measurement failed; 130 interrupted. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys

from harden.entry import guarded, parse_recipe, recipe_parser, start_logging
from harden.recipe import Recipe


def main(arguments: list[str] | None = None) -> int:
    """Parse, load, scan, print the statement; returns the exit code."""

    def command() -> int:
        parser = recipe_parser("harden certify", __doc__)
        parser.add_argument("--sample", metavar="N", help="short for --certify.sample: random neurons; 'null': all")
        given = sys.argv[1:] if arguments is None else arguments
        sample = parser.parse_known_args(given)[0].sample
        recipe, options = parse_recipe(parser, [*given, *(["--certify.sample", sample] if sample else [])])
        if options.print_config:
            print(recipe.to_yaml(), end="")
            return 0
        return run(recipe)

    return guarded(command)


def run(recipe: Recipe) -> int:
    start_logging()

    from harden import processes  # torch and transformers: only now, so that --help is instant
    from harden.certify.run import certify
    from harden.report.certificate import certificate_table

    certificate = certify(recipe)
    main_process = processes.is_main()
    processes.finish()
    if main_process:
        adapter = f" with the adapter {certificate.adapter}" if certificate.adapter else ""
        table = certificate_table(certificate)
        print(f"\n{certificate.model}{adapter}\n\n{table}\n\n{recipe.output}/certificate/certificate.json")
    return 0
