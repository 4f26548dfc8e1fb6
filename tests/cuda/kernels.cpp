// Compares every CUDA kernel, run on the CPU by cuda_on_cpu.h, with a naive reference in double precision.
//
// A case fails if an element differs from its reference by more than rounding explains, if an element is not written, if
// memory next to a result is written, if the result depends on the order of warps, or if an image's result differs in any
// bit from its result without the other images. Build and run:
//   g++ -std=c++17 -O2 -Wno-unknown-pragmas tests/cuda/kernels.cpp -o kernels && ./kernels
#include "cuda_on_cpu.h"

#include "../../worker/kernels/cuda/attention.cu"
#include "../../worker/kernels/cuda/elementwise.cu"
#include "../../worker/kernels/cuda/image.cu"
#include "../../worker/kernels/cuda/norm.cu"
#include "../../worker/kernels/cuda/score.cu"

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>

// ---- types --------------------------------------------------------------------------------------------------------

template <typename T>
struct Type;
template <>
struct Type<float> {
    static constexpr const char* name = "f32";
    static constexpr double epsilon = 0x1p-24, smallest = 0x1p-126;
};
template <>
struct Type<__half> {
    static constexpr const char* name = "f16";
    static constexpr double epsilon = 0x1p-11, smallest = 0x1p-24;
};
template <>
struct Type<__nv_bfloat16> {
    static constexpr const char* name = "bf16";
    static constexpr double epsilon = 0x1p-8, smallest = 0x1p-126;
};

template <typename T>
struct Kernels;
#define ELBO_TEST_KERNELS(T, suffix)                                                                                         \
    template <>                                                                                                              \
    struct Kernels<T> {                                                                                                      \
        static constexpr auto activate = activate_##suffix;                                                                  \
        static constexpr auto geglu = geglu_##suffix;                                                                        \
        static constexpr auto gate = gate_##suffix;                                                                          \
        static constexpr auto add = add_##suffix;                                                                            \
        static constexpr auto gather = gather_##suffix;                                                                      \
        static constexpr auto concat = concat_##suffix;                                                                      \
        static constexpr auto upsample = upsample_##suffix;                                                                  \
        static constexpr auto im2col = im2col_##suffix;                                                                      \
        static constexpr auto group_norm_stats = group_norm_stats_##suffix;                                                  \
        static constexpr auto group_norm = group_norm_##suffix;                                                              \
        static constexpr auto layer_norm = layer_norm_##suffix;                                                              \
        static constexpr auto adaptive_norm = adaptive_norm_##suffix;                                                        \
        static constexpr auto qk_norm = qk_norm_##suffix;                                                                    \
        static constexpr auto errors = errors_##suffix;                                                                      \
        static auto attention(u32 width) {                                                                                   \
            switch (width) {                                                                                                 \
                case 16: return attention_d16_##suffix;                                                                      \
                case 32: return attention_d32_##suffix;                                                                      \
                case 48: return attention_d48_##suffix;                                                                      \
                case 64: return attention_d64_##suffix;                                                                      \
                case 80: return attention_d80_##suffix;                                                                      \
                case 96: return attention_d96_##suffix;                                                                      \
                case 128: return attention_d128_##suffix;                                                                    \
                default: return attention_d160_##suffix;                                                                     \
            }                                                                                                                \
        }                                                                                                                    \
    };
ELBO_EACH_TYPE(ELBO_TEST_KERNELS)

// ---- data ---------------------------------------------------------------------------------------------------------

/// splitmix64.
struct Random {
    uint64_t state = 1;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    /// Sum of four uniforms, of variance 1.
    double normal() {
        double sum = 0;
        for (int i = 0; i < 4; ++i) sum += double(next() >> 11) * 0x1p-53 - 0.5;
        return sum * 1.7320508075688772;
    }
} random_numbers;

/// Elements between guards, starting `skew` elements after an address that is a multiple of 16.
template <typename T>
struct Buffer {
    static constexpr size_t GUARD = 64;
    std::vector<T> storage;
    size_t length, skew;

    explicit Buffer(size_t length, size_t skew = 0) : storage(length + skew + 2 * GUARD), length(length), skew(skew) {
        std::memset(static_cast<void*>(storage.data()), 0xff, storage.size() * sizeof(T));
    }
    static Buffer normal(size_t length, double scale = 1, double mean = 0, size_t skew = 0) {
        Buffer buffer(length, skew);
        for (size_t i = 0; i < length; ++i) buffer.data()[i] = from_float<T>(float(mean + scale * random_numbers.normal()));
        return buffer;
    }
    T* data() { return storage.data() + GUARD + skew; }
    double operator[](size_t i) const { return double(to_float(storage[GUARD + skew + i])); }
    const T* at(size_t i) const { return storage.data() + GUARD + skew + i; }
    bool intact() const {
        const auto* bytes = reinterpret_cast<const unsigned char*>(storage.data());
        const size_t head = (GUARD + skew) * sizeof(T), tail = (GUARD + skew + length) * sizeof(T);
        const auto untouched = [](unsigned char byte) { return byte == 0xff; };
        return std::all_of(bytes, bytes + head, untouched) && std::all_of(bytes + tail, bytes + storage.size() * sizeof(T), untouched);
    }
    void reset() { *this = Buffer(length, skew); }
};

