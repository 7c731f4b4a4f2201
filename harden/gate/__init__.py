"""The release gate: a policy goes in; a verdict, an exit code and evidence come out."""
