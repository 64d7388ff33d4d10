#!/usr/bin/env bash
# The workloads in tables/workloads, anew: what servers of real models call, and what evaluations alone may measure.
# usage: scripts/serving_workloads.sh [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" tune
out=${1:-tables/workloads}
serving=(--tp 1,2,4,8 --mode eager,graph --dtype bfloat16,float16)

layerzero-tune workload make --model tuned --draws 1 "${serving[@]}" --out "$out/tuned.jsonl"
layerzero-tune workload make --model held-out --draws 2 "${serving[@]}" \
  --unseen-by "$out/tuned.jsonl" --out "$out/held-out.jsonl"
