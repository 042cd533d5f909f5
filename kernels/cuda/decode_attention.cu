// Attention of single rows over paged keys: a block takes one split of a row's keys and up to
// eight query heads of one KV head; `merge_partials` puts the splits together.
//
// The products run on matrix instructions with keys (or the dimensions of values) as rows and query
// heads as the eight columns, so that grouped heads cost nothing and K and V are read once. A lane
// loads 16 bytes of a row in the shape the instruction wants: which dimension stands in which place
// of a sum does not matter, if the query stands alike. It loads for itself alone, into a place of
// its own in shared memory, and two tiles ahead: while scores of the last keys are computed, the
// first values are on their way.
//
// With g = lane / 4 and c = lane % 4:
// - scores: lane (g, c) loads of the keys g and g + 8 of a tile the chunks c, c + 4, .. of eight
//   dimensions; a chunk feeds two instructions;
// - values: lane (g, c) loads of the keys 2c, 2c + 1, 2c + 8, 2c + 9 the chunks g, g + 8, ..; two
//   keys' numbers of one dimension are put beside each other with byte_perm.
//
// Order of sums, whatever else runs and however keys lie in blocks: a score by dimensions; the sum
// of weights by lanes and a tree; a value by its warp's keys in tiles of 16, then over warps.
#include "tables.cuh"

constexpr int WARPS = 8;
constexpr int HEADS = 8;
constexpr int TILE = 16;

// Words of a lane for a part of K: of dimensions 32s + 8c .. + 7.
template <int D> constexpr int SCORE_CHUNKS = (D + 31) / 32;
// And of V: of dimensions 64z + 8g .. + 7.
template <int D> constexpr int VALUE_CHUNKS = (D + 63) / 64;

// Tiles of a warp that are on their way, and a lane's words of each.
template <int D> constexpr int AHEAD = D > 128 ? 1 : 2;
template <int D>
constexpr int WORDS = 2 * SCORE_CHUNKS<D> > 4 * VALUE_CHUNKS<D> ? 2 * SCORE_CHUNKS<D>
                                                                : 4 * VALUE_CHUNKS<D>;

// Numbers from one head to the next where warps tell each other their sums: one more, so that few
// lanes meet in a bank.
template <int D> constexpr int PART = D + 1;

template <class T> struct Decode {
    const T *q, *k_cache, *v_cache;
    const TableEntry* entries;
    const unsigned *table_starts, *num_entries, *num_keys, *row_sequence, *positions;
    const float *cos, *sin;
    unsigned max_position;
    const SplitItem* items;
    const unsigned* starts;
    float2* stats;
    float* outs;
    unsigned rows, heads, kv_heads;
    int64_t q_stride;
    unsigned slots, split, window;
    float scale, cap;
};

// Parts of the block's shared memory.
template <int D> struct Shared {
    float* q;         // (HEADS, D), not rotated
    unsigned* rows;   // (split) rows of the cache
    int* deltas;      // (split)
    float* weights;   // (HEADS, stride): scores in units of log 2, then weights
    uint4* words;     // (WARPS, AHEAD, WORDS, 32)
    float* partials;  // (WARPS, HEADS, PART), where those were
    float2* stats;    // (HEADS) maximum and sum
    unsigned* bad;    // whether an entry points outside the cache or the rotations
    unsigned stride;

    DEVICE Shared(unsigned char* memory, unsigned split) {
        q = reinterpret_cast<float*>(memory);
        stats = reinterpret_cast<float2*>(q + HEADS * D);
        bad = reinterpret_cast<unsigned*>(stats + HEADS);
        rows = bad + 4;
        deltas = reinterpret_cast<int*>(rows + split);
        weights = reinterpret_cast<float*>(deltas + split);
        stride = split + 8;
        partials = weights + HEADS * stride;
        words = reinterpret_cast<uint4*>(partials);
    }

    // A lane's words of its warp's tile of this number, 32 apart.
    DEVICE uint4* own(unsigned number) const {
        unsigned tile = threadIdx.x / 32 * AHEAD<D> + number % AHEAD<D>;
        return words + tile * WORDS<D> * 32 + threadIdx.x % 32;
    }
};

