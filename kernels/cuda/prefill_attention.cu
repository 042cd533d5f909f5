// Attention of a sequence's rows over its paged keys: a block takes a tile of (row, head) pairs, the
// heads being those that share a KV head, and passes over keys in tiles of 64 with a running maximum
// per pair (Dao, "FlashAttention-2", 2023).
//
// - K of the next tile is copied while this tile's values are summed, V while scores are: one
//   buffer each (cp.async), two barriers a tile.
// - Keys are listed LIST at a time; tiles end where the list does and where the turn of the query
//   changes. Then the queries are turned again, in shared memory.
// - Rows of shared memory are multiples of 128 bytes; the 16-byte chunk c of row r stands at
//   c ^ (r % 8), so that neither copies nor matrix loads meet in a bank.
//
// A pair's sums have one order, given by its keys and turns: tiles that a row does not see change
// nothing of it.
#include "tables.cuh"

constexpr int WARPS = 4;
constexpr int KEYS = 64;

// Tiles of 16 pairs that a warp has.
template <int D> constexpr int TILES = D > 128 ? 1 : 2;
// Pairs of a block.
template <int D> constexpr int PAIRS = WARPS * 16 * TILES<D>;
// Keys listed at a time: what fits a block on devices with 100 KB.
template <int D> constexpr int LIST = D > 128 ? 256 : 1024;
// Numbers from one row of shared memory to the next.
template <int D> constexpr int STRIDE = D <= 64 ? 64 : D <= 128 ? 128 : 256;

template <class T> struct Prefill {
    const T *q, *k_cache, *v_cache;
    const TableEntry* entries;
    const unsigned *table_starts, *num_entries, *num_keys, *cu_seqlens_q, *positions;
    const float *cos, *sin;
    unsigned max_position;
    T* out;
    float2* stats;
    float* outs;
    unsigned first_row, rows_end, heads, kv_heads;
    int64_t q_stride;
    unsigned slots, parts, part_keys, window;
    float scale, cap;
};

template <class T, int D> struct Shared {
    T *q, *k, *v;
    unsigned* rows;  // (LIST)
    int* deltas;     // (LIST)
    uint2* bounds;   // (PAIRS) the keys [x, y) a pair sees
    unsigned* bad;   // whether an entry points outside the cache
    unsigned* next;  // the entry behind the list
    unsigned* scratch;

    DEVICE explicit Shared(unsigned char* memory) {
        q = reinterpret_cast<T*>(memory);
        k = q + PAIRS<D> * STRIDE<D>;
        v = k + KEYS * STRIDE<D>;
        rows = reinterpret_cast<unsigned*>(v + KEYS * STRIDE<D>);
        deltas = reinterpret_cast<int*>(rows + LIST<D>);
        bounds = reinterpret_cast<uint2*>(deltas + LIST<D>);
        bad = reinterpret_cast<unsigned*>(bounds + PAIRS<D>);
        next = bad + 1;
        scratch = bad + 4;
    }
};

template <int D, class T> DEVICE T* chunk_of(T* base, int row, int chunk) {
    return base + row * STRIDE<D> + 8 * (chunk ^ (row & 7));
}

// The rows of a block's pairs.
struct Rows {
    unsigned first;   // row of pair 0's sequence
    unsigned pair;    // of the sequence, at place 0 of the tile
    unsigned pairs;   // of the sequence
    unsigned group;   // query heads that share a KV head
    unsigned kv_head;
    unsigned keys;    // of the sequence

    DEVICE bool has(unsigned place) const { return pair + place < pairs; }
    DEVICE unsigned row(unsigned place) const { return first + (pair + place) / group; }
    DEVICE unsigned head(unsigned place) const {
        return kv_head * group + (pair + place) % group;
    }
};

