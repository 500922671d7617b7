#!/usr/bin/env bash
# The main job in miniature: makes long videos with questions, trains a small VILA on them with MM-SP, in four stages of growing
# length, tests it on held-out videos, exports it and lets it answer held-out questions through transformers, and draws where in
# videos of which length it finds a needle.
# Two processes on two GPUs where there are two, one on a single GPU, else two on the CPU.
#
#   bash examples/quickstart.sh           # results in runs/quickstart
#   bash examples/quickstart.sh --short   # a few steps of each stage, to see that everything runs: runs/quickstart-short
#
# Every stage is the ordinary trainer with a YAML file of examples/quickstart; further arguments are overrides for all stages.
set -euo pipefail
SECONDS=0
STARTED_IN=$PWD

RUN=runs/quickstart
TRAIN=1536 HELD_OUT=256
FRAMES=8,16,32,64,128,256
DURATION="about 5 minutes, on two CPU cores and on GPUs"
SHORT=()
if [[ ${1:-} == --short ]]; then
  shift
  RUN=runs/quickstart-short
  TRAIN=64 HELD_OUT=16
  FRAMES=8,32
  DURATION="about 2 minutes, on two CPU cores and on GPUs"
  SHORT=(train.steps=4 optim.warmup_steps=2 train.log_every=1)
fi
echo "This takes $DURATION; two minutes or more the first time for the installation, if something is missing."

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

choose_processes

rm -rf "$RUN"
say "making videos and questions in $RUN/data"
"$PYTHON" tools/make_synthetic_videos.py "$RUN/data" --images --frames 4 16 32 --train "$TRAIN" --eval "$HELD_OUT"
"$PYTHON" examples/quickstart/contact_sheet.py "$RUN/data/eval_32.json" "$RUN/sample.png"

LENGTHS=(image 4 16 32)
LABELS=("pictures" "4 frames" "16 frames" "32 frames")
for stage in 1 2 3 4; do
  say "stage $stage of 4: ${LABELS[stage - 1]}"
  CONTINUE=()
  if ((stage > 1)); then
    CONTINUE=(checkpoint.load="$RUN/stage_$((stage - 1))")
  fi
  "$PYTHON" -m megatron_vila.launch --nproc-per-node "$PROCESSES" "examples/quickstart/stage_$stage.yaml" \
    parallel.ulysses="$PROCESSES" \
    data.train="[$RUN/data/train_${LENGTHS[stage - 1]}.json]" \
    data.eval="[$RUN/data/eval_${LENGTHS[stage - 1]}.json]" \
    data.tokenizer="$RUN/data/tokenizer" \
    train.output="$RUN/stage_$stage" \
    "${CONTINUE[@]}" "${SHORT[@]}" "$@"
done

say "results"
"$PYTHON" tools/summarize_runs.py "$RUN" "$RUN"/stage_{1,2,3,4} --labels "${LABELS[@]}" --wall-s "$SECONDS"

say "the same model in transformers"
"$PYTHON" tools/convert_checkpoint.py export "$RUN/stage_4" "$RUN/hf"
"$PYTHON" examples/quickstart/answer_held_out.py "$RUN/hf" "$RUN/data/eval_32.json" --summary "$RUN/summary.json"

say "a needle in videos up to eight times as long as it was trained on"
"$PYTHON" tools/evaluate.py needle "$RUN/stage_4" --frames "$FRAMES" --synthetic-needles 16 --out "$RUN/needle"

say "done in $SECONDS s"
"$PYTHON" examples/quickstart/next_steps.py "$RUN" --processes "$PROCESSES" --started-in "$STARTED_IN"
