#!/usr/bin/env bash
# Stage 5 of LongVILA-7B with 2048 frames on 32 nodes of 8 GPUs, as a SLURM job:
#
#   sbatch --account=ACCOUNT --partition=PARTITION examples/slurm_256gpu.sh [key=value ...]
#
# Submit from the repository's folder. Set below: the paths, and the container if your cluster runs them (pyxis). Without a
# container, have an environment that every node sees: bash tests/run.sh makes .venv, and "source .venv/bin/activate" before
# sbatch makes the job use it. Look at the layout first:
#   python -m megatron_vila.explain longvila-7b-stage5 world_size=256 parallel.ring=16
#SBATCH --job-name=longvila-7b-stage5
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# 15 minutes before the limit the trainer gets SIGTERM: it saves and ends with 75; the job then queues itself again under the same
# number and continues from there, so a job that waits for this one with --dependency=afterok starts when the run has finished
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

for SETTING in "$@"; do
  if [[ $SETTING =~ ^checkpoint\.(resume|save)= && ! ${SETTING,,} =~ =(true|newest_whole)$ ]]; then
    echo "$SETTING cannot be used in a job that queues itself again: it could not continue from where it stopped; for a new run set" \
      "another OUTPUT" >&2
    exit 2
  fi
done

export MODEL=longvila-7b
export DATA=${DATA:-/data/longvila_sft/train.json}
export MEDIA=${MEDIA:-/data/longvila_sft/videos}
export TOKENIZER=${TOKENIZER:-/models/qwen2-7b-tokenizer}
export CONTEXT=${CONTEXT:-524288}
export CHECKPOINT=${CHECKPOINT:-/runs/longvila-7b-stage4-$CONTEXT}
export OUTPUT=${OUTPUT:-/runs/longvila-7b-stage5-2048frames}
CONTAINER=${CONTAINER:-}             # image with the package, made from the Dockerfile; empty: no container
MOUNTS=${MOUNTS:-/data:/data,/models:/models,/runs:/runs,$PWD:$PWD}

# 256 GPUs = tp 2 * ulysses 2 * ring 16 * dp 4: a tensor and Ulysses group takes half a node, a ring 8 nodes, and 4 videos are in
# work at once. 524288 tokens / (tp * ulysses * ring = 64) = 8192 tokens of a sample on each GPU. Qwen2-7B's 28 query heads
# allow tp * ulysses = 4 at most on a power of two.
LAYOUT=(parallel.tp=2 parallel.pp=1 parallel.ulysses=2 parallel.ring=16)

export NNODES=$SLURM_NNODES
export GPUS_PER_NODE=8
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${HOSTS[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# when one node has ended the others have a minute to do so: a stopped run ends with 75 on each of them
STEP=(--kill-on-bad-exit=0 --wait=60)
if [[ -n $CONTAINER ]]; then
  STEP+=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$PWD")
fi
STATUS=0
# shellcheck disable=SC2016 # the number of the node is known on the node only
srun "${STEP[@]}" bash -c 'NODE_RANK=$SLURM_NODEID exec bash examples/train_stage5.sh "$@"' train "${LAYOUT[@]}" "$@" || STATUS=$?
# 143: the signal came while the nodes were starting, before there was anything to save
if ((STATUS == 75 || STATUS == 143)); then
  echo "stopped before its end: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
