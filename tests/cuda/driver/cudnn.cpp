// The fake libcudnn (9, legacy API): two-dimensional forward convolutions, plain and with bias, residual and activation.
//
// Sums are in f32, in the order (ky, kx, channel). f32 operands are rounded to TF32 unless the math type is FMA, like the real
// library on tensor cores. It refuses what the real one does not support; padding is symmetric by construction.
//
// ELBO_EMULATED_CUDNN breaks it: it does not start (fails), has no convolution with bias and residual (no-fused), no convolution
// at all (no-convolutions, or breaks if that only shows when one is run), or no memory for the hundredth one (no-memory).
#include "emulated.h"
#include "gemm.h"
#include "number.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <optional>

namespace {
enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1001,
    SUBLIBRARY_LOADING_FAILED = 1008,
    BAD_PARAM = 2000,
    NOT_SUPPORTED = 3000,
    DEVICE_ALLOCATION_FAILED = 4004,
    EXECUTION_FAILED = 5000,
};
enum Format { NCHW = 0, NHWC = 1 };
enum Math { DEFAULT_MATH = 0, TENSOR_OP = 1, TENSOR_OP_CONVERSION = 2, FMA = 3 };
enum Algorithm { IMPLICIT_GEMM = 0, IMPLICIT_PRECOMP_GEMM = 1, ALGORITHMS = 8 };
enum Activation { ACTIVATION_RELU = 1, ACTIVATION_IDENTITY = 5 };
enum DataType { DATA_FLOAT = 0, DATA_HALF = 2, DATA_BFLOAT16 = 9 };

bool made_to(const char* fault) {
    const char* value = std::getenv("ELBO_EMULATED_CUDNN");
    return value && !std::strcmp(value, fault);
}

struct Handle {
    const void* stream = nullptr;
};

struct Tensor {
    int type = -1;
    int n = 0, c = 0, h = 0, w = 0;
    int64_t sn = 0, sc = 0, sh = 0, sw = 0;  // strides in elements
    bool same_shape(const Tensor& o) const { return n == o.n && c == o.c && h == o.h && w == o.w; }
    size_t extent() const { return (n - 1) * sn + (c - 1) * sc + (h - 1) * sh + (w - 1) * sw + 1; }
    bool channels_last() const { return sc == 1 && sw == c && sh == int64_t(w) * c && sn == int64_t(h) * w * c; }
    bool channels_first() const { return sw == 1 && sh == w && sc == int64_t(h) * w && sn == int64_t(c) * h * w; }
};

struct Filter {
    int type = -1, format = NCHW;
    int k = 0, c = 0, h = 0, w = 0;
};

struct Convolution {
    int pad_h = 0, pad_w = 0, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
    int mode = -1, compute = -1, math = DEFAULT_MATH, groups = 1;
    int out(int in, int kernel, int pad, int stride, int dilation) const { return 1 + (in + 2 * pad - (kernel - 1) * dilation - 1) / stride; }
};

struct ActivationDescriptor {
    int mode = -1;
    double coefficient = 0;
};

struct Performance {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};

std::optional<number::Type> type(int data_type) {
    switch (data_type) {
        case DATA_FLOAT: return number::F32;
        case DATA_HALF: return number::F16;
        case DATA_BFLOAT16: return number::BF16;
        default: return {};
    }
}

// Operands must start at multiples of 16 bytes, which the real library's channels-last kernels rely on.
bool aligned(std::initializer_list<const void*> pointers) {
    return std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uint64_t>(p) % 16 == 0; });
}

template <class T>
T* device(T* pointer, size_t elements, int data_type, const char* what) {
    return static_cast<T*>(elbo_emulated_memory(reinterpret_cast<uint64_t>(pointer), elements * number::bytes(*type(data_type)), what));
}

