#!/usr/bin/env bash
# The workloads in tables/workloads, anew: what servers of real models call, and what evaluations alone may measure.
# usage: scripts/serving_workloads.sh [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" tune
out=${1:-tables/workloads}
drawn=$(mktemp -d)
trap 'rm -rf "$drawn"' EXIT
serving=(--tp 1,2,4,8 --mode eager,graph --dtype bfloat16,float16)

# Rows have two sizes, attention has three: it takes more points to know it as well. GeGLU is of few models, and full
# attention of few encoders, at few lengths: at each of them the best kernel changes with every wave of tiles that a batch
# fills.
layerzero-tune workload make --model tuned --draws 1 "${serving[@]}" --out "$drawn/once.jsonl"
layerzero-tune workload make --model tuned --draws 2 "${serving[@]}" --ops attention,mlp.geglu --out "$drawn/twice.jsonl"
layerzero-tune workload make --model tuned --draws 6 "${serving[@]}" --ops attention.full --out "$drawn/often.jsonl"
layerzero-tune workload merge "$drawn/once.jsonl" "$drawn/twice.jsonl" "$drawn/often.jsonl" --out "$drawn/first.jsonl"
layerzero-tune workload make --model held-out --draws 3 "${serving[@]}" \
  --unseen-by "$drawn/first.jsonl" --out "$drawn/unseen.jsonl"
# As many as are measured within half an hour.
layerzero-tune workload sample "$drawn/unseen.jsonl" --ops attention --at-most 104 --out "$drawn/attention.jsonl"
layerzero-tune workload sample "$drawn/unseen.jsonl" --ops norm,mlp --at-most 100 --out "$drawn/others.jsonl"
layerzero-tune workload merge "$drawn/attention.jsonl" "$drawn/others.jsonl" --out "$out/held-out.jsonl"
# More batches at the lengths of encoders that are held out too, of their own sizes.
layerzero-tune workload make --model tuned --draws 9 "${serving[@]}" --ops attention.full \
  --unseen-by "$out/held-out.jsonl" --out "$drawn/more.jsonl"
layerzero-tune workload merge "$drawn/first.jsonl" "$drawn/more.jsonl" --out "$out/tuned.jsonl"
