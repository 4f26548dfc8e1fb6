// Attention that never stores its scores: softmax(q k^T scale) v. One block handles a tile of queries of one head of
// one image.
//
// Online softmax (Milakov, Gimelshein 2018) over tiles of keys, arranged as in FlashAttention-2 (Dao 2023). Launch with
// grid (ceil(q_len / queries), heads, images), and these threads and bytes of dynamic shared memory (to use more than
// 48 KiB, set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES):
//
//        |       f16, bf16: 128 threads       |          f32: 128 threads
//    D   | queries   keys a step      bytes   | queries   keys a step      bytes
//    16  |   128          64          18432   |    64          64          32768
//    32  |   128          64          30720   |    64          64          45056
//    48  |   128          64          43008   |    64          64          57344
//    64  |   128          64          55296   |    64          64          69632
//    80  |   128          64          67584   |    64          64          81920
//    96  |   128          32          53248   |    64          64          94208
//   128  |   128          32          69632   |    64          32          76800
//   160  |    64          32          64512   |    64          32          93184
//
// Heads narrower than D are padded with zeros, only in shared memory. Rows are read 16 bytes at a time if `dim`, the
// strides and the tensors' alignment allow (for half types `dim` must be a multiple of 8), else element by element.
#include "common.cuh"

constexpr u32 ATTENTION_THREADS = 128;
constexpr float LOG2_E = 1.44269504088896341f;

/// The arguments of an entry point, and the part of them this block works on.
template <typename T>
struct Heads {
    const T *q, *k, *v;
    T* out;
    u32 q_len, kv_len, dim, q_stride, kv_stride, out_stride, first_query;
    /// Whether every row of a head starts at a multiple of 16 bytes.
    bool vectors, out_vectors;
    bool causal;
    /// Factor of a score, so that 2^(score * factor) is exp(score * scale).
    float factor;

    __device__ __forceinline__ Heads(const T* q, const u32* q_rows, const T* k, const T* v, const u32* kv_rows, T* out, u32 q_len,
                                     u32 kv_len, u32 heads, u32 dim, u32 q_stride, u32 kv_stride, u64 q_image, u64 kv_image,
                                     float scale, u32 causal, u32 queries)
        : q_len(q_len), kv_len(kv_len), dim(dim), q_stride(q_stride), kv_stride(kv_stride), out_stride(heads * dim),
          first_query(blockIdx.x * queries), causal(causal != 0), factor(scale * LOG2_E) {
        const u32 head = blockIdx.y, image = blockIdx.z;
        this->q = q + row_of(q_rows, image) * q_image + u64(head) * dim;
        this->k = k + row_of(kv_rows, image) * kv_image + u64(head) * dim;
        this->v = v + row_of(kv_rows, image) * kv_image + u64(head) * dim;
        this->out = out + u64(image) * q_len * out_stride + u64(head) * dim;
        constexpr u32 width = 16 / sizeof(T);
        const bool whole = dim % width == 0;
        vectors = whole && (q_stride | kv_stride) % width == 0 && (q_image | kv_image) % width == 0 && aligned(q) && aligned(k) && aligned(v);
        out_vectors = whole && aligned(out);
    }

    /// Number of keys that at least one query of a tile sees.
    __device__ __forceinline__ u32 keys(u32 queries) const { return causal ? min(kv_len, first_query + queries) : kv_len; }
    /// Number of keys that every query of a tile sees.
    __device__ __forceinline__ u32 common_keys() const { return causal ? min(kv_len, first_query + 1) : kv_len; }
    __device__ __forceinline__ bool sees(u32 query, u32 key) const { return key < kv_len && (!causal || key <= query); }
};

