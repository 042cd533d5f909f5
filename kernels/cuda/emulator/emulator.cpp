// Fibers, the scheduler of a block, collectives, and the memory of the emulated device.
#include "emulator.h"

#include <cstdio>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

thread_local Fiber* current = nullptr;
thread_local dim3 block_index, block_size, grid_size;
thread_local unsigned char* shared_memory = nullptr;

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned char ONES = 0xff;

[[noreturn]] void fail(const char* why) {
    fprintf(stderr, "emulated device: %s: block (%u, %u, %u), thread %u\n", why, block_index.x,
            block_index.y, block_index.z, current ? current->thread.x : 0);
    abort();
}

struct Block {
    std::vector<Fiber> fibers;
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    void* scheduler = nullptr;
    void (*kernel)(void**) = nullptr;
    void** args = nullptr;
#if !defined(__x86_64__)
    std::vector<ucontext_t> contexts;
    ucontext_t scheduler_context;
#endif
};
thread_local Block block;

#if defined(__x86_64__)
// Saves what a call preserves on the stack of the one, loads it from the stack of the other.
extern "C" void strand_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl strand_emulator_switch
.type strand_emulator_switch, @function
strand_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size strand_emulator_switch, .-strand_emulator_switch
)");

void leave() { strand_emulator_switch(&current->stack_pointer, block.scheduler); }
void enter(Fiber& fiber) {
    current = &fiber;
    strand_emulator_switch(&block.scheduler, fiber.stack_pointer);
}
#else
void leave() {
    size_t index = current - block.fibers.data();
    swapcontext(&block.contexts[index], &block.scheduler_context);
}
void enter(Fiber& fiber) {
    current = &fiber;
    swapcontext(&block.scheduler_context, &block.contexts[&fiber - block.fibers.data()]);
}
#endif

void body() {
    block.kernel(block.args);
    if (!current->open.empty() || !current->groups.empty()) fail("copies that nobody waited for");
    current->done = true;
    leave();
    fail("a thread went on behind its end");
}

void prepare(Fiber& fiber, size_t index) {
    fiber.thread = {static_cast<unsigned>(index), 0, 0};
    fiber.waits_at = Collective::none;
    fiber.done = false;
    unsigned char* top = block.stacks + (index + 1) * STACK;
#if defined(__x86_64__)
    void** stack = reinterpret_cast<void**>(top) - 3;  // so that `body` finds it as behind a call
    *--stack = reinterpret_cast<void*>(&body);
    stack -= 6;  // the registers, whatever they hold
    fiber.stack_pointer = stack;
#else
    ucontext_t& context = block.contexts[index];
    getcontext(&context);
    context.uc_stack.ss_sp = top - STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, &body, 0);
#endif
}

// Runs a warp until all its lanes wait at the barrier or are done.
void run_warp(Fiber* warp, bool backwards) {
    for (;;) {
        for (int i = 0; i < 32; i++) {
            Fiber& fiber = warp[backwards ? 31 - i : i];
            if (!fiber.done && fiber.waits_at == Collective::none) enter(fiber);
        }
        current = warp;
        Collective first = warp[0].waits_at;
        for (int i = 0; i < 32; i++) {
            current = &warp[i];
            bool same = warp[i].waits_at == first && warp[i].finish == warp[0].finish;
            if (warp[i].done != warp[0].done) fail("lanes of a warp end apart");
            if (!warp[i].done && !same) fail("lanes of a warp wait at different places");
        }
        if (warp[0].done || first == Collective::barrier) return;
        if (warp[0].finish) warp[0].finish(warp);
        for (int i = 0; i < 32; i++) {
            warp[i].waits_at = Collective::none;
            warp[i].finish = nullptr;
        }
    }
}

void run_block(bool backwards) {
    size_t warps = block.fibers.size() / 32;
    for (;;) {
        for (size_t i = 0; i < warps; i++) {
            run_warp(&block.fibers[32 * (backwards ? warps - 1 - i : i)], backwards);
        }
        size_t done = 0;
        for (Fiber& fiber : block.fibers) done += fiber.done;
        if (done == block.fibers.size()) return;
        current = block.fibers.data();
        if (done != 0) fail("some threads end where others wait at a barrier");
        for (Fiber& fiber : block.fibers) fiber.waits_at = Collective::none;
    }
}

struct Shuffled {
    unsigned value;
    int source;
};

