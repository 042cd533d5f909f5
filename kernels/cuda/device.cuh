// What all kernels share: numbers of 16 bits, matrix instructions, asynchronous copies, sums over
// warps. The only file that knows whether nvcc or the emulator compiles it.
//
// Kernels use no static shared memory: SHARED names what the launcher asked for.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define KERNEL extern "C" __global__ void
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define KERNELS(file, ...)
#define ENTRY(kernel)
constexpr unsigned FULL_WARP = 0xffffffffu;
#else
#include "emulator/emulator.h"
#define KERNEL extern "C" void
#define SHARED(name) unsigned char* const name = emulator::shared_memory
#define KERNELS(file, ...)                                       \
    extern "C" const emulator::Entry strand_kernels_##file[];    \
    const emulator::Entry strand_kernels_##file[] = {__VA_ARGS__, {nullptr, nullptr}};
#define ENTRY(kernel) {#kernel, &emulator::run<kernel>}
#endif

#define DEVICE __device__ __forceinline__

constexpr float MINUS_INFINITY = -__builtin_huge_valf();

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

#ifdef __CUDACC__
DEVICE float widen(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DEVICE float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T> DEVICE T narrow(float x);
template <> DEVICE Bf16 narrow<Bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <> DEVICE F16 narrow<F16>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
// Two numbers in a word, the first in its low half.
template <class T> DEVICE unsigned pack(float low, float high);
template <> DEVICE unsigned pack<Bf16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&both);
}
template <> DEVICE unsigned pack<F16>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&both);
}
#else
DEVICE float widen(Bf16 x) { return emulator::from_bf16(x.bits); }
DEVICE float widen(F16 x) { return emulator::from_f16(x.bits); }
template <class T> T narrow(float x);
template <> inline Bf16 narrow<Bf16>(float x) { return {emulator::to_bf16(x)}; }
template <> inline F16 narrow<F16>(float x) { return {emulator::to_f16(x)}; }
template <class T> DEVICE unsigned pack(float low, float high) {
    return static_cast<unsigned>(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
}
#endif

DEVICE float widen(float x) { return x; }
#ifdef __CUDACC__
template <> DEVICE float narrow<float>(float x) { return x; }
#else
template <> inline float narrow<float>(float x) { return x; }
#endif

template <class T> DEVICE float2 unpack(unsigned both) {
    T low = {static_cast<uint16_t>(both)}, high = {static_cast<uint16_t>(both >> 16)};
    return make_float2(widen(low), widen(high));
}

// d += a b, of 16 x 16 and 16 x 8 numbers, accumulated in f32. The lanes' shares are drawn in
// emulator/emulator.cpp.
template <class T> DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifdef __CUDACC__
template <>
DEVICE void mma<Bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void mma<F16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrices of 8 x 8 out of shared memory; each lane names a row of 16 bytes.
DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, or 16 zero bytes; both aligned to 16.
DEVICE void copy_async(void* to, const void* from, bool real) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the last COUNT groups. Others' need a barrier, too.
template <int COUNT> DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}
// 2^x, to 2 ulp; 0 for -infinity.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Numbers that are read once: not worth a place in the first cache.
DEVICE uint4 load_once(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}
DEVICE uint2 load_once_2(const void* from) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(from));
    return x;
}
// Two numbers less 1024 + CENTER, all of them integers in [1024, 1280): exact.
template <int CENTER> DEVICE unsigned less_1024(unsigned both) {
    unsigned center = 0x00010001u * (0x6400 + CENTER);
    __half2 less = __hsub2(*reinterpret_cast<__half2*>(&both), *reinterpret_cast<__half2*>(&center));
    return *reinterpret_cast<unsigned*>(&less);
}
#else
template <class T> DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulator::MmaIn in;
    memcpy(in.a, a, sizeof a);
    memcpy(in.b, b, sizeof b);
    memcpy(in.c, d, sizeof d);
    in.widen = std::is_same<T, Bf16>::value ? &emulator::from_bf16 : &emulator::from_f16;
    emulator::mma(d, in);
}
DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
    emulator::load_matrix(r, 4, false, row);
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    emulator::load_matrix(r, 4, true, row);
}
DEVICE void copy_async(void* to, const void* from, bool real) {
    emulator::copy_async(to, from, real ? 16 : 0, real ? 0 : 16);
}
DEVICE void commit_copies() { emulator::commit(); }
template <int COUNT> DEVICE void await_copies() { emulator::wait_but(COUNT); }
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE uint4 load_once(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) abort();
    return *static_cast<const uint4*>(from);
}
DEVICE uint2 load_once_2(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 8) abort();
    return *static_cast<const uint2*>(from);
}
template <int CENTER> DEVICE unsigned less_1024(unsigned both) {
    float2 x = unpack<F16>(both);
    return pack<F16>(x.x - (1024 + CENTER), x.y - (1024 + CENTER));
}
#endif

#ifdef __CUDACC__
// a / b to 2 ulp; 0 for b beyond 2^126.
DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
#else
DEVICE float divide_fast(float a, float b) { return a / b; }
#endif

constexpr float LOG2_E = 1.44269504088896340736f;
// e^x, to a few ulp.
DEVICE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

// To 3e-7.
DEVICE float tanh_fast(float x) { return 1.0f - divide_fast(2.0f, exp_fast(x + x) + 1.0f); }

// The sum over a warp, in every lane: always of the same pairs.
template <class T> DEVICE T warp_sum(T x) {
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(FULL_WARP, x, bits);
    return x;
}
DEVICE float warp_max(float x) {
    for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, bits));
    return x;
}

// The sum over a block of up to 1024 threads, in every thread. `scratch` holds a T per warp; all
// threads have left it when this returns.
template <class T> DEVICE T block_sum(T x, T* scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return x;
}