// ---- verdicts -----------------------------------------------------------------------------------------------------

struct Record {
    int cases = 0;
    double error = 0, of_allowed = 0;
    std::vector<std::string> failures;
};

struct Report {
    std::vector<std::string> order;
    std::map<std::string, Record> records;
    Record& of(const std::string& kernel) {
        if (!records.count(kernel)) order.push_back(kernel);
        return records[kernel];
    }
    void fail(const std::string& kernel, const std::string& why) { of(kernel).failures.push_back(why); }
} report;

/// Runs `kernel` in both orders of warps; the results in `out` must have the same bits.
template <typename T, typename Run>
void run_both_ways(const std::string& kernel, const std::string& label, Buffer<T>& out, const Run& run) {
    const Buffer<T> before = out;
    elbo_cuda_reverse = true;
    run();
    const Buffer<T> reversed = out;
    elbo_cuda_reverse = false;
    out = before;
    run();
    if (std::memcmp(reversed.at(0), out.at(0), out.length * sizeof(T))) report.fail(kernel, label + ": the order of warps matters");
    if (!out.intact()) report.fail(kernel, label + ": writes outside its result");
}

/// Compares with `want(i)`, allowing `allowed(i)` in addition to half a unit in the last place.
template <typename T, typename Want, typename Allowed>
void compare(const std::string& kernel, const std::string& label, const Buffer<T>& got, const Want& want, const Allowed& allowed) {
    Record& record = report.of(kernel);
    ++record.cases;
    for (size_t i = 0; i < got.length; ++i) {
        const double expected = want(i), error = std::fabs(got[i] - expected);
        const double limit = Type<T>::epsilon * std::fabs(expected) + Type<T>::smallest + allowed(i);
        if (!(error <= limit)) {
            char line[256];
            std::snprintf(line, sizeof line, "%s: element %zu is %.9g, expected %.9g +- %.3g", label.c_str(), i, got[i], expected, limit);
            record.failures.push_back(line);
            return;
        }
        record.error = std::max(record.error, error);
        record.of_allowed = std::max(record.of_allowed, error / limit);
    }
}

template <typename T>
void same_bits(const std::string& kernel, const std::string& label, const Buffer<T>& alone, const Buffer<T>& among, size_t from) {
    if (std::memcmp(alone.at(0), among.at(from), alone.length * sizeof(T)))
        report.fail(kernel, label + ": an image's result depends on the others");
}

template <typename Kernel, typename... Arguments>
void launch(const Kernel& kernel, dim3 grid, u32 threads, size_t shared, Arguments... arguments) {
    elbo_cuda_launch([&] { kernel(arguments...); }, grid, threads, shared);
}

template <typename T>
std::string name(const char* kernel) {
    return std::string(kernel) + "_" + Type<T>::name;
}

template <typename... Numbers>
std::string shape(Numbers... numbers) {
    std::string text;
    ((text += (text.empty() ? "" : ", ") + std::to_string(numbers)), ...);
    return text;
}

/// The error that f32 arithmetic may have on values of the given size.
double f32_noise(double size) { return 4e-7 * size; }

// ---- elementwise --------------------------------------------------------------------------------------------------

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

template <typename T>
void test_activate() {
    const auto reference = [](double x, u32 kind) {
        switch (kind) {
            case 0: return x / (1 + std::exp(-x));
            case 1: return gelu(x);
            case 2: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
            default: return x / (1 + std::exp(-1.702 * x));
        }
    };
    for (u32 kind = 0; kind < 4; ++kind)
        for (const size_t n : {1, 7, 8, 600, 4099})
            for (const size_t skew : {0, 1}) {
                Buffer<T> x = Buffer<T>::normal(n, n == 600 ? 40 : 3, 0, skew), out(n);
                const std::string label = shape(kind, n, skew);
                run_both_ways(name<T>("activate"), label, out, [&] { launch(Kernels<T>::activate, 2, 256, 0, x.data(), out.data(), n, kind); });
                compare(name<T>("activate"), label, out, [&](size_t i) { return reference(x[i], kind); },
                        [&](size_t i) { return f32_noise(std::fabs(x[i])); });
            }
}

