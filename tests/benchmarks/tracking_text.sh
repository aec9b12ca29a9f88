#!/usr/bin/env bash
# Train language models on solved state-tracking questions, one per range of eigenvalues, side by side. Build the
# corpus, train, export, run the suite `state_tracking`, which asks for eight times the length of the training
# questions, and measure perplexity by position to sixteen times the training length.
#   bash tests/benchmarks/tracking_text.sh WORK_FOLDER RESULT_FOLDER [pretrain settings, e.g. steps=600]
set -euo pipefail
work=$1 results=$2
shift 2
lrnn() { echo "\$ lrnn $*"; python3 -m lrnn.cli "$@"; }

mkdir -p "$work/text" "$results"
[ -e "$work/corpus" ] || {
    python3 tests/benchmarks/tracking_text.py "$work/text/solved.jsonl"
    lrnn corpus json --data-files "$work/text/solved.jsonl" --train-tokenizer 384 --heldout 0.05 --out "$work/corpus"
}
one_range() {
    python3 - "$2" "$work/$1.json" <<'PYTHON'
import json, sys
model = json.load(open("configs/models/tiny.json"))
model |= dict(hidden_size=256, num_heads=4, num_hidden_layers=4, intermediate_size=704, vocab_size=384)
model |= dict(max_position_embeddings=2048, allow_neg_eigval=sys.argv[1] == "true")
json.dump(model, open(sys.argv[2], "w"))
PYTHON
    lrnn pretrain configs/tiny.yaml "model=$work/$1.json" "run_dir=$work/$1" "data.corpora=[{path: $work/corpus}]" \
        precision=bfloat16 data.seq_len=2048 global_batch_size=16 micro_batch_size=16 steps=2000 schedule.warmup_steps=100 log.every=50 \
        log.heldout_every=500 checkpoint.every=1000 "${@:3}"
    lrnn export "$work/$1" "$work/$1-model"
    lrnn eval "$work/$1-model" --suite state_tracking --max-length 8192 --batch-size 64 --out "$results/$1"
}
echo "both ranges side by side: $results/negative.log, $results/positive.log"
one_range negative true "$@" > "$results/negative.log" 2>&1 & negative=$!
one_range positive false "$@" > "$results/positive.log" 2>&1 & positive=$!
trap 'kill $negative $positive 2>/dev/null || true' EXIT  # if one fails, the other is stopped
for range in negative positive; do
    wait "${!range}" || { echo "$range failed:" >&2; tail -n 5 "$results/$range.log" >&2; exit 1; }
done
lrnn position "$work/negative-model" "$work/positive-model" --documents "$work/corpus/heldout.jsonl" --join \
    --out "$results/position"
