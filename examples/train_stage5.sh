#!/usr/bin/env bash
# Stage 5 of the LongVILA recipe, long supervised fine-tuning with MM-SP: hundreds to thousands of frames per video,
# everything learns.
#
#   MODEL=longvila-7b DATA=/data/longvila_sft.json TOKENIZER=/models/tokenizer bash examples/train_stage5.sh [--dry-run] [key=value ...]
#
# Keep tp * ulysses inside a node and let ring cross nodes. For example, 512 frames on two nodes:
#   NNODES=2 ... bash examples/train_stage5.sh data.num_frames=512 train.seq_length=131072 parallel.ring=4
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset (megatron_vila/config/presets/); change them on the
# command line, for example parallel.tp=4. Variables: examples/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_stage 5 "$@"
