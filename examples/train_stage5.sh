#!/usr/bin/env bash
# Stage 5 of the LongVILA recipe, long supervised fine-tuning with MM-SP: hundreds to thousands of frames per video,
# everything learns.
#
#   MODEL=longvila-7b DATA=/data/longvila_sft.json TOKENIZER=/models/tokenizer bash examples/train_stage5.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), frames, lengths and rates come from the preset; see megatron_vila/config/presets/. Keep
# tp * ulysses inside a node and let ring cross nodes. For example, 512 frames on two nodes:
#   NNODES=2 ... bash examples/train_stage5.sh data.num_frames=512 train.seq_length=131072 parallel.ring=4
set -euo pipefail

MODEL=${MODEL:-longvila-7b}          # longvila-1.5b, longvila-7b or llama3-longvila-8b
DATA=${DATA:?set DATA to the LLaVA-format JSON or JSONL file of the long-video samples; several: a.json,b.json}
MEDIA=${MEDIA:-}                     # folder of the files that DATA names; empty: the folder of DATA
TOKENIZER=${TOKENIZER:?set TOKENIZER to the folder of the Hugging Face tokenizer of the LLM}
CONTEXT=${CONTEXT:-262144}           # context of stage 4; the rotary base follows from it
CHECKPOINT=${CHECKPOINT:-runs/$MODEL-stage4-$CONTEXT} # weights to start from: a run's folder or one of its steps
OUTPUT=${OUTPUT:-runs/$MODEL-stage5}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# The published longvila-7b has another pair of base and factor (the preset's): to go on from it, override both.
THETA=$(rotary_base "$CONTEXT")
launch "$MODEL-stage5" \
  model.llm.rope_theta="$THETA" \
  model.llm.rope_scaling_factor=1.0 \
  data.train="[$DATA]" \
  data.media_dir="$MEDIA" \
  data.tokenizer="$TOKENIZER" \
  checkpoint.load="$CHECKPOINT" \
  checkpoint.save_every=50 \
  train.output="$OUTPUT" \
  "$@"
