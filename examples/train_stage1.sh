#!/usr/bin/env bash
# Stage 1 of the LongVILA recipe, alignment: the projector learns to speak the LLM's language on image captions; vision
# tower and LLM are frozen.
#
#   MODEL=longvila-7b DATA=/data/align.json TOKENIZER=/models/tokenizer bash examples/train_stage1.sh [--dry-run] [key=value ...]
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset (megatron_vila/config/presets/); change them on the
# command line, for example parallel.tp=4. Variables: examples/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_stage 1 "$@"
