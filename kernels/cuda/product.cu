// y = x w^T + bias, of which no element depends on another row: k ascends in steps of one matrix
// instruction, in one accumulator, whatever the number of rows.
//
// A block has 64 x 64 elements; its four warps take 16 columns each. Tiles of 64 k come through
// three buffers (cp.async); the 16-byte chunk c of row r stands at c ^ (r % 8).
#include "device.cuh"

constexpr int TILE = 64;
constexpr int STAGE = 64;
constexpr int STAGES = 3;

template <class T> DEVICE T* chunk_of(T* base, int row, int chunk) {
    return base + row * STAGE + 8 * (chunk ^ (row & 7));
}

// Copies 64 rows of k from `at` on; what lies outside becomes zeros.
template <class T>
DEVICE void copy_tile(T* to, const T* from, int64_t first, int64_t rows, int64_t k, int64_t at) {
    for (int task = threadIdx.x; task < TILE * STAGE / 8; task += blockDim.x) {
        int row = task / (STAGE / 8), chunk = task % (STAGE / 8);
        bool real = first + row < rows && at + 8 * chunk < k;
        const T* place = real ? from + (first + row) * k + at + 8 * chunk : from;
        copy_async(chunk_of(to, row, chunk), place, real);
    }
}

template <class T, class Y>
DEVICE void product(const T* x, const T* w, const float* bias, Y* y, unsigned rows, unsigned n,
                    unsigned k) {
    SHARED(memory);
    T* tiles = reinterpret_cast<T*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    int64_t first_row = int64_t(blockIdx.y) * TILE, first_column = int64_t(blockIdx.x) * TILE;
    int count = (k + STAGE - 1) / STAGE;
    auto x_tile = [&](int stage) { return tiles + stage * 2 * TILE * STAGE; };
    auto w_tile = [&](int stage) { return tiles + (stage * 2 + 1) * TILE * STAGE; };
    auto start = [&](int step) {
        if (step < count) {
            copy_tile(x_tile(step % STAGES), x, first_row, rows, k, int64_t(step) * STAGE);
            copy_tile(w_tile(step % STAGES), w, first_column, n, k, int64_t(step) * STAGE);
        }
        commit_copies();
    };
    float sum[TILE / 16][2][4] = {};
    start(0);
    start(1);
    for (int step = 0; step < count; step++) {
        await_copies<1>();
        __syncthreads();  // this tile is there; the one before is free
        start(step + 2);
#pragma unroll
        for (int part = 0; part < STAGE / 16; part++) {
            unsigned b[4];
            load_matrices(b, chunk_of(w_tile(step % STAGES), 16 * warp + matrix / 2 * 8 + r,
                                      2 * part + matrix % 2));
            const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < TILE / 16; m++) {
                if (first_row + 16 * m >= rows) break;
                unsigned a[4];
                load_matrices(a, chunk_of(x_tile(step % STAGES), 16 * m + matrix % 2 * 8 + r,
                                          2 * part + matrix / 2));
                mma<T>(sum[m][0], a, left);
                mma<T>(sum[m][1], a, right);
            }
        }
    }
    await_copies<0>();
#pragma unroll
    for (int m = 0; m < TILE / 16; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int64_t row = first_row + 16 * m + lane / 4 + i % 4 / 2 * 8;
            int64_t column = first_column + 16 * warp + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < rows && column < n) {
                float value = sum[m][i / 4][i % 4] + (bias ? bias[column] : 0);
                y[row * n + column] = narrow<Y>(value);
            }
        }
    }
}

template <class Y> DEVICE void spread_bias(const float* bias, Y* y, unsigned rows, unsigned n) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < int64_t(rows) * n) y[i] = narrow<Y>(bias[i % n]);
}

#define PRODUCT(name, T, Y)                                                                    \
    KERNEL __launch_bounds__(128) name(const T* x, const T* w, const float* bias, Y* y,        \
                                       unsigned rows, unsigned n, unsigned k) {                \
        product(x, w, bias, y, rows, n, k);                                                    \
    }
PRODUCT(product_bf16_bf16, Bf16, Bf16)
PRODUCT(product_bf16_f32, Bf16, float)
PRODUCT(product_f16_f16, F16, F16)
PRODUCT(product_f16_f32, F16, float)

#define SPREAD(name, Y)                                                      \
    KERNEL name(const float* bias, Y* y, unsigned rows, unsigned n) {        \
        spread_bias(bias, y, rows, n);                                       \
    }
SPREAD(spread_bias_bf16, Bf16)
SPREAD(spread_bias_f16, F16)
SPREAD(spread_bias_f32, float)

KERNELS(product, ENTRY(product_bf16_bf16), ENTRY(product_bf16_f32), ENTRY(product_f16_f16),
        ENTRY(product_f16_f32), ENTRY(spread_bias_bf16), ENTRY(spread_bias_f16),
        ENTRY(spread_bias_f32))