Status check(const Handle* handle, const Tensor& x, const Filter& w, const Convolution& conv, const Tensor& y) {
    if (!handle || !elbo_emulated_context()) return NOT_INITIALIZED;
    if (conv.groups != 1 || conv.mode != 1) ELBO_FAIL("cuDNN: groups and flipped convolutions are not implemented");
    if (x.n != y.n || x.c != w.c || y.c != w.k || y.h != conv.out(x.h, w.h, conv.pad_h, conv.stride_h, conv.dilation_h) ||
        y.w != conv.out(x.w, w.w, conv.pad_w, conv.stride_w, conv.dilation_w))
        return BAD_PARAM;
    if (!type(x.type) || x.type != w.type) return NOT_SUPPORTED;
    const bool all_half = conv.compute == DATA_HALF && x.type == DATA_HALF;  // what candle asks for; the sums here are f32 anyway
    if (x.type != y.type || (conv.compute != DATA_FLOAT && !all_half)) return NOT_SUPPORTED;
    if (w.format == NHWC ? !x.channels_last() || !y.channels_last() : !y.channels_first()) return NOT_SUPPORTED;
    return SUCCESS;
}

// The real sizes also vary with the shape: a size queried for another shape must not pass.
size_t workspace_bytes(int algorithm, const Tensor& y) {
    return algorithm == IMPLICIT_PRECOMP_GEMM ? std::min<size_t>(256 + 4 * size_t(y.n) * y.h * y.w, 1 << 20) : 0;
}

bool available(int algorithm) { return algorithm == IMPLICIT_GEMM || algorithm == IMPLICIT_PRECOMP_GEMM; }

Status use_workspace(const Handle* handle, int algorithm, void* workspace, size_t bytes, const Tensor& y) {
    if (!available(algorithm)) return NOT_SUPPORTED;
    size_t needed = workspace_bytes(algorithm, y);
    if (bytes < needed) return BAD_PARAM;
    if (made_to("breaks")) return EXECUTION_FAILED;
    static std::atomic<int> convolutions = 0;
    if (made_to("no-memory") && ++convolutions == 100) return DEVICE_ALLOCATION_FAILED;
    elbo_emulated_scribble(handle->stream, workspace, needed, "workspace of a convolution");
    return SUCCESS;
}

// finish(convolution, channel, image, row, column) for every output.
template <class Finish>
void convolve(const Tensor& x, const void* x_host, const Filter& w, const void* w_host, const Convolution& conv, const Tensor& y, Finish finish) {
    const bool tf32 = x.type == DATA_FLOAT && conv.math != FMA;
    const number::Type element = *type(x.type);
    const bool last = w.format == NHWC;
    const int64_t wk = int64_t(w.h) * w.w * w.c, wc = last ? 1 : int64_t(w.h) * w.w, wh = last ? int64_t(w.w) * w.c : w.w, ww = last ? w.c : 1;
    number::visit(element, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        auto input = static_cast<const T*>(x_host);
        auto weight = static_cast<const T*>(w_host);
        auto read = [=](T value) { return tf32 ? number::tf32(number::get(value)) : number::get(value); };
        auto row = [&](size_t k, float* to, size_t stride) {
            for (int ky = 0; ky < w.h; ky++)
                for (int kx = 0; kx < w.w; kx++)
                    for (int c = 0; c < w.c; c++, to += stride) *to = read(weight[k * wk + ky * wh + kx * ww + c * wc]);
        };
        auto column = [&](size_t pixel, float* to, size_t stride) {
            const int image = pixel / (size_t(y.h) * y.w), oy = pixel / y.w % y.h, ox = pixel % y.w;
            for (int ky = 0; ky < w.h; ky++)
                for (int kx = 0; kx < w.w; kx++) {
                    const int iy = oy * conv.stride_h - conv.pad_h + ky * conv.dilation_h, ix = ox * conv.stride_w - conv.pad_w + kx * conv.dilation_w;
                    const bool inside = iy >= 0 && iy < x.h && ix >= 0 && ix < x.w;
                    const T* at = input + (inside ? image * x.sn + iy * x.sh + ix * x.sw : 0);
                    for (int c = 0; c < w.c; c++, to += stride) *to = inside ? read(at[c * x.sc]) : 0;
                }
        };
        gemm::multiply(w.k, size_t(y.n) * y.h * y.w, size_t(wk), row, column, [&](size_t k, size_t pixel, float sum) {
            finish(sum, int(k), int(pixel / (size_t(y.h) * y.w)), int(pixel / y.w % y.h), int(pixel % y.w));
        });
    });
}

