#!/usr/bin/env bash
# The main job in miniature: makes long videos with questions, trains a small VILA on them with MM-SP over two processes, in four
# stages of growing length, tests it on held-out videos, exports it and lets it answer held-out questions through transformers.
# Two GPUs with NCCL if there are two, else two CPU processes.
#
#   bash examples/quickstart.sh           # results in runs/quickstart
#   bash examples/quickstart.sh --short   # a few steps of each stage, to see that everything runs: runs/quickstart-short
#
# Every stage is the ordinary trainer with a YAML file of examples/quickstart; further arguments are overrides for all stages.
set -euo pipefail
SECONDS=0

RUN=runs/quickstart
TRAIN=1024 HELD_OUT=256
SHORT=()
if [[ ${1:-} == --short ]]; then
  shift
  RUN=runs/quickstart-short
  TRAIN=64 HELD_OUT=16
  SHORT=(train.steps=4 optim.warmup_steps=2 train.log_every=1)
fi

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

if (($(gpu_count) >= 2)); then
  echo "two processes on two GPUs (NCCL)"
else
  echo "two processes on the CPU (gloo)"
  # two ranks cannot share one GPU under NCCL
  export CUDA_VISIBLE_DEVICES=""
fi
THREADS=$(($(nproc) / 2))
export OMP_NUM_THREADS=$((THREADS < 1 ? 1 : THREADS > 8 ? 8 : THREADS))

rm -rf "$RUN"
say "making videos and questions in $RUN/data"
python tools/make_synthetic_videos.py "$RUN/data" --images --frames 4 16 32 --train "$TRAIN" --eval "$HELD_OUT"

LENGTHS=(image 4 16 32)
LABELS=("pictures" "4 frames" "16 frames" "32 frames")
for stage in 1 2 3 4; do
  say "stage $stage of 4: ${LABELS[stage - 1]}"
  CONTINUE=()
  if ((stage > 1)); then
    CONTINUE=(checkpoint.load="$RUN/stage_$((stage - 1))")
  fi
  torchrun --standalone --nproc-per-node 2 -m megatron_vila.train "examples/quickstart/stage_$stage.yaml" \
    data.train="[$RUN/data/train_${LENGTHS[stage - 1]}.json]" \
    data.eval="[$RUN/data/eval_${LENGTHS[stage - 1]}.json]" \
    data.tokenizer="$RUN/data/tokenizer" \
    train.output="$RUN/stage_$stage" \
    "${CONTINUE[@]}" "${SHORT[@]}" "$@"
done

say "results"
python tools/summarize_runs.py "$RUN" "$RUN"/stage_{1,2,3,4} --labels "${LABELS[@]}" --wall-s "$SECONDS"

say "the same model in transformers"
python tools/convert_checkpoint.py export "$RUN/stage_4" "$RUN/hf"
python examples/quickstart/answer_held_out.py "$RUN/hf" "$RUN/data/eval_32.json" --summary "$RUN/summary.json"

echo "checkpoint: $RUN/stage_4, exported: $RUN/hf"
echo "metrics: $RUN/stage_4/metrics.jsonl, summary: $RUN/summary.json, plot: $RUN/loss.png"
