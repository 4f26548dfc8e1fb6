// The error of a model's prediction, one number per evaluation.
//
// Launch: grid (evaluations), 256 threads, no dynamic shared memory. This moves few bytes compared to the model, so one
// block per evaluation is fast enough and fixes the order of its sum.
#include "common.cuh"

enum Distance : u32 { SQUARED = 0, ABSOLUTE = 1, HUBER = 2 };

__device__ __forceinline__ float distance_of(float difference, u32 distance) {
    const float size = fabsf(difference);
    if (distance == ABSOLUTE) return size;
    // Delta 1.
    if (distance == HUBER) return size <= 1.0f ? 0.5f * difference * difference : size - 0.5f;
    return difference * difference;
}

template <typename T>
__device__ __forceinline__ void errors_of(const T* output, const float* noisy, const float* target, const float* mix, const u32* points,
                                          float* errors, u32 pixels, u32 channels, u32 out_channels, u32 distance) {
    __shared__ double warps[THREADS / WARP];
    const u32 evaluation = blockIdx.x, point = points[evaluation], count = pixels * channels;
    const float of_output = mix[2 * u64(point)], of_noisy = mix[2 * u64(point) + 1];
    output += u64(evaluation) * pixels * out_channels;
    noisy += u64(point) * count;
    target += u64(point) * count;

    double sum = 0.0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const u32 pixel = i / channels, channel = i - pixel * channels;
        const float predicted = fmaf(of_output, to_float(output[u64(pixel) * out_channels + channel]), of_noisy * noisy[i]);
        sum += double(distance_of(predicted - target[i], distance));
    }
    sum = lane_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (u32 warp = 0; warp < THREADS / WARP; ++warp) total += warps[warp];
        errors[evaluation] = float(total / double(count));
    }
}

#define ELBO_SCORE(T, suffix)                                                                                                        \
    /* With p = points[e], predicted = mix[p, 0] output[e] + mix[p, 1] noisy[p]: errors[e] = mean distance to target[p] over */      \
    /* [pixels, channels]; output [evaluations, pixels, out_channels], of which the first `channels` count. */                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                            \
        errors_##suffix(const T* output, const float* noisy, const float* target, const float* mix, const u32* points,               \
                        float* errors, u32, u32 pixels, u32 channels, u32 out_channels, u32 distance) {                              \
        errors_of<T>(output, noisy, target, mix, points, errors, pixels, channels, out_channels, distance);                          \
    }

ELBO_EACH_TYPE(ELBO_SCORE)
