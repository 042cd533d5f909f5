// Rows of a table by number: embeddings as f32, activations as they are. A block per row.
#include "weights.cuh"

template <class T>
DEVICE void embedding(const unsigned* ids, const T* weight, float* out, unsigned vocab,
                      unsigned width) {
    int64_t row = blockIdx.x;
    unsigned id = ids[row];
    const T* from = weight + int64_t(id < vocab ? id : 0) * width;
    float* to = out + row * width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        to[i] = id < vocab ? widen(from[i]) : __uint_as_float(0x7fffffff);
    }
}

// Of blocks a warp reads what sixteen rows have in a group, as products do; four lanes hold what is
// this row's.
template <class W>
DEVICE void embedding_of_blocks(const unsigned* ids, const Matrix& w, float* out) {
    int64_t row = blockIdx.x;
    unsigned id = ids[row], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool known = id < w.n;
    unsigned column = known ? id % COLUMNS : 0, tile = known ? id / COLUMNS : 0;
    float* to = out + row * w.k + lane % 4 * 4;
    for (unsigned group = warp; group < w.k / GROUP; group += blockDim.x / 32) {
        typename W::Raw raw = W::load(w, tile, group);
        // the lane whose accumulators would be the column's has its scales
        auto of_column = [&](const Scales& scales) {
            float x = column / 8 ? (column % 2 ? scales.of[1][1] : scales.of[1][0])
                                 : (column % 2 ? scales.of[0][1] : scales.of[0][0]);
            return __shfl_sync(FULL_WARP, x, column % 8 / 2);
        };
        float scale[2], offset = 0;
        scale[0] = of_column(W::scales(raw, 0));
        scale[1] = W::NUM_SCALES == 2 ? of_column(W::scales(raw, W::NUM_SCALES - 1)) : scale[0];
        if constexpr (W::IS_OFFSET) offset = of_column(W::offsets(raw));
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 codes = unpack<F16>(column / 8 ? W::pair(raw, 1, p) : W::pair(raw, 0, p));
            float x = fmaf(codes.x, scale[p / 2], offset), y = fmaf(codes.y, scale[p / 2], offset);
            if (lane / 4 == column % 8) {
                float* place = to + group * GROUP + p / 2 * 16 + p % 2 * 2;
                place[0] = known ? x : __uint_as_float(0x7fffffff);
                place[1] = known ? y : __uint_as_float(0x7fffffff);
            }
        }
    }
}

KERNEL embedding_bf16(const unsigned* ids, const Bf16* weight, float* out, unsigned vocab,
                      unsigned width) {
    embedding(ids, weight, out, vocab, width);
}
KERNEL embedding_f16(const unsigned* ids, const F16* weight, float* out, unsigned vocab,
                     unsigned width) {
    embedding(ids, weight, out, vocab, width);
}

#define OF_BLOCKS(name, W)                                                                     \
    KERNEL embedding_##name(const unsigned* ids, const void* weight, float* out,               \
                            unsigned vocab, unsigned width) {                                  \
        embedding_of_blocks<W>(ids, {weight, vocab, width}, out);                              \
    }
OF_BLOCKS(q4_0, Q4_0)
OF_BLOCKS(q4_1, Q4_1)
OF_BLOCKS(q5_0, Q5_0)
OF_BLOCKS(q5_1, Q5_1)
OF_BLOCKS(q8_0, Q8_0)
OF_BLOCKS(q4_k, Q4_K)
OF_BLOCKS(q5_k, Q5_K)
OF_BLOCKS(q6_k, Q6_K)

KERNEL gather_rows(const unsigned* x, const unsigned* rows, unsigned* out, unsigned limit,
                   unsigned words) {
    unsigned row = rows[blockIdx.x];
    const unsigned* from = x + int64_t(row < limit ? row : 0) * words;
    unsigned* to = out + int64_t(blockIdx.x) * words;
    for (unsigned i = threadIdx.x; i < words; i += blockDim.x) to[i] = row < limit ? from[i] : 0;
}

KERNELS(embedding, ENTRY(embedding_bf16), ENTRY(embedding_f16), ENTRY(embedding_q4_0),
        ENTRY(embedding_q4_1), ENTRY(embedding_q5_0), ENTRY(embedding_q5_1), ENTRY(embedding_q8_0),
        ENTRY(embedding_q4_k), ENTRY(embedding_q5_k), ENTRY(embedding_q6_k), ENTRY(gather_rows))