void finish_shuffle(Fiber* warp) {
    unsigned found[32];
    for (int i = 0; i < 32; i++) {
        int source = static_cast<const Shuffled*>(warp[i].in)->source;
        found[i] = static_cast<const Shuffled*>(warp[source].in)->value;
    }
    for (int i = 0; i < 32; i++) *static_cast<unsigned*>(warp[i].out) = found[i];
}

void finish_vote(Fiber* warp) {
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) votes |= unsigned(*static_cast<const bool*>(warp[i].in)) << i;
    for (int i = 0; i < 32; i++) *static_cast<unsigned*>(warp[i].out) = votes;
}

// m16n8k16, with the lanes' shares as the PTX manual draws them: with g = lane / 4, c = lane % 4
//   a[0] rows g,     columns 2c, 2c + 1      a[1] rows g + 8, the same columns
//   a[2] rows g,     columns 2c + 8, + 9     a[3] rows g + 8, the same columns
//   b[0] rows 2c, 2c + 1, column g           b[1] rows 2c + 8, + 9, column g
//   c[0], c[1] row g, columns 2c, 2c + 1     c[2], c[3] row g + 8, the same columns
void finish_mma(Fiber* warp) {
    float a[16][16], b[8][16];
    auto input = [&](int lane) { return static_cast<const MmaIn*>(warp[lane].in); };
    auto widen = input(0)->widen;
    for (int lane = 0; lane < 32; lane++) {
        const MmaIn& in = *input(lane);
        int g = lane / 4, c = lane % 4;
        for (int half = 0; half < 2; half++) {
            auto value = [&](unsigned word) {
                return widen(static_cast<uint16_t>(word >> (16 * half)));
            };
            a[g][2 * c + half] = value(in.a[0]);
            a[g + 8][2 * c + half] = value(in.a[1]);
            a[g][2 * c + 8 + half] = value(in.a[2]);
            a[g + 8][2 * c + 8 + half] = value(in.a[3]);
            b[g][2 * c + half] = value(in.b[0]);
            b[g][2 * c + 8 + half] = value(in.b[1]);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, c = lane % 4;
        float* d = static_cast<float*>(warp[lane].out);
        for (int i = 0; i < 4; i++) {
            int row = g + 8 * (i / 2), column = 2 * c + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
            d[i] = input(lane)->c[i] + sum;
        }
    }
}

struct MatrixRow {
    const void* row;
    int count;
    bool transposed;
};

// Four (two, one) matrices of 8 x 8: lanes 8i..8i + 7 name the rows of matrix i. Lane l gets of
// each the elements (l / 4, 2 (l % 4)) and the next of the row; transposed: of the column.
void finish_load_matrix(Fiber* warp) {
    auto input = [&](int lane) { return static_cast<const MatrixRow*>(warp[lane].in); };
    for (int lane = 0; lane < 32; lane++) {
        unsigned* r = static_cast<unsigned*>(warp[lane].out);
        int g = lane / 4, c = lane % 4;
        for (int i = 0; i < input(lane)->count; i++) {
            auto element = [&](int row, int column) {
                const char* base = static_cast<const char*>(input(8 * i + row)->row);
                if (reinterpret_cast<uintptr_t>(base) % 16) fail("a matrix row off 16 bytes");
                uint16_t value;
                memcpy(&value, base + 2 * column, 2);
                return static_cast<unsigned>(value);
            };
            r[i] = input(lane)->transposed ? element(2 * c, g) | element(2 * c + 1, g) << 16
                                           : element(g, 2 * c) | element(g, 2 * c + 1) << 16;
        }
    }
}

}  // namespace

void wait_at(Collective what, const void* in, void* out, void (*finish)(Fiber* warp)) {
    current->waits_at = what;
    current->in = in;
    current->out = out;
    current->finish = finish;
    leave();
}

unsigned shuffle(unsigned value, int source_lane) {
    Shuffled in = {value, source_lane};
    unsigned out;
    wait_at(Collective::shuffle, &in, &out, &finish_shuffle);
    return out;
}

unsigned vote(bool value) {
    unsigned out;
    wait_at(Collective::vote, &value, &out, &finish_vote);
    return out;
}

void mma(float* d, const MmaIn& in) {
    float out[4];
    wait_at(Collective::mma, &in, out, &finish_mma);
    memcpy(d, out, sizeof out);
}

void load_matrix(unsigned* r, int count, bool transposed, const void* row) {
    MatrixRow in = {row, count, transposed};
    unsigned out[4];
    wait_at(Collective::load_matrix, &in, out, &finish_load_matrix);
    memcpy(r, out, 4 * count);
}