/// Copies rows `first` to `first + ROWS` of a head to shared memory, with zeros past `len` and past `dim`. Vectors are
/// copied asynchronously, as part of the thread's next group of copies.
template <u32 D, u32 ROWS, u32 STRIDE, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* head, u32 stride, u32 first, u32 len, u32 dim, bool vectors) {
    constexpr u32 WIDTH = 16 / sizeof(T), CHUNKS = D / WIDTH;
    static_assert(ROWS * CHUNKS % ATTENTION_THREADS == 0, "every thread copies as much");
    if (vectors) {
#pragma unroll
        for (u32 i = 0; i < ROWS * CHUNKS / ATTENTION_THREADS; ++i) {
            const u32 index = i * ATTENTION_THREADS + threadIdx.x;
            const u32 row = index / CHUNKS, column = index % CHUNKS * WIDTH;
            const bool inside = first + row < len && column < dim;
            cp_async_16(tile + row * STRIDE + column, head + (inside ? u64(first + row) * stride + column : 0), inside ? 16 : 0);
        }
    } else {
#pragma unroll 1
        for (u32 index = threadIdx.x; index < ROWS * D; index += ATTENTION_THREADS) {
            const u32 row = index / D, column = index % D;
            const bool inside = first + row < len && column < dim;
            tile[row * STRIDE + column] = inside ? head[u64(first + row) * stride + column] : from_float<T>(0.0f);
        }
    }
}

// ---- half types: tensor cores -------------------------------------------------------------------------------------

/// Tile sizes for a block of four warps on a head of D elements of a half type.
template <u32 D>
struct HalfTiles {
    static constexpr u32 WARPS = ATTENTION_THREADS / WARP;
    /// Blocks of 16 queries per warp. With two, each load of keys or values from shared memory feeds two products. For
    /// D = 160 the sums of two would not fit in registers.
    static constexpr u32 BLOCKS = D <= 128 ? 2 : 1;
    static constexpr u32 WARP_QUERIES = 16 * BLOCKS;
    static constexpr u32 QUERIES = WARPS * WARP_QUERIES;
    static constexpr u32 KEYS = D <= 80 ? 64 : 32;
    /// An odd number of 16-byte words, so that the eight rows that ldmatrix reads at once lie in different banks.
    static constexpr u32 STRIDE = D + 8;
    static constexpr u32 SHARED_BYTES = (QUERIES + 4 * KEYS) * STRIDE * 2;
    /// Blocks that must fit in the registers of a multiprocessor at once.
    static constexpr u32 RESIDENT = D == 16 ? 4 : D == 32 || D == 160 ? 3 : 2;
    /// Whether the queries stay in registers; else they are read again from shared memory for each tile of keys.
    static constexpr bool HELD = D <= 64;
};

/// A row's sums are rescaled only when its weights would exceed 2^8 relative to the old maximum. The weights stay far
/// inside the range of f16, and most tiles need no rescaling.
constexpr float SLACK = 8.0f;

/// A warp's queries and its sums over the keys so far. Of a 16 x 8 result, a lane holds columns 2 (lane % 4) and the
/// next one, in row lane / 4 (elements 0, 1) and in the row 8 below (2, 3).
template <typename T, u32 D>
struct WarpQueries {
    using Tiles = HalfTiles<D>;
    static constexpr u32 BLOCKS = Tiles::BLOCKS, KEYS = Tiles::KEYS, STRIDE = Tiles::STRIDE;

    const Heads<T>& heads;
    T* const queries;  // this warp's rows of the tile
    const u32 lane, first_query;
    u32 held[Tiles::HELD ? BLOCKS : 1][Tiles::HELD ? D / 16 : 1][4];
    float sums[BLOCKS][D / 8][4];
    float largest[BLOCKS][2], total[BLOCKS][2];

