// The fake libcurand: the generators that candle creates with a device. Their numbers differ from cuRAND's.
#include "emulated.h"

#include <cstring>
#include <random>
#include <string>

namespace {
struct Generator {
    const void* stream = nullptr;
    std::mt19937_64 engine;
};

template <class T, class D>
int fill(Generator* generator, T* out, size_t count, D distribution) {
    if (!count) return 0;
    T* host = emulated<T>(out, count * sizeof(T), "a random fill");
    std::string numbers(count * sizeof(T), 0);  // drawn now: the generator may be gone when the stream gets here
    for (size_t i = 0; i < count; i++) {
        T number = static_cast<T>(distribution(generator->engine));
        std::memcpy(&numbers[i * sizeof(T)], &number, sizeof(T));
    }
    later(generator->stream, "a random fill", [=] { std::memcpy(host, numbers.data(), numbers.size()); });
    return 0;
}
}  // namespace

extern "C" {
int curandCreateGenerator(Generator** generator, int) {
    *generator = new Generator;
    return 0;
}
int curandDestroyGenerator(Generator* generator) {
    delete generator;
    return 0;
}
int curandSetStream(Generator* generator, const void* stream) {
    elbo_emulated_stream(stream, "curandSetStream");
    generator->stream = stream;
    return 0;
}
int curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
    generator->engine.seed(seed);
    return 0;
}
int curandSetGeneratorOffset(Generator* generator, unsigned long long offset) {
    generator->engine.discard(offset);
    return 0;
}
int curandGenerate(Generator* g, unsigned* out, size_t n) { return fill(g, out, n, [](auto& engine) { return engine(); }); }
int curandGenerateUniform(Generator* g, float* out, size_t n) { return fill(g, out, n, std::uniform_real_distribution<float>()); }
int curandGenerateUniformDouble(Generator* g, double* out, size_t n) { return fill(g, out, n, std::uniform_real_distribution<double>()); }
int curandGenerateNormal(Generator* g, float* out, size_t n, float mean, float deviation) {
    if (n % 2) return 105;  // CURAND_STATUS_LENGTH_NOT_MULTIPLE
    return fill(g, out, n, std::normal_distribution<float>(mean, deviation));
}
int curandGenerateNormalDouble(Generator* g, double* out, size_t n, double mean, double deviation) {
    if (n % 2) return 105;
    return fill(g, out, n, std::normal_distribution<double>(mean, deviation));
}
}
