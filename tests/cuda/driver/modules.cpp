// The fake libcuda's modules and launches. A kernel is found by its name, first in the image and then among the compiled kernels.
#include "driver.h"
#include "kernels.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

namespace {
// A kernel image. Names are read from PTX and cubins; a fat binary is compressed, so its names can't be read.
struct Module {
    std::string image;
    bool legible;
    bool has(const std::string& name) const;
    const kernels::Kernel* resolve(const std::string& name) const;
};

struct Function {
    std::string name;
    const kernels::Kernel* kernel;  // null: not compiled in, so a launch aborts
    int dynamic_shared = driver::SHARED_DEFAULT;
};

std::mutex mutex;
std::map<Module*, std::unique_ptr<Module>> modules;
std::map<Function*, std::unique_ptr<Function>> functions;  // these outlive their module, since cudarc holds both

bool part_of_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

bool Module::has(const std::string& name) const {
    for (size_t at = image.find(name); at != std::string::npos; at = image.find(name, at + 1)) {
        size_t end = at + name.size();
        if ((at == 0 || !part_of_name(image[at - 1])) && (end == image.size() || !part_of_name(image[end]))) return true;
    }
    return false;
}

// Of several kernels with one name, the one whose source file has most of its kernels in the image; elbo's if names can't be read.
const kernels::Kernel* Module::resolve(const std::string& name) const {
    const kernels::Kernel* best = nullptr;
    double best_share = -1;
    for (const auto& candidate : kernels::all()) {
        if (name != candidate.name) continue;
        std::string source = candidate.source;
        double share = source.rfind("elbo/", 0) == 0 ? 0.1 : 0;
        if (legible) {
            double present = 0, total = 0;
            for (const auto& sibling : kernels::all())
                if (source == sibling.source) total++, present += has(sibling.name);
            share = present / total;
        }
        if (share > best_share) best = &candidate, best_share = share;
    }
    return best;
}

CUresult load(Module** out, std::string image, bool legible) {
    auto module = std::make_unique<Module>(Module{std::move(image), legible});
    *out = module.get();
    std::lock_guard lock(mutex);
    modules[*out] = std::move(module);
    return CUDA_SUCCESS;
}

template <class T>
T read(const char* image, size_t offset) {
    T value;
    std::memcpy(&value, image + offset, sizeof value);
    return value;
}

Function* find(Function* function) {
    std::lock_guard lock(mutex);
    return functions.count(function) ? function : nullptr;
}

CUresult launch(Function* handle, dim3 grid, dim3 block, unsigned shared, CUstream stream, void** arguments) {
    if (CUresult failed = driver::launching()) return failed;
    Function* function = find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || !threads || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (threads > 1024 || block.z > 64 || shared > unsigned(function->dynamic_shared)) return CUDA_ERROR_INVALID_VALUE;
    if (!function->kernel) ELBO_FAIL("kernel %s is not compiled into the emulator", function->name.c_str());
    if (threads > function->kernel->max_threads) return CUDA_ERROR_INVALID_VALUE;
    function->kernel->run({function->kernel->name, arguments, grid, block, shared, stream});
    return CUDA_SUCCESS;
}

int blocks_of_processor(Function* function, int threads, size_t shared) {
    if (threads <= 0 || threads > 1024 || shared > size_t(function->dynamic_shared)) return 0;
    int warps = (threads + 31) / 32;
    return std::min({64 / warps, int(driver::SHARED_PROCESSOR / (shared + 1024)), 32});
}
}  // namespace

void driver::configure_threads() {
    const char* value = std::getenv("ELBO_EMULATED_REVERSE");
    elbo_cuda_reverse = value && *value == '1';
}

std::vector<kernels::Kernel>& kernels::all() {
    static std::vector<Kernel> kernels;
    return kernels;
}

extern "C" {
struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    CUstream stream;
    void* attributes;
    unsigned attribute_count;
};

