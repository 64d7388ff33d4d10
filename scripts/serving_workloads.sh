#!/usr/bin/env bash
# The workloads in tables/workloads, anew: what servers of real models call, and what evaluations alone may measure.
# usage: scripts/serving_workloads.sh [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" tune
out=${1:-tables/workloads}
drawn=$(mktemp -d)
trap 'rm -rf "$drawn"' EXIT
serving=(--tp 1,2,4,8 --mode eager,graph --dtype bfloat16,float16)

layerzero-tune workload make --model tuned --draws 1 "${serving[@]}" --out "$out/tuned.jsonl"
layerzero-tune workload make --model held-out --draws 2 "${serving[@]}" \
  --unseen-by "$out/tuned.jsonl" --out "$drawn/all.jsonl"
# As many as are measured within half an hour.
layerzero-tune workload sample "$drawn/all.jsonl" --ops attention --at-most 130 --out "$drawn/attention.jsonl"
layerzero-tune workload sample "$drawn/all.jsonl" --ops norm,mlp --at-most 100 --out "$drawn/others.jsonl"
layerzero-tune workload merge "$drawn/attention.jsonl" "$drawn/others.jsonl" --out "$out/held-out.jsonl"