// Writes the queries, turned by `delta` and scaled, to shared memory. Those before the keys of
// `delta` see none of them: zeros.
template <class T, int D>
DEVICE void turn_queries(const Shared<T, D>& shared, const Prefill<T>& op, const Rows& rows,
                         int delta) {
    constexpr int HALF = D / 16;  // chunks
    float factor = op.cap != 0 ? op.scale : op.scale * LOG2_E;
    for (int task = threadIdx.x; task < PAIRS<D> * HALF; task += blockDim.x) {
        int place = task / HALF, chunk = task % HALF;
        unsigned low[4] = {}, high[4] = {};
        unsigned row = rows.has(place) ? rows.row(place) : 0;
        int64_t position = rows.has(place) ? int64_t(op.positions[row]) - delta : -1;
        if (position >= 0) {
            const T* q = op.q + row * op.q_stride + int64_t(rows.head(place)) * D + 8 * chunk;
            uint4 a = *reinterpret_cast<const uint4*>(q);
            uint4 b = *reinterpret_cast<const uint4*>(q + D / 2);
            const unsigned as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
            bool inside = position < op.max_position;
            int64_t angle = (inside ? position : 0) * (D / 2) + 8 * chunk;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack<T>(as[i]), y = unpack<T>(bs[i]);
                float2 c = *reinterpret_cast<const float2*>(op.cos + angle + 2 * i);
                float2 s = *reinterpret_cast<const float2*>(op.sin + angle + 2 * i);
                float f = inside ? factor : __uint_as_float(0x7fffffff);
                low[i] = pack<T>(fmaf(x.x, c.x, -(y.x * s.x)) * f, fmaf(x.y, c.y, -(y.y * s.y)) * f);
                high[i] = pack<T>(fmaf(y.x, c.x, x.x * s.x) * f, fmaf(y.y, c.y, x.y * s.y) * f);
            }
        }
        *reinterpret_cast<uint4*>(chunk_of<D>(shared.q, place, chunk)) =
            make_uint4(low[0], low[1], low[2], low[3]);
        *reinterpret_cast<uint4*>(chunk_of<D>(shared.q, place, chunk + HALF)) =
            make_uint4(high[0], high[1], high[2], high[3]);
    }
}

// Starts the copy of `count` listed keys' rows of a cache; the rest of the tile becomes zeros.
template <class T, int D>
DEVICE void copy_tile(const Shared<T, D>& shared, const Prefill<T>& op, const T* cache, T* to,
                      unsigned kv_head, unsigned at, unsigned count) {
    constexpr int CHUNKS = D / 8;
    for (int task = threadIdx.x; task < KEYS * CHUNKS; task += blockDim.x) {
        unsigned key = task / CHUNKS, chunk = task % CHUNKS;
        bool real = key < count;
        int64_t row = shared.rows[at + (real ? key : 0)];
        const T* from = cache + (row * op.kv_heads + kv_head) * D + 8 * chunk;
        copy_async(chunk_of<D>(to, key, chunk), from, real);
    }
    commit_copies();
}

// How many keys from `at` on, of `left` and of a tile, have one delta.
DEVICE unsigned run_length(const int* deltas, unsigned at, unsigned left) {
    unsigned lane = threadIdx.x % 32;
    int delta = deltas[at];
    bool low = lane < left && deltas[at + min(lane, left - 1)] == delta;
    bool high = lane + 32 < left && deltas[at + min(lane + 32, left - 1)] == delta;
    unsigned lows = ~__ballot_sync(FULL_WARP, low), highs = ~__ballot_sync(FULL_WARP, high);
    if (lows != 0) return __ffs(lows) - 1;
    return 32 + (highs != 0 ? __ffs(highs) - 1 : 32);
}

// What a lane keeps of its warp's pairs: of tile m the rows g and g + 8.
template <int D> struct State {
    float sum[TILES<D>][D / 8][4];
    float best[TILES<D>][2], total[TILES<D>][2];
};

// scores (16 TILES pairs, KEYS) = q k^T
template <class T, int D>
DEVICE void score(const Shared<T, D>& shared, float (&scores)[TILES<D>][KEYS / 8][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int m = 0; m < TILES<D>; m++) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0;
        }
    }
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned q[TILES<D>][4];
#pragma unroll
        for (int m = 0; m < TILES<D>; m++) {
            int row = (warp * TILES<D> + m) * 16 + matrix % 2 * 8 + r;
            load_matrices(q[m], chunk_of<D>(shared.q, row, 2 * step + matrix / 2));
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            unsigned k[4];
            load_matrices(k, chunk_of<D>(shared.k, 16 * n + matrix / 2 * 8 + r, 2 * step + matrix % 2));
            const unsigned left[2] = {k[0], k[1]}, right[2] = {k[2], k[3]};
#pragma unroll
            for (int m = 0; m < TILES<D>; m++) {
                mma<T>(scores[m][2 * n], q[m], left);
                mma<T>(scores[m][2 * n + 1], q[m], right);
            }
        }
    }
}

