#!/bin/sh
# Gate a checkpoint in any CI: gate.sh MODEL ADAPTER POLICY DIR [OPTION...] ("" for no adapter; options of harden gate,
# such as --reference). Leaves with harden's exit code. Keep DIR as an artifact, also on failure.
set -u
model=$1 adapter=$2 policy=$3 dir=$4
shift 4
began=$(mktemp)
harden gate --model "$model" ${adapter:+--adapter "$adapter"} --policy "$policy" --output "$dir" "$@"
code=$?
if [ "$dir/verdict.json" -nt "$began" ]; then cat "$dir/README.md"; else echo "no verdict (exit code $code)"; fi
rm -f "$began"
exit $code