template <typename T>
void test_geglu() {
    for (const u32 channels : {8u, 320u, 13u, 1u}) {
        const u64 rows = 9;
        Buffer<T> x = Buffer<T>::normal(rows * 2 * channels, 2), out(rows * channels);
        run_both_ways(name<T>("geglu"), shape(channels), out, [&] { launch(Kernels<T>::geglu, 3, 256, 0, x.data(), out.data(), rows, channels); });
        const auto hidden = [&](size_t i) { return x[i / channels * 2 * channels + i % channels]; };
        const auto gate = [&](size_t i) { return x[i / channels * 2 * channels + channels + i % channels]; };
        compare(name<T>("geglu"), shape(channels), out, [&](size_t i) { return hidden(i) * gelu(gate(i)); },
                [&](size_t i) { return f32_noise(std::fabs(hidden(i) * gate(i))); });
    }
}

template <typename T>
void test_gate() {
    for (const u32 channels : {16u, 72u, 11u})
        for (const u32 at : {0u, 2u}) {
            const u32 images = 3, len = 7, row_width = 6 * channels;
            const size_t n = size_t(images) * len * channels;
            Buffer<T> x = Buffer<T>::normal(n), h = Buffer<T>::normal(n), rows = Buffer<T>::normal(size_t(images) * row_width), out(n);
            const std::string label = shape(channels, at);
            run_both_ways(name<T>("gate"), label, out, [&] {
                launch(Kernels<T>::gate, 2, 256, 0, x.data(), h.data(), rows.data(), out.data(), images, len, channels, row_width, at);
            });
            compare(name<T>("gate"), label, out,
                    [&](size_t i) { return x[i] + rows[i / (len * channels) * row_width + at * channels + i % channels] * h[i]; },
                    [&](size_t) { return f32_noise(4); });
        }
}

template <typename T>
void test_add() {
    for (const u32 channels : {8u, 40u, 5u})
        for (u32 terms = 0; terms < 16; ++terms) {
            const u32 images = 3, pixels = 10;
            const size_t n = size_t(images) * pixels * channels;
            const Buffer<T> before = Buffer<T>::normal(n);
            Buffer<T> out = before, bias = Buffer<T>::normal(channels), shift = Buffer<T>::normal(5 * channels);
            Buffer<T> residual = Buffer<T>::normal(5 * pixels * channels);
            std::vector<u32> shift_rows = {4, 0, 4}, residual_rows = {1, 3, 0};
            const bool indexed = terms & 8;
            run_both_ways(name<T>("add"), shape(channels, terms), out, [&] {
                launch(Kernels<T>::add, 2, 256, 0, out.data(), terms & 1 ? bias.data() : nullptr, terms & 2 ? shift.data() : nullptr,
                       indexed ? shift_rows.data() : nullptr, terms & 4 ? residual.data() : nullptr,
                       indexed ? residual_rows.data() : nullptr, images, pixels, channels);
            });
            compare(name<T>("add"), shape(channels, terms), out,
                    [&](size_t i) {
                        const size_t image = i / (pixels * channels), within = i % (pixels * channels), c = i % channels;
                        double sum = before[i];
                        if (terms & 1) sum += bias[c];
                        if (terms & 2) sum += shift[(indexed ? shift_rows[image] : image) * channels + c];
                        if (terms & 4) sum += residual[(indexed ? residual_rows[image] : image) * pixels * channels + within];
                        return sum;
                    },
                    [](size_t) { return f32_noise(6); });
        }
}

// ---- image --------------------------------------------------------------------------------------------------------

double exactly(size_t) { return 0; }

template <typename T>
void test_gather() {
    for (const u64 len : {8ull, 1000ull, 3ull, 1ull}) {
        Buffer<T> x = Buffer<T>::normal(4 * len), out(6 * len);
        std::vector<u32> index = {3, 0, 0, 2, 1, 3};
        run_both_ways(name<T>("gather"), shape(len), out, [&] { launch(Kernels<T>::gather, 2, 256, 0, x.data(), index.data(), out.data(), 6u, len); });
        compare(name<T>("gather"), shape(len), out, [&](size_t i) { return x[index[i / len] * len + i % len]; }, exactly);
    }
}

