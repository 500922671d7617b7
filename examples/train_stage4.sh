#!/usr/bin/env bash
# Stage 4 of the LongVILA recipe, context extension on text: rows of CONTEXT tokens with a larger rotary base; vision tower and
# projector are frozen. Longer contexts are reached in steps, each starting from the one before:
#
#   MODEL=longvila-7b CONTEXT=262144 DATA=/data/text.json TOKENIZER=/models/tokenizer bash examples/train_stage4.sh
#   MODEL=longvila-7b CONTEXT=524288 CHECKPOINT=runs/longvila-7b-stage4-262144 DATA=... bash examples/train_stage4.sh
#
# Rotary bases, steps and batches are those of the released scripts (megatron_vila/config/presets/contexts/). The layout of the
# preset holds 16384 tokens a GPU at its own context; for a longer one raise parallel.ring by the same factor.
#
# Layout (tp, pp, ulysses, ring), lengths, rates and batch come from the preset (megatron_vila/config/presets/); change them on the
# command line, for example parallel.tp=4. Variables: examples/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_stage 4 "$@"
