"""One HTML page about run folders: `harden report DIR... [--output FILE] [--plots FOLDER] [--texts]`.

DIR is the output of a training run, an attack, a certificate or a gate. Several are compared side by side. The page
needs no network and no model; of prompts it shows ids and categories. Exit codes: 0 written; 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harden.entry import command_parser, guarded
from harden.errors import HardenError

PAGE = "report.html"


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, draw, write; returns the exit code."""

    def command() -> int:
        parser = command_parser("harden report", __doc__)
        parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="run folders")
        parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to write; one DIR: DIR/{PAGE}")
        parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write each figure as SVG and PNG, too")
        parser.add_argument("--texts", action="store_true", help="show the texts of the test prompts, too")
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        if options.output is None and len(options.folders) > 1:
            raise HardenError("several folders make one page: give it a place with --output FILE")
        output = options.output or options.folders[0] / PAGE

        from harden.report.page import report  # matplotlib: only now, so that --help is instant
        from harden.report.records import read_runs
        from harden.report.writing import write_page, write_plots

        made = report(read_runs(options.folders), options.texts)
        plots = write_plots(options.plots, made.figures) if options.plots is not None else []
        write_page(output, made.html)
        for path in (output, *plots):
            print(path)
        return 0

    return guarded(command, resumes=False)
