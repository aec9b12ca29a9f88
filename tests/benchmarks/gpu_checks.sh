#!/usr/bin/env bash
# What only a GPU can show, beside the run of pretrain_340m.sh: the loop's own time, the loader, the tests in tests/gpu.
#   bash tests/benchmarks/gpu_checks.sh TEXT_FOLDER WORK_FOLDER RESULT_FOLDER
# A corpus in WORK_FOLDER/corpus, as pretrain_340m.sh leaves it, is used. About 8 minutes, half of it fla's autotuning.
set -euo pipefail
text=$1 work=$2 results=$3
lrnn() { python3 -m lrnn.cli "$@"; }

mkdir -p "$work" "$results"
[ -d "$work/corpus" ] || lrnn corpus "$text" --train-tokenizer 32000 --heldout 0.02 --skip-bad-files --out "$work/corpus"
lrnn bench loop configs/340m.yaml "data.corpora=[{path: $work/corpus}]" global_batch_size=16 log.every=5 --steps 25 |
    tee "$results/bench_loop.txt"
lrnn bench data --corpus "$work/corpus" | tee "$results/bench_data.txt"
python3 -m pytest -q -s -p no:cacheprovider tests/gpu | tee "$results/tests_gpu.txt"