template <typename T>
void test_concat() {
    for (const auto& [c1, c2] : {std::pair<u32, u32>{8, 16}, {320, 320}, {5, 8}, {8, 3}})
        for (const bool indexed : {false, true}) {
            const u32 images = 3, pixels = 6, width = c1 + c2;
            Buffer<T> x = Buffer<T>::normal(images * pixels * c1), other = Buffer<T>::normal(3 * pixels * c2), out(images * pixels * width);
            std::vector<u32> rows = {2, 2, 0};
            run_both_ways(name<T>("concat"), shape(c1, c2), out, [&, c1 = c1, c2 = c2] {
                launch(Kernels<T>::concat, 2, 256, 0, x.data(), other.data(), indexed ? rows.data() : nullptr, out.data(), images, pixels, c1, c2);
            });
            compare(name<T>("concat"), shape(c1, c2), out,
                    [&, c1 = c1, c2 = c2](size_t i) {
                        const size_t position = i / width, c = i % width, image = position / pixels;
                        if (c < c1) return x[position * c1 + c];
                        return other[((indexed ? rows[image] : image) * pixels + position % pixels) * c2 + c - c1];
                    },
                    exactly);
        }
}

template <typename T>
void test_upsample() {
    for (const u32 c : {8u, 64u, 3u}) {
        const u32 images = 2, h = 5, w = 3;
        Buffer<T> x = Buffer<T>::normal(images * h * w * c), out(images * h * w * c * 4);
        run_both_ways(name<T>("upsample"), shape(c), out, [&] { launch(Kernels<T>::upsample, 2, 256, 0, x.data(), out.data(), images, h, w, c); });
        compare(name<T>("upsample"), shape(c), out,
                [&](size_t i) {
                    const size_t at_x = i / c % (2 * w), at_y = i / c / (2 * w) % (2 * h), image = i / c / (4 * w * h);
                    return x[((image * h + at_y / 2) * w + at_x / 2) * c + i % c];
                },
                exactly);
    }
}

template <typename T>
void test_im2col() {
    for (const u32 c : {8u, 40u, 4u, 3u})
        for (const auto& [stride, before] : {std::pair<u32, u32>{1, 1}, {2, 1}, {2, 0}}) {
            const u32 images = 2, h = 7, w = 6, out_h = stride == 1 ? h : (h + 1) / 2, out_w = stride == 1 ? w : w / 2;
            Buffer<T> x = Buffer<T>::normal(images * h * w * c), out(images * out_h * out_w * 9 * c);
            const std::string label = shape(c, stride, before);
            run_both_ways(name<T>("im2col"), label, out, [&, stride = stride, before = before] {
                launch(Kernels<T>::im2col, 2, 256, 0, x.data(), out.data(), images, h, w, c, out_h, out_w, stride, before);
            });
            compare(name<T>("im2col"), label, out,
                    [&, stride = stride, before = before](size_t i) {
                        const size_t tap = i / c % 9, position = i / c / 9;
                        const long y = long(position / out_w % out_h * stride + tap / 3) - before;
                        const long at_x = long(position % out_w * stride + tap % 3) - before;
                        if (y < 0 || at_x < 0 || y >= long(h) || at_x >= long(w)) return 0.0;
                        return x[((position / (out_w * out_h) * h + y) * w + at_x) * c + i % c];
                    },
                    exactly);
        }
}

// ---- norms --------------------------------------------------------------------------------------------------------

struct GroupCase {
    u32 images, pixels, channels, groups, chunk;
    double mean;
};

