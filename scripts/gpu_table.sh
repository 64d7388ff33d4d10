#!/usr/bin/env bash
# On an H100, one stage of a table that ships; each continues what an earlier call left in the folder, and keeps what it
# has when it is interrupted. scripts/check_table.py judges it all afterwards.
# usage: scripts/gpu_table.sh tune FOLDER COMMIT BUDGET [OPS]    tune for the serving workloads, or for these operations
#                                                                of them; may be called again
#        scripts/gpu_table.sh second FOLDER COMMIT BUDGET [OPS]  the same once more, independently
#        scripts/gpu_table.sh compile FOLDER                     the tables of both, and without buckets; needs no GPU
#        scripts/gpu_table.sh evaluate FOLDER COMMIT [N]         measure N held-out shapes of each operation and mode
#        scripts/gpu_table.sh ceilings FOLDER COMMIT             what the device gives at most, and kernels near that
set -euo pipefail
usage="usage: gpu_table.sh STAGE FOLDER [COMMIT [BUDGET or N [OPS]]]"
stage=${1:?$usage} folder=${2:?$usage}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workloads=tables/workloads
product="NVIDIA H100 80GB HBM3"
mkdir -p "$folder"

# A table is of one product.
device_facts() { # COMMIT
  python3 scripts/device_facts.py "${1:?commit}" > "$folder/facts.new.json"
  grep -q "\"device\": \"$product\"" "$folder/facts.new.json" || { cat "$folder/facts.new.json" >&2; exit 3; }
  mv "$folder/facts.new.json" "$folder/facts.json"
}

tune() { # RESULTS COMMIT BUDGET OPS
  local began
  began=$(date -u -Iseconds)
  device_facts "$2"
  # What is interrupted has taken its time too.
  # shellcheck disable=SC2064
  trap "noted '$(basename "$1")' '$2' '$began' $SECONDS" EXIT
  layerzero-tune run --device cuda:0 --workload $workloads/tuned.jsonl --budget "${3:?budget, such as 9m}" --out "$1" \
    ${4:+--ops "$4"} --json > "$folder/run.json"
}

noted() { # NAME COMMIT BEGAN, and the shell's SECONDS then
  python3 - "$folder" "$1" "$2" "$3" $((SECONDS - $4)) <<'PYTHON'
import json, pathlib, sys
folder, results, commit, began, device_s = sys.argv[1:]
report = pathlib.Path(folder, "run.json")
run = json.loads(report.read_text() or "{}")
kept = ("contests_measured", "measuring_s", "preparing_s", "expected_regret")
line = {"results": results, "commit": commit, "began": began, "device_s": int(device_s)}
line |= {name: run[name] for name in kept if name in run}
with pathlib.Path(folder, "tuning_runs.jsonl").open("a") as file:
    file.write(json.dumps(line) + "\n")
report.unlink()
PYTHON
}

case $stage in
  tune) tune "$folder/results" "${3:?commit}" "${4:-}" "${5:-}" ;;
  second) tune "$folder/second_results" "${3:?commit}" "${4:-}" "${5:-}" ;;
  compile)
    layerzero-tune compile "$folder/results" --out "$folder/tables"
    [ ! -d "$folder/second_results" ] || layerzero-tune compile "$folder/second_results" --out "$folder/second"
    python3 scripts/removed_buckets.py "$folder/results" "$folder/without_buckets" --tables 3
    ;;
  evaluate)
    device_facts "${3:?commit}"
    layerzero-tune workload sample $workloads/held-out.jsonl --at-most "${4:-52}" --out "$folder/held-out.jsonl"
    beside=()
    for tables in "$folder"/second "$folder"/without_buckets_*; do
      [ ! -d "$tables" ] || beside+=(--beside "$tables")
    done
    layerzero-tune evaluate "$folder/tables" --results "$folder/results" --workload "$folder/held-out.jsonl" \
      "${beside[@]}" --out "$folder/held-out" --json > "$folder/evaluation.new.json" || [ $? -eq 2 ]  # shapes without a time
    mv "$folder/evaluation.new.json" "$folder/evaluation.json"
    ;;
  ceilings)
    device_facts "${3:?commit}"
    python3 scripts/device_ceilings.py --device cuda:0 --out "$folder/ceilings.json"
    layerzero-tune run --device cuda:0 --workload $workloads/ceilings.jsonl --out "$folder/ceilings" --json > /dev/null
    ;;
  *) echo "stage is '$stage', allowed: tune, second, compile, evaluate, ceilings" >&2; exit 2 ;;
esac
