#!/bin/bash
# Runs nvcc, but skips candle's kernels for quantised weights and mixtures of experts: no model of elbo calls them, and they
# would take minutes and 39 MB. They are replaced by objects and PTX without code, and by functions that abort if Rust links to
# them.
set -euo pipefail
source="${!#}"
# Prints the value of an option.
after() {
    local option=$1 previous=
    shift
    for argument in "$@"; do
        [ "$previous" != "$option" ] || echo "$argument"
        previous=$argument
    done
}
case " $* " in
    *" -c "*)
        output=$(after -o "$@")
        case "$source" in
            *moe_gguf.cu)
                declarations="$(dirname "$(dirname "$source")")/ffi.rs"
                {
                    echo '#include <stdlib.h>'
                    grep -oE 'pub fn [A-Za-z0-9_]+' "$declarations" | awk '{ print "void " $3 "(void) { abort(); }" }' | sort -u
                } | gcc -fPIC -x c -c -o "$output" -
                exit
                ;;
            *mmq_*.cu | *mmvq_gguf.cu | *moe_*.cu)
                exec gcc -fPIC -x c -c -o "$output" /dev/null
                ;;
        esac
        ;;
    *" --ptx "*)
        if [[ $source == */quantized.cu ]]; then
            printf '.version 9.0\n.target sm_80\n.address_size 64\n' > "$(after --output-directory "$@")/quantized.ptx"
            exit
        fi
        ;;
esac
exec "${CUDA_HOME:?set it, or use toolkit.sh}/bin/nvcc" "$@"
