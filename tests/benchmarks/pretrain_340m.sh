#!/usr/bin/env bash
# Train the 340M configuration on one GPU: build a corpus from a folder of text, train 300 steps with a stop half-way
# like that of a pre-empted job, resume, plot, and export.
#   bash tests/benchmarks/pretrain_340m.sh TEXT_FOLDER WORK_FOLDER RESULT_FOLDER
set -euo pipefail
text=$1 work=$2 results=$3
lrnn() { echo "\$ lrnn $*"; python3 -m lrnn.cli "$@"; }

mkdir -p "$work" "$results"
lrnn corpus "$text" --train-tokenizer 32000 --heldout 0.02 --skip-bad-files --out "$work/corpus"

pretrain=(pretrain configs/340m.yaml "run_dir=$work/run" "data.corpora=[{path: $work/corpus}]" steps=300
    global_batch_size=16 optim.lr=1e-3 schedule.warmup_steps=30 log.every=5 log.heldout_every=50 log.heldout_batches=8)
echo "\$ lrnn ${pretrain[*]}"
python3 -m lrnn.cli "${pretrain[@]}" & # not through the function, because the signal has to reach Python itself
run=$!
until grep -qs '"step": 150, "loss"' "$work/run/metrics.jsonl"; do
    kill -0 $run # ends the script if the run has failed
    sleep 0.5
done
kill -USR1 $run
status=0
wait $run || status=$?
[ $status -eq 75 ] || { echo "a stopped run should end with 75, not $status"; exit 1; }
lrnn "${pretrain[@]}"

lrnn plot "$work/run" --out "$results/loss.png"
cp "$work/run/metrics.jsonl" "$work/run/run.yaml" "$results/"
cp "$work/corpus/manifest.json" "$results/corpus.json"
lrnn export "$work/run" "$work/model" --dtype bfloat16
cp "$work/model/config.json" "$results/"
