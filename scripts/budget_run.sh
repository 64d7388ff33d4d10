#!/usr/bin/env bash
# On a CUDA device: tune attention and norms within five minutes, compile, evaluate on held-out shapes, and tune beside
# two kernels that break the GPU. scripts/check_budget_run.py judges what lies in the folder afterwards.
# usage: scripts/budget_run.sh FOLDER COMMIT      (the environment has layerzero-tune, and the tests' modules on its path)
set -euo pipefail
folder=${1:?usage: budget_run.sh FOLDER COMMIT} commit=${2:?usage: budget_run.sh FOLDER COMMIT}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$folder"
layerzero-tune run --device cuda:0 --preset quick --ops attention,norm --budget 5m --out "$folder/results" --json \
  > "$folder/run.json"
layerzero-tune compile "$folder/results" --out "$folder/tables"
layerzero-tune evaluate "$folder/tables" --results "$folder/results" --held-out 110 --out "$folder/held-out" --json \
  > "$folder/evaluation.json"
python3 scripts/device_facts.py "$commit" > "$folder/facts.json"
for rows in 16 33 48 65 96; do
  echo "{\"operation\": \"norm.rms\", \"dtype\": \"bfloat16\", \"mode\": \"graph\", \"rows\": $rows, \"hidden_size\": 1024}"
done > "$folder/faults.jsonl"
layerzero-tune run --device cuda:0 --workload "$folder/faults.jsonl" --kernels tests.gpu.faulty_kernels \
  --out "$folder/faults" --json > "$folder/faults.json"