template <typename T>
void test_group_norm(const GroupCase& test, bool shifted, bool activated) {
    const auto& [images, pixels, channels, groups, chunk, mean] = test;
    const std::string label = shape(images, pixels, channels, groups, chunk) + (shifted ? ", shifted" : "");
    const u32 chunks = (pixels + chunk - 1) / chunk, width = channels / groups;
    const size_t image_size = size_t(pixels) * channels;
    const float eps = 1e-5f;
    Buffer<T> x = Buffer<T>::normal(images * image_size, 1, mean), shift = Buffer<T>::normal(4 * channels), out(images * image_size);
    Buffer<T> weight = Buffer<T>::normal(channels), bias = Buffer<T>::normal(channels);
    Buffer<float> partial(size_t(images) * chunks * groups * 2);
    std::vector<u32> rows = {3, 1, 1};
    T* const shifts = shifted ? shift.data() : nullptr;

    const auto input = [&](size_t image, size_t pixel, size_t c) {
        return x[image * image_size + pixel * channels + c] + (shifted ? shift[rows[image] * channels + c] : 0.0);
    };
    /// Mean and sum of squared deviations of a group in pixels [from, to).
    const auto moments = [&](size_t image, size_t group, size_t from, size_t to) {
        double sum = 0, squares = 0;
        for (size_t p = from; p < to; ++p)
            for (size_t c = group * width; c < (group + 1) * width; ++c) sum += input(image, p, c);
        const double centre = sum / double((to - from) * width);
        for (size_t p = from; p < to; ++p)
            for (size_t c = group * width; c < (group + 1) * width; ++c) squares += std::pow(input(image, p, c) - centre, 2);
        return std::pair<double, double>(centre, squares);
    };

    const std::string stats = name<T>("group_norm_stats");
    run_both_ways(stats, label, partial, [&] {
        launch(Kernels<T>::group_norm_stats, dim3(chunks, images), 256, 0, x.data(), shifts, rows.data(), partial.data(), images, pixels,
               channels, groups, chunk);
    });
    std::vector<double> expected(partial.length);
    for (size_t i = 0; i < expected.size(); i += 2) {
        const size_t group = i / 2 % groups, k = i / 2 / groups % chunks, image = i / 2 / groups / chunks;
        std::tie(expected[i], expected[i + 1]) = moments(image, group, k * chunk, std::min<size_t>(pixels, (k + 1) * chunk));
    }
    compare(stats, label, partial, [&](size_t i) { return expected[i]; },
            [&](size_t i) { return i % 2 ? 1e-5 * expected[i] + f32_noise(1e-3 + std::fabs(mean)) : f32_noise(2 + std::fabs(mean)); });

    const std::string kernel = name<T>("group_norm");
    const auto normalise = [&](Buffer<T>& from, Buffer<float>& moments_of, Buffer<T>& to, u32* of_rows, u32 count) {
        launch(Kernels<T>::group_norm, dim3(chunks, count), 256, 0, from.data(), shifts, of_rows, moments_of.data(), weight.data(), bias.data(),
               to.data(), count, pixels, channels, groups, chunk, eps, u32(activated));
    };
    run_both_ways(kernel, label, out, [&] { normalise(x, partial, out, rows.data(), images); });
    std::vector<std::pair<double, double>> of_group(size_t(images) * groups);
    for (size_t i = 0; i < of_group.size(); ++i) of_group[i] = moments(i / groups, i % groups, 0, pixels);
    compare(kernel, label, out,
            [&](size_t i) {
                const size_t image = i / image_size, c = i % channels;
                const auto [centre, squares] = of_group[image * groups + c / width];
                const double inverse = 1 / std::sqrt(squares / (double(pixels) * width) + eps);
                const double y = (input(image, i % image_size / channels, c) - centre) * inverse * weight[c] + bias[c];
                return activated ? y / (1 + std::exp(-y)) : y;
            },
            [&](size_t) { return 1e-5 + f32_noise(4 * std::fabs(mean)); });

    const u32 last = images - 1;
    Buffer<T> one(image_size), one_out(image_size);
    std::copy(x.at(last * image_size), x.at(images * image_size), one.data());
    Buffer<float> one_partial(size_t(chunks) * groups * 2);
    launch(Kernels<T>::group_norm_stats, dim3(chunks, 1), 256, 0, one.data(), shifts, &rows[last], one_partial.data(), 1u, pixels, channels,
           groups, chunk);
    normalise(one, one_partial, one_out, &rows[last], 1);
    same_bits(stats, label, one_partial, partial, last * one_partial.length);
    same_bits(kernel, label, one_out, out, last * image_size);
}

template <typename T>
void test_group_norms() {
    const std::vector<GroupCase> cases = {
        {2, 50, 320, 32, 16, 0}, {3, 33, 64, 32, 33, 3}, {2, 17, 36, 4, 5, -2},  {1, 9, 2560, 32, 4, 0}, {2, 21, 960, 32, 8, 1},
        {1, 5, 100, 5, 2, 0},    {2, 64, 128, 32, 64, 0}, {1, 6, 4100, 4, 4, 1}, {1, 1, 8, 1, 1, 0},     {2, 40, 256, 256, 7, 0},
        {1, 7, 6144, 3, 7, 0},   {2, 100, 8, 2, 100, 50}, {1, 300, 48, 3, 1, 0}, {1, 5, 4104, 8, 5, 0},
    };
    for (const GroupCase& test : cases)
        for (const bool variant : {false, true}) test_group_norm<T>(test, variant, !variant);
}

/// (x - mean) / sqrt(variance + eps) of a row.
template <typename T>
std::vector<double> normalised(const Buffer<T>& x, size_t from, size_t channels, double eps) {
    double mean = 0, variance = 0;
    for (size_t c = 0; c < channels; ++c) mean += x[from + c] / double(channels);
    for (size_t c = 0; c < channels; ++c) variance += std::pow(x[from + c] - mean, 2) / double(channels);
    std::vector<double> row(channels);
    for (size_t c = 0; c < channels; ++c) row[c] = (x[from + c] - mean) / std::sqrt(variance + eps);
    return row;
}

