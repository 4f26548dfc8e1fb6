// Error codes and handles of the CUDA driver API, for the files of the fake libcuda.
#pragma once

#include "memory.h"

enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_FILE_NOT_FOUND = 301,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_NOT_SUPPORTED = 801,
};

using CUdeviceptr = uint64_t;
struct CUstream_st;
using CUstream = CUstream_st*;

namespace driver {
constexpr int MULTIPROCESSORS = 132;
constexpr int SHARED_DEFAULT = 48 << 10;    // bytes of a block without cuFuncSetAttribute
constexpr int SHARED_OPT_IN = 227 << 10;    // bytes of a block with it
constexpr int SHARED_PROCESSOR = 228 << 10; // bytes of a multiprocessor

// Reads ELBO_EMULATED_REVERSE.
void configure_threads();
// Success if this thread has a current context, which the driver requires for nearly every call.
CUresult ready();
// The same for a launch, one of which can be made to fail.
CUresult launching();
// Returns the unreported error of an earlier call, once.
CUresult left_over();
bool alive(CUstream stream);
}  // namespace driver

// Starts a function of the API that needs a context.
#define ELBO_READY() \
    if (CUresult unready = driver::ready()) return unready
