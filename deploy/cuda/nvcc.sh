#!/bin/bash
# nvcc, but for candle's kernels of quantised weights and mixtures of experts: no model of elbo's calls them, and they would
# take minutes and 33 MB. Objects without code stand in for them, with functions that end the process where Rust names some.
source="${!#}"
output=
for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = -o ]; then
        next=$((i + 1))
        output="${!next}"
    fi
done
case " $* " in
    *" -c "*)
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
    *" --ptx "* | *" -ptx "*)
        # Quantised weights again, 6 MB of text.
        if [[ $source == */quantized.cu && -n $output ]]; then
            printf '.version 9.0\n.target sm_80\n.address_size 64\n' > "$output"
            exit
        fi
        ;;
esac
exec "${CUDA_HOME:?set it, or use toolkit.sh}/bin/nvcc" "$@"
