// The fake libcublasLt: matmul with the epilogues none, bias, GELU and ReLU. It refuses what the real library refuses, also for
// requests that do not take their algorithm from the heuristic.
#include "blas.h"

#include <cmath>

namespace {
using namespace blas;

struct Handle {};

struct Desc {
    int compute, scale;
    int transpose_a = 0, transpose_b = 0, transpose_c = 0, pointer_mode = 0;
    int epilogue = 1;
    const void* bias = nullptr;
    long long bias_stride = 0;
    int bias_type = -1;  // -1: the type of D
};

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
    int order = 0;
    int batch = 1;
    int64_t stride = 0;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};

struct Algorithm {
    uint64_t made_by_heuristic, workspace;
    uint32_t alignment[4];
    int type_in, type_out, compute, epilogue;
    uint64_t unused[2];
};
static_assert(sizeof(Algorithm) == 64);
constexpr uint64_t MADE = 0x656c626f;

struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

enum Epilogue { DEFAULT = 1, RELU = 2, BIAS = 4, GELU = 32 };

template <class T>
Status get(T& field, const void* value, size_t bytes) {
    if (!value || bytes < sizeof(T)) return INVALID_VALUE;
    std::memcpy(&field, value, sizeof(T));
    return SUCCESS;
}

// The checks of both cublasLtMatmul and the heuristic.
Status check(const Desc& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    for (const Layout* l : {&a, &b, &c, &d}) {
        if (l->order) ELBO_FAIL("cublasLt: matrix order %d is not implemented, only columns", l->order);
        if (!l->rows || !l->cols || l->ld < int64_t(l->rows) || l->batch < 1 || l->batch != d.batch) return INVALID_VALUE;
    }
    if (o.transpose_c || o.pointer_mode) ELBO_FAIL("cublasLt: a transposed C and scalars on the device are not implemented");
    uint64_t k = o.transpose_a ? a.rows : a.cols;
    if ((o.transpose_a ? a.cols : a.rows) != d.rows || (o.transpose_b ? b.cols : b.rows) != k || (o.transpose_b ? b.rows : b.cols) != d.cols ||
        c.rows != d.rows || c.cols != d.cols)
        return INVALID_VALUE;
    if (!computes_f32(o.compute) || o.scale != R_32F) return NOT_SUPPORTED;
    if (!type(a.type) || a.type != b.type || c.type != d.type || (d.type != a.type && d.type != R_32F)) return NOT_SUPPORTED;
    if (o.epilogue & ~(DEFAULT | RELU | BIAS | GELU)) ELBO_FAIL("cublasLt: epilogue %d is not implemented", o.epilogue);
    if (o.epilogue & BIAS && o.bias_type != -1 && o.bias_type != d.type) return NOT_SUPPORTED;
    return SUCCESS;
}

// Whether an algorithm supports these types and this epilogue.
bool suits(const Algorithm& algorithm, const Desc& o, const Layout& a, const Layout& d) {
    return algorithm.made_by_heuristic == MADE && algorithm.type_in == a.type && algorithm.type_out == d.type && algorithm.compute == o.compute &&
           algorithm.epilogue == o.epilogue;
}

Matrix matrix(const Layout& l) { return {*type(l.type), l.rows, l.cols, size_t(l.ld), l.stride}; }

// The library's GELU is the tanh approximation.
float gelu(float x) { return 0.5f * x * (1 + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }
}  // namespace

extern "C" {
Status cublasLtCreate(Handle** handle) {
    if (!elbo_emulated_context()) return NOT_INITIALIZED;
    *handle = new Handle;
    return SUCCESS;
}
Status cublasLtDestroy(Handle* handle) {
    delete handle;
    return handle ? SUCCESS : NOT_INITIALIZED;
}
size_t cublasLtGetVersion() { return 130000; }

Status cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
    *desc = new Desc{compute, scale};
    return SUCCESS;
}
Status cublasLtMatmulDescDestroy(Desc* desc) {
    delete desc;
    return SUCCESS;
}
Status cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: return get(desc->compute, value, bytes);
        case 1: return get(desc->scale, value, bytes);
        case 2: return get(desc->pointer_mode, value, bytes);
        case 3: return get(desc->transpose_a, value, bytes);
        case 4: return get(desc->transpose_b, value, bytes);
        case 5: return get(desc->transpose_c, value, bytes);
        case 7: return get(desc->epilogue, value, bytes);
        case 8: return get(desc->bias, value, bytes);
        case 10: return get(desc->bias_stride, value, bytes);
        case 26: return get(desc->bias_type, value, bytes);
        default: ELBO_FAIL("cublasLtMatmulDescSetAttribute: attribute %d is not implemented", attribute);
    }
}

Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = new Layout{type, rows, cols, ld};
    return SUCCESS;
}
Status cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: return get(layout->type, value, bytes);
        case 1: return get(layout->order, value, bytes);
        case 2: return get(layout->rows, value, bytes);
        case 3: return get(layout->cols, value, bytes);
        case 4: return get(layout->ld, value, bytes);
        case 5: return get(layout->batch, value, bytes);
        case 6: return get(layout->stride, value, bytes);
        default: ELBO_FAIL("cublasLtMatrixLayoutSetAttribute: attribute %d is not implemented", attribute);
    }
}

