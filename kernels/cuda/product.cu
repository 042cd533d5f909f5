// y = x w^T + bias, of which no element depends on another row, or on how many rows there are.
//
// Groups of 32 inputs ascend in steps of one matrix instruction; k is cut into eight slices of whole
// groups, whose sums are added in ascending order. Two kernels sum so: with few rows a warp takes
// a slice, with many a warp takes all of them, one after the other.
//
// Of weights in blocks a group's codes are summed as exact numbers of 16 bits, and its sum is then
// scaled; an offset is multiplied with the sum of the group's inputs.
#include "weights.cuh"

constexpr unsigned SLICES = 8;
constexpr unsigned ROWS = 64;  // of a block, with many
constexpr unsigned STAGE = 64;
constexpr unsigned STAGES = 3;
constexpr int FEW_AHEAD = 4;
constexpr int MANY_AHEAD = 2;

struct Result {
    const float* bias;
    void* y;
    // Numbers from a row to the next.
    unsigned stride;
    // Whether y is f32.
    unsigned is_wide;
};

template <class T>
DEVICE void store(const Result& to, int64_t row, unsigned column, float value) {
    if (to.bias) value += to.bias[column];
    int64_t at = row * to.stride + column;
    if (to.is_wide) {
        static_cast<float*>(to.y)[at] = value;
    } else {
        static_cast<T*>(to.y)[at] = narrow<T>(value);
    }
}

DEVICE unsigned slice_groups(unsigned groups) { return (groups + SLICES - 1) / SLICES; }

// Adds 16 rows times a group's columns. a[j] are the rows' inputs of the group's halves.
template <class W>
DEVICE void multiply(float (&sum)[2][4], const unsigned (&a)[2][4], const typename W::Raw& raw,
                     const unsigned (&b)[2][2][2]) {
    using T = typename W::Number;
    if constexpr (!W::IS_SCALED) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            mma<T>(sum[t], a[0], b[t][0]);
            mma<T>(sum[t], a[1], b[t][1]);
        }
    } else {
#pragma unroll
        for (int part = 0; part < W::NUM_SCALES; part++) {
            Scales scales = W::scales(raw, part);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                float codes[4] = {};
                mma<T>(codes, a[part], b[t][part]);
                if (W::NUM_SCALES == 1) mma<T>(codes, a[1], b[t][1]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[t][i] = fmaf(codes[i], scales.of[t][i % 2], sum[t][i]);
                }
            }
        }
        if constexpr (W::IS_OFFSET) {
            const unsigned ones[2] = {0x3c003c00, 0x3c003c00};
            float inputs[4] = {};
            mma<T>(inputs, a[0], ones);
            mma<T>(inputs, a[1], ones);
            Scales offsets = W::offsets(raw);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float& one = sum[i / 4][i % 4];
                one = fmaf(inputs[i % 4], offsets.of[i / 4][i % 2], one);
            }
        }
    }
}

template <class W>
DEVICE void fragments(unsigned (&b)[2][2][2], const typename W::Raw& raw) {
#pragma unroll
    for (int i = 0; i < 8; i++) b[i / 4][i / 2 % 2][i % 2] = W::pair(raw, i / 4, i % 4);
}

// Up to 16 rows and 16 columns a block; the rows come as they are needed, which is cheap where most
// blocks read the same few.
template <class W>
DEVICE void few_rows(const typename W::Number* x, const Matrix& w, const Result& to,
                     unsigned rows) {
    SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);  // [slice][row][column]
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x;
    unsigned first_row = blockIdx.y * 16, groups = (w.k + GROUP - 1) / GROUP;
    unsigned begin = min(warp * slice_groups(groups), groups);
    unsigned end = min(begin + slice_groups(groups), groups);
    typename W::Raw ahead[FEW_AHEAD] = {};
