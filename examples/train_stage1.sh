#!/usr/bin/env bash
# Stage 1 of the LongVILA recipe, alignment: the projector learns to speak the LLM's language on image captions; vision
# tower and LLM are frozen.
#
#   MODEL=longvila-7b DATA=/data/align.json TOKENIZER=/models/tokenizer bash examples/train_stage1.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset; see megatron_vila/config/presets/. Change them
# on the command line, for example: bash examples/train_stage1.sh parallel.tp=4 train.steps=10
set -euo pipefail

MODEL=${MODEL:-longvila-7b}          # longvila-1.5b, longvila-7b or llama3-longvila-8b
DATA=${DATA:?set DATA to the LLaVA-format JSON or JSONL file of the image-caption pairs; several: a.json,b.json}
MEDIA=${MEDIA:-}                     # folder of the files that DATA names; empty: the folder of DATA
TOKENIZER=${TOKENIZER:?set TOKENIZER to the folder of the Hugging Face tokenizer of the LLM}
CHECKPOINT=${CHECKPOINT:-}           # weights to start from; empty: random ones, for a test of speed
OUTPUT=${OUTPUT:-runs/$MODEL-stage1}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch "$MODEL-stage1" \
  data.train="[$DATA]" \
  data.media_dir="$MEDIA" \
  data.tokenizer="$TOKENIZER" \
  checkpoint.load="$CHECKPOINT" \
  checkpoint.save_every=100 \
  train.output="$OUTPUT" \
  "$@"
