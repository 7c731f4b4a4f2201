#!/bin/sh
# Gate a checkpoint in any CI: gate.sh MODEL ADAPTER POLICY DIR ("" for no adapter). Leaves with harden's exit code; DIR
# has the evidence whatever happens. Keep DIR as an artifact, also on failure.
set -u
model=$1 adapter=$2 policy=$3 dir=$4
harden gate --model "$model" ${adapter:+--adapter "$adapter"} --policy "$policy" --output "$dir"
code=$?
if [ -f "$dir/README.md" ]; then cat "$dir/README.md"; else echo "no verdict (exit code $code)"; fi
exit $code
