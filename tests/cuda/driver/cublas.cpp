// The fake libcublas: the matrix products that candle's matmul needs.
#include "blas.h"

namespace {
using namespace blas;

struct Handle {
    const void* stream = nullptr;
    int pointer_mode = 0;
    int math_mode = 0;
};

enum Operation { OP_N = 0, OP_T = 1, OP_C = 2 };

Status check(Handle* h, int ta, int tb, int m, int n, int k, int lda, int ldb, int ldc, int batch) {
    if (!h) return NOT_INITIALIZED;
    if (h->pointer_mode) ELBO_FAIL("cuBLAS with scalars on the device is not implemented");
    if (ta < 0 || ta > 2 || tb < 0 || tb > 2 || m < 0 || n < 0 || k < 0 || batch < 0) return INVALID_VALUE;
    bool fits = lda >= std::max(1, ta == OP_N ? m : k) && ldb >= std::max(1, tb == OP_N ? k : n) && ldc >= std::max(1, m);
    return fits ? SUCCESS : INVALID_VALUE;
}

Status multiply(Handle* h, int ta, int tb, int m, int n, int k, float alpha, const void* a, int type_a, int lda, long long sa, const void* b,
                int type_b, int ldb, long long sb, float beta, void* c, int type_c, int ldc, long long sc, int batch, bool tf32) {
    if (Status bad = check(h, ta, tb, m, n, k, lda, ldb, ldc, batch)) return bad;
    auto x = type(type_a), y = type(type_b), z = type(type_c);
    if (!x || !y || !z || *x != *y || (*z != *x && *z != number::F32)) return NOT_SUPPORTED;
    if (!m || !n || !batch) return SUCCESS;
    Matrix ma{*x, size_t(ta == OP_N ? m : k), size_t(ta == OP_N ? k : m), size_t(lda), sa};
    Matrix mb{*y, size_t(tb == OP_N ? k : n), size_t(tb == OP_N ? n : k), size_t(ldb), sb};
    Matrix mc{*z, size_t(m), size_t(n), size_t(ldc), sc};
    product(h->stream, ta != OP_N, tb != OP_N, alpha, a, ma, b, mb, beta, c, mc, c, mc, size_t(batch), tf32, [](float value, size_t, size_t) { return value; });
    return SUCCESS;
}
}  // namespace

extern "C" {
Status cublasCreate_v2(Handle** handle) {
    *handle = new Handle;
    return SUCCESS;
}
Status cublasDestroy_v2(Handle* handle) {
    delete handle;
    return handle ? SUCCESS : NOT_INITIALIZED;
}
Status cublasSetStream_v2(Handle* handle, const void* stream) {
    elbo_emulated_stream(stream, "cublasSetStream");
    handle->stream = stream;
    return SUCCESS;
}
Status cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t bytes) {
    elbo_emulated_scribble(handle->stream, workspace, bytes, "cublasSetWorkspace");
    return SUCCESS;
}
Status cublasGetPointerMode_v2(Handle* handle, int* mode) {
    *mode = handle->pointer_mode;
    return SUCCESS;
}
Status cublasSetPointerMode_v2(Handle* handle, int mode) {
    handle->pointer_mode = mode;
    return SUCCESS;
}
Status cublasSetMathMode(Handle* handle, int mode) {
    handle->math_mode = mode;
    return SUCCESS;
}
Status cublasGetVersion_v2(Handle*, int* version) {
    *version = 130000;
    return SUCCESS;
}

Status cublasGemmStridedBatchedEx(Handle* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, long long sa,
                                  const void* b, int type_b, int ldb, long long sb, const void* beta, void* c, int type_c, int ldc, long long sc,
                                  int batch, int compute, int) {
    if (compute != COMPUTE_16F && !computes_f32(compute)) return NOT_SUPPORTED;
    if (compute == COMPUTE_16F && (type_a != R_16F || type_c != R_16F)) return NOT_SUPPORTED;
    number::Type scalar = compute == COMPUTE_16F ? number::F16 : number::F32;
    return multiply(h, ta, tb, m, n, k, number::load(scalar, alpha, 0), a, type_a, lda, sa, b, type_b, ldb, sb, number::load(scalar, beta, 0), c,
                    type_c, ldc, sc, batch, compute == FAST_TF32 && type_a == R_32F);
}

Status cublasGemmEx(Handle* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                    int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algo);
}

Status cublasSgemmStridedBatched(Handle* h, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, long long sa,
                                 const float* b, int ldb, long long sb, const float* beta, float* c, int ldc, long long sc, int batch) {
    return multiply(h, ta, tb, m, n, k, *alpha, a, R_32F, lda, sa, b, R_32F, ldb, sb, *beta, c, R_32F, ldc, sc, batch, false);
}

Status cublasSgemm_v2(Handle* h, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, const float* b, int ldb,
                      const float* beta, float* c, int ldc) {
    return cublasSgemmStridedBatched(h, ta, tb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);
}

Status cublasDgemmStridedBatched(Handle* h, int ta, int tb, int m, int n, int k, const double* alpha, const double* a, int lda, long long sa,
                                 const double* b, int ldb, long long sb, const double* beta, double* c, int ldc, long long sc, int batch) {
    if (Status bad = check(h, ta, tb, m, n, k, lda, ldb, ldc, batch)) return bad;
    if (!m || !n || !batch) return SUCCESS;
    auto host = [&](const double* base, int rows, int cols, int ld, long long stride) {
        return emulated<double>(base, size_t((batch - 1) * stride + (long long)(cols - 1) * ld + rows) * 8, "a matrix of doubles");
    };
    const double* x = host(a, ta ? k : m, ta ? m : k, lda, sa);
    const double* y = host(b, tb ? n : k, tb ? k : n, ldb, sb);
    double* z = host(c, m, n, ldc, sc);
    later(h->stream, "a matrix product", [=, scale = *alpha, keep = *beta] {
        for (long long at = 0; at < batch; at++)
            for (long long j = 0; j < n; j++)
                for (long long i = 0; i < m; i++) {
                    double sum = 0;
                    for (long long p = 0; p < k; p++) sum += x[at * sa + (ta ? i * lda + p : p * lda + i)] * y[at * sb + (tb ? p * ldb + j : j * ldb + p)];
                    double& to = z[at * sc + j * ldc + i];
                    to = scale * sum + (keep ? keep * to : 0);
                }
    });
    return SUCCESS;
}
}