// Calls change(tile of pairs, half, key, score), the key without the lane's own 2c.
template <int D, class Change>
DEVICE void for_scores(float (&scores)[TILES<D>][KEYS / 8][4], Change change) {
#pragma unroll
    for (int m = 0; m < TILES<D>; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    change(m, half, 8 * n + i, scores[m][n][2 * half + i]);
                }
            }
        }
    }
}

// Scores to weights; sums are brought to the new maximum. The tile's keys begin at `key`.
template <class T, int D>
DEVICE void weigh(const Shared<T, D>& shared, const Prefill<T>& op, State<D>& state,
                  float (&scores)[TILES<D>][KEYS / 8][4], unsigned key, unsigned count,
                  bool whole) {
    int c = threadIdx.x % 4;
    if (op.cap != 0) {
        float inverse = 1 / op.cap;
        for_scores<D>(scores, [&](int, int, int, float& score) {
            score = op.cap * LOG2_E * tanh_fast(score * inverse);
        });
    }
    if (!whole) {
        int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
        for_scores<D>(scores, [&](int m, int half, int place, float& score) {
            uint2 seen = shared.bounds[(warp * TILES<D> + m) * 16 + 8 * half + g];
            unsigned own = key + place + 2 * c;
            if (own < seen.x || own >= min(seen.y, key + count)) score = MINUS_INFINITY;
        });
    }
#pragma unroll
    for (int m = 0; m < TILES<D>; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float best = state.best[m][half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                best = fmaxf(best, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            }
            best = fmaxf(best, __shfl_xor_sync(FULL_WARP, best, 1));
            best = fmaxf(best, __shfl_xor_sync(FULL_WARP, best, 2));
            float finite = best == MINUS_INFINITY ? 0 : best;
            float factor = exp2_fast(state.best[m][half] - finite), total = 0;
            state.best[m][half] = best;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[m][n][2 * half + i];
                    score = exp2_fast(score - finite);
                    total += score;
                }
            }
            state.total[m][half] = fmaf(state.total[m][half], factor, total);
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                state.sum[m][d][2 * half] *= factor;
                state.sum[m][d][2 * half + 1] *= factor;
            }
        }
    }
}

// sum += weights v
template <class T, int D>
DEVICE void add_values(const Shared<T, D>& shared, State<D>& state,
                       const float (&weights)[TILES<D>][KEYS / 8][4]) {
    int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
        unsigned p[TILES<D>][4];
#pragma unroll
        for (int m = 0; m < TILES<D>; m++) {
            const float(&a)[4] = weights[m][2 * n], (&b)[4] = weights[m][2 * n + 1];
            p[m][0] = pack<T>(a[0], a[1]);
            p[m][1] = pack<T>(a[2], a[3]);
            p[m][2] = pack<T>(b[0], b[1]);
            p[m][3] = pack<T>(b[2], b[3]);
        }
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            unsigned v[4];
            load_matrices_transposed(
                v, chunk_of<D>(shared.v, 16 * n + matrix % 2 * 8 + r, 2 * d + matrix / 2));
            const unsigned left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
            for (int m = 0; m < TILES<D>; m++) {
                mma<T>(state.sum[m][2 * d], p[m], left);
                mma<T>(state.sum[m][2 * d + 1], p[m], right);
            }
        }
    }
}

// The pairs' bounds, and what all have in common: the keys that any of them sees, [lowest,
// highest), and those that all see, [latest, earliest).
struct Bounds {
    unsigned lowest, latest, earliest, highest;
};

