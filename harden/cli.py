"""The `harden` command."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from harden import __version__

COMMANDS = {
    "train": ("harden.train", "run a recipe: locate, attack, train, re-attack"),
    "attack": ("harden.attack.command", "run every neuron attack on a model and report what it does"),
    "certify": ("harden.certify.command", "scan neurons exactly, and bound what the scan missed"),
    "gate": ("harden.gate.command", "decide by a policy whether a checkpoint may ship"),
    "report": ("harden.report.command", "one HTML page about a run folder, or several side by side"),
    "sign": ("harden.gate.sign", "sign a model that passed its gate, and the evidence"),
    "verify": ("harden.gate.verify", "check that a gate's evidence and a model belong together"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="harden", description="Harden chat models against single-neuron attacks.")
    parser.add_argument("--version", action="version", version=f"harden {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=purpose)
    if not sys.argv[1:]:
        parser.print_help()
        return 2
    arguments, rest = parser.parse_known_args()

    from harden.entry import guarded

    return guarded(lambda: _run(arguments.command, rest))  # importing takes a while, and may be interrupted


def _run(command: str, rest: list[str]) -> int:
    run = import_module(COMMANDS[command][0]).main
    return run(rest, "harden train") if command == "train" else run(rest)


if __name__ == "__main__":
    sys.exit(main())
