// silu(gate) * up, two values a thread.
#include "device.cuh"

DEVICE float silu(float x) { return x / (1.0f + exp_fast(-x)); }

template <class T>
DEVICE void silu_mul(const T* gate_up, T* out, unsigned rows, unsigned inner) {
    unsigned pairs = inner / 2;
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= int64_t(rows) * pairs) return;
    int64_t row = i / pairs, pair = i % pairs;
    const unsigned* from = reinterpret_cast<const unsigned*>(gate_up) + row * 2 * pairs + pair;
    float2 gate = unpack<T>(from[0]), up = unpack<T>(from[pairs]);
    reinterpret_cast<unsigned*>(out)[i] = pack<T>(silu(gate.x) * up.x, silu(gate.y) * up.y);
}

KERNEL silu_mul_bf16(const Bf16* gate_up, Bf16* out, unsigned rows, unsigned inner) {
    silu_mul(gate_up, out, rows, inner);
}
KERNEL silu_mul_f16(const F16* gate_up, F16* out, unsigned rows, unsigned inner) {
    silu_mul(gate_up, out, rows, inner);
}

KERNELS(silu_mul, ENTRY(silu_mul_bf16), ENTRY(silu_mul_f16))
