#!/usr/bin/env bash
# Stage 3 of the LongVILA recipe, short supervised fine-tuning on images and short videos: everything learns.
#
#   MODEL=longvila-7b DATA=/data/instructions.json TOKENIZER=/models/tokenizer bash examples/train_stage3.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset (megatron_vila/config/presets/); change them on the
# command line, for example parallel.tp=4. Variables: examples/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_stage 3 "$@"