    __device__ __forceinline__ WarpQueries(const Heads<T>& heads, T* tile)
        : heads(heads), queries(tile + threadIdx.x / WARP * Tiles::WARP_QUERIES * STRIDE), lane(threadIdx.x % WARP),
          first_query(heads.first_query + threadIdx.x / WARP * Tiles::WARP_QUERIES) {
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m) {
#pragma unroll
            for (u32 n = 0; n < D / 8; ++n)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
            largest[m][0] = largest[m][1] = -INFINITY;
            total[m][0] = total[m][1] = 0.0f;
        }
    }

    /// The left operand of 16 queries and 16 dimensions.
    __device__ __forceinline__ void load_queries(u32 (&a)[4], u32 m, u32 d) const {
        ldmatrix_x4<false>(a, queries + (m * 16 + lane % 16) * STRIDE + d * 16 + lane / 16 * 8);
    }

    /// Loads the queries into registers if they are kept there. Call it once they have arrived in shared memory.
    __device__ __forceinline__ void hold() {
        if constexpr (Tiles::HELD) {
#pragma unroll
            for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
                for (u32 d = 0; d < D / 16; ++d) load_queries(held[m][d], m, d);
        }
    }

    /// Adds a tile of keys that starts at `first_key`. With `masked`, some keys are hidden from some queries, and keys
    /// from `end` on are hidden from all.
    template <bool masked>
    __device__ __forceinline__ void step(const T* keys, const T* values, u32 first_key, u32 end) {
        float scores[BLOCKS][KEYS / 8][4];
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;

#pragma unroll
        for (u32 d = 0; d < D / 16; ++d) {
            u32 a[BLOCKS][4];
#pragma unroll
            for (u32 m = 0; m < BLOCKS; ++m) {
                if constexpr (Tiles::HELD) {
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) a[m][i] = held[m][d][i];
                } else {
                    load_queries(a[m], m, d);
                }
            }
#pragma unroll
            for (u32 n = 0; n < KEYS / 16; ++n) {
                if (masked && first_key + n * 16 >= end) break;
                u32 b[4];
                ldmatrix_x4<false>(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + d * 16 + lane / 8 % 2 * 8);
                const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
                for (u32 m = 0; m < BLOCKS; ++m) {
                    mma_16816<T>(scores[m][2 * n], a[m], left);
                    mma_16816<T>(scores[m][2 * n + 1], a[m], right);
                }
            }
        }
        if constexpr (masked) hide(scores, first_key);
        exponentiate(scores);

#pragma unroll
        for (u32 n = 0; n < KEYS / 16; ++n) {
            if (masked && first_key + n * 16 >= end) break;
            // Two adjacent results, rounded, form the left operand of the next product.
            u32 a[BLOCKS][4];
#pragma unroll
            for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    a[m][i] = pack_pair<T>(scores[m][2 * n + i / 2][i % 2 * 2], scores[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (u32 d = 0; d < D / 16; ++d) {
                u32 b[4];
                ldmatrix_x4<true>(b, values + (n * 16 + lane % 16) * STRIDE + d * 16 + lane / 16 * 8);
                const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
                for (u32 m = 0; m < BLOCKS; ++m) {
                    mma_16816<T>(sums[m][2 * d], a[m], left);
                    mma_16816<T>(sums[m][2 * d + 1], a[m], right);
                }
            }
        }
    }

    __device__ __forceinline__ void hide(float (&scores)[BLOCKS][KEYS / 8][4], u32 first_key) const {
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const u32 query = first_query + m * 16 + lane / 4 + i / 2 * 8, key = first_key + n * 8 + lane % 4 * 2 + i % 2;
                    if (!heads.sees(query, key)) scores[m][n][i] = -INFINITY;
                }
    }

    /// Turns scores into weights relative to the largest score of each row, and rescales the sums so far to match.
    __device__ __forceinline__ void exponentiate(float (&scores)[BLOCKS][KEYS / 8][4]) {
        float rescale[BLOCKS][2];
        bool any = false;
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                float best = largest[m][r];
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; ++n) best = fmaxf(best, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
                best = lane_max<4>(best);
                // The negated comparison makes the first tile, which starts from -inf, rescale.
                const bool passed = !((best - largest[m][r]) * heads.factor <= SLACK);
                rescale[m][r] = passed ? exp2_fast((largest[m][r] - best) * heads.factor) : 1.0f;
                if (passed) largest[m][r] = best;
                any |= passed;
            }
        // Rows below the limit are multiplied by 1, so a row's result does not depend on its neighbours.
        if (__any_sync(ALL_LANES, any)) {
#pragma unroll
            for (u32 m = 0; m < BLOCKS; ++m) {
                total[m][0] *= rescale[m][0];
                total[m][1] *= rescale[m][1];
#pragma unroll
                for (u32 n = 0; n < D / 8; ++n)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) sums[m][n][i] *= rescale[m][i / 2];
            }
        }
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                const float offset = -largest[m][r] * heads.factor;
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (u32 i = 2 * r; i < 2 * r + 2; ++i) {
                        scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], heads.factor, offset));
                        total[m][r] += scores[m][n][i];
                    }
            }
    }

    /// Writes the results through the warp's own rows of shared memory, so that each lane stores 16 bytes.
    __device__ __forceinline__ void finish() {
        __syncwarp();
#pragma unroll
        for (u32 m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                const float inverse = 1.0f / lane_sum<4>(total[m][r]);
#pragma unroll
                for (u32 n = 0; n < D / 8; ++n)
                    *reinterpret_cast<u32*>(queries + (m * 16 + r * 8 + lane / 4) * STRIDE + n * 8 + lane % 4 * 2) =
                        pack_pair<T>(sums[m][n][2 * r] * inverse, sums[m][n][2 * r + 1] * inverse);
            }
        __syncwarp();
        constexpr u32 CHUNKS = D / VECTOR;
        if (heads.out_vectors) {
#pragma unroll 4
            for (u32 i = lane; i < Tiles::WARP_QUERIES * CHUNKS; i += WARP) {
                const u32 row = i / CHUNKS, column = i % CHUNKS * VECTOR;
                if (first_query + row >= heads.q_len || column >= heads.dim) continue;
                put<VECTOR>(heads.out + u64(first_query + row) * heads.out_stride + column, fetch<VECTOR>(queries + row * STRIDE + column));
            }
        } else {
#pragma unroll 1
            for (u32 i = lane; i < Tiles::WARP_QUERIES * D; i += WARP) {
                const u32 row = i / D, column = i % D;
                if (first_query + row >= heads.q_len || column >= heads.dim) continue;
                heads.out[u64(first_query + row) * heads.out_stride + column] = queries[row * STRIDE + column];
            }
        }
    }
};