// What a warp loads of an item: its tiles of K, then as many of V.
template <class T, int D> struct Tiles {
    const Shared<D>& shared;
    const Decode<T>& op;
    unsigned kv_head, keys;

    // Of K.
    DEVICE unsigned count() const {
        unsigned first = threadIdx.x / 32 * TILE;
        return keys > first ? (keys - first + WARPS * TILE - 1) / (WARPS * TILE) : 0;
    }
    DEVICE unsigned start(unsigned number) const {
        return (threadIdx.x / 32 + number * WARPS) * TILE;
    }

    // Lanes past the last key read it once more.
    DEVICE void load(unsigned number) const {
        int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        uint4* to = shared.own(number);
        if (number < count()) {
            unsigned tile = start(number);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const T* from = row(op.k_cache, tile + g + 8 * half) + 8 * c;
#pragma unroll
                for (int s = 0; s < SCORE_CHUNKS<D>; s++, to += 32) {
                    copy_async(to, from + 32 * s, 32 * s + 8 * c < D);
                }
            }
        } else if (number < 2 * count()) {
            unsigned tile = start(number - count());
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const T* from = row(op.v_cache, tile + 2 * c + n % 2 + 8 * (n / 2)) + 8 * g;
#pragma unroll
                for (int z = 0; z < VALUE_CHUNKS<D>; z++, to += 32) {
                    copy_async(to, from + 64 * z, 64 * z + 8 * g < D);
                }
            }
        }
        commit_copies();
    }

    DEVICE const T* row(const T* cache, unsigned key) const {
        return cache + (int64_t(shared.rows[min(key, keys - 1)]) * op.kv_heads + kv_head) * D;
    }
};

