#!/usr/bin/env bash
# Measure and test on a GPU what pretrain_340m.sh does not cover: the loop's own time, where the time of a step goes, the
# loader, the tests in tests/gpu, and a small model that is trained, exported and evaluated. Takes about 6 minutes, and
# those that fla's kernels take to choose their settings in `lrnn bench step`.
#   bash tests/benchmarks/gpu_checks.sh TEXT_FOLDER WORK_FOLDER RESULT_FOLDER
# Reads the .py files of TEXT_FOLDER. Without a network, run `lrnn eval --fetch` beforehand. Every part runs even if
# another fails, except that nothing runs without the corpora. The exit status is 1 if any part failed.
set -uo pipefail
text=$1 work=$2 results=$3
lrnn() { echo "\$ lrnn $*"; timeout "$limit" python3 -m lrnn.cli "$@"; }
failed=0
part() { # NAME SECONDS_FOR_EACH_COMMAND
    local limit=$2 start=$SECONDS status=0
    "$1" >"$results/$1.txt" 2>&1 || status=$?
    echo "$1: status $status, $((SECONDS - start)) s"
    return $status
}

corpus() {
    lrnn corpus "$text" --include '*.py' --train-tokenizer "$1" --heldout 0.02 --skip-bad-files --out "$work/corpus-$1"
}
corpora() {
    corpus 4096 &
    corpus 32000 && wait $!
}
bench_loop() {
    lrnn bench loop configs/340m.yaml "data.corpora=[{path: $work/corpus-32000}]" global_batch_size=16 log.every=5 --steps 25
}
bench_step() { lrnn bench step configs/340m.yaml --verbose --json "$results/bench_step.json"; }
bench_data() { lrnn bench data --corpus "$work/corpus-32000" --seconds 3; }
gpu_tests() { timeout "$limit" python3 -m pytest -v -s -p no:cacheprovider tests/gpu; }
small_model() {
    local heldout=$work/corpus-4096/heldout.jsonl
    lrnn pretrain configs/tiny.yaml "run_dir=$work/run" "data.corpora=[{path: $work/corpus-4096}]" steps=50 precision=bfloat16 &&
        lrnn export "$work/run" "$work/model" &&
        for device in cuda cpu; do
            lrnn eval "$work/model" --suite quick --heldout "$heldout" --limit 16 --max-length 2048 \
                --device $device --dtype float32 --out "$work/eval-$device" || return
        done &&
        lrnn eval "$work/model" --suite code_math --allow-code-execution --limit 4 --max-length 2048
}

mkdir -p "$work" "$results"
part corpora 120 || exit 1
part bench_loop 240 || failed=1 # runs alone on the machine, like the next two parts
part bench_step 420 || failed=1
part bench_data 60 || failed=1
part gpu_tests 300 & # nothing is timed from here on, so parts may run side by side
tests=$!
part small_model 120 || failed=1
wait $tests || failed=1
exit $failed
