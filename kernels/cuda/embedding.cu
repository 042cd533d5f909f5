// Rows of a table by number: embeddings as f32, activations as they are. A block per row.
#include "device.cuh"

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

KERNEL embedding_bf16(const unsigned* ids, const Bf16* weight, float* out, unsigned vocab,
                      unsigned width) {
    embedding(ids, weight, out, vocab, width);
}
KERNEL embedding_f16(const unsigned* ids, const F16* weight, float* out, unsigned vocab,
                     unsigned width) {
    embedding(ids, weight, out, vocab, width);
}

KERNEL gather_rows(const unsigned* x, const unsigned* rows, unsigned* out, unsigned limit,
                   unsigned words) {
    unsigned row = rows[blockIdx.x];
    const unsigned* from = x + int64_t(row < limit ? row : 0) * words;
    unsigned* to = out + int64_t(blockIdx.x) * words;
    for (unsigned i = threadIdx.x; i < words; i += blockDim.x) to[i] = row < limit ? from[i] : 0;
}

KERNELS(embedding, ENTRY(embedding_bf16), ENTRY(embedding_f16), ENTRY(gather_rows))
