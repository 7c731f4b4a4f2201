"""Sign a model that passed, and the evidence: `harden sign DIR --model M [--adapter A] --key PRIVATE.pem`.

Writes OpenSSF model signatures into DIR: model.sig, of the files that ship (the adapter's, or the model's), and
attestation.sig, of the statement about them. Checks first what `harden verify` checks. Exit codes: 0 signed; 1 evidence
and model do not belong together, or the verdict is no pass; 2 usage. Needs the extra `sign`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harden.entry import command_parser, guarded


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, sign; returns the exit code."""

    def command() -> int:
        parser = command_parser("harden sign", __doc__)
        parser.add_argument("folder", metavar="DIR", type=Path, help="output folder of harden gate")
        parser.add_argument("--model", required=True, help="a bundled model, a local folder or a hub id")
        parser.add_argument("--adapter", help="PEFT adapter of the model")
        parser.add_argument("--key", required=True, type=Path, metavar="PRIVATE.pem", help="elliptic private key")
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)

        from harden.gate.attestation import attested_digest, problems, read_verdict  # only now: --help is instant
        from harden.gate.signatures import sign
        from harden.gate.subject import subject_files

        attested = attested_digest(options.folder)
        files = subject_files(options.model, options.adapter)
        found = problems(options.folder, files)
        if not found and (outcome := read_verdict(options.folder).outcome) != "pass":
            found = [f"the verdict is '{outcome}'; only a pass is signed"]
        for problem in found:
            print(f"harden: {problem}", file=sys.stderr)
        if found:
            return 1
        for path in sign(options.folder, options.model, options.adapter, options.key, files, attested):
            print(path)
        return 0

    return guarded(command, resumes=False)