template <typename T>
void test_layer_norm() {
    for (const u32 channels : {1u, 8u, 37u, 320u, 1152u, 2048u, 2056u, 2560u})
        for (const double mean : {0.0, 20.0}) {
            const u64 rows = 11;
            const float eps = 1e-5f;
            const bool affine = mean == 0 || channels == 320;
            Buffer<T> x = Buffer<T>::normal(rows * channels, 1, mean), weight = Buffer<T>::normal(channels), bias = Buffer<T>::normal(channels);
            Buffer<T> out(rows * channels);
            const auto run = [&](T* from, T* to, u64 count) {
                launch(Kernels<T>::layer_norm, 1, 256, 0, from, affine ? weight.data() : nullptr, affine ? bias.data() : nullptr, to, count,
                       channels, eps);
            };
            run_both_ways(name<T>("layer_norm"), shape(channels), out, [&] { run(x.data(), out.data(), rows); });
            std::vector<double> expected;
            for (size_t row = 0; row < rows; ++row)
                for (const double y : normalised(x, row * channels, channels, eps)) {
                    const size_t c = expected.size() % channels;
                    expected.push_back(affine ? y * weight[c] + bias[c] : y);
                }
            compare(name<T>("layer_norm"), shape(channels), out, [&](size_t i) { return expected[i]; },
                    [&](size_t) { return f32_noise(20 + 4 * mean); });
            Buffer<T> alone(channels), row(channels);
            std::copy(x.at(10 * channels), x.at(11 * channels), row.data());
            run(row.data(), alone.data(), 1);
            same_bits(name<T>("layer_norm"), shape(channels), alone, out, 10 * channels);
        }
}

template <typename T>
void test_adaptive_norm() {
    for (const u32 channels : {8u, 1152u, 30u}) {
        const u32 images = 3, len = 5, row_width = 6 * channels, shift_at = 3, scale_at = 4;
        const float eps = 1e-6f;
        Buffer<T> x = Buffer<T>::normal(images * len * channels, 2, 1), rows = Buffer<T>::normal(images * row_width), out(x.length);
        run_both_ways(name<T>("adaptive_norm"), shape(channels), out, [&] {
            launch(Kernels<T>::adaptive_norm, 1, 256, 0, x.data(), rows.data(), out.data(), images, len, channels, row_width, shift_at, scale_at, eps);
        });
        std::vector<double> expected;
        for (size_t row = 0; row < images * len; ++row)
            for (const double y : normalised(x, row * channels, channels, eps)) {
                const size_t c = expected.size() % channels, of = row / len * row_width;
                expected.push_back(y * (1 + rows[of + scale_at * channels + c]) + rows[of + shift_at * channels + c]);
            }
        compare(name<T>("adaptive_norm"), shape(channels), out, [&](size_t i) { return expected[i]; }, [](size_t) { return f32_noise(30); });
        Buffer<T> alone(len * channels), one(len * channels);
        std::copy(x.at(2 * len * channels), x.at(3 * len * channels), one.data());
        launch(Kernels<T>::adaptive_norm, 1, 256, 0, one.data(), rows.at(2 * row_width), alone.data(), 1u, len, channels, row_width, shift_at,
               scale_at, eps);
        same_bits(name<T>("adaptive_norm"), shape(channels), alone, out, 2 * len * channels);
    }
}

template <typename T>
void test_qk_norm() {
    for (const u32 dim : {64u, 72u, 24u, 10u, 160u}) {
        const u64 positions = 5;
        const u32 heads = 3;
        const float eps = 1e-6f;
        Buffer<T> qkv = Buffer<T>::normal(positions * 3 * heads * dim, 3), query = Buffer<T>::normal(dim), key = Buffer<T>::normal(dim);
        Buffer<T> out(qkv.length);
        run_both_ways(name<T>("qk_norm"), shape(dim), out, [&] {
            launch(Kernels<T>::qk_norm, 1, 256, 0, qkv.data(), query.data(), key.data(), out.data(), positions, heads, dim, eps);
        });
        const auto part = [&](size_t i) { return i / dim / heads % 3; };
        compare(name<T>("qk_norm"), shape(dim), out,
                [&](size_t i) {
                    if (part(i) == 2) return qkv[i];
                    double squares = 0;
                    for (size_t c = 0; c < dim; ++c) squares += std::pow(qkv[i / dim * dim + c], 2);
                    return qkv[i] / std::sqrt(squares / dim + eps) * (part(i) == 0 ? query : key)[i % dim];
                },
                [&](size_t i) { return part(i) == 2 ? 0 : f32_noise(8); });
    }
}

// ---- attention ----------------------------------------------------------------------------------------------------