template <typename T, u32 D>
__device__ __forceinline__ void half_attention(const Heads<T>& heads, T* shared) {
    using Tiles = HalfTiles<D>;
    constexpr u32 KEYS = Tiles::KEYS, STRIDE = Tiles::STRIDE, TILE = KEYS * STRIDE;
    T* const keys = shared + Tiles::QUERIES * STRIDE;
    T* const values = keys + 2 * TILE;
    const u32 end = heads.keys(Tiles::QUERIES), tiles = (end + KEYS - 1) / KEYS, unmasked = heads.common_keys() / KEYS;

    const auto prefetch = [&](u32 tile) {
        const u32 buffer = tile % 2 * TILE;
        load_tile<D, KEYS, STRIDE>(keys + buffer, heads.k, heads.kv_stride, tile * KEYS, heads.kv_len, heads.dim, heads.vectors);
        load_tile<D, KEYS, STRIDE>(values + buffer, heads.v, heads.kv_stride, tile * KEYS, heads.kv_len, heads.dim, heads.vectors);
        cp_async_commit();
    };
    load_tile<D, Tiles::QUERIES, STRIDE>(shared, heads.q, heads.q_stride, heads.first_query, heads.q_len, heads.dim, heads.vectors);
    prefetch(0);

    WarpQueries<T, D> queries(heads, shared);
    for (u32 tile = 0; tile < tiles; ++tile) {
        // Now this tile has arrived, and no warp still reads the other buffer.
        cp_async_wait<0>();
        __syncthreads();
        if (tile == 0) queries.hold();
        if (tile + 1 < tiles) prefetch(tile + 1);
        const T* const tile_keys = keys + tile % 2 * TILE;
        const T* const tile_values = values + tile % 2 * TILE;
        if (tile < unmasked)
            queries.template step<false>(tile_keys, tile_values, tile * KEYS, end);
        else
            queries.template step<true>(tile_keys, tile_values, tile * KEYS, end);
    }
    queries.finish();
}

// ---- f32: no tensor cores, since they would round f32 to TF32 ------------------------------------------------------

