// The processor in the part of a CUDA device: one fiber per thread, one block at a time.
//
// What it checks beyond running a kernel:
// - shared memory is all ones (NaN in every float) before each block and ends at a page that can't
//   be touched, as all device memory does;
// - every thread of a block reaches the same barrier, every lane of a warp the same collective;
//   else it aborts: such a kernel hangs or is undefined on a device;
// - cp_async fills its target with ones; the bytes arrive at the wait for them, read as late;
// - threads run one after another between synchronizations, ascending or descending: a result that
//   changes with the order is a race.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

enum class Collective { none, barrier, sync, shuffle, vote, mma, load_matrix };

struct Copy {
    void* to;
    const void* from;
    int bytes, zeros;
};

struct Fiber {
    void* stack_pointer = nullptr;
    dim3 thread;
    Collective waits_at = Collective::none;
    bool done = false;
    const void* in = nullptr;
    void* out = nullptr;
    void (*finish)(Fiber* warp) = nullptr;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

extern thread_local Fiber* current __attribute__((tls_model("initial-exec")));
extern thread_local dim3 block_index, block_size, grid_size;
extern thread_local unsigned char* shared_memory;

void wait_at(Collective what, const void* in, void* out, void (*finish)(Fiber* warp));

unsigned shuffle(unsigned value, int source_lane);
unsigned vote(bool value);
void copy_async(void* to, const void* from, int bytes, int zeros);
void commit();
void wait_but(unsigned last);
void load_matrix(unsigned* r, int count, bool transposed, const void* row);

static inline int lane() { return static_cast<int>(current->thread.x & 31); }

struct Entry {
    const char* name;
    void (*run)(void** args);
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(args[I])...);
}
template <class... A> void apply(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}
template <auto kernel> void run(void** args) { apply(kernel, args); }

// Numbers of 16 bits, by their bits.
float from_bf16(uint16_t bits);
uint16_t to_bf16(float x);
float from_f16(uint16_t bits);
uint16_t to_f16(float x);

struct MmaIn {
    unsigned a[4], b[2];
    float c[4];
    float (*widen)(uint16_t);
};
void mma(float* d, const MmaIn& in);

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __syncthreads() \
    emulator::wait_at(emulator::Collective::barrier, nullptr, nullptr, nullptr)
#define __syncwarp() emulator::wait_at(emulator::Collective::sync, nullptr, nullptr, nullptr)

constexpr unsigned FULL_WARP = 0xffffffffu;
template <class T> static inline T __shfl_sync(unsigned, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    for (unsigned& word : words) word = emulator::shuffle(word, source & 31);
    memcpy(&value, words, sizeof(T));
    return value;
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, emulator::lane() ^ bits);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, int distance) {
    int source = emulator::lane() - distance;
    return __shfl_sync(mask, value, source < 0 ? emulator::lane() : source);
}
static inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(mask, value, bits);
    return value;
}
static inline unsigned __ballot_sync(unsigned, bool value) { return emulator::vote(value); }
static inline bool __any_sync(unsigned, bool value) { return emulator::vote(value) != 0; }
static inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T> static inline T atomicAdd(T* place, T value) {
    T before = *place;
    *place = before + value;
    return before;
}
template <class T> static inline T atomicMin(T* place, T value) {
    T before = *place;
    if (value < before) *place = value;
    return before;
}
template <class T> static inline T atomicMax(T* place, T value) {
    T before = *place;
    if (before < value) *place = value;
    return before;
}
template <class T> static inline T __ldg(const T* place) { return *place; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned byte = static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7))) & 0xff;
        out |= byte << (8 * i);
    }
    return out;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
