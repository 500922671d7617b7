#!/usr/bin/env bash
# Stage 4 of the LongVILA recipe, context extension on text: rows of CONTEXT tokens with a larger rotary base; vision tower and
# projector are frozen. Longer contexts are reached in steps, each starting from the one before:
#
#   MODEL=longvila-7b CONTEXT=262144 DATA=/data/text.json TOKENIZER=/models/tokenizer bash examples/train_stage4.sh
#   MODEL=longvila-7b CONTEXT=524288 CHECKPOINT=runs/longvila-7b-stage4-262144 DATA=... bash examples/train_stage4.sh
#
# The rotary bases, steps and batches are those of the released scripts. The layout of the preset holds 16384 tokens a GPU at
# its own context; for a longer one raise parallel.ring by the same factor.
set -euo pipefail

MODEL=${MODEL:-longvila-7b}          # longvila-1.5b, longvila-7b or llama3-longvila-8b
CONTEXT=${CONTEXT:-262144}           # 131072, 262144, 524288 or 1048576
DATA=${DATA:?set DATA to the LLaVA-format JSON or JSONL file of long texts; several: a.json,b.json}
TOKENIZER=${TOKENIZER:?set TOKENIZER to the folder of the Hugging Face tokenizer of the LLM}
CHECKPOINT=${CHECKPOINT:-runs/$MODEL-stage3} # weights to start from: a run's folder or one of its steps
OUTPUT=${OUTPUT:-runs/$MODEL-stage4-$CONTEXT}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

THETA=$(rotary_base "$CONTEXT")
case $CONTEXT in
  131072) STEPS=40 BATCH=4 ;;
  262144 | 524288) STEPS=80 BATCH=16 ;;
  1048576) STEPS=50 BATCH=4 ;;
esac

launch "$MODEL-stage4" \
  data.train="[$DATA]" \
  data.tokenizer="$TOKENIZER" \
  model.llm.rope_theta="$THETA" \
  model.llm.rope_scaling_factor=1.0 \
  model.llm.max_positions="$CONTEXT" \
  train.seq_length="$CONTEXT" \
  train.steps="$STEPS" \
  train.global_batch_size="$BATCH" \
  checkpoint.load="$CHECKPOINT" \
  checkpoint.save_every=20 \
  train.output="$OUTPUT" \
  "$@"