size_t at(const Tensor& t, int n, int c, int h, int w) { return n * t.sn + c * t.sc + h * t.sh + w * t.sw; }

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
    return static_cast<const char*>(a) < static_cast<const char*>(b) + b_bytes && static_cast<const char*>(b) < static_cast<const char*>(a) + a_bytes;
}
}  // namespace

extern "C" {
#define DESCRIPTOR(Name, Type)                       \
    Status cudnnCreate##Name##Descriptor(Type** d) { \
        *d = new Type;                               \
        return SUCCESS;                              \
    }                                                \
    Status cudnnDestroy##Name##Descriptor(Type* d) { \
        delete d;                                    \
        return SUCCESS;                              \
    }
DESCRIPTOR(Tensor, Tensor)
DESCRIPTOR(Filter, Filter)
DESCRIPTOR(Convolution, Convolution)
DESCRIPTOR(Activation, ActivationDescriptor)

Status cudnnCreate(Handle** handle) {
    if (made_to("fails")) return SUBLIBRARY_LOADING_FAILED;
    if (!elbo_emulated_context()) return NOT_INITIALIZED;
    *handle = new Handle;
    return SUCCESS;
}
Status cudnnDestroy(Handle* handle) {
    delete handle;
    return SUCCESS;
}
Status cudnnSetStream(Handle* handle, const void* stream) {
    elbo_emulated_stream(stream, "cudnnSetStream");
    handle->stream = stream;
    return SUCCESS;
}
size_t cudnnGetVersion() { return 91300; }
size_t cudnnGetCudartVersion() { return 13000; }
const char* cudnnGetErrorString(Status status) {
    switch (status) {
        case SUCCESS: return "CUDNN_STATUS_SUCCESS";
        case NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
        case BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
        default: return "CUDNN_STATUS_NOT_SUPPORTED";
    }
}

Status cudnnSetTensor4dDescriptorEx(Tensor* t, int type, int n, int c, int h, int w, int sn, int sc, int sh, int sw) {
    if (n <= 0 || c <= 0 || h <= 0 || w <= 0 || sn <= 0 || sc <= 0 || sh <= 0 || sw <= 0) return BAD_PARAM;
    if (int64_t(n) * c * h * w >= int64_t(1) << 31) return NOT_SUPPORTED;
    *t = {type, n, c, h, w, sn, sc, sh, sw};
    return SUCCESS;
}

Status cudnnSetTensor4dDescriptor(Tensor* t, int format, int type, int n, int c, int h, int w) {
    if (n <= 0 || c <= 0 || h <= 0 || w <= 0 || (format != NCHW && format != NHWC)) return BAD_PARAM;
    if (int64_t(n) * c * h * w >= int64_t(1) << 31) return NOT_SUPPORTED;
    return format == NHWC ? cudnnSetTensor4dDescriptorEx(t, type, n, c, h, w, h * w * c, 1, w * c, c)
                          : cudnnSetTensor4dDescriptorEx(t, type, n, c, h, w, c * h * w, h * w, w, 1);
}

Status cudnnSetFilter4dDescriptor(Filter* f, int type, int format, int k, int c, int h, int w) {
    if (k <= 0 || c <= 0 || h <= 0 || w <= 0 || (format != NCHW && format != NHWC)) return BAD_PARAM;
    *f = {type, format, k, c, h, w};
    return SUCCESS;
}

Status cudnnSetConvolution2dDescriptor(Convolution* d, int pad_h, int pad_w, int u, int v, int dilation_h, int dilation_w, int mode, int compute) {
    if (pad_h < 0 || pad_w < 0 || u <= 0 || v <= 0 || dilation_h <= 0 || dilation_w <= 0) return BAD_PARAM;
    *d = {pad_h, pad_w, u, v, dilation_h, dilation_w, mode, compute, d->math, d->groups};
    return SUCCESS;
}
Status cudnnSetConvolutionMathType(Convolution* d, int math) {
    if (math < 0 || math > 3) return BAD_PARAM;
    d->math = math;
    return SUCCESS;
}
Status cudnnSetConvolutionGroupCount(Convolution* d, int groups) {
    d->groups = groups;
    return SUCCESS;
}
Status cudnnSetActivationDescriptor(ActivationDescriptor* d, int mode, int, double coefficient) {
    *d = {mode, coefficient};
    return SUCCESS;
}