// The query of head g, turned to `position`, in the shape of a matrix instruction's b.
template <class T, int D>
DEVICE void turn_query(const Shared<D>& shared, const Decode<T>& op, int64_t position,
                       unsigned (&query)[SCORE_CHUNKS<D>][4]) {
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const float* head = shared.q + g * D;
    if (position < 0 || position >= op.max_position) {
        *shared.bad = 1;
        position = 0;
    }
#pragma unroll
    for (int s = 0; s < SCORE_CHUNKS<D>; s++) {
        int dim = 32 * s + 8 * c;
        if (dim >= D) {
#pragma unroll
            for (int i = 0; i < 4; i++) query[s][i] = 0;
            continue;
        }
        bool low = dim < D / 2;
        int pair = low ? dim : dim - D / 2;
        const float* cos = op.cos + position * (D / 2) + pair;
        const float* sin = op.sin + position * (D / 2) + pair;
        float4 c4[2] = {reinterpret_cast<const float4*>(cos)[0],
                        reinterpret_cast<const float4*>(cos)[1]};
        float4 s4[2] = {reinterpret_cast<const float4*>(sin)[0],
                        reinterpret_cast<const float4*>(sin)[1]};
        const float cosines[8] = {c4[0].x, c4[0].y, c4[0].z, c4[0].w,
                                  c4[1].x, c4[1].y, c4[1].z, c4[1].w};
        const float sines[8] = {s4[0].x, s4[0].y, s4[0].z, s4[0].w,
                                s4[1].x, s4[1].y, s4[1].z, s4[1].w};
        float turned[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float a = head[pair + i], b = head[pair + D / 2 + i];
            turned[i] = low ? fmaf(a, cosines[i], -(b * sines[i]))
                            : fmaf(b, cosines[i], a * sines[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) query[s][i] = pack<T>(turned[2 * i], turned[2 * i + 1]);
    }
}

// Scores of this warp's tiles, for all heads.
template <class T, int D>
DEVICE void score(const Tiles<T, D>& tiles, unsigned position) {
    const Shared<D>& shared = tiles.shared;
    const Decode<T>& op = tiles.op;
    unsigned keys = tiles.keys, count = tiles.count();
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    unsigned query[SCORE_CHUNKS<D>][4];
    bool turned = false;
    int turned_by = 0;
    for (unsigned number = 0; number < count; number++) {
        // Scores of lanes past the last key are thrown away.
        unsigned tile = tiles.start(number), last = keys - 1;
        int delta[2] = {shared.deltas[min(tile + g, last)], shared.deltas[min(tile + g + 8, last)]};
        await_copies<AHEAD<D> - 1>();
        uint4 words[2][SCORE_CHUNKS<D>];
#pragma unroll
        for (int i = 0; i < 2 * SCORE_CHUNKS<D>; i++) {
            words[i / SCORE_CHUNKS<D>][i % SCORE_CHUNKS<D>] = shared.own(number)[32 * i];
        }
        int first = shared.deltas[tile];
        bool mixed = __any_sync(FULL_WARP, delta[0] != first || delta[1] != first);
        int before = first;
        for (unsigned i = 0; i < (mixed ? TILE : 1); i++) {
            int by = shared.deltas[min(tile + i, last)];
            if (i > 0 && by == before) continue;
            before = by;
            if (!turned || by != turned_by) {
                turn_query<T, D>(shared, op, int64_t(position) - by, query);
                turned = true;
                turned_by = by;
            }
            float sum[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = 0; s < SCORE_CHUNKS<D>; s++) {
                const uint4 &a = words[0][s], &b = words[1][s];
                const unsigned left[4] = {a.x, b.x, a.y, b.y}, right[4] = {a.z, b.z, a.w, b.w};
                const unsigned q_left[2] = {query[s][0], query[s][1]};
                const unsigned q_right[2] = {query[s][2], query[s][3]};
                mma<T>(sum, left, q_left);
                mma<T>(sum, right, q_right);
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                unsigned place = tile + g + 8 * (n / 2);
                float value = sum[n] * op.scale;
                if (op.cap != 0) value = op.cap * tanh_fast(value / op.cap);
                if (delta[n / 2] == by) {
                    float* to = shared.weights + (2 * c + n % 2) * shared.stride + place;
                    *to = place < keys ? value * LOG2_E : MINUS_INFINITY;
                }
            }
        }
        tiles.load(number + AHEAD<D>);  // where this one was
    }
}

// Scores to weights, head by head; what was rounded is what is summed.
template <class T, int D> DEVICE void weigh(const Shared<D>& shared, unsigned padded) {
    int head = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* row = shared.weights + head * shared.stride;
    float best = MINUS_INFINITY, sum = 0;
    for (unsigned i = lane; i < padded; i += 32) best = fmaxf(best, row[i]);
    best = warp_max(best);
    for (unsigned i = lane; i < padded; i += 32) {
        float weight = widen(narrow<T>(exp2_fast(row[i] - best)));
        row[i] = weight;
        sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) shared.stats[head] = make_float2(best, sum);
}

DEVICE unsigned word_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// sum[z][i][n]: n / 2 picks dimension 64z + 8g + 2i or the next, n % 2 head 2c or the next.
template <class T, int D>
DEVICE void add_values(const Shared<D>& shared, unsigned tile,
                       const uint4* words, float (&sum)[VALUE_CHUNKS<D>][4][4]) {
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const float* row = shared.weights + g * shared.stride + tile + 2 * c;
    const unsigned weights[2] = {pack<T>(row[0], row[1]), pack<T>(row[8], row[9])};
#pragma unroll
    for (int z = 0; z < VALUE_CHUNKS<D>; z++) {
        uint4 keys[4];
#pragma unroll
        for (int n = 0; n < 4; n++) keys[n] = words[32 * (n * VALUE_CHUNKS<D> + z)];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned x[4];
#pragma unroll
            for (int n = 0; n < 4; n++) x[n] = word_of(keys[n], i);
            const unsigned values[4] = {
                __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632),
                __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632)};
            mma<T>(sum[z][i], values, weights);
        }
    }
}

template <class T, int D>
DEVICE void write_partials(const Shared<D>& shared, const Decode<T>& op, unsigned item,
                           unsigned head, unsigned heads,
                           const float (&sum)[VALUE_CHUNKS<D>][4][4]) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float* own = shared.partials + warp * HEADS * PART<D>;