#pragma unroll
    for (unsigned i = 0; i < FEW_AHEAD; i++) {
        if (begin + i < end) ahead[i] = W::load(w, tile, begin + i);
    }
    auto inputs = [&](unsigned row, unsigned at) {
        if (row >= rows || at >= w.k) return make_uint2(0, 0);
        return *reinterpret_cast<const uint2*>(x + int64_t(row) * w.k + at);
    };
    float sum[2][4] = {};
    for (unsigned first = begin; first < end; first += FEW_AHEAD) {
#pragma unroll
        for (unsigned i = 0; i < FEW_AHEAD; i++) {
            unsigned group = first + i;
            if (group >= end) break;
            typename W::Raw raw = ahead[i];
            if (group + FEW_AHEAD < end) ahead[i] = W::load(w, tile, group + FEW_AHEAD);
            unsigned a[2][4], b[2][2][2];
#pragma unroll
            for (unsigned j = 0; j < 2; j++) {
                unsigned at = group * GROUP + 16 * j + lane % 4 * 4;
                uint2 upper = inputs(first_row + lane / 4, at);
                uint2 lower = inputs(first_row + lane / 4 + 8, at);
                a[j][0] = upper.x, a[j][1] = lower.x, a[j][2] = upper.y, a[j][3] = lower.y;
            }
            fragments<W>(b, raw);
            multiply<W>(sum, a, raw, b);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        unsigned row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sums[(warp * 16 + row) * COLUMNS + column] = sum[i / 4][i % 4];
    }
    __syncthreads();
    unsigned row = first_row + threadIdx.x / 16;
    unsigned column = tile * COLUMNS + threadIdx.x % 16;
    if (row >= rows || column >= w.n) return;
    float all = 0;
#pragma unroll
    for (unsigned slice = 0; slice < SLICES; slice++) all += sums[slice * 256 + threadIdx.x];
    store<typename W::Number>(to, row, column, all);
}

// The 16-byte chunk c of row r of a stage stands at c ^ 2 (r % 4), so that eight bytes of four rows
// come out of different banks.
template <class T> DEVICE T* chunk_of(T* tile, unsigned row, unsigned chunk) {
    return tile + row * STAGE + 8 * (chunk ^ (row % 4 * 2));
}

// 64 rows and 16 columns a warp. Tiles of the rows come through three buffers (cp.async).
template <class W>
DEVICE void many_rows(const typename W::Number* x, const Matrix& w, const Result& to,
                      unsigned rows) {
    using T = typename W::Number;
    SHARED(memory);
    T* tiles = reinterpret_cast<T*>(memory);
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned tile = blockIdx.x * (blockDim.x / 32) + warp, first_row = blockIdx.y * ROWS;
    unsigned groups = (w.k + GROUP - 1) / GROUP, slice_end = slice_groups(groups);
    bool has_columns = tile * COLUMNS < w.n;
    auto start = [&](unsigned step) {
        for (unsigned task = threadIdx.x; task < ROWS * STAGE / 8; task += blockDim.x) {
            unsigned row = task / (STAGE / 8), chunk = task % (STAGE / 8);
            unsigned at = step * STAGE + 8 * chunk;
            bool real = first_row + row < rows && at < w.k;
            const T* from = real ? x + int64_t(first_row + row) * w.k + at : x;
            copy_async(chunk_of(tiles + step % STAGES * ROWS * STAGE, row, chunk), from, real);
        }
        commit_copies();
    };
    typename W::Raw ahead[MANY_AHEAD] = {};
#pragma unroll
    for (unsigned i = 0; i < MANY_AHEAD; i++) {
        if (i < groups && has_columns) ahead[i] = W::load(w, tile, i);
    }
    float all[ROWS / 16][2][4] = {}, sum[ROWS / 16][2][4] = {};
    start(0);
    start(1);
    for (unsigned step = 0; step * STAGE < w.k; step++) {
        await_copies<1>();
        __syncthreads();  // this tile is there; the one before is free
        start(step + 2);
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            unsigned group = 2 * step + half;
            if (group >= groups || !has_columns) break;
            typename W::Raw raw = ahead[half];
            if (group + MANY_AHEAD < groups) ahead[half] = W::load(w, tile, group + MANY_AHEAD);
            unsigned b[2][2][2];
            fragments<W>(b, raw);
#pragma unroll
            for (unsigned m = 0; m < ROWS / 16; m++) {
                if (first_row + 16 * m >= rows) break;
                unsigned a[2][4];
#pragma unroll
                for (unsigned j = 0; j < 2; j++) {
                    const T* stage = tiles + step % STAGES * ROWS * STAGE;
                    unsigned row = 16 * m + lane / 4, chunk = 4 * half + 2 * j + lane % 4 / 2;
                    auto inputs = [&](unsigned row) {
                        const T* from = chunk_of(stage, row, chunk) + lane % 2 * 4;
                        return *reinterpret_cast<const uint2*>(from);
                    };
                    uint2 upper = inputs(row), lower = inputs(row + 8);
                    a[j][0] = upper.x, a[j][1] = lower.x, a[j][2] = upper.y, a[j][3] = lower.y;
                }
                multiply<W>(sum[m], a, raw, b);
            }
            if (group + 1 == min(slice_end, groups)) {
                slice_end += slice_groups(groups);
#pragma unroll
                for (unsigned i = 0; i < ROWS / 2; i++) {
                    float& one = sum[i / 8][i / 4 % 2][i % 4];
                    all[i / 8][i / 4 % 2][i % 4] += one;
                    one = 0;
                }
            }
        }
    }
    await_copies<0>();
    // whole warps have stayed for the barriers