template <class T, int D>
DEVICE Bounds find_bounds(const Shared<T, D>& shared, const Prefill<T>& op, const Rows& rows,
                          State<D>& state) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    unsigned* all = shared.scratch;
    if (threadIdx.x == 0) {
        all[0] = all[2] = 0xffffffff;
        all[1] = all[3] = 0;
        *shared.bad = 0;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < TILES<D>; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned place = (warp * TILES<D> + m) * 16 + 8 * half + g;
            Visible visible = {0, 0};
            if (rows.has(place)) {
                visible = visible_keys(op.positions[rows.row(place)], rows.keys, op.window);
                atomicMin(&all[0], visible.first);
                atomicMax(&all[1], visible.first);
                atomicMin(&all[2], visible.end);
                atomicMax(&all[3], visible.end);
            }
            if (threadIdx.x % 4 == 0) {
                shared.bounds[place] = make_uint2(visible.first, visible.end);
            }
            state.best[m][half] = MINUS_INFINITY;
            state.total[m][half] = 0;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                state.sum[m][d][2 * half] = 0;
                state.sum[m][d][2 * half + 1] = 0;
            }
        }
    }
    __syncthreads();
    return {all[0], all[1], all[2], all[3]};
}

template <class T, int D>
DEVICE void pass_over_keys(const Shared<T, D>& shared, const Prefill<T>& op, const Rows& rows,
                           const TableEntry* entries, unsigned num_entries, const Bounds& bounds,
                           unsigned start, unsigned end, State<D>& state) {
    unsigned entry = find_entry(entries, num_entries, start);
    bool turned = false;
    int delta = 0;
    for (unsigned list = start; list < end; list += LIST<D>) {
        unsigned listed = min(end - list, unsigned(LIST<D>)), at = 0;
        list_keys(entries, num_entries, entry, list, list + listed, op.slots, shared.rows,
                  shared.deltas, shared.bad, shared.next);
        __syncthreads();
        entry = *shared.next;
        unsigned count = run_length(shared.deltas, 0, listed);
        if (!turned || shared.deltas[0] != delta) {
            delta = shared.deltas[0];
            turn_queries<T, D>(shared, op, rows, delta);
            turned = true;
        }
        copy_tile<T, D>(shared, op, op.k_cache, shared.k, rows.kv_head, 0, count);
        while (count > 0) {
            await_copies<0>();
            __syncthreads();  // K and the queries are there, V is free
            copy_tile<T, D>(shared, op, op.v_cache, shared.v, rows.kv_head, at, count);
            float scores[TILES<D>][KEYS / 8][4];
            score<T, D>(shared, scores);
            unsigned key = list + at, following = at + count;
            unsigned next = following < listed
                                ? run_length(shared.deltas, following, listed - following)
                                : 0;
            await_copies<0>();
            __syncthreads();  // V is there, K and the queries are free
            if (next > 0) {
                copy_tile<T, D>(shared, op, op.k_cache, shared.k, rows.kv_head, following, next);
                if (shared.deltas[following] != delta) {
                    delta = shared.deltas[following];
                    turn_queries<T, D>(shared, op, rows, delta);
                }
            }
            bool whole = count == KEYS && key >= bounds.latest && key + KEYS <= bounds.earliest;
            weigh<T, D>(shared, op, state, scores, key, count, whole);
            add_values<T, D>(shared, state, scores);
            at = following;
            count = next;
        }
        __syncthreads();  // the list is free
    }
}

template <class T, int D>
DEVICE void write_result(const Shared<T, D>& shared, const Prefill<T>& op, const Rows& rows,
                         unsigned part, const State<D>& state) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    bool bad = *shared.bad != 0;
#pragma unroll
    for (int m = 0; m < TILES<D>; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = state.total[m][half];
            total += __shfl_xor_sync(FULL_WARP, total, 1);
            total += __shfl_xor_sync(FULL_WARP, total, 2);
            if (bad) total = __uint_as_float(0x7fffffff);
            unsigned place = (warp * TILES<D> + m) * 16 + 8 * half + g;
            if (!rows.has(place)) continue;
            int64_t row = rows.row(place), head = rows.head(place);
            int64_t item = (row - op.first_row) * op.parts + part;
            int64_t to = op.parts == 1 ? row * op.heads + head : item * op.heads + head;
            float factor = total == 0 ? 0 : 1 / total;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                float a = state.sum[m][d][2 * half], b = state.sum[m][d][2 * half + 1];
                int64_t pair = (to * D + 8 * d + 2 * c) / 2;
                if (op.parts == 1) {
                    reinterpret_cast<unsigned*>(op.out)[pair] = pack<T>(a * factor, b * factor);
                } else {
                    reinterpret_cast<float2*>(op.outs)[pair] = make_float2(a, b);
                }
            }
            if (op.parts > 1 && c == 0) op.stats[to] = make_float2(state.best[m][half], total);
        }
    }
}

