#!/usr/bin/env bash
# Stage 2 of the LongVILA recipe, pre-training on large image-text data: projector and LLM learn, the tower is frozen.
#
#   MODEL=longvila-7b DATA=/data/pairs.json TOKENIZER=/models/tokenizer bash examples/train_stage2.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset (megatron_vila/config/presets/); change them on the
# command line, for example parallel.tp=4. Variables: examples/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_stage 2 "$@"
