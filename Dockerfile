# megatron_vila on NVIDIA's PyTorch image, with the image's own torch, Transformer Engine and apex. Not built in CI.
#
#   docker build -t megatron_vila .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --rm -it megatron_vila bash examples/quickstart.sh
FROM nvcr.io/nvidia/pytorch:26.06-py3

WORKDIR /opt/megatron_vila
COPY . .
# installs what the image lacks, with the pins of the constraints file; what is there stays
RUN WITH_GPU=1 bash -c 'set -euo pipefail; source examples/common.sh'
