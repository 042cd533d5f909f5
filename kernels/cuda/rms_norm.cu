// Root mean square norms of f32 rows, alone and behind a residual sum. A block per row; thread i
// takes the pairs i, i + 256, ... in both passes, so that it reads back only what it wrote itself.
#include "device.cuh"

template <class T>
DEVICE void normalize(const float* x, const float* weight, T* out, unsigned width, float eps,
                      float squares) {
    SHARED(scratch);
    float sum = block_sum(squares, reinterpret_cast<float*>(scratch));
    float scale = rsqrtf(sum / width + eps);
    for (unsigned pair = threadIdx.x; pair < width / 2; pair += blockDim.x) {
        float a = x[2 * pair] * scale * weight[2 * pair];
        float b = x[2 * pair + 1] * scale * weight[2 * pair + 1];
        reinterpret_cast<unsigned*>(out)[pair] = pack<T>(a, b);
    }
}

template <class T>
DEVICE void rms_norm(const float* x, const float* weight, T* out, unsigned width, float eps) {
    x += int64_t(blockIdx.x) * width;
    out += int64_t(blockIdx.x) * width;
    float squares = 0;
    for (unsigned pair = threadIdx.x; pair < width / 2; pair += blockDim.x) {
        float a = x[2 * pair], b = x[2 * pair + 1];
        squares = fmaf(b, b, fmaf(a, a, squares));
    }
    normalize(x, weight, out, width, eps, squares);
}

template <class T>
DEVICE void add_rms_norm(const T* x, float* residual, const float* weight, T* out, unsigned width,
                         float eps) {
    const unsigned* pairs = reinterpret_cast<const unsigned*>(x + int64_t(blockIdx.x) * width);
    residual += int64_t(blockIdx.x) * width;
    float squares = 0;
    for (unsigned pair = threadIdx.x; pair < width / 2; pair += blockDim.x) {
        float2 added = unpack<T>(pairs[pair]);
        float2* place = reinterpret_cast<float2*>(residual) + pair;
        float a = added.x + place->x, b = added.y + place->y;
        *place = make_float2(a, b);
        squares = fmaf(b, b, fmaf(a, a, squares));
    }
    normalize(residual, weight, out + int64_t(blockIdx.x) * width, width, eps, squares);
}

KERNEL rms_norm_bf16(const float* x, const float* weight, Bf16* out, unsigned width, float eps) {
    rms_norm(x, weight, out, width, eps);
}
KERNEL rms_norm_f16(const float* x, const float* weight, F16* out, unsigned width, float eps) {
    rms_norm(x, weight, out, width, eps);
}
KERNEL add_rms_norm_bf16(const Bf16* x, float* residual, const float* weight, Bf16* out,
                         unsigned width, float eps) {
    add_rms_norm(x, residual, weight, out, width, eps);
}
KERNEL add_rms_norm_f16(const F16* x, float* residual, const float* weight, F16* out,
                        unsigned width, float eps) {
    add_rms_norm(x, residual, weight, out, width, eps);
}

KERNELS(rms_norm, ENTRY(rms_norm_bf16), ENTRY(rms_norm_f16), ENTRY(add_rms_norm_bf16),
        ENTRY(add_rms_norm_f16))