#pragma unroll
    for (int z = 0; z < VALUE_CHUNKS<D>; z++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int dim = 64 * z + 8 * g + 2 * i;
            if (dim >= D) continue;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                unsigned column = 2 * c + n % 2;
                if (column < heads) own[column * PART<D> + dim + n / 2] = sum[z][i][n];
            }
        }
    }
    __syncthreads();
    int64_t place = int64_t(item) * op.heads + head;
    for (unsigned i = threadIdx.x; i < heads * D; i += blockDim.x) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            total += shared.partials[(w * HEADS + i / D) * PART<D> + i % D];
        }
        op.outs[place * D + i] = total;
    }
    if (threadIdx.x < heads) {
        float2 stats = shared.stats[threadIdx.x];
        if (*shared.bad != 0) stats.y = __uint_as_float(0x7fffffff);
        op.stats[place + threadIdx.x] = stats;
    }
}

template <class T, int D>
DEVICE void decode_item(const Shared<D>& shared, const Decode<T>& op, unsigned index,
                        unsigned kv_head, unsigned first_head, unsigned heads) {
    SplitItem item = op.items[index];
    unsigned sequence = op.row_sequence ? op.row_sequence[item.row] : item.row;
    unsigned position = op.positions[item.row];
    Visible visible = visible_keys(position, op.num_keys[sequence], op.window);
    unsigned start = visible.first + item.split * op.split;
    unsigned end = min(start + op.split, visible.end), keys = end - start;

    const T* q = op.q + item.row * op.q_stride + int64_t(first_head) * D;
    for (unsigned i = threadIdx.x; i < HEADS * D; i += blockDim.x) {
        shared.q[i] = i < heads * D ? widen(q[i]) : 0;
    }
    if (threadIdx.x == 0) *shared.bad = 0;
    __syncthreads();
    list_keys(op.entries + op.table_starts[sequence], op.num_entries[sequence], item.entry, start,
              end, op.slots, shared.rows, shared.deltas, shared.bad, shared.bad + 1);
    __syncthreads();
    Tiles<T, D> tiles = {shared, op, kv_head, keys};
#pragma unroll
    for (unsigned number = 0; number < AHEAD<D>; number++) tiles.load(number);
    score<T, D>(tiles, position);
    __syncthreads();
    weigh<T, D>(shared, (keys + TILE - 1) / TILE * TILE);
    __syncthreads();
    float sum[VALUE_CHUNKS<D>][4][4] = {};
    unsigned count = tiles.count();
    for (unsigned number = count; number < 2 * count; number++) {
        await_copies<AHEAD<D> - 1>();
        add_values<T, D>(shared, tiles.start(number - count), shared.own(number), sum);
        tiles.load(number + AHEAD<D>);
    }
    await_copies<0>();
    __syncthreads();
    write_partials<T, D>(shared, op, index, first_head, heads, sum);
    __syncthreads();
}

template <class T, int D> DEVICE void decode_attention(const Decode<T>& op) {
    SHARED(memory);
    Shared<D> shared(memory, op.split);
    unsigned group = op.heads / op.kv_heads, groups = (group + HEADS - 1) / HEADS;
    int64_t work = int64_t(op.starts[op.rows]) * op.kv_heads * groups;
    for (int64_t i = blockIdx.x; i < work; i += gridDim.x) {
        unsigned part = i % groups, kv_head = i / groups % op.kv_heads;
        unsigned head = kv_head * group + part * HEADS, heads = min(group - part * HEADS, unsigned(HEADS));
        decode_item<T, D>(shared, op, i / groups / op.kv_heads, kv_head, head, heads);
    }
}

// Items that are read at a time, before any is merged.
constexpr int MERGED = 8;