Status cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return SUCCESS;
}
Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}
Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: case 3: return SUCCESS;  // search mode, mask of reduction schemes: one algorithm, which never splits k
        case 1: return get(preference->workspace, value, bytes);
        case 5: case 6: case 7: case 8: return get(preference->alignment[attribute - 5], value, bytes);
        default: ELBO_FAIL("cublasLtMatmulPreferenceSetAttribute: attribute %d is not implemented", attribute);
    }
}

Status cublasLtMatmulAlgoGetHeuristic(Handle* handle, const Desc* desc, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
                                      const Preference* preference, int requested, HeuristicResult* results, int* returned) {
    *returned = 0;
    if (!handle || !elbo_emulated_context()) return NOT_INITIALIZED;
    if (requested < 1) return INVALID_VALUE;
    if (Status bad = check(*desc, *a, *b, *c, *d)) return bad;
    results[0] = {};
    Algorithm& algorithm = results[0].algorithm;
    algorithm = {MADE, std::min<uint64_t>(preference->workspace, 1 << 16), {}, a->type, d->type, desc->compute, desc->epilogue, {}};
    std::copy_n(preference->alignment, 4, algorithm.alignment);
    results[0].workspace = algorithm.workspace;
    results[0].waves = 1;
    *returned = 1;
    return SUCCESS;
}

Status cublasLtMatmulAlgoCheck(Handle* handle, const Desc* desc, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
                               const Algorithm* algorithm, HeuristicResult* result) {
    if (!handle || !elbo_emulated_context()) return NOT_INITIALIZED;
    if (Status bad = check(*desc, *a, *b, *c, *d)) return bad;
    if (!suits(*algorithm, *desc, *a, *d)) return NOT_SUPPORTED;
    *result = {*algorithm, algorithm->workspace, 0, 1, {}};
    return SUCCESS;
}

Status cublasLtMatmul(Handle* handle, const Desc* desc, const float* alpha, const void* a, const Layout* la, const void* b, const Layout* lb,
                      const float* beta, const void* c, const Layout* lc, void* d, const Layout* ld, const Algorithm* algorithm, void* workspace,
                      size_t workspace_bytes, const void* stream) {
    if (!handle || !elbo_emulated_context()) return NOT_INITIALIZED;
    if (!alpha || !beta || !a || !b || !d || (*beta != 0 && !c)) return INVALID_VALUE;
    if (Status bad = check(*desc, *la, *lb, *lc, *ld)) return bad;
    if (algorithm && algorithm->made_by_heuristic != MADE) return INVALID_VALUE;
    if (algorithm && !suits(*algorithm, *desc, *la, *ld)) return NOT_SUPPORTED;
    const void* pointers[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        uint32_t promised = algorithm ? std::min(16u, algorithm->alignment[i]) : 16;
        if (reinterpret_cast<uint64_t>(pointers[i]) % promised) return INVALID_VALUE;
    }
    if (algorithm && workspace_bytes < algorithm->workspace) return INVALID_VALUE;
    if (algorithm) elbo_emulated_scribble(stream, workspace, algorithm->workspace, "workspace of cublasLtMatmul");

    const number::Type bias_type = *type(ld->type);
    const char* bias = nullptr;
    if (desc->epilogue & BIAS) {
        if (!desc->bias) return INVALID_VALUE;
        if (reinterpret_cast<uint64_t>(desc->bias) % 16) return INVALID_VALUE;
        bias = emulated<char>(desc->bias, ((ld->batch - 1) * desc->bias_stride + ld->rows) * number::bytes(bias_type), "bias of cublasLtMatmul");
    }
    const bool relu = desc->epilogue & RELU, smooth = desc->epilogue & GELU;
    product(stream, desc->transpose_a, desc->transpose_b, *alpha, a, matrix(*la), b, matrix(*lb), *beta, c, matrix(*lc), d, matrix(*ld), ld->batch,
            desc->compute == FAST_TF32 && la->type == R_32F, [=, stride = desc->bias_stride](float value, size_t row, size_t batch) {
                if (bias) value += number::load(bias_type, bias, batch * stride + row);
                return relu ? std::max(value, 0.0f) : smooth ? gelu(value) : value;
            });
    return SUCCESS;
}
}
