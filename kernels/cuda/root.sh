#!/bin/sh
# usage: . kernels/cuda/root.sh [FOLDER]
#
# For machines without CUDA: puts the compiler of CUDA 13.0 into FOLDER (once: 100 MB of wheels) and
# tells the build where it is. Then: cargo build --release --features cuda
#
# 13.0 and not later: what later compilers write as PTX is not read by the drivers of 13.0.
strand_cuda_root=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/strand-cuda-13.0}
if [ ! -x "$strand_cuda_root/nvidia/cu13/bin/nvcc" ]; then
    python3 -m pip install --quiet --no-deps --no-compile --target "$strand_cuda_root" \
        nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 || return 1
fi
export CUDA_HOME="$strand_cuda_root/nvidia/cu13"
export NVCC="$CUDA_HOME/bin/nvcc"
unset strand_cuda_root