/// Tile sizes for a block of 8 x 16 threads on a head of D floats. A thread handles 8 queries, and every 16th key or
/// dimension.
template <u32 D>
struct FloatTiles {
    static constexpr u32 ROWS = 8, COLUMNS = 16;
    static constexpr u32 QUERIES = ATTENTION_THREADS / COLUMNS * ROWS;
    static constexpr u32 KEYS = D <= 96 ? 64 : 32;
    /// An odd number of 16-byte words, as above.
    static constexpr u32 STRIDE = D + 4, WEIGHTS_STRIDE = KEYS + 4;
    static constexpr u32 SHARED_BYTES = ((QUERIES + 2 * KEYS) * STRIDE + QUERIES * WEIGHTS_STRIDE) * 4;
    static constexpr u32 RESIDENT = 2;
    /// Steps of four dimensions or keys in flight; one for wide heads, whose sums take most registers.
    static constexpr u32 UNROLL = D <= 80 ? 2 : 1;
};

template <u32 D>
__device__ __forceinline__ void float_attention(const Heads<float>& heads, float* shared) {
    using Tiles = FloatTiles<D>;
    constexpr u32 ROWS = Tiles::ROWS, COLUMNS = Tiles::COLUMNS, KEYS = Tiles::KEYS, STRIDE = Tiles::STRIDE, N = KEYS / COLUMNS;
    float* const keys = shared + Tiles::QUERIES * STRIDE;
    float* const values = keys + KEYS * STRIDE;
    const u32 column = threadIdx.x % COLUMNS, first_row = threadIdx.x / COLUMNS * ROWS;
    const float* const queries = shared + first_row * STRIDE;
    float* const weights = values + KEYS * STRIDE + first_row * Tiles::WEIGHTS_STRIDE;
    const u32 end = heads.keys(Tiles::QUERIES), unmasked = heads.common_keys() / KEYS * KEYS;

    float sums[ROWS][D / COLUMNS] = {}, largest[ROWS], total[ROWS] = {};
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) largest[r] = -INFINITY;

    load_tile<D, Tiles::QUERIES, STRIDE>(shared, heads.q, heads.q_stride, heads.first_query, heads.q_len, heads.dim, heads.vectors);
    for (u32 first_key = 0; first_key < end; first_key += KEYS) {
        __syncthreads();
        load_tile<D, KEYS, STRIDE>(keys, heads.k, heads.kv_stride, first_key, heads.kv_len, heads.dim, heads.vectors);
        load_tile<D, KEYS, STRIDE>(values, heads.v, heads.kv_stride, first_key, heads.kv_len, heads.dim, heads.vectors);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        float scores[ROWS][N] = {};
#pragma unroll Tiles::UNROLL
        for (u32 d = 0; d < D; d += 4) {
            float4 key[N];
#pragma unroll
            for (u32 n = 0; n < N; ++n) key[n] = *reinterpret_cast<const float4*>(keys + (column + n * COLUMNS) * STRIDE + d);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                const float4 query = *reinterpret_cast<const float4*>(queries + r * STRIDE + d);
#pragma unroll
                for (u32 n = 0; n < N; ++n) {
                    scores[r][n] = fmaf(query.x, key[n].x, scores[r][n]);
                    scores[r][n] = fmaf(query.y, key[n].y, scores[r][n]);
                    scores[r][n] = fmaf(query.z, key[n].z, scores[r][n]);
                    scores[r][n] = fmaf(query.w, key[n].w, scores[r][n]);
                }
            }
        }

#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            float best = largest[r];
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
                if (first_key >= unmasked && !heads.sees(heads.first_query + first_row + r, first_key + column + n * COLUMNS))
                    scores[r][n] = -INFINITY;
                best = fmaxf(best, scores[r][n]);
            }
            best = lane_max<COLUMNS>(best);
            const float rescale = exp2_fast((largest[r] - best) * heads.factor);
            largest[r] = best;
            total[r] *= rescale;
#pragma unroll
            for (u32 d = 0; d < D / COLUMNS; ++d) sums[r][d] *= rescale;
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
                const float weight = exp2_fast((scores[r][n] - best) * heads.factor);
                total[r] += weight;
                weights[r * Tiles::WEIGHTS_STRIDE + column + n * COLUMNS] = weight;
            }
        }
        // The 16 threads that share these rows belong to one warp.
        __syncwarp();

