// Elementwise activations, gates and sums, each in one pass over memory.
//
// Launch: any grid of 256 threads (the loops stride by the grid), no dynamic shared memory. A thread moves 8 channels
// at a time if the number of channels is a multiple of 8 and the tensors are aligned to 16 bytes.
#include "common.cuh"

enum Activation : u32 { SILU = 0, GELU_ERF = 1, GELU_TANH = 2, QUICK_GELU = 3 };

template <typename T, u32 kind>
__device__ __forceinline__ float activation(float x) {
    if constexpr (kind == SILU) return silu<T>(x);
    if constexpr (kind == GELU_ERF) return gelu_erf(x);
    // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    if constexpr (kind == GELU_TANH) return sigmoid_times<T>(x, 1.5957691216057308f * x * fmaf(0.044715f * x, x, 1.0f));
    return sigmoid_times<T>(x, 1.702f * x);
}

template <typename T, u32 kind>
__device__ void activate_all(const T* x, T* out, u64 n) {
    const u64 vectors = aligned(x) && aligned(out) ? n / VECTOR : 0;
    for (u64 i = grid_index(); i < vectors; i += grid_step()) {
        float values[VECTOR];
        load(x + i * VECTOR, values);
#pragma unroll
        for (u32 j = 0; j < VECTOR; ++j) values[j] = activation<T, kind>(values[j]);
        store(out + i * VECTOR, values);
    }
    for (u64 i = vectors * VECTOR + grid_index(); i < n; i += grid_step())
        out[i] = from_float<T>(activation<T, kind>(to_float(x[i])));
}

template <typename T>
__device__ __forceinline__ void activate(const T* x, T* out, u64 n, u32 kind) {
    switch (kind) {
        case SILU: return activate_all<T, SILU>(x, out, n);
        case GELU_ERF: return activate_all<T, GELU_ERF>(x, out, n);
        case GELU_TANH: return activate_all<T, GELU_TANH>(x, out, n);
        case QUICK_GELU: return activate_all<T, QUICK_GELU>(x, out, n);
    }
}

template <typename T, u32 N>
__device__ void geglu_by(const T* x, T* out, u64 rows, u32 channels) {
    const u32 width = channels / N;
    for (u64 i = grid_index(); i < rows * width; i += grid_step()) {
        u32 column;
        const u64 row = divide(i, width, column);
        const T* const from = x + row * 2 * channels + column * N;
        float hidden[N], gate[N];
        load(from, hidden);
        load(from + channels, gate);
#pragma unroll
        for (u32 j = 0; j < N; ++j) hidden[j] *= gelu_erf(gate[j]);
        store(out + i * N, hidden);
    }
}

template <typename T>
__device__ __forceinline__ void geglu(const T* x, T* out, u64 rows, u32 channels) {
    if (channels % VECTOR == 0 && aligned(x) && aligned(out))
        geglu_by<T, VECTOR>(x, out, rows, channels);
    else
        geglu_by<T, 1>(x, out, rows, channels);
}

template <typename T, u32 N>
__device__ void gate_by(const T* x, const T* h, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width, u32 at) {
    const u32 width = channels / N;
    for (u64 i = grid_index(); i < u64(images) * len * width; i += grid_step()) {
        u32 column;
        const u32 image = u32(divide(i, width, column) / len);
        float values[N], hidden[N], gate[N];
        load(x + i * N, values);
        load(h + i * N, hidden);
        load(rows + u64(image) * row_width + u64(at) * channels + column * N, gate);
#pragma unroll
        for (u32 j = 0; j < N; ++j) values[j] = fmaf(gate[j], hidden[j], values[j]);
        store(out + i * N, values);
    }
}

template <typename T>
__device__ __forceinline__ void gate(const T* x, const T* h, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width,
                                     u32 at) {
    if (channels % VECTOR == 0 && row_width % VECTOR == 0 && aligned(x) && aligned(h) && aligned(rows) && aligned(out))
        gate_by<T, VECTOR>(x, h, rows, out, images, len, channels, row_width, at);
    else
        gate_by<T, 1>(x, h, rows, out, images, len, channels, row_width, at);
}

template <typename T, u32 N>
__device__ void add_by(T* out, const T* bias, const T* shift, const u32* shift_rows, const T* residual, const u32* residual_rows,
                       u32 images, u32 pixels, u32 channels) {
    const u32 width = channels / N;
    for (u64 i = grid_index(); i < u64(images) * pixels * width; i += grid_step()) {
        u32 column;
        const u64 position = divide(i, width, column);
        u32 pixel;
        const u32 image = u32(divide(position, pixels, pixel));
        float sum[N], term[N];
        load(out + i * N, sum);
        if (bias) {
            load(bias + column * N, term);
#pragma unroll
            for (u32 j = 0; j < N; ++j) sum[j] += term[j];
        }
        if (shift) {
            load(shift + u64(row_of(shift_rows, image)) * channels + column * N, term);
#pragma unroll
            for (u32 j = 0; j < N; ++j) sum[j] += term[j];
        }
        if (residual) {
            load(residual + (u64(row_of(residual_rows, image)) * pixels + pixel) * channels + column * N, term);
#pragma unroll
            for (u32 j = 0; j < N; ++j) sum[j] += term[j];
        }
        store(out + i * N, sum);
    }
}

template <typename T>
__device__ __forceinline__ void add(T* out, const T* bias, const T* shift, const u32* shift_rows, const T* residual,
                                    const u32* residual_rows, u32 images, u32 pixels, u32 channels) {
    if (channels % VECTOR == 0 && aligned(out) && aligned(bias) && aligned(shift) && aligned(residual))
        add_by<T, VECTOR>(out, bias, shift, shift_rows, residual, residual_rows, images, pixels, channels);
    else
        add_by<T, 1>(out, bias, shift, shift_rows, residual, residual_rows, images, pixels, channels);
}

#define ELBO_ELEMENTWISE(T, suffix)                                                                                                 \
    /* out = f(x); kind is an Activation. */                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) activate_##suffix(const T* x, T* out, u64 n, u32 kind) {                  \
        activate<T>(x, out, n, kind);                                                                                               \
    }                                                                                                                               \
    /* x [rows, 2 channels] holds halves (h, g): out [rows, channels] = h gelu(g). */                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) geglu_##suffix(const T* x, T* out, u64 rows, u32 channels) {              \
        geglu<T>(x, out, rows, channels);                                                                                           \
    }                                                                                                                               \
    /* out = x + rows[b, at channels + c] h; x, h, out [images, len, channels], rows [images, row_width]. */                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                           \
        gate_##suffix(const T* x, const T* h, const T* rows, T* out, u32 images, u32 len, u32 channels, u32 row_width, u32 at) {    \
        gate<T>(x, h, rows, out, images, len, channels, row_width, at);                                                             \
    }                                                                                                                               \
    /* out [images, pixels, channels] += bias[c] + shift[row(b), c] + residual[row(b), p, c], each term optional. */                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                           \
        add_##suffix(T* out, const T* bias, const T* shift, const u32* shift_rows, const T* residual, const u32* residual_rows,     \
                     u32 images, u32 pixels, u32 channels) {                                                                        \
        add<T>(out, bias, shift, shift_rows, residual, residual_rows, images, pixels, channels);                                    \
    }

ELBO_EACH_TYPE(ELBO_ELEMENTWISE)