Status cudnnGetConvolution2dForwardOutputDim(const Convolution* d, const Tensor* x, const Filter* w, int* n, int* c, int* height, int* width) {
    *n = x->n;
    *c = w->k;
    *height = d->out(x->h, w->h, d->pad_h, d->stride_h, d->dilation_h);
    *width = d->out(x->w, w->w, d->pad_w, d->stride_w, d->dilation_w);
    return SUCCESS;
}

Status cudnnGetConvolutionForwardWorkspaceSize(Handle* handle, const Tensor* x, const Filter* w, const Convolution* conv, const Tensor* y,
                                               int algorithm, size_t* bytes) {
    if (Status bad = check(handle, *x, *w, *conv, *y)) return bad;
    if (!available(algorithm) || made_to("no-convolutions")) return NOT_SUPPORTED;
    *bytes = workspace_bytes(algorithm, *y);
    return SUCCESS;
}

Status cudnnGetConvolutionForwardAlgorithmMaxCount(Handle*, int* count) {
    *count = ALGORITHMS;
    return SUCCESS;
}

Status cudnnGetConvolutionForwardAlgorithm_v7(Handle* handle, const Tensor* x, const Filter* w, const Convolution* conv, const Tensor* y, int requested,
                                              int* returned, Performance* results) {
    if (requested < 1) return BAD_PARAM;
    if (Status bad = check(handle, *x, *w, *conv, *y)) return bad;
    *returned = 0;
    for (int algorithm : {1, 0, 2, 3, 4, 5, 6, 7}) {
        if (*returned == requested) break;
        results[(*returned)++] = {algorithm, available(algorithm) ? SUCCESS : NOT_SUPPORTED, -1, workspace_bytes(algorithm, *y), 1, conv->math, {}};
    }
    return SUCCESS;
}

// The real library runs every algorithm on y; here y becomes NaN.
Status cudnnFindConvolutionForwardAlgorithmEx(Handle* handle, const Tensor* x, const void* x_data, const Filter* w, const void* w_data,
                                              const Convolution* conv, const Tensor* y, void* y_data, int requested, int* returned,
                                              Performance* results, void* workspace, size_t workspace_size) {
    if (Status bad = cudnnGetConvolutionForwardAlgorithm_v7(handle, x, w, conv, y, requested, returned, results)) return bad;
    device(x_data, x->extent(), x->type, "x of a convolution");
    device(w_data, size_t(w->k) * w->c * w->h * w->w, w->type, "filter of a convolution");
    elbo_emulated_scribble(handle->stream, y_data, y->extent() * number::bytes(*type(y->type)), "y of a convolution");
    elbo_emulated_scribble(handle->stream, workspace, workspace_size, "workspace of a convolution");
    for (int i = 0; i < *returned; i++) {
        if (results[i].status == SUCCESS && results[i].memory > workspace_size) results[i].status = BAD_PARAM;
        results[i].time = results[i].status == SUCCESS ? 0.01f * float(i + 1) : -1;
    }
    std::stable_sort(results, results + *returned, [](const Performance& a, const Performance& b) { return !a.status && b.status; });
    return SUCCESS;
}