struct AttentionCase {
    u32 q_len, kv_len;
    bool causal, packed;
    double scale;    // of queries; a large scale makes the softmax select one key
    size_t skew = 0;  // elements by which q, k and v miss an aligned address
};

template <typename T>
void test_attention(u32 width, u32 dim, const AttentionCase& test) {
    const std::string kernel = name<T>(("attention_d" + std::to_string(width)).c_str());
    const std::string label = shape(dim, test.q_len, test.kv_len) + (test.causal ? ", causal" : "") + (test.packed ? ", packed" : "");
    constexpr bool exact = sizeof(T) == 4;
    const u32 images = 3, heads = 2, inner = heads * dim, row = test.packed ? 3 * inner : inner, kv_row = test.packed ? 3 * inner : 2 * inner;
    const u32 tile = exact || width == 160 ? 64 : 128;
    const size_t shared = exact ? size_t(64 + 2 * (width <= 96 ? 64 : 32)) * (width + 4) * 4 + 256 * ((width <= 96 ? 64 : 32) + 4)
                                : size_t(tile + 4 * (width <= 80 ? 64 : 32)) * (width + 8) * 2;
    Buffer<T> q = Buffer<T>::normal(size_t(images) * test.q_len * row, test.scale, 0, test.skew);
    Buffer<T> kv = Buffer<T>::normal(size_t(images) * test.kv_len * kv_row, 1, 0, test.skew);
    // Packed: q, k and v are side by side in one tensor.
    Buffer<T>& source = test.packed ? q : kv;
    const size_t k_at = test.packed ? inner : 0, v_at = k_at + inner;
    const u64 q_image = u64(test.q_len) * row, kv_image = u64(test.kv_len) * kv_row;
    const float scale = 1 / std::sqrt(float(dim));
    std::vector<u32> q_rows = {2, 0, 2}, kv_rows = {1, 2, 0};
    const bool indexed = !test.causal;
    Buffer<T> out(size_t(images) * test.q_len * inner);
    const auto run = [&](Buffer<T>& to, u32* of_q, u32* of_kv, u32 count) {
        launch(Kernels<T>::attention(width), dim3((test.q_len + tile - 1) / tile, heads, count), 128, shared, q.at(0), of_q, source.at(k_at),
               source.at(v_at), of_kv, to.data(), count, test.q_len, test.kv_len, heads, dim, row, kv_row, q_image, kv_image, scale,
               u32(test.causal));
    };
    run_both_ways(kernel, label, out, [&] { run(out, indexed ? q_rows.data() : nullptr, indexed ? kv_rows.data() : nullptr, images); });

    // Weighted by the softmax: the values and their magnitudes. Also the largest sum of magnitudes of a score's terms, whose
    // rounding changes the weights.
    std::vector<double> expected(out.length), mass(out.length), largest(out.length);
    std::vector<double> scores(test.kv_len);
    for (size_t image = 0; image < images; ++image)
        for (size_t i = 0; i < test.q_len; ++i)
            for (size_t head = 0; head < heads; ++head) {
                const size_t from_q = (indexed ? q_rows[image] : image) * q_image + i * row + head * dim;
                const size_t from_kv = (indexed ? kv_rows[image] : image) * kv_image + head * dim;
                const size_t visible = test.causal ? std::min<size_t>(i + 1, test.kv_len) : test.kv_len;
                double best = -INFINITY, total = 0, size = 0;
                for (size_t j = 0; j < visible; ++j) {
                    double terms = 0;
                    scores[j] = 0;
                    for (size_t c = 0; c < dim; ++c) {
                        const double term = scale * q[from_q + c] * source[from_kv + j * kv_row + k_at + c];
                        scores[j] += term;
                        terms += std::fabs(term);
                    }
                    best = std::max(best, scores[j]);
                    size = std::max(size, terms);
                }
                for (size_t j = 0; j < visible; ++j) total += scores[j] = std::exp(scores[j] - best);
                for (size_t c = 0; c < dim; ++c) {
                    const size_t at = (image * test.q_len + i) * inner + head * dim + c;
                    for (size_t j = 0; j < visible; ++j) {
                        const double value = source[from_kv + j * kv_row + v_at + c];
                        expected[at] += scores[j] / total * value;
                        mass[at] += scores[j] / total * std::fabs(value);
                    }
                    largest[at] = size;
                }
            }
    compare(kernel, label, out, [&](size_t i) { return expected[i]; },
            [&](size_t i) { return (Type<T>::epsilon + f32_noise(4 + largest[i])) * mass[i]; });

    Buffer<T> alone(size_t(test.q_len) * inner);
    u32 last = images - 1;
    run(alone, indexed ? &q_rows[last] : &last, indexed ? &kv_rows[last] : &last, 1);
    same_bits(kernel, label, alone, out, last * alone.length);
}