void copy_async(void* to, const void* from, int bytes, int zeros) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
        fail("an asynchronous copy off 16 bytes");
    }
    memset(to, ONES, bytes + zeros);
    current->open.push_back({to, from, bytes, zeros});
}

void commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

void wait_but(unsigned last) {
    auto& groups = current->groups;
    size_t ready = groups.size() > last ? groups.size() - last : 0;
    for (size_t i = 0; i < ready; i++) {
        for (const Copy& copy : groups[i]) {
            memcpy(copy.to, copy.from, copy.bytes);
            memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
        }
    }
    groups.erase(groups.begin(), groups.begin() + ready);
}

float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

uint16_t to_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_f16(uint16_t bits) {
    unsigned sign = static_cast<unsigned>(bits & 0x8000) << 16;
    unsigned rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return __uint_as_float(sign | ((rest << 13) + (112u << 23)));
    float x = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -x : x;
}

uint16_t to_f16(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(0x7fff);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (rest >= 0x38800000) {
        unsigned rounded = rest + 0xfff + (rest >> 13 & 1);
        return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
    }
    // Subnormal: a multiple of 2^-24, to nearest even.
    float scaled = __uint_as_float(rest) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<unsigned>(nearbyintf(scaled)));
}

}  // namespace emulator

extern const emulator::Entry* const strand_emulator_kernels[];

// Memory that ends at a page which can't be touched, all ones.
extern "C" void* strand_emulator_alloc(size_t bytes) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t pages = (bytes + page - 1) / page;
    auto* base = static_cast<unsigned char*>(mmap(nullptr, (pages + 3) * page, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED) return nullptr;
    memcpy(base, &bytes, sizeof bytes);
    unsigned char* end = base + (pages + 2) * page;
    mprotect(base + page, page, PROT_NONE);
    mprotect(end, page, PROT_NONE);
    auto* address = end - (bytes + 15) / 16 * 16;
    memset(base + 2 * page, emulator::ONES, pages * page);
    return address;
}

// Aborts if the bytes beside the memory were written.
extern "C" void strand_emulator_free(void* address, size_t bytes) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t pages = (bytes + page - 1) / page;
    auto* start = static_cast<unsigned char*>(address);
    auto* end = start + (bytes + 15) / 16 * 16;
    auto* first = end - pages * page;
    auto check = [](const unsigned char* from, const unsigned char* to) {
        for (; from < to; from++) {
            if (*from != emulator::ONES) emulator::fail("a write beside an allocation");
        }
    };
    check(first, start);
    check(start + bytes, end);
    munmap(first - 2 * page, (pages + 3) * page);
}

// 0: done; 1: there is no such kernel; 2: what no device can do.
extern "C" int strand_emulator_launch(const char* name, const unsigned* grid, unsigned threads,
                                      unsigned shared, void** args, int backwards) {
    using namespace emulator;
    const Entry* found = nullptr;
    for (const Entry* const* table = strand_emulator_kernels; *table; table++) {
        for (const Entry* entry = *table; entry->name; entry++) {
            if (strcmp(entry->name, name) == 0) found = entry;
        }
    }
    if (!found) return 1;
    if (threads == 0 || threads % 32 || threads > 1024 || shared > 227 * 1024) return 2;
    if (grid[1] > 65535 || grid[2] > 65535) return 2;
    block.kernel = found->run;
    block.args = args;
    block.fibers.resize(threads);
    if (block.stack_count < threads) {
        if (block.stacks) munmap(block.stacks, block.stack_count * STACK);
        block.stacks = static_cast<unsigned char*>(mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE,
                                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        block.stack_count = threads;
    }
#if !defined(__x86_64__)
    block.contexts.resize(threads);
#endif
    size_t room = shared ? shared : 1;
    shared_memory = static_cast<unsigned char*>(strand_emulator_alloc(room));
    block_size = {threads, 1, 1};
    grid_size = {grid[0], grid[1], grid[2]};
    uint64_t count = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t i = 0; i < count; i++) {
        uint64_t index = backwards ? count - 1 - i : i;
        block_index = {unsigned(index % grid[0]), unsigned(index / grid[0] % grid[1]),
                       unsigned(index / grid[0] / grid[1])};
        memset(shared_memory, ONES, shared);
        for (size_t thread = 0; thread < threads; thread++) prepare(block.fibers[thread], thread);
        run_block(backwards != 0);
    }
    strand_emulator_free(shared_memory, room);
    return 0;
}
