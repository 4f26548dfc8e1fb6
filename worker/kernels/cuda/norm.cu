// Normalisations. Means and variances are computed in two steps or around a pivot, never as E[x^2] - E[x]^2, which
// loses precision when the mean is large.
//
// Launch all with 256 threads per block and no dynamic shared memory:
//   group_norm_stats, group_norm   grid (ceil(pixels / chunk), images); groups <= 256, channels / groups <= 2048. A chunk of
//                                  about 32 to 128 pixels fills a GPU and keeps the partials small relative to the image.
//   layer_norm, adaptive_norm      any grid; one warp per row: ceil(rows / 8) blocks cover all at once
//   qk_norm                        any grid; 8 lanes per head: ceil(positions * 3 * heads / 32) blocks cover all at once
#include "common.cuh"

constexpr u32 WARPS = THREADS / WARP;
/// Blocks that must fit in the registers of a multiprocessor at once: enough to keep its memory busy, without spills.
template <typename T>
constexpr u32 RESIDENT = sizeof(T) == 4 ? 2 : 3;

// ---- group norm ---------------------------------------------------------------------------------------------------

/// Channels that a block works on at a time: whole groups, 8 consecutive channels per thread.
constexpr u32 SLAB = THREADS * VECTOR;
constexpr u32 MAX_GROUPS = THREADS;
/// Number of pixels a thread prefetches.
constexpr u32 AHEAD = 4;

/// How the threads of a block divide a slab of a chunk. A thread owns `owned` channels from `channel` on, in every
/// `rows`th pixel from `row` on. Threads of a row read consecutive addresses.
struct Share {
    u32 channels, rows, row, channel, owned;

    __device__ __forceinline__ Share(u32 channels) : channels(channels) {
        const u32 columns = (channels + VECTOR - 1) / VECTOR;
        rows = THREADS / columns;
        row = threadIdx.x / columns;
        channel = threadIdx.x % columns * VECTOR;
        owned = min(VECTOR, channels - channel);
    }
    /// How many of a chunk's `count` pixels row `of` reads.
    __device__ __forceinline__ u32 pixels(u32 count, u32 of) const { return of < rows ? count / rows + (of < count % rows) : 0; }
};

/// Groups per slab, divided as evenly as possible.
__device__ __forceinline__ u32 slab_groups(u32 channels, u32 groups) {
    const u32 most = SLAB / (channels / groups);
    const u32 slabs = (groups + most - 1) / most;
    return (groups + slabs - 1) / slabs;
}

template <bool vectors, typename T>
__device__ __forceinline__ void load_owned(const T* from, u32 owned, float (&to)[VECTOR]) {
    if constexpr (vectors) {
        load(from, to);
    } else {
#pragma unroll
        for (u32 j = 0; j < VECTOR; ++j) to[j] = j < owned ? to_float(from[j]) : 0.0f;
    }
}

