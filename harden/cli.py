"""The `harden` command."""

from __future__ import annotations

import argparse
import sys

from harden import __version__


def main() -> int:
    parser = argparse.ArgumentParser(prog="harden", description="Harden chat models against single-neuron attacks.")
    parser.add_argument("--version", action="version", version=f"harden {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", add_help=False, help="run a recipe: locate, attack, train, re-attack")
    commands.add_parser("attack", add_help=False, help="run every neuron attack on a model and report what it does")
    commands.add_parser("certify", add_help=False, help="scan neurons exactly, and bound what the scan missed")
    commands.add_parser("gate", add_help=False, help="decide by a policy whether a checkpoint may ship")
    commands.add_parser("report", add_help=False, help="one HTML page about a run folder, or several side by side")
    commands.add_parser("sign", add_help=False, help="sign a model that passed its gate, and the evidence")
    commands.add_parser("verify", add_help=False, help="check that a gate's evidence and a model belong together")
    arguments, rest = parser.parse_known_args()

    from harden.entry import guarded

    return guarded(lambda: _run(arguments.command, rest))  # importing takes a while, and may be interrupted


def _run(command: str, rest: list[str]) -> int:
    from harden import train
    from harden.attack import command as attack
    from harden.certify import command as certify
    from harden.gate import command as gate
    from harden.gate import sign, verify
    from harden.report import command as report

    if command == "train":
        return train.main(rest, "harden train")
    entry_points = {
        "attack": attack,
        "certify": certify,
        "gate": gate,
        "report": report,
        "sign": sign,
        "verify": verify,
    }
    return entry_points[command].main(rest)


if __name__ == "__main__":
    sys.exit(main())
