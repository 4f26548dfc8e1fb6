// The matrix product behind cuBLAS, cuBLASLt and cuDNN, in f32. Each output is summed in the order of k, so that a result never
// depends on the shape of the whole product.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <thread>

namespace gemm {
typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr size_t ROWS = 32, COLUMNS = 6, GROUP = 8;  // a tile of outputs; tiles that share a pass over the rows' operand

// sum[j][i] = sum over k of a[k][i] * b[k][j]
inline void tile(size_t k, const float* a, const float* b, float* sum) {
    Vector s[COLUMNS][2] = {};
    for (size_t p = 0; p < k; p++, a += ROWS, b += COLUMNS) {
        Vector low = *reinterpret_cast<const Vector*>(a), high = *reinterpret_cast<const Vector*>(a + 16);
#pragma GCC unroll 6
        for (size_t j = 0; j < COLUMNS; j++) s[j][0] += low * b[j], s[j][1] += high * b[j];
    }
    for (size_t j = 0; j < COLUMNS; j++)
        for (size_t h = 0; h < 2; h++) *reinterpret_cast<Vector*>(sum + j * ROWS + 16 * h) = s[j][h];
}

template <class F>
void halves(size_t count, bool threads, F work) {
    if (!threads || count < 2) return work(size_t(0), count);
    std::thread second([&] { work(count / 2, count); });
    work(size_t(0), count / 2);
    second.join();
}

// Calls put(i, j, sum over p of a(i)[p] * b(j)[p]) for i < m, j < n.
// read_a(i, to, stride) and read_b(j, to, stride) write the k operands of a row and of a column to to[p * stride].
template <class A, class B, class Put>
void multiply(size_t m, size_t n, size_t k, A read_a, B read_b, Put put) {
    const size_t panels = (m + ROWS - 1) / ROWS, tiles = (n + COLUMNS - 1) / COLUMNS;
    const bool threads = double(m) * double(n) * double(k) > 1e6;
    std::unique_ptr<float[]> left(new float[std::max<size_t>(panels * ROWS * k, 1)]());
    halves(panels, threads, [&](size_t from, size_t to) {
        for (size_t i = from * ROWS; i < std::min(m, to * ROWS); i++) read_a(i, &left[i / ROWS * ROWS * k + i % ROWS], ROWS);
    });
    halves(tiles, threads, [&](size_t from, size_t to) {
        std::unique_ptr<float[]> right(new float[std::max<size_t>(GROUP * COLUMNS * k, 1)]());
        float sum[COLUMNS * ROWS];
        for (size_t first = from; first < to; first += GROUP) {
            const size_t last = std::min(to, first + GROUP);
            for (size_t j = first * COLUMNS; j < std::min(n, last * COLUMNS); j++) {
                size_t at = j - first * COLUMNS;
                read_b(j, &right[at / COLUMNS * COLUMNS * k + at % COLUMNS], COLUMNS);
            }
            for (size_t panel = 0; panel < panels; panel++)
                for (size_t t = first; t < last; t++) {
                    tile(k, &left[panel * ROWS * k], &right[(t - first) * COLUMNS * k], sum);
                    for (size_t j = 0; j < std::min(COLUMNS, n - t * COLUMNS); j++)
                        for (size_t i = 0; i < std::min(ROWS, m - panel * ROWS); i++)
                            put(panel * ROWS + i, t * COLUMNS + j, sum[j * ROWS + i]);
                }
        }
    });
}
}  // namespace gemm
