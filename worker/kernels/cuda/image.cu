// Moves elements between layouts. Nothing is computed, so the types differ only in their width.
//
// Launch: any grid of 256 threads (the loops stride by the grid), no dynamic shared memory. A thread moves 8 channels
// at a time if the number of channels is a multiple of 8 and the tensors are aligned to 16 bytes.
#include "common.cuh"

template <typename T, u32 N>
__device__ void gather_by(const T* x, const u32* index, T* out, u32 count, u64 len) {
    const u64 width = len / N;
    for (u64 i = grid_index(); i < count * width; i += grid_step()) {
        u64 row, column;
        if (width >> 32) {
            row = i / width;
            column = i - row * width;
        } else {
            u32 remainder;
            row = divide(i, u32(width), remainder);
            column = remainder;
        }
        put<N>(out + i * N, fetch<N>(x + index[row] * len + column * N));
    }
}

template <typename T>
__device__ __forceinline__ void gather(const T* x, const u32* index, T* out, u32 count, u64 len) {
    if (len % VECTOR == 0 && aligned(x) && aligned(out))
        gather_by<T, VECTOR>(x, index, out, count, len);
    else
        gather_by<T, 1>(x, index, out, count, len);
}

template <typename T, u32 N>
__device__ void concat_by(const T* x, const T* other, const u32* other_rows, T* out, u32 images, u32 pixels, u32 c1, u32 c2) {
    const u32 width = (c1 + c2) / N, first = c1 / N;
    for (u64 i = grid_index(); i < u64(images) * pixels * width; i += grid_step()) {
        u32 column;
        const u64 position = divide(i, width, column);
        const T* from;
        if (column < first) {
            from = x + position * c1 + column * N;
        } else {
            u32 pixel;
            const u32 image = u32(divide(position, pixels, pixel));
            from = other + (u64(row_of(other_rows, image)) * pixels + pixel) * c2 + (column - first) * N;
        }
        put<N>(out + i * N, fetch<N>(from));
    }
}

template <typename T>
__device__ __forceinline__ void concat(const T* x, const T* other, const u32* other_rows, T* out, u32 images, u32 pixels, u32 c1, u32 c2) {
    if (c1 % VECTOR == 0 && c2 % VECTOR == 0 && aligned(x) && aligned(other) && aligned(out))
        concat_by<T, VECTOR>(x, other, other_rows, out, images, pixels, c1, c2);
    else
        concat_by<T, 1>(x, other, other_rows, out, images, pixels, c1, c2);
}

/// A thread reads each input once and writes four copies.
template <typename T, u32 N>
__device__ void upsample_by(const T* x, T* out, u32 images, u32 h, u32 w, u32 c) {
    const u32 width = c / N;
    for (u64 i = grid_index(); i < u64(images) * h * w * width; i += grid_step()) {
        u32 column, at_x;
        const u64 row = divide(divide(i, width, column), w, at_x);
        const Elements<N, T> elements = fetch<N>(x + i * N);
        T* const to = out + ((row * 2) * (2 * u64(w)) + 2 * at_x) * c + column * N;
        const u64 line = 2 * u64(w) * c;
        put<N>(to, elements);
        put<N>(to + c, elements);
        put<N>(to + line, elements);
        put<N>(to + line + c, elements);
    }
}

template <typename T>
__device__ __forceinline__ void upsample(const T* x, T* out, u32 images, u32 h, u32 w, u32 c) {
    if (c % VECTOR == 0 && aligned(x) && aligned(out))
        upsample_by<T, VECTOR>(x, out, images, h, w, c);
    else
        upsample_by<T, 1>(x, out, images, h, w, c);
}

/// A thread writes the nine taps of its channels. The nine loads are independent, and neighbouring threads share most
/// of them in cache.
template <typename T, u32 N>
__device__ void im2col_by(const T* x, T* out, u32 images, u32 h, u32 w, u32 c, u32 out_h, u32 out_w, u32 stride, u32 before) {
    const u32 width = c / N;
    for (u64 i = grid_index(); i < u64(images) * out_h * out_w * width; i += grid_step()) {
        u32 column, at_x, at_y;
        const u64 position = divide(i, width, column);
        const u32 image = u32(divide(divide(position, out_w, at_x), out_h, at_y));
        const T* const from = x + u64(image) * h * w * c + column * N;
        T* const to = out + position * 9 * c + column * N;
        Elements<N, T> taps[9];
#pragma unroll
        for (u32 tap = 0; tap < 9; ++tap) {
            // A coordinate below 0 wraps to a large number, so it counts as outside like one past the end.
            const u32 in_y = at_y * stride + tap / 3 - before, in_x = at_x * stride + tap % 3 - before;
            taps[tap] = Elements<N, T>{};
            if (in_y < h && in_x < w) taps[tap] = fetch<N>(from + (u64(in_y) * w + in_x) * c);
        }
#pragma unroll
        for (u32 tap = 0; tap < 9; ++tap) put<N>(to + u64(tap) * c, taps[tap]);
    }
}

template <typename T>
__device__ __forceinline__ void im2col(const T* x, T* out, u32 images, u32 h, u32 w, u32 c, u32 out_h, u32 out_w, u32 stride, u32 before) {
    if (c % VECTOR == 0 && aligned(x) && aligned(out))
        im2col_by<T, VECTOR>(x, out, images, h, w, c, out_h, out_w, stride, before);
    else
        im2col_by<T, 1>(x, out, images, h, w, c, out_h, out_w, stride, before);
}

#define ELBO_IMAGE(T, suffix)                                                                                                        \
    /* out[i, :] = x[index[i], :]; out [count, len]. */                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                            \
        gather_##suffix(const T* x, const u32* index, T* out, u32 count, u64 len) {                                                  \
        gather<T>(x, index, out, count, len);                                                                                        \
    }                                                                                                                                \
    /* out [images, pixels, c1 + c2] = x [images, pixels, c1], then other[row(b)] [pixels, c2]. */                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                            \
        concat_##suffix(const T* x, const T* other, const u32* other_rows, T* out, u32 images, u32 pixels, u32 c1, u32 c2) {         \
        concat<T>(x, other, other_rows, out, images, pixels, c1, c2);                                                                \
    }                                                                                                                                \
    /* out [images, 2 h, 2 w, c]: each pixel of x [images, h, w, c] four times. */                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                            \
        upsample_##suffix(const T* x, T* out, u32 images, u32 h, u32 w, u32 c) {                                                     \
        upsample<T>(x, out, images, h, w, c);                                                                                        \
    }                                                                                                                                \
    /* out [images, out_h, out_w, 9 c], ordered (ky, kx, c): the 3 x 3 pixels of x [images, h, w, c] that start `before` pixels */   \
    /* above and left of (y stride, x stride), zero outside. */                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                            \
        im2col_##suffix(const T* x, T* out, u32 images, u32 h, u32 w, u32 c, u32 out_h, u32 out_w, u32 stride, u32 before) {         \
        im2col<T>(x, out, images, h, w, c, out_h, out_w, stride, before);                                                            \
    }

ELBO_EACH_TYPE(ELBO_IMAGE)