CUresult cuModuleLoadData(Module** module, const void* data) {
    ELBO_READY();
    auto image = static_cast<const char*>(data);
    if (!image) return CUDA_ERROR_INVALID_VALUE;
    if (read<unsigned char>(image, 0) == 0x50 && read<uint32_t>(image, 0) == 0xBA55ED50)
        return load(module, "", false);  // fat binary
    if (read<unsigned char>(image, 0) == 0x7F && read<uint32_t>(image, 0) == 0x464C457F) {  // ELF: its sections' headers end it
        size_t bytes = read<uint64_t>(image, 0x28) + size_t(read<uint16_t>(image, 0x3A)) * read<uint16_t>(image, 0x3C);
        return load(module, std::string(image, bytes), true);
    }
    std::string ptx = image;
    return ptx.find(".version") == std::string::npos ? CUDA_ERROR_INVALID_IMAGE : load(module, ptx, true);
}

CUresult cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) { return cuModuleLoadData(module, image); }
CUresult cuModuleLoadFatBinary(Module** module, const void* image) { return cuModuleLoadData(module, image); }

CUresult cuModuleLoad(Module** module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string image{std::istreambuf_iterator<char>(file), {}};
    return cuModuleLoadData(module, image.c_str());
}

CUresult cuModuleUnload(Module* module) {
    std::lock_guard lock(mutex);
    return modules.erase(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ELBO_READY();
    std::lock_guard lock(mutex);
    if (!modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
    const kernels::Kernel* kernel = module->resolve(name);
    if (module->legible ? !module->has(name) : !kernel) return CUDA_ERROR_NOT_FOUND;
    auto made = std::make_unique<Function>(Function{name, kernel});
    *function = made.get();
    functions[*function] = std::move(made);
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(Function* handle, int attribute, int value) {
    Function* function = find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == 9) return CUDA_SUCCESS;  // carve-out, a hint
    if (attribute != 8 || value < 0 || value > driver::SHARED_OPT_IN) return CUDA_ERROR_INVALID_VALUE;
    function->dynamic_shared = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, int attribute, Function* handle) {
    Function* function = find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    const int fixed[] = {int(function->kernel ? function->kernel->max_threads : 1024), 0, 0, 0, 32, 90, 90, 0};  // threads, shared, constant, local, registers, PTX, binary, caching
    if (attribute >= 0 && attribute < 8) *value = fixed[attribute];
    else if (attribute == 8) *value = function->dynamic_shared;
    else ELBO_FAIL("cuFuncGetAttribute: attribute %d is not implemented", attribute);
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(Function* function, int) { return find(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* handle, int threads, size_t shared) {
    Function* function = find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    *blocks = blocks_of_processor(function, threads, shared);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads, size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* shared, Function* handle, int blocks, int) {
    if (!find(handle) || blocks <= 0) return CUDA_ERROR_INVALID_VALUE;
    *shared = std::min(driver::SHARED_PROCESSOR / blocks - 1024, driver::SHARED_OPT_IN);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* threads, Function* handle, size_t (*)(int), size_t, int limit) {
    if (!find(handle)) return CUDA_ERROR_INVALID_HANDLE;
    *threads = limit > 0 ? std::min(limit, 1024) : 1024;
    *grid = 2 * driver::MULTIPROCESSORS;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* threads, Function* function, size_t (*shared)(int), size_t bytes, int limit, unsigned) {
    return cuOccupancyMaxPotentialBlockSize(grid, threads, function, shared, bytes, limit);
}

CUresult cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void** arguments, void** extra) {
    if (extra) ELBO_FAIL("cuLaunchKernel with `extra` is not implemented");
    return launch(function, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream, arguments);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, Function* function, void** arguments, void** extra) {
    if (extra || c->attribute_count) ELBO_FAIL("cuLaunchKernelEx with attributes or `extra` is not implemented");
    return launch(function, dim3(c->grid_x, c->grid_y, c->grid_z), dim3(c->block_x, c->block_y, c->block_z), c->shared, c->stream, arguments);
}
}