template <class T, int D> DEVICE void prefill_attention(const Prefill<T>& op) {
    SHARED(memory);
    Shared<T, D> shared(memory);
    // The last tiles have the most keys: they start first.
    unsigned index = gridDim.x - 1 - blockIdx.x, part = index % op.parts;
    unsigned sequence = blockIdx.z;
    Rows rows;
    rows.first = max(op.cu_seqlens_q[sequence], op.first_row);
    unsigned rows_end = min(op.cu_seqlens_q[sequence + 1], op.rows_end);
    rows.group = op.heads / op.kv_heads;
    rows.pairs = rows_end > rows.first ? (rows_end - rows.first) * rows.group : 0;
    rows.pair = index / op.parts * PAIRS<D>;
    rows.kv_head = blockIdx.y;
    rows.keys = op.num_keys[sequence];
    if (rows.pair >= rows.pairs) return;

    State<D> state;
    Bounds bounds = find_bounds<T, D>(shared, op, rows, state);
    uint64_t part_start = uint64_t(part) * op.part_keys;
    unsigned start = unsigned(max(uint64_t(bounds.lowest), part_start));
    unsigned end = unsigned(min(uint64_t(bounds.highest), part_start + op.part_keys));
    if (start < end) {
        pass_over_keys<T, D>(shared, op, rows, op.entries + op.table_starts[sequence],
                             op.num_entries[sequence], bounds, start, end, state);
    }
    write_result<T, D>(shared, op, rows, part, state);
}

#define PREFILL(name, T, D)                                                                       \
    KERNEL __launch_bounds__(WARPS * 32)                                                          \
        name(const T* q, const T* k, const T* v, const TableEntry* entries,                       \
             const unsigned* table_starts, const unsigned* num_entries, const unsigned* num_keys, \
             const unsigned* cu_seqlens_q, const unsigned* positions, const float* cos,           \
             const float* sin, unsigned max_position, T* out, float2* stats, float* outs,         \
             unsigned first_row, unsigned rows_end, unsigned heads, unsigned kv_heads,            \
             int64_t q_stride, unsigned slots, unsigned parts, unsigned part_keys,                \
             unsigned window, float scale, float cap) {                                           \
        Prefill<T> op = {q,        k,         v,        entries,  table_starts, num_entries,      \
                         num_keys, cu_seqlens_q, positions, cos,  sin,          max_position,     \
                         out,      stats,     outs,     first_row, rows_end,    heads,            \
                         kv_heads, q_stride,  slots,    parts,    part_keys,    window,           \
                         scale,    cap};                                                          \
        prefill_attention<T, D>(op);                                                              \
    }
PREFILL(prefill_attention_bf16_16, Bf16, 16)
PREFILL(prefill_attention_bf16_32, Bf16, 32)
PREFILL(prefill_attention_bf16_64, Bf16, 64)
PREFILL(prefill_attention_bf16_96, Bf16, 96)
PREFILL(prefill_attention_bf16_128, Bf16, 128)
PREFILL(prefill_attention_bf16_256, Bf16, 256)
PREFILL(prefill_attention_f16_16, F16, 16)
PREFILL(prefill_attention_f16_32, F16, 32)
PREFILL(prefill_attention_f16_64, F16, 64)
PREFILL(prefill_attention_f16_96, F16, 96)
PREFILL(prefill_attention_f16_128, F16, 128)
PREFILL(prefill_attention_f16_256, F16, 256)

KERNELS(prefill_attention, ENTRY(prefill_attention_bf16_16), ENTRY(prefill_attention_bf16_32),
        ENTRY(prefill_attention_bf16_64), ENTRY(prefill_attention_bf16_96),
        ENTRY(prefill_attention_bf16_128), ENTRY(prefill_attention_bf16_256),
        ENTRY(prefill_attention_f16_16), ENTRY(prefill_attention_f16_32),
        ENTRY(prefill_attention_f16_64), ENTRY(prefill_attention_f16_96),
        ENTRY(prefill_attention_f16_128), ENTRY(prefill_attention_f16_256))
