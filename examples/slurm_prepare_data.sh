#!/usr/bin/env bash
# Prepare samples for training on many machines, as an array of SLURM jobs, one part of the records each:
#
#   sbatch --account=ACCOUNT --partition=PARTITION --array=0-31 examples/slurm_prepare_data.sh [options of tools/prepare_data.py]
#
# Set below what is read and where the shards go; both lie on a file system that all machines see. Each task takes one part; the
# one that is done last makes the index. A task that was stopped goes on where it was: submit the same line again, the parts that
# are done end at once. The number of tasks belongs to the set, so keep it. docs/prepare_data.md has the rest.
#SBATCH --job-name=prepare-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

SOURCE=${SOURCE:-/data/longvila_sft/train.json}
MEDIA=${MEDIA:-/data/longvila_sft/videos}
OUTPUT=${OUTPUT:-/data/longvila_sft/prepared}
PYTHON=${PYTHON:-python}

STATUS=0
# shellcheck disable=SC2086 # several sources are several words
"$PYTHON" tools/prepare_data.py $SOURCE --media-dir "$MEDIA" --out "$OUTPUT" \
  --part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT" "$@" || STATUS=$?
# 1: some samples are bad and were left out, which the report names
((STATUS == 1)) || exit "$STATUS"