Status cudnnConvolutionForward(Handle* handle, const float* alpha, const Tensor* x, const void* x_data, const Filter* w, const void* w_data,
                               const Convolution* conv, int algorithm, void* workspace, size_t workspace_size, const float* beta, const Tensor* y,
                               void* y_data) {
    if (Status bad = check(handle, *x, *w, *conv, *y)) return bad;
    if (w->format == NHWC && !aligned({x_data, w_data, y_data})) return BAD_PARAM;
    const number::Type element = *type(y->type);
    const void* in = device(x_data, x->extent(), x->type, "x of a convolution");
    const void* filter = device(w_data, size_t(w->k) * w->c * w->h * w->w, w->type, "filter of a convolution");
    void* out = device(y_data, y->extent(), y->type, "y of a convolution");
    if (Status bad = use_workspace(handle, algorithm, workspace, workspace_size, *y)) return bad;
    if (overlap(in, x->extent() * number::bytes(element), out, y->extent() * number::bytes(element))) ELBO_FAIL("a convolution writes over its input");
    later(handle->stream, "a convolution", [=, x = *x, w = *w, conv = *conv, y = *y, alpha = *alpha, beta = *beta] {
        convolve(x, in, w, filter, conv, y, [&](float sum, int c, int n, int row, int column) {
            size_t to = at(y, n, c, row, column);
            number::store(element, out, to, alpha * sum + (beta != 0 ? beta * number::load(element, out, to) : 0));
        });
    });
    return SUCCESS;
}

Status cudnnConvolutionBiasActivationForward(Handle* handle, const float* alpha1, const Tensor* x, const void* x_data, const Filter* w,
                                             const void* w_data, const Convolution* conv, int algorithm, void* workspace, size_t workspace_size,
                                             const float* alpha2, const Tensor* z, const void* z_data, const Tensor* bias, const void* bias_data,
                                             const ActivationDescriptor* activation, const Tensor* y, void* y_data) {
    if (!x || !w || !conv || !z || !bias || !activation || !y || !alpha1 || !alpha2 || !z_data || !bias_data) return BAD_PARAM;
    if (Status bad = check(handle, *x, *w, *conv, *y)) return bad;
    if (made_to("no-fused")) return NOT_SUPPORTED;
    if (activation->mode != ACTIVATION_RELU && activation->mode != ACTIVATION_IDENTITY) return NOT_SUPPORTED;
    if (activation->mode == ACTIVATION_IDENTITY && algorithm != IMPLICIT_PRECOMP_GEMM) return NOT_SUPPORTED;
    if (!z->same_shape(*y) || bias->n != 1 || bias->c != y->c || bias->h != 1 || bias->w != 1 || bias->sc != 1) return BAD_PARAM;
    if (z->type != y->type || bias->type != y->type) return NOT_SUPPORTED;
    if (w->format == NHWC && !aligned({x_data, w_data, z_data, bias_data, y_data})) return BAD_PARAM;
    const number::Type element = *type(y->type);
    const void* in = device(x_data, x->extent(), x->type, "x of a convolution");
    const void* filter = device(w_data, size_t(w->k) * w->c * w->h * w->w, w->type, "filter of a convolution");
    const void* residual = device(z_data, z->extent(), z->type, "z of a convolution");
    const void* shift = device(bias_data, y->c, bias->type, "bias of a convolution");
    void* out = device(y_data, y->extent(), y->type, "y of a convolution");
    if (Status bad = use_workspace(handle, algorithm, workspace, workspace_size, *y)) return bad;
    if (overlap(in, x->extent() * number::bytes(element), out, y->extent() * number::bytes(element))) ELBO_FAIL("a convolution writes over its input");
    if (residual != out && overlap(residual, z->extent() * number::bytes(element), out, y->extent() * number::bytes(element)))
        ELBO_FAIL("a convolution's y overlaps its z");
    const bool relu = activation->mode == ACTIVATION_RELU;
    later(handle->stream, "a convolution", [=, x = *x, w = *w, conv = *conv, y = *y, z = *z, alpha1 = *alpha1, alpha2 = *alpha2] {
        convolve(x, in, w, filter, conv, y, [&](float sum, int c, int n, int row, int column) {
            float value = alpha1 * sum + number::load(element, shift, c);
            if (alpha2 != 0) value += alpha2 * number::load(element, residual, at(z, n, c, row, column));
            number::store(element, out, at(y, n, c, row, column), relu ? std::max(value, 0.0f) : value);
        });
    });
    return SUCCESS;
}
}
