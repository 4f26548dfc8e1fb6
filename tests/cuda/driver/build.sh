#!/bin/bash
# Builds the fake CUDA libraries into OUT: build.sh OUT [directory of candle-kernels' sources]
# A program that loads CUDA dynamically (cudarc with the cfg dynamic-loading) finds one emulated H100 with LD_LIBRARY_PATH=OUT.
# At run time, read when the program initialises CUDA:
#   ELBO_EMULATED_MEMORY   bytes of device memory, beyond which allocations fail (default: 80 GB)
#   ELBO_EMULATED_REVERSE  1: threads of a block run last to first; a result that changes has a race
#   ELBO_EMULATED_ASYNC    1: work runs as late as the API allows, not at once (see queue.cpp)
#   ELBO_EMULATED_PROFILE  a file for the names and times of all work between cuProfilerStart and cuProfilerStop
#   ELBO_EMULATED_FAULT    lost@N: launch N and every later call fail; stale@N: launch N is refused, and its error appears once more later
#   ELBO_EMULATED_CUDNN    which part of cuDNN does not work (see cudnn.cpp)
# Wrong use (memory out of bounds or freed, wrong pointers, unknown kernels) aborts the program with a message.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
candle=${2:-$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/candle-kernels-0.11.*/src | tail -1)}
objects=$out/objects
mkdir -p "$objects/stubs/cuda/std"
for stub in cuda_fp16.h cuda_bf16.h cuda_fp8.h cuda.h cuda/std/limits; do  # candle.h replaces them
    [ -e "$objects/stubs/$stub" ] || touch "$objects/stubs/$stub"
done
gpp="${CXX:-g++} -std=c++17 -O2 -march=native -fPIC -fno-strict-aliasing -Wall -I$here -I$root/tests/cuda -DELBO_CUDA_ON_CPU"
export here objects gpp

# compile SOURCE OBJECT FLAGS...: does nothing if the object is newer than all its sources
compile() {
    local source=$1 object=$2 f stale=; shift 2
    if [ -e "$object" ]; then
        for f in "$here/build.sh" $(sed 's/^[^:]*: //; s/\\$//' "$object.d"); do [ "$f" -ot "$object" ] || stale=1; done
        [ "$stale" ] || return 0
    fi
    $gpp "$@" -MMD -MF "$object.d" -c "$source" -o "$object"
}

# wrap GROUP FILE RUN HEADER: compiles one .cu file and a registration of its entry points. Their names get a prefix, since
# candle and elbo may both have an im2col_f32, and everything else a namespace of its own.
wrap() {
    local group=$1 stem name unit flags kernels k bound
    stem=$(basename "$2" .cu); name=${group}_$stem; unit=$objects/$name.cpp
    flags="-I$(dirname "$2") -Wno-unknown-pragmas"
    [ "$group" = candle ] && flags="-I$objects/stubs $flags -w"
    sed 's/extern __shared__ int dst_row\[\];/int* dst_row = (int*)elbo_cuda::dynamic_shared();/' "$2" > "$objects/$name.cu.new"
    # Lines "name bound", where the bound is the number of threads in __launch_bounds__.
    kernels=$({ echo "#include \"$4\""; echo "#undef __launch_bounds__"; echo "#define __launch_bounds__(threads, ...) BOUND<threads>"; cat "$objects/$name.cu.new"; } |
        $gpp $flags -E -P -x c++ - | tr '\n' ' ' | grep -oP 'extern "C"\s+(BOUND<[^>]*>\s*)?void\s+(BOUND<[^>]*>\s*)?\w+(?=\s*\()' |
        sed -E 's/.*BOUND<([^>]*)>.* (\w+)$/\2 \1/; s/^extern.* (\w+)$/\1/' | sort -u) ||
        { echo "$2: no kernel was recognised in it" >&2; return 1; }
    {
        echo "#include \"$4\""
        echo "#include \"kernels.h\""
        while read -r k bound; do echo "#define $k ${name}_$k"; done <<< "$kernels"
        echo "namespace $name {"
        echo "#include \"$objects/$name.cu\""
        while read -r k bound; do echo "static kernels::Register of_$k(\"$group/$stem\", \"$k\", kernels::$3<$k>, kernels::bound($bound));"; done <<< "$kernels"
        echo "}"
    } > "$unit.new"
    for f in "$objects/$name.cu" "$unit"; do cmp -s "$f.new" "$f" || mv "$f.new" "$f"; rm -f "$f.new"; done
    compile "$unit" "$objects/$name.o" $flags
}
export -f compile wrap

{
    for cu in "$root"/worker/kernels/cuda/*.cu; do echo "wrap elbo $cu entry cuda_on_cpu.h"; done
    for stem in conv unary binary cast indexing affine fill ternary; do echo "wrap candle $candle/$stem.cu flat_entry candle.h"; done
    for stem in reduce sort; do echo "wrap candle $candle/$stem.cu entry candle.h"; done
    for source in "$here"/*.cpp; do echo "compile $source $objects/$(basename "$source" .cpp).o"; done
} | xargs -P "${JOBS:-$(nproc)}" -I{} bash -euo pipefail -c {}

# link NAME VERSION OBJECTS...
link() {
    local name=$1 version=$2; shift 2
    $gpp -shared -Wl,-soname,"lib$name.so.$version" -Wl,-rpath,'$ORIGIN' -Wl,-Bsymbolic -Wl,-z,defs -o "$out/lib$name.so.$version" "$@" -lpthread
    ln -sf "lib$name.so.$version" "$out/lib$name.so"
}
link cuda 1 "$objects"/{driver,memory,modules,queue,streams,transfers}.o "$objects"/elbo_*.o "$objects"/candle_*.o
link cublas 13 "$objects/cublas.o" -L"$out" -l:libcuda.so.1
link cublasLt 13 "$objects/cublaslt.o" -L"$out" -l:libcuda.so.1
link curand 10 "$objects/curand.o" -L"$out" -l:libcuda.so.1
link cudnn 9 "$objects/cudnn.o" -L"$out" -l:libcuda.so.1