template <typename T, bool vectors>
__device__ void chunk_statistics(float* means, float* squares, const T* x, const T* shift, const u32* shift_rows, float* partial,
                                 u32 pixels, u32 channels, u32 groups, u32 chunk) {
    const u32 image = blockIdx.y, first = blockIdx.x * chunk, count = min(chunk, pixels - first);
    const u32 chunks = (pixels + chunk - 1) / chunk, group_channels = channels / groups, stride = slab_groups(channels, groups);
    x += (u64(image) * pixels + first) * channels;
    if (shift) shift += u64(row_of(shift_rows, image)) * channels;
    partial += (u64(image) * chunks + blockIdx.x) * groups * 2;

    for (u32 group = 0; group < groups; group += stride) {
        const u32 here = min(stride, groups - group), from_channel = group * group_channels;
        const Share share(here * group_channels);
        const u32 mine = share.pixels(count, share.row);
        if (share.row < share.rows) {
            // Relative to a value of the same channel, the squares stay about as large as the variance. The shift
            // changes only a channel's mean, so it is added later.
            float pivot[VECTOR] = {}, sum[VECTOR] = {}, square[VECTOR] = {};
            const T* const from = x + u64(share.row) * channels + from_channel + share.channel;
            const u64 step = u64(share.rows) * channels;
            if (mine > 0) load_owned<vectors>(from, share.owned, pivot);
#pragma unroll AHEAD
            for (u32 i = 1; i < mine; ++i) {
                float values[VECTOR];
                load_owned<vectors>(from + i * step, share.owned, values);
#pragma unroll
                for (u32 j = 0; j < VECTOR; ++j) {
                    const float difference = values[j] - pivot[j];
                    sum[j] += difference;
                    square[j] = fmaf(difference, difference, square[j]);
                }
            }
            const float inverse = mine > 0 ? 1.0f / float(mine) : 0.0f;
#pragma unroll
            for (u32 j = 0; j < VECTOR; ++j)
                if (j < share.owned) {
                    const u32 at = share.row * share.channels + share.channel + j;
                    means[at] = fmaf(sum[j], inverse, pivot[j]);
                    squares[at] = fmaxf(fmaf(-sum[j] * inverse, sum[j], square[j]), 0.0f);
                }
        }
        __syncthreads();
        // Sum the rows into channels, in the place of row 0.
        for (u32 c = threadIdx.x; c < share.channels; c += THREADS) {
            float mean = 0.0f, deviations = 0.0f;
            for (u32 row = 0; row < share.rows; ++row)
                mean = fmaf(float(share.pixels(count, row)), means[row * share.channels + c], mean);
            mean /= float(count);
            for (u32 row = 0; row < share.rows; ++row) {
                const float difference = means[row * share.channels + c] - mean;
                deviations += fmaf(float(share.pixels(count, row)) * difference, difference, squares[row * share.channels + c]);
            }
            means[c] = shift ? mean + to_float(shift[from_channel + c]) : mean;
            squares[c] = deviations;
        }
        __syncthreads();
        // Sum the channels into groups.
        for (u32 g = threadIdx.x / WARP; g < here; g += WARPS) {
            const u32 lane = threadIdx.x % WARP;
            float mean = 0.0f, deviations = 0.0f;
            for (u32 c = lane; c < group_channels; c += WARP) mean += means[g * group_channels + c];
            mean = lane_sum(mean) / float(group_channels);
            for (u32 c = lane; c < group_channels; c += WARP) {
                const float difference = means[g * group_channels + c] - mean;
                deviations += fmaf(float(count) * difference, difference, squares[g * group_channels + c]);
            }
            deviations = lane_sum(deviations);
            if (lane == 0) {
                partial[(group + g) * 2] = mean;
                partial[(group + g) * 2 + 1] = deviations;
            }
        }
        __syncthreads();
    }
}

/// Whether each thread's 8 channels of a slab are whole 16-byte words.
__device__ __forceinline__ bool slab_vectors(const void* x, const void* out, u32 channels, u32 groups) {
    const u32 stride = slab_groups(channels, groups);
    return channels % VECTOR == 0 && (stride == groups || stride * (channels / groups) % VECTOR == 0) && aligned(x) && aligned(out);
}

template <typename T>
__device__ __forceinline__ void group_norm_stats(const T* x, const T* shift, const u32* shift_rows, float* partial, u32 pixels,
                                                 u32 channels, u32 groups, u32 chunk) {
    __shared__ float means[SLAB], squares[SLAB];
    if (slab_vectors(x, x, channels, groups))
        chunk_statistics<T, true>(means, squares, x, shift, shift_rows, partial, pixels, channels, groups, chunk);
    else
        chunk_statistics<T, false>(means, squares, x, shift, shift_rows, partial, pixels, channels, groups, chunk);
}

/// Count, mean and sum of squared deviations of a set of elements.
struct Moments {
    float count, mean, squares;

