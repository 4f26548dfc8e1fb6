// A column-major matrix product over device memory, for the fakes of cuBLAS and cuBLASLt.
#pragma once

#include "emulated.h"
#include "gemm.h"
#include "number.h"

#include <optional>

namespace blas {
enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum DataType { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14 };
enum ComputeType { COMPUTE_16F = 64, COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, FAST_16F = 74, FAST_16BF = 75, FAST_TF32 = 77 };

inline std::optional<number::Type> type(int data_type) {
    switch (data_type) {
        case R_32F: return number::F32;
        case R_16F: return number::F16;
        case R_16BF: return number::BF16;
        default: return {};
    }
}

inline bool computes_f32(int compute) {
    return compute == COMPUTE_32F || compute == COMPUTE_32F_PEDANTIC || compute == FAST_16F || compute == FAST_16BF || compute == FAST_TF32;
}

struct Matrix {
    number::Type type;
    size_t rows, cols;  // as stored
    size_t ld;
    long long stride = 0;  // elements between the matrices of a batch

    size_t extent(size_t batch) const {
        if (!rows || !cols || !batch) return 0;
        return ((batch - 1) * size_t(stride) + (cols - 1) * ld + rows) * number::bytes(type);
    }
};

// d = finish(alpha * op(a) op(b) + beta * c, row, batch), in the order of the stream. The pointers are device pointers.
template <class Finish>
void product(const void* stream, bool transpose_a, bool transpose_b, float alpha, const void* a, const Matrix& ma, const void* b, const Matrix& mb,
             float beta, const void* c, const Matrix& mc, void* d, const Matrix& md, size_t batch, bool tf32, Finish finish) {
    const size_t m = md.rows, n = md.cols, k = transpose_a ? ma.rows : ma.cols;
    auto host_a = k ? emulated<char>(a, ma.extent(batch), "matrix A") : nullptr;
    auto host_b = k ? emulated<char>(b, mb.extent(batch), "matrix B") : nullptr;
    auto host_c = beta != 0 ? emulated<char>(c, mc.extent(batch), "matrix C") : nullptr;
    auto host_d = emulated<char>(d, md.extent(batch), "matrix D");
    auto overlaps = [&](const char* other, size_t bytes) { return other && other < host_d + md.extent(batch) && host_d < other + bytes; };
    if (overlaps(host_a, ma.extent(batch)) || overlaps(host_b, mb.extent(batch))) ELBO_FAIL("a matrix product writes over its operand");
    later(stream, "a matrix product", [=] {
        // One row of op(a), or column of op(b): elements `step` apart.
        auto reader = [&](const char* base, const Matrix& matrix, bool along_column, size_t at) {
            return [=, &matrix](size_t index, float* to, size_t stride) {
                const size_t first = at * size_t(matrix.stride) + (along_column ? index * matrix.ld : index), step = along_column ? 1 : matrix.ld;
                number::visit(matrix.type, [&](auto* t) {
                    auto elements = reinterpret_cast<const std::remove_pointer_t<decltype(t)>*>(base);
                    for (size_t p = 0; p < k; p++) {
                        float value = number::get(elements[first + p * step]);
                        to[p * stride] = tf32 ? number::tf32(value) : value;
                    }
                });
            };
        };
        for (size_t at = 0; at < batch; at++)
            gemm::multiply(m, n, k, reader(host_a, ma, transpose_a, at), reader(host_b, mb, !transpose_b, at), [&](size_t i, size_t j, float sum) {
                float value = alpha * sum;
                if (beta != 0) value += beta * number::load(mc.type, host_c, at * size_t(mc.stride) + j * mc.ld + i);
                number::store(md.type, host_d, at * size_t(md.stride) + j * md.ld + i, finish(value, i, at));
            });
    });
}
}  // namespace blas