#pragma unroll Tiles::UNROLL
        for (u32 k = 0; k < KEYS; k += 4) {
            float4 weight[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) weight[r] = *reinterpret_cast<const float4*>(weights + r * Tiles::WEIGHTS_STRIDE + k);
#pragma unroll
            for (u32 d = 0; d < D / COLUMNS; ++d) {
                const float* const value = values + k * STRIDE + column + d * COLUMNS;
                const float a = value[0], b = value[STRIDE], c = value[2 * STRIDE], e = value[3 * STRIDE];
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) {
                    sums[r][d] = fmaf(weight[r].x, a, sums[r][d]);
                    sums[r][d] = fmaf(weight[r].y, b, sums[r][d]);
                    sums[r][d] = fmaf(weight[r].z, c, sums[r][d]);
                    sums[r][d] = fmaf(weight[r].w, e, sums[r][d]);
                }
            }
        }
    }

#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        const float inverse = 1.0f / lane_sum<COLUMNS>(total[r]);
        const u32 query = heads.first_query + first_row + r;
        if (query >= heads.q_len) continue;
#pragma unroll
        for (u32 d = 0; d < D / COLUMNS; ++d)
            if (column + d * COLUMNS < heads.dim)
                heads.out[u64(query) * heads.out_stride + column + d * COLUMNS] = sums[r][d] * inverse;
    }
}

// ---- entry points -------------------------------------------------------------------------------------------------

template <typename T, u32 D>
struct AttentionTiles : HalfTiles<D> {};
template <u32 D>
struct AttentionTiles<float, D> : FloatTiles<D> {};

template <typename T, u32 D>
__device__ __forceinline__ void attention(const Heads<T>& heads, unsigned char* shared) {
    static_assert(AttentionTiles<T, D>::SHARED_BYTES <= 99 << 10, "too much shared memory for sm_86 and sm_120");
    if constexpr (sizeof(T) == 4)
        float_attention<D>(heads, reinterpret_cast<float*>(shared));
    else
        half_attention<T, D>(heads, reinterpret_cast<T*>(shared));
}

/// out [images, q_len, heads dim] = softmax(q k^T scale) v for each image and head. Image b reads row q_rows[b] of q,
/// and row kv_rows[b] of k and v. Row r of q starts at r q_image, its position i at i q_stride, its head h at h dim; k
/// and v likewise. If causal, query i sees keys 0 to i. There must be at least one key.
#define ELBO_ATTENTION(T, suffix, D)                                                                                               \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, AttentionTiles<T, D>::RESIDENT)                                \
        attention_d##D##_##suffix(const T* q, const u32* q_rows, const T* k, const T* v, const u32* kv_rows, T* out, u32,          \
                                  u32 q_len, u32 kv_len, u32 heads, u32 dim, u32 q_stride, u32 kv_stride, u64 q_image,             \
                                  u64 kv_image, float scale, u32 causal) {                                                         \
        ELBO_DYNAMIC_SHARED(shared);                                                                                               \
        const Heads<T> of(q, q_rows, k, v, kv_rows, out, q_len, kv_len, heads, dim, q_stride, kv_stride, q_image, kv_image, scale, \
                          causal, AttentionTiles<T, D>::QUERIES);                                                                  \
        attention<T, D>(of, shared);                                                                                               \
    }

#define ELBO_ATTENTION_WIDTHS(T, suffix)                                                                       \
    ELBO_ATTENTION(T, suffix, 16)                                                                              \
    ELBO_ATTENTION(T, suffix, 32)                                                                              \
    ELBO_ATTENTION(T, suffix, 48)                                                                              \
    ELBO_ATTENTION(T, suffix, 64)                                                                              \
    ELBO_ATTENTION(T, suffix, 80)                                                                              \
    ELBO_ATTENTION(T, suffix, 96)                                                                              \
    ELBO_ATTENTION(T, suffix, 128)                                                                             \
    ELBO_ATTENTION(T, suffix, 160)

ELBO_EACH_TYPE(ELBO_ATTENTION_WIDTHS)
