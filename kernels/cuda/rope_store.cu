// What lies between the fused product and attention: q normed in place, k normed, rotated and
// stored, v stored. A warp per row and head; lane l has the pairs (i, i + d/2) for i = l, l + 32..
#include "device.cuh"

// Pairs of a lane: heads are at most 256 wide.
constexpr int PAIRS = 4;

template <class T>
DEVICE void rope_store(T* qkv, const float* q_norm, const float* k_norm, float eps,
                       const float* cos, const float* sin, unsigned positions,
                       const unsigned* stored_positions, const unsigned* slot_mapping, T* k_cache,
                       T* v_cache, unsigned slots, unsigned heads, unsigned kv_heads, unsigned dim,
                       unsigned stride) {
    unsigned head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned row = blockIdx.y, half = dim / 2;
    if (head >= heads + 2 * kv_heads) return;
    T* x = qkv + int64_t(row) * stride + head * dim;
    bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
    const float* weight = is_q ? q_norm : is_k ? k_norm : nullptr;
    if (is_q && !weight) return;

    float a[PAIRS], b[PAIRS], squares = 0;
    for (int n = 0; n < PAIRS; n++) {
        unsigned i = lane + 32 * n;
        a[n] = i < half ? widen(x[i]) : 0;
        b[n] = i < half ? widen(x[i + half]) : 0;
        squares = fmaf(b[n], b[n], fmaf(a[n], a[n], squares));
    }
    if (weight) {
        float scale = rsqrtf(warp_sum(squares) / dim + eps);
        for (int n = 0; n < PAIRS; n++) {
            unsigned i = lane + 32 * n;
            if (i < half) {
                a[n] *= scale * weight[i];
                b[n] *= scale * weight[i + half];
            }
        }
    }
    unsigned slot = slot_mapping[row];
    if (!is_q && slot >= slots) return;
    T* to = x;
    if (!is_q) {
        unsigned kv_head = head - heads - (is_k ? 0 : kv_heads);
        to = (is_k ? k_cache : v_cache) + (int64_t(slot) * kv_heads + kv_head) * dim;
    }
    unsigned position = is_k ? stored_positions[row] : 0;
    for (int n = 0; n < PAIRS; n++) {
        unsigned i = lane + 32 * n;
        if (i >= half) break;
        float c = 1, s = 0;
        if (is_k) {
            int64_t angle = int64_t(position) * half + i;
            c = position < positions ? cos[angle] : __uint_as_float(0x7fffffff);
            s = position < positions ? sin[angle] : __uint_as_float(0x7fffffff);
        }
        to[i] = narrow<T>(is_k ? fmaf(a[n], c, -(b[n] * s)) : a[n]);
        to[i + half] = narrow<T>(is_k ? fmaf(b[n], c, a[n] * s) : b[n]);
    }
}

#define ROPE_STORE(name, T)                                                                       \
    KERNEL name(T* qkv, const float* q_norm, const float* k_norm, float eps, const float* cos,    \
                const float* sin, unsigned positions, const unsigned* stored_positions,           \
                const unsigned* slot_mapping, T* k_cache, T* v_cache, unsigned slots,             \
                unsigned heads, unsigned kv_heads, unsigned dim, unsigned stride) {               \
        rope_store(qkv, q_norm, k_norm, eps, cos, sin, positions, stored_positions, slot_mapping, \
                   k_cache, v_cache, slots, heads, kv_heads, dim, stride);                        \
    }
ROPE_STORE(rope_store_bf16, Bf16)
ROPE_STORE(rope_store_f16, F16)

KERNELS(rope_store, ENTRY(rope_store_bf16), ENTRY(rope_store_f16))