    /// Combines the moments of two sets (Chan, Golub, LeVeque 1979).
    __device__ __forceinline__ void merge(const Moments& other) {
        const float total = count + other.count;
        if (total == 0.0f) return;
        const float difference = other.mean - mean, share = other.count / total;
        mean = fmaf(difference, share, mean);
        squares += fmaf(difference * difference * count, share, other.squares);
        count = total;
    }
};

/// Mean and 1 / sqrt(variance + eps) of each group of this block's image, from the image's chunks.
__device__ void merge_chunks(const float* partial, u32 pixels, u32 groups, u32 group_channels, u32 chunk, float eps, float* means,
                             float* inverses) {
    __shared__ Moments lanes[THREADS];
    const u32 chunks = (pixels + chunk - 1) / chunk;
    partial += u64(blockIdx.y) * chunks * groups * 2;

    // As many threads as fit merge the chunks of each group, then one thread merges their results.
    const u32 parts = THREADS / groups;
    if (threadIdx.x < parts * groups) {
        const u32 group = threadIdx.x % groups;
        Moments moments = {0.0f, 0.0f, 0.0f};
        for (u32 k = threadIdx.x / groups; k < chunks; k += parts) {
            const float2 of_chunk = reinterpret_cast<const float2*>(partial)[u64(k) * groups + group];
            const u32 chunk_pixels = min(chunk, pixels - k * chunk);
            moments.merge({float(chunk_pixels) * float(group_channels), of_chunk.x, of_chunk.y});
        }
        lanes[threadIdx.x] = moments;
    }
    __syncthreads();
    if (threadIdx.x < groups) {
        Moments moments = lanes[threadIdx.x];
        for (u32 part = 1; part < parts; ++part) moments.merge(lanes[part * groups + threadIdx.x]);
        means[threadIdx.x] = moments.mean;
        inverses[threadIdx.x] = 1.0f / sqrtf(moments.squares / moments.count + eps);
    }
    __syncthreads();
}