#pragma unroll
    for (unsigned i = 0; i < ROWS / 2; i++) {
        unsigned row = first_row + i / 8 * 16 + lane / 4 + i % 4 / 2 * 8;
        unsigned column = tile * COLUMNS + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && column < w.n) store<T>(to, row, column, all[i / 8][i / 4 % 2][i % 4]);
    }
}

template <class Y> DEVICE void spread_bias(const float* bias, Y* y, unsigned rows, unsigned n) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < int64_t(rows) * n) y[i] = narrow<Y>(bias[i % n]);
}

#define PRODUCT(name, W, way)                                                                  \
    KERNEL __launch_bounds__(256, 2) name(const W::Number* x, const void* values,              \
                                          const float* bias, void* y, unsigned rows,           \
                                          unsigned n, unsigned k, unsigned stride,             \
                                          unsigned is_wide) {                                  \
        way<W>(x, {values, n, k}, {bias, y, stride, is_wide}, rows);                           \
    }
#define PRODUCTS(name, W)                     \
    PRODUCT(product_few_##name, W, few_rows)  \
    PRODUCT(product_many_##name, W, many_rows)
PRODUCTS(bf16, Dense<Bf16>)
PRODUCTS(f16, Dense<F16>)
PRODUCTS(q4_0, Q4_0)
PRODUCTS(q4_1, Q4_1)
PRODUCTS(q5_0, Q5_0)
PRODUCTS(q5_1, Q5_1)
PRODUCTS(q8_0, Q8_0)
PRODUCTS(q4_k, Q4_K)
PRODUCTS(q5_k, Q5_K)
PRODUCTS(q6_k, Q6_K)

#define SPREAD(name, Y)                                                      \
    KERNEL name(const float* bias, Y* y, unsigned rows, unsigned n) {        \
        spread_bias(bias, y, rows, n);                                       \
    }
SPREAD(spread_bias_bf16, Bf16)
SPREAD(spread_bias_f16, F16)
SPREAD(spread_bias_f32, float)

#define ENTRIES(name) ENTRY(product_few_##name), ENTRY(product_many_##name)
KERNELS(product, ENTRIES(bf16), ENTRIES(f16), ENTRIES(q4_0), ENTRIES(q4_1), ENTRIES(q5_0),
        ENTRIES(q5_1), ENTRIES(q8_0), ENTRIES(q4_k), ENTRIES(q5_k), ENTRIES(q6_k),
        ENTRY(spread_bias_bf16), ENTRY(spread_bias_f16), ENTRY(spread_bias_f32))
