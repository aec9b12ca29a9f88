#!/usr/bin/env bash
# Check DeltaProduct on a GPU against float64, then time its kernels and training steps. Each part prints as it ends.
#
#   bash tests/benchmarks/delta_product.sh [WORK_FOLDER]      in the root of a checkout; with 16 cores 100 s and the steps
#
# Kernels are compiled by processes side by side. PYTHONPATH must name the checkout, TRITON_PTXAS_PATH a ptxas of 13.3
# or newer where Triton is older than 3.9. PYTHON names the interpreter.
set -uo pipefail
work=${1:-$(mktemp -d)} python=${PYTHON:-python3} begin=$SECONDS
mkdir -p "$work"
export OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
tests=tests/gpu/delta_rule/test_random_inputs.py

case_names=()
for factors in 2 3 4; do for tokens in 300 320; do case_names+=("test_product[$factors-$tokens]"); done; done
for factors in 2 4; do case_names+=("test_product_in_segments[$factors]"); done
compile=() checks=()
for factors in 1 2 3 4; do
  $python tests/benchmarks/delta_product.py --only-ours --factors "$factors" >"$work/compile$factors.log" 2>&1 &
  compile+=($!)
done
for name in "${case_names[@]}"; do
  (
    timeout 90 "$python" -m pytest -q -s -p no:cacheprovider "$tests::$name" >"$work/$name.log" 2>&1
    result=$(grep -q "^1 passed" "$work/$name.log" && echo passed || echo "DID NOT PASS")
    echo "$name: $result, $((SECONDS - begin)) s"
    grep -E "^\.?([0-9] factors|segments)|^E  " "$work/$name.log" | head -4
  ) &
  checks+=($!)
done
wait "${compile[@]}"
for factors in 1 2 3 4; do grep -h "Error" "$work/compile$factors.log" | tail -1; done
wait "${checks[@]}"
$python tests/benchmarks/delta_product.py --only-ours
echo "kernels: $((SECONDS - begin)) s"

for factors in 1 2; do
  mixer=$([ "$factors" = 1 ] && echo gated_deltanet || echo gated_deltaproduct)
  $python -c "import json, sys
model = json.load(open('configs/models/340m.json')) | {'mixer': '$mixer', 'num_householder': $factors}
if $factors == 1:
    del model['num_householder']
json.dump(model, open(sys.argv[1], 'w'))" "$work/model$factors.json"
  $python -m lrnn.cli bench step configs/340m.yaml "model=$work/model$factors.json" global_batch_size=32 --only-ours 2>"$work/step$factors.log" |
    sed -u "s/^/$factors factors: /" | grep --line-buffered -v "left out"
  echo "steps with $factors factors: $((SECONDS - begin)) s"
done
