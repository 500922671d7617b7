#!/usr/bin/env bash
# The quickstart's model, trained longer so that it finds needles in videos that are four times as long as any it has seen, and longer
# ones: docs/evaluation.md tells what was tried. Ends with a needle map by generation.
#
#   bash examples/needle_long.sh   # about 15 minutes on two idle CPU cores; results in runs/needle_long
#
# It differs from the quickstart in three ways: four times the videos, more steps, and no rotary positions: divided by 10,000, all
# are nearly 0, so that no distance between two tokens is a new one in a longer video. Order is still seen, through the causal mask.
# Further arguments are overrides for all stages.
set -euo pipefail
SECONDS=0
RUN=runs/needle_long

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"
choose_processes

rm -rf "$RUN"
say "making videos and questions in $RUN/data"
"$PYTHON" tools/make_synthetic_videos.py "$RUN/data" --images --frames 4 16 32 --train 4096 --eval 256 --seed 1

LENGTHS=(image 4 16 32)
STEPS=(400 200 150 400)
for stage in 1 2 3 4; do
  say "stage $stage of 4: $RUN/stage_$stage"
  CONTINUE=()
  if ((stage > 1)); then
    CONTINUE=(checkpoint.load="$RUN/stage_$((stage - 1))")
  fi
  "$PYTHON" -m megatron_vila.launch --nproc-per-node "$PROCESSES" "examples/quickstart/stage_$stage.yaml" \
    parallel.ulysses="$PROCESSES" \
    model.llm.rope_scaling_factor=1e4 \
    data.train="[$RUN/data/train_${LENGTHS[stage - 1]}.json]" \
    data.eval="[$RUN/data/eval_${LENGTHS[stage - 1]}.json]" \
    data.tokenizer="$RUN/data/tokenizer" \
    train.steps="${STEPS[stage - 1]}" \
    train.output="$RUN/stage_$stage" \
    "${CONTINUE[@]}" "$@"
done

say "a needle in videos up to 32 times as long as it was trained on"
"$PYTHON" tools/evaluate.py needle "$RUN/stage_4" --frames 8,16,32,64,128,256,512,1024 --synthetic-needles 64 --out "$RUN/needle"
say "done in $SECONDS s"
