#!/usr/bin/env bash
# On a CUDA device, one stage of a table that ships; each continues what an earlier call left in the folder.
# scripts/check_table.py judges it all afterwards.
# usage: scripts/gpu_table.sh tune FOLDER BUDGET COMMIT      tune for the serving workloads; may be called again
#        scripts/gpu_table.sh second FOLDER BUDGET COMMIT    the same once more, independently
#        scripts/gpu_table.sh evaluate FOLDER COMMIT         compile, measure the held-out shapes
#        scripts/gpu_table.sh live FOLDER                    the live selector where buckets are missing
#        scripts/gpu_table.sh ceilings FOLDER                what the device gives at most, and kernels near that
set -euo pipefail
stage=${1:?usage: gpu_table.sh STAGE FOLDER ...} folder=${2:?usage: gpu_table.sh STAGE FOLDER ...}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workloads=tables/workloads
mkdir -p "$folder"

tune() { # RESULTS BUDGET COMMIT
  local start=$SECONDS began
  began=$(date -u -Iseconds)
  layerzero-tune run --device cuda:0 --workload $workloads/tuned.jsonl --budget "$2" --out "$1" --json \
    > "$folder/run.json"
  python3 - "$folder" "$(basename "$1")" "$3" "$began" $((SECONDS - start)) <<'PYTHON'
import json, pathlib, sys
folder, results, commit, began, device_s = sys.argv[1:]
run = json.loads(pathlib.Path(folder, "run.json").read_text())
kept = ("contests_measured", "measuring_s", "preparing_s", "expected_regret")
line = {"results": results, "commit": commit, "began": began, "device_s": int(device_s)}
line |= {name: run[name] for name in kept}
with pathlib.Path(folder, "tuning_runs.jsonl").open("a") as file:
    file.write(json.dumps(line) + "\n")
PYTHON
  rm "$folder/run.json"
}

case $stage in
  tune) tune "$folder/results" "${3:?budget, such as 9m}" "${4:?commit}" ;;
  second) tune "$folder/second" "${3:?budget, such as 9m}" "${4:?commit}" ;;
  evaluate)
    python3 scripts/device_facts.py "${3:?commit}" > "$folder/facts.json"
    layerzero-tune compile "$folder/results" --out "$folder/tables"
    layerzero-tune evaluate "$folder/tables" --results "$folder/results" --workload $workloads/held-out.jsonl \
      --out "$folder/held-out" --json > "$folder/evaluation.json"
    ;;
  live) python3 scripts/removed_buckets.py "$folder/results" "$folder/held-out" --json > "$folder/removed_buckets.json" ;;
  ceilings)
    python3 scripts/device_ceilings.py --device cuda:0 --out "$folder/ceilings.json"
    layerzero-tune run --device cuda:0 --workload $workloads/ceilings.jsonl --out "$folder/ceilings" --json > /dev/null
    ;;
  *) echo "stage is '$stage', allowed: tune, second, evaluate, live, ceilings" >&2; exit 2 ;;
esac
