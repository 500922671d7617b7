#!/usr/bin/env bash
# MM-SP under stock Transformers models, on two processes with FSDP2: a Qwen2 on text, then a LLaVA-OneVision on videos, both tiny
# and with random weights. Two GPUs with NCCL if there are two, else two CPU processes.
#
#   bash examples/hf_mm_sp/run.sh                     # both, results in runs/hf_mm_sp
#   bash examples/hf_mm_sp/run.sh --model FOLDER ...  # arguments of train.py: your own model and data
#
# With more GPUs: torchrun --nproc-per-node 8 examples/hf_mm_sp/train.py --ulysses 4 --ring 2 ...
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
THREADS=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS < 1 ? 1 : THREADS > 8 ? 8 : THREADS))}
source examples/launch.sh

if (($(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true) < 2)); then
  # two ranks cannot share one GPU under NCCL
  export CUDA_VISIBLE_DEVICES=""
fi
TRAIN=(torchrun --standalone --nproc-per-node 2 examples/hf_mm_sp/train.py)

if (($#)); then
  exec "${TRAIN[@]}" "$@"
fi
printf '\n== %s\n' "Qwen2 on the pages of this repository, ulysses=2"
"${TRAIN[@]}" --config examples/hf_mm_sp/configs/tiny-qwen2.json --ulysses 2 --out runs/hf_mm_sp/text
printf '\n== %s\n' "LLaVA-OneVision on synthetic videos, ring=2"
"${TRAIN[@]}" --config examples/hf_mm_sp/configs/tiny-llava-onevision.json --ring 2 --out runs/hf_mm_sp/video