// A row's items in ascending order; out (rows, heads, d). A block per row and head.
template <class T>
DEVICE void merge_partials(const float2* stats, const float* outs, const unsigned* starts,
                           unsigned stride, T* out, unsigned heads, unsigned dim) {
    int64_t row = blockIdx.y, head = blockIdx.x;
    int64_t first = starts ? starts[row] : row * stride;
    int64_t end = starts ? starts[row + 1] : first + stride;
    for (unsigned i = threadIdx.x; i < dim; i += blockDim.x) {
        float best = MINUS_INFINITY, sum = 0, value = 0;
        for (int64_t base = first; base < end; base += MERGED) {
            float2 parts[MERGED];
            float values[MERGED];
#pragma unroll
            for (int n = 0; n < MERGED; n++) {
                int64_t place = min(base + n, end - 1) * heads + head;
                parts[n] = stats[place];
                values[n] = outs[place * dim + i];
            }
#pragma unroll
            for (int n = 0; n < MERGED; n++) {
                // Nothing visible in this part.
                bool empty = parts[n].x == MINUS_INFINITY && parts[n].y == 0;
                if (base + n >= end || empty) continue;
                float larger = fmaxf(best, parts[n].x);
                float before = exp2_fast(best - larger), now = exp2_fast(parts[n].x - larger);
                sum = fmaf(sum, before, parts[n].y * now);
                value = fmaf(value, before, values[n] * now);
                best = larger;
            }
        }
        out[(row * heads + head) * dim + i] = narrow<T>(sum == 0 ? 0 : value / sum);
    }
}

KERNEL merge_partials_bf16(const float2* stats, const float* outs, const unsigned* starts,
                           unsigned stride, Bf16* out, unsigned heads, unsigned dim) {
    merge_partials(stats, outs, starts, stride, out, heads, dim);
}
KERNEL merge_partials_f16(const float2* stats, const float* outs, const unsigned* starts,
                          unsigned stride, F16* out, unsigned heads, unsigned dim) {
    merge_partials(stats, outs, starts, stride, out, heads, dim);
}

#define DECODE(name, T, D, blocks)                                                                 \
    KERNEL __launch_bounds__(WARPS * 32, blocks)                                                   \
        name(const T* q, const T* k, const T* v, const TableEntry* entries,                        \
             const unsigned* table_starts, const unsigned* num_entries, const unsigned* num_keys,  \
             const unsigned* row_sequence, const unsigned* positions, const float* cos,            \
             const float* sin, unsigned max_position, const SplitItem* items,                      \
             const unsigned* starts, float2* stats, float* outs, unsigned rows, unsigned heads,    \
             unsigned kv_heads, int64_t q_stride, unsigned slots, unsigned split, unsigned window, \
             float scale, float cap) {                                                             \
        Decode<T> op = {q,         k,        v,         entries,  table_starts, num_entries, num_keys, \
                        row_sequence, positions, cos,   sin,      max_position, items,   starts,   \
                        stats,     outs,     rows,      heads,    kv_heads,     q_stride, slots,   \
                        split,     window,   scale,     cap};                                      \
        decode_attention<T, D>(op);                                                                \
    }
DECODE(decode_attention_bf16_16, Bf16, 16, 2)
DECODE(decode_attention_bf16_32, Bf16, 32, 2)
DECODE(decode_attention_bf16_64, Bf16, 64, 2)
DECODE(decode_attention_bf16_96, Bf16, 96, 2)
DECODE(decode_attention_bf16_128, Bf16, 128, 2)
DECODE(decode_attention_bf16_256, Bf16, 256, 1)
DECODE(decode_attention_f16_16, F16, 16, 2)
DECODE(decode_attention_f16_32, F16, 32, 2)
DECODE(decode_attention_f16_64, F16, 64, 2)
DECODE(decode_attention_f16_96, F16, 96, 2)
DECODE(decode_attention_f16_128, F16, 128, 2)
DECODE(decode_attention_f16_256, F16, 256, 1)

KERNELS(decode_attention, ENTRY(merge_partials_bf16), ENTRY(merge_partials_f16),
        ENTRY(decode_attention_bf16_16), ENTRY(decode_attention_bf16_32),
        ENTRY(decode_attention_bf16_64), ENTRY(decode_attention_bf16_96),
        ENTRY(decode_attention_bf16_128), ENTRY(decode_attention_bf16_256),
        ENTRY(decode_attention_f16_16), ENTRY(decode_attention_f16_32),
        ENTRY(decode_attention_f16_64), ENTRY(decode_attention_f16_96),
        ENTRY(decode_attention_f16_128), ENTRY(decode_attention_f16_256))
