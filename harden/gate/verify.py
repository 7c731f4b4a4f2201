"""Check that the evidence of a gate is whole and about this model: `harden verify DIR --model M [--adapter A]`.

Digests of the model's files and of the evidence must be those of attestation.json, and the verdict must follow from the
records. With --key the signatures of `harden sign` must be there and fit, too; without it, whoever can write DIR can
have written all of it. Exit codes: 0 they belong together, whatever the verdict; 1 they do not; 2 usage: no such folder
or model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harden.entry import command_parser, guarded


def main(arguments: list[str] | None = None) -> int:
    """Parse, digest, compare; returns the exit code."""

    def command() -> int:
        parser = command_parser("harden verify", __doc__)
        parser.add_argument("folder", metavar="DIR", type=Path, help="output folder of harden gate")
        parser.add_argument("--model", required=True, help="a bundled model, a local folder or a hub id")
        parser.add_argument("--adapter", help="PEFT adapter of the model")
        parser.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="check the signatures with this public key")
        parser.add_argument("--require-pass", action="store_true", help="exit code 1 for any verdict but a pass, too")
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)

        from harden.gate.attestation import problems, read_verdict  # only now, so that --help is instant
        from harden.gate.subject import subject_files

        found = problems(options.folder, subject_files(options.model, options.adapter))
        if options.key is not None:
            from harden.gate.signatures import signature_problems

            found += signature_problems(options.folder, options.model, options.adapter, options.key)
        for problem in found:
            print(f"harden: {problem}", file=sys.stderr)
        if found:
            return 1
        verdict = read_verdict(options.folder)
        how = "belong together and are signed with this key" if options.key else "belong together"
        print(f"{options.folder}: evidence and model {how}; policy '{verdict.policy}': {verdict.outcome}")
        return 1 if options.require_pass and verdict.outcome != "pass" else 0

    return guarded(command, resumes=False)
