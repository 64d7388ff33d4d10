#!/usr/bin/env bash
# The main job on this machine: measure its kernels, compile a table, see how good it is, and call through it.
# usage: scripts/quickstart.sh [FOLDER]     results and tables go to FOLDER (layerzero-out); running it again continues
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" tune
out=${1:-layerzero-out}

echo "== the device and its kernels"
layerzero-tune doctor

echo "== measuring"
layerzero-tune run --device cpu --preset quick --budget 4m --out "$out/results"

echo "== compiling"
layerzero-tune compile "$out/results" --out "$out/tables"

echo "== evaluating on shapes that the tuning never saw"
layerzero-tune evaluate "$out/tables" --results "$out/results" --out "$out/held-out" --held-out 48

echo "== why one of the choices is what it is"
layerzero-tune explain --tables "$out/tables" --device cpu --operation attention.cross --dtype bfloat16 \
  --batch-size 2 --num-heads 32 --num-kv-heads 8 --head-dim 64 --seq-len-q 1 --seq-len-k 400

echo "== calling through the table"
LAYERZERO_TABLES="$out/tables" python scripts/example.py
echo "== done: results in $out/results, tables in $out/tables"
