#!/bin/bash
# Installs what a CUDA build needs into DIR, for machines without a toolkit, and prints the variables to build with:
#   eval "$(deploy/cuda/toolkit.sh DIR)"
# The compiler comes from PyPI. It is that of CUDA 13.0, whose PTX driver 580 can load. CUDA's libraries are opened when the
# program runs, so empty libraries with their names are enough to link it.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: toolkit.sh DIR}" && cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=$dir/nvidia/cu13
if [ ! -x "$home/bin/nvcc" ]; then
    python3 -m pip install --quiet --no-deps --target "$dir" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
fi
stubs=$dir/stubs
mkdir -p "$stubs"
for name in cuda cublas cublasLt curand nvrtc cudnn; do
    [ -e "$stubs/lib$name.so" ] || gcc -shared -o "$stubs/lib$name.so" -x c /dev/null
done
ln -sf "$home/lib/libcudart_static.a" "$stubs/libcudart.so"
# candle's own kernels are compiled for one architecture, as PTX that the driver translates for newer devices.
cat <<END
export CUDA_HOME='$home' CUDA_PATH='$home' CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80
export NVCC='$here/nvcc.sh' PATH='$home/bin':"\$PATH"
export RUSTFLAGS='--cfg feature="dynamic-loading" -L native=$stubs'
END