template <typename T, bool vectors>
__device__ void normalise_chunk(const float* means, const float* inverses, const T* x, const T* shift, const u32* shift_rows,
                                const T* weight, const T* bias, T* out, u32 pixels, u32 channels, u32 groups, u32 chunk, bool activate) {
    const u32 image = blockIdx.y, first = blockIdx.x * chunk, count = min(chunk, pixels - first);
    const u32 group_channels = channels / groups, stride = slab_groups(channels, groups);
    const u64 offset = (u64(image) * pixels + first) * channels;
    if (shift) shift += u64(row_of(shift_rows, image)) * channels;

    for (u32 group = 0; group < groups; group += stride) {
        const u32 from_channel = group * group_channels;
        const Share share(min(stride, groups - group) * group_channels);
        if (share.row >= share.rows) continue;
        float centre[VECTOR], scale[VECTOR], add[VECTOR];
#pragma unroll
        for (u32 j = 0; j < VECTOR; ++j) {
            centre[j] = scale[j] = add[j] = 0.0f;
            if (j < share.owned) {
                const u32 c = from_channel + share.channel + j, g = c / group_channels;
                centre[j] = shift ? means[g] - to_float(shift[c]) : means[g];
                scale[j] = weight ? inverses[g] * to_float(weight[c]) : inverses[g];
                add[j] = bias ? to_float(bias[c]) : 0.0f;
            }
        }
        const u32 mine = share.pixels(count, share.row);
        const u64 start = offset + u64(share.row) * channels + from_channel + share.channel;
        const u64 step = u64(share.rows) * channels;
        const auto normalise = [&](float(&values)[VECTOR]) {
#pragma unroll
            for (u32 j = 0; j < VECTOR; ++j) {
                const float y = fmaf(values[j] - centre[j], scale[j], add[j]);
                values[j] = activate ? silu<T>(y) : y;
            }
        };
        float values[VECTOR];
        if constexpr (vectors) {
            for (u32 i = 0; i < mine; i += AHEAD) {
                Elements<VECTOR, T> ahead[AHEAD];
#pragma unroll
                for (u32 k = 0; k < AHEAD; ++k)
                    if (i + k < mine) ahead[k] = fetch<VECTOR>(x + start + (i + k) * step);
#pragma unroll
                for (u32 k = 0; k < AHEAD; ++k) {
                    if (i + k >= mine) break;
                    unpack<VECTOR, T>(ahead[k], values);
                    normalise(values);
                    store(out + start + (i + k) * step, values);
                }
            }
        } else {
            for (u32 i = 0; i < mine; ++i) {
                load_owned<false>(x + start + i * step, share.owned, values);
                normalise(values);
#pragma unroll
                for (u32 j = 0; j < VECTOR; ++j)
                    if (j < share.owned) out[start + i * step + j] = from_float<T>(values[j]);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void group_norm(const T* x, const T* shift, const u32* shift_rows, const float* partial, const T* weight,
                                           const T* bias, T* out, u32 pixels, u32 channels, u32 groups, u32 chunk, float eps,
                                           u32 activate) {
    __shared__ float means[MAX_GROUPS], inverses[MAX_GROUPS];
    merge_chunks(partial, pixels, groups, channels / groups, chunk, eps, means, inverses);
    if (slab_vectors(x, out, channels, groups))
        normalise_chunk<T, true>(means, inverses, x, shift, shift_rows, weight, bias, out, pixels, channels, groups, chunk, activate != 0);
    else
        normalise_chunk<T, false>(means, inverses, x, shift, shift_rows, weight, bias, out, pixels, channels, groups, chunk, activate != 0);
}

// ---- norms of a row -----------------------------------------------------------------------------------------------

/// Vectors of a row that a lane keeps in registers; the rest of a longer row is read again.
constexpr u32 HELD = 8;

/// Calls `write(channel, values)` with (x - mean) / sqrt(variance + eps), N channels of a row at a time. One warp
/// handles one row.
template <typename T, u32 N, typename Write>
__device__ __forceinline__ void normalise_row(const T* x, u32 channels, float eps, const Write& write) {
    const u32 lane = threadIdx.x % WARP, columns = channels / N;
    const bool held = columns <= WARP * HELD;
    Elements<N, T> elements[HELD];
    float values[N];

    // Visits this lane's columns, from registers if they are held.
    const auto each = [&](auto&& visit) {
        if (held) {
#pragma unroll
            for (u32 k = 0; k < HELD; ++k) {
                const u32 column = lane + k * WARP;
                if (column >= columns) break;
                unpack<N, T>(elements[k], values);
                visit(column);
            }
        } else {
            for (u32 column = lane; column < columns; column += WARP) {
                load(x + column * N, values);
                visit(column);
            }
        }
    };
    if (held) {
#pragma unroll
        for (u32 k = 0; k < HELD; ++k)
            if (lane + k * WARP < columns) elements[k] = fetch<N>(x + (lane + k * WARP) * N);
    }

    float sum = 0.0f, square = 0.0f;
    each([&](u32) {
#pragma unroll
        for (u32 j = 0; j < N; ++j) sum += values[j];
    });
    const float mean = lane_sum(sum) / float(channels);
    each([&](u32) {
#pragma unroll
        for (u32 j = 0; j < N; ++j) square = fmaf(values[j] - mean, values[j] - mean, square);
    });
    const float inverse = 1.0f / sqrtf(lane_sum(square) / float(channels) + eps);
    each([&](u32 column) {
#pragma unroll
        for (u32 j = 0; j < N; ++j) values[j] = (values[j] - mean) * inverse;
        write(column * N, values);
    });
}

__device__ __forceinline__ u64 first_row() { return u64(blockIdx.x) * WARPS + threadIdx.x / WARP; }
__device__ __forceinline__ u64 row_step() { return u64(gridDim.x) * WARPS; }

template <typename T, u32 N>
__device__ void layer_norm_by(const T* x, const T* weight, const T* bias, T* out, u64 rows, u32 channels, float eps) {
    for (u64 row = first_row(); row < rows; row += row_step())
        normalise_row<T, N>(x + row * channels, channels, eps, [&](u32 channel, float(&values)[N]) {
            float term[N];
            if (weight) {
                load(weight + channel, term);
#pragma unroll
                for (u32 j = 0; j < N; ++j) values[j] *= term[j];
            }
            if (bias) {
                load(bias + channel, term);
#pragma unroll
                for (u32 j = 0; j < N; ++j) values[j] += term[j];
            }
            store(out + row * channels + channel, values);
        });
}

template <typename T>
__device__ __forceinline__ void layer_norm(const T* x, const T* weight, const T* bias, T* out, u64 rows, u32 channels, float eps) {
    if (channels % VECTOR == 0 && aligned(x) && aligned(weight) && aligned(bias) && aligned(out))
        layer_norm_by<T, VECTOR>(x, weight, bias, out, rows, channels, eps);
    else
        layer_norm_by<T, 1>(x, weight, bias, out, rows, channels, eps);
}

template <typename T, u32 N>
__device__ void adaptive_norm_by(const T* x, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width, u32 shift_at,
                                 u32 scale_at, float eps) {
    for (u64 row = first_row(); row < u64(images) * len; row += row_step()) {
        u32 position;
        const T* const of_image = rows + divide(row, len, position) * row_width;
        const T *const shifts = of_image + u64(shift_at) * channels, *const scales = of_image + u64(scale_at) * channels;
        normalise_row<T, N>(x + row * channels, channels, eps, [&](u32 channel, float(&values)[N]) {
            float shift[N], scale[N];
            load(shifts + channel, shift);
            load(scales + channel, scale);
#pragma unroll
            for (u32 j = 0; j < N; ++j) values[j] = fmaf(values[j], 1.0f + scale[j], shift[j]);
            store(out + row * channels + channel, values);
        });
    }
}

template <typename T>
__device__ __forceinline__ void adaptive_norm(const T* x, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width,
                                              u32 shift_at, u32 scale_at, float eps) {
    if (channels % VECTOR == 0 && row_width % VECTOR == 0 && aligned(x) && aligned(rows) && aligned(out))
        adaptive_norm_by<T, VECTOR>(x, rows, out, images, len, channels, row_width, shift_at, scale_at, eps);
    else
        adaptive_norm_by<T, 1>(x, rows, out, images, len, channels, row_width, shift_at, scale_at, eps);
}

// ---- norms of heads -----------------------------------------------------------------------------------------------

/// Lanes that share a head. For a head of 64 elements of a half type, each lane does one 16-byte load.
constexpr u32 HEAD_LANES = 8;

template <typename T, u32 N>
__device__ void qk_norm_by(const T* qkv, const T* query, const T* key, T* out, u64 positions, u32 heads, u32 dim, float eps) {
    constexpr u32 HEADS = THREADS / HEAD_LANES;
    const u32 lane = threadIdx.x % HEAD_LANES, columns = dim / N;
    const u64 count = positions * 3 * heads;
    // All threads of a block run the same number of iterations, so that each warp is complete when its lanes sum.
    for (u64 base = u64(blockIdx.x) * HEADS; base < count; base += u64(gridDim.x) * HEADS) {
        const u64 head = base + threadIdx.x / HEAD_LANES;
        const bool present = head < count;
        u32 in_position;
        divide(head, 3 * heads, in_position);
        const bool value = in_position >= 2 * heads;
        const T* const weight = in_position < heads ? query : key;
        const T* const from = qkv + head * dim;
        float square = 0.0f, values[N];
        if (present && !value)
            for (u32 column = lane; column < columns; column += HEAD_LANES) {
                load(from + column * N, values);
#pragma unroll
                for (u32 j = 0; j < N; ++j) square = fmaf(values[j], values[j], square);
            }
        const float inverse = 1.0f / sqrtf(lane_sum<HEAD_LANES>(square) / float(dim) + eps);
        if (!present) continue;
        for (u32 column = lane; column < columns; column += HEAD_LANES) {
            if (value) {
                put<N>(out + head * dim + column * N, fetch<N>(from + column * N));
                continue;
            }
            load(from + column * N, values);
            if (weight) {
                float factor[N];
                load(weight + column * N, factor);
#pragma unroll
                for (u32 j = 0; j < N; ++j) values[j] *= inverse * factor[j];
            } else {
#pragma unroll
                for (u32 j = 0; j < N; ++j) values[j] *= inverse;
            }
            store(out + head * dim + column * N, values);
        }
    }
}

template <typename T>
__device__ __forceinline__ void qk_norm(const T* qkv, const T* query, const T* key, T* out, u64 positions, u32 heads, u32 dim, float eps) {
    if (dim % VECTOR == 0 && aligned(qkv) && aligned(query) && aligned(key) && aligned(out))
        qk_norm_by<T, VECTOR>(qkv, query, key, out, positions, heads, dim, eps);
    else
        qk_norm_by<T, 1>(qkv, query, key, out, positions, heads, dim, eps);
}

#define ELBO_NORM(T, suffix)                                                                                                        \
    /* partial [images, chunks, groups, 2] = mean, and sum of squared deviations from it, of a chunk of pixels of a group of */     \
    /* x [images, pixels, channels] + shift[row(b), c]. */                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT<T>)                                                              \
        group_norm_stats_##suffix(const T* x, const T* shift, const u32* shift_rows, float* partial, u32, u32 pixels,               \
                                  u32 channels, u32 groups, u32 chunk) {                                                            \
        group_norm_stats<T>(x, shift, shift_rows, partial, pixels, channels, groups, chunk);                                        \
    }                                                                                                                               \
    /* out = normalised x + shift, times weight[c], plus bias[c], through SiLU if `activate`. */                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT<T>)                                                              \
        group_norm_##suffix(const T* x, const T* shift, const u32* shift_rows, const float* partial, const T* weight,               \
                            const T* bias, T* out, u32, u32 pixels, u32 channels, u32 groups, u32 chunk, float eps, u32 activate) { \
        group_norm<T>(x, shift, shift_rows, partial, weight, bias, out, pixels, channels, groups, chunk, eps, activate);            \
    }                                                                                                                               \
    /* x, out [rows, channels]; weight and bias [channels] or absent. */                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT<T>)                                                              \
        layer_norm_##suffix(const T* x, const T* weight, const T* bias, T* out, u64 rows, u32 channels, float eps) {                \
        layer_norm<T>(x, weight, bias, out, rows, channels, eps);                                                                   \
    }                                                                                                                               \
    /* out = norm(x) (1 + rows[b, scale_at channels + c]) + rows[b, shift_at channels + c]; x, out [images, len, channels]. */      \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT<T>)                                                              \
        adaptive_norm_##suffix(const T* x, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width, u32 shift_at,   \
                               u32 scale_at, float eps) {                                                                           \
        adaptive_norm<T>(x, rows, out, images, len, channels, row_width, shift_at, scale_at, eps);                                  \
    }                                                                                                                               \
    /* qkv, out [positions, 3, heads, dim]: x / rms(x) * weight[dim] for each head of queries and keys, values as they are. */      \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT<T>)                                                              \
        qk_norm_##suffix(const T* qkv, const T* query, const T* key, T* out, u64 positions, u32 heads, u32 dim, float eps) {        \
        qk_norm<T>(qkv, query, key, out, positions, heads, dim, eps);                                                               \
    }

ELBO_EACH_TYPE(ELBO_NORM)