template <typename T>
void test_attentions() {
    const std::vector<AttentionCase> every = {
        {65, 77, false, false, 1}, {77, 77, true, true, 1}, {130, 130, false, true, 2}, {33, 64, false, false, 300},
    };
    const std::vector<AttentionCase> more = {
        {1, 1, false, false, 1},    {200, 200, true, true, 1},  {16, 129, false, false, 1}, {140, 5, false, false, 1},
        {70, 90, false, false, 1, 1}, {129, 128, false, false, 30}, {5, 300, false, false, 8}, {90, 20, true, false, 1},
        {20, 90, true, false, 1},
    };
    const std::vector<std::pair<u32, u32>> dims = {{16, 8},  {16, 16}, {16, 10},  {32, 24},   {32, 32},   {48, 40},   {48, 33},
                                                   {64, 64}, {64, 56}, {80, 72},  {80, 80},   {96, 96},   {96, 88},   {128, 128},
                                                   {128, 100}, {160, 160}, {160, 150}};
    for (const auto& [width, dim] : dims) {
        for (const AttentionCase& test : every) test_attention<T>(width, dim, test);
        if (dim == 40 || dim == 64 || dim == 160)
            for (const AttentionCase& test : more) test_attention<T>(width, dim, test);
    }
}

// ---- score --------------------------------------------------------------------------------------------------------

template <typename T>
void test_errors() {
    for (u32 distance = 0; distance < 3; ++distance)
        for (const auto& [pixels, channels, out_channels] : {std::tuple<u32, u32, u32>{49, 4, 4}, {1000, 4, 8}, {1, 1, 3}, {70, 3, 6}}) {
            const u32 evaluations = 5, points = 3;
            const size_t count = size_t(pixels) * channels, out_count = size_t(pixels) * out_channels;
            Buffer<T> output = Buffer<T>::normal(evaluations * out_count);
            Buffer<float> noisy = Buffer<float>::normal(points * count), target = Buffer<float>::normal(points * count);
            Buffer<float> mix = Buffer<float>::normal(points * 2), errors(evaluations);
            std::vector<u32> index = {2, 0, 1, 1, 2};
            const auto run = [&, pixels = pixels, channels = channels, out_channels = out_channels](const T* from, u32* of, Buffer<float>& to, u32 n) {
                launch(Kernels<T>::errors, n, 256, 0, from, noisy.data(), target.data(), mix.data(), of, to.data(), n, pixels, channels,
                       out_channels, distance);
            };
            const std::string label = shape(distance, pixels, channels, out_channels), kernel = name<T>("errors");
            run_both_ways(kernel, label, errors, [&] { run(output.data(), index.data(), errors, evaluations); });
            compare(kernel, label, errors,
                    [&, pixels = pixels, channels = channels, out_channels = out_channels](size_t e) {
                        const size_t p = index[e];
                        double sum = 0;
                        for (size_t i = 0; i < count; ++i) {
                            const double predicted =
                                mix[2 * p] * output[e * out_count + i / channels * out_channels + i % channels] + mix[2 * p + 1] * noisy[p * count + i];
                            const double d = std::fabs(predicted - target[p * count + i]);
                            sum += distance == 0 ? d * d : distance == 1 ? d : d <= 1 ? d * d / 2 : d - 0.5;
                        }
                        return sum / double(count);
                    },
                    [](size_t) { return f32_noise(2); });
            Buffer<float> alone(1);
            run(output.at(4 * out_count), &index[4], alone, 1);
            same_bits(kernel, label, alone, errors, 4);
        }
}

template <typename T>
void test_type() {
    test_activate<T>();
    test_geglu<T>();
    test_gate<T>();
    test_add<T>();
    test_gather<T>();
    test_concat<T>();
    test_upsample<T>();
    test_im2col<T>();
    test_group_norms<T>();
    test_layer_norm<T>();
    test_adaptive_norm<T>();
    test_qk_norm<T>();
    test_attentions<T>();
    test_errors<T>();
}

int main() {
    test_type<float>();
    test_type<__half>();
    test_type<__nv_bfloat16>();
    bool failed = false;
    for (const std::string& kernel : report.order) {
        const Record& record = report.records[kernel];
        std::printf("%-24s %3d cases, max error %.2e, at most %.2f of what is allowed%s\n", kernel.c_str(), record.cases, record.error,
                    record.of_allowed, record.failures.empty() ? "" : "  FAILED");
        for (const std::string& failure : record.failures) std::printf("    %s\n", failure.c_str());
        failed |= !record.failures.empty();
    }
    return failed ? 1 : 0;
}
