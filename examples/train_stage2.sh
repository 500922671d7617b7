#!/usr/bin/env bash
# Stage 2 of the LongVILA recipe, pre-training on large image-text data: projector and LLM learn, the tower is frozen.
#
#   MODEL=longvila-7b DATA=/data/pairs.json TOKENIZER=/models/tokenizer bash examples/train_stage2.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset; see megatron_vila/config/presets/. Change them
# on the command line, for example: bash examples/train_stage2.sh parallel.tp=4 train.steps=10
set -euo pipefail

MODEL=${MODEL:-longvila-7b}          # longvila-1.5b, longvila-7b or llama3-longvila-8b
DATA=${DATA:?set DATA to the LLaVA-format JSON or JSONL file of the image-text samples; several: a.json,b.json}
MEDIA=${MEDIA:-}                     # folder of the files that DATA names; empty: the folder of DATA
TOKENIZER=${TOKENIZER:?set TOKENIZER to the folder of the Hugging Face tokenizer of the LLM}
CHECKPOINT=${CHECKPOINT:-runs/$MODEL-stage1} # weights to start from: a run's folder or one of its steps
OUTPUT=${OUTPUT:-runs/$MODEL-stage2}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch "$MODEL-stage2" \
  data.train="[$DATA]" \
  data.media_dir="$MEDIA" \
  data.tokenizer="$TOKENIZER" \
  checkpoint.load="$CHECKPOINT" \
  checkpoint.save_every=500 \
  train.output="$OUTPUT" \
  "$@"
