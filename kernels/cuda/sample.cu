// One token of a row of logits: greedy, or a draw behind min-p, top-k and top-p. A block per row.
//
// Tokens have masses: weights exp((logit - max) / temperature) in units of 2^-44, whole numbers, so
// that sums have no order. Top-k, top-p and the draw are one search: the first token, from the most
// likely one on, at which the count (the mass) from the beginning reaches a goal. It goes through
// the logits by eight bits of their order a pass, with a histogram each.
#include "device.cuh"

constexpr int BINS = 256;
constexpr int WARPS = 32;
// Histograms of masses, so that few warps meet in a bin.
constexpr int COPIES = 8;
// Logits a thread reads before it looks at them.
constexpr int BATCH = 4;
constexpr double UNITS = 17592186044416.0;  // 2^44

struct SampleRow {
    float temperature, top_p, min_p;
    unsigned top_k;
    uint64_t seed;
    unsigned choice, position;
};

// A token in the order of likelihood: the order of its logit, the count (the mass) of what comes
// before all that are equal to it, the mass of each, and how many of them reach the goal.
struct Place {
    unsigned key;
    uint64_t before, mass, ties;

    DEVICE uint64_t through() const { return before + ties * mass; }
};

struct Shared {
    unsigned long long* masses;   // (COPIES, BINS)
    unsigned long long* scratch;  // (WARPS)
    unsigned long long* found;    // (8)
    unsigned* counts;             // (BINS)

    DEVICE explicit Shared(unsigned char* memory) {
        masses = reinterpret_cast<unsigned long long*>(memory);
        scratch = masses + COPIES * BINS;
        found = scratch + WARPS;
        counts = reinterpret_cast<unsigned*>(found + 8);
    }
};

// Calls look(token, logit, whether there is such a token) for all tokens; warps stay together.
template <class Look> DEVICE void for_logits(const float* logits, unsigned vocab, Look look) {
    for (unsigned base = 0; base < vocab; base += BATCH * blockDim.x) {
        float x[BATCH];
#pragma unroll
        for (int n = 0; n < BATCH; n++) {
            unsigned i = base + n * blockDim.x + threadIdx.x;
            x[n] = i < vocab ? logits[i] : MINUS_INFINITY;
        }
#pragma unroll
        for (int n = 0; n < BATCH; n++) {
            unsigned i = base + n * blockDim.x + threadIdx.x;
            look(i, x[n], i < vocab);
        }
    }
}

// Ascends with the number, as total_cmp does.
DEVICE unsigned order_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
DEVICE float with_order(unsigned key) {
    return __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

DEVICE uint64_t mass_of(float logit, float best, const SampleRow& row) {
    double x = double(logit - best) / double(row.temperature);
    if (!(x > -31)) return 0;
    double weight = exp(x);
    return weight >= double(row.min_p) ? uint64_t(weight * UNITS) : 0;
}

// The first of the largest.
DEVICE unsigned argmax(const float* logits, unsigned vocab, const Shared& shared) {
    float best = MINUS_INFINITY;
    unsigned id = vocab;
    for_logits(logits, vocab, [&](unsigned i, float x, bool there) {
        if (there && (x > best || (x == best && i < id))) {
            best = x;
            id = i;
        }
    });
    auto keep = [&](float other, unsigned other_id) {
        if (other > best || (other == best && other_id < id)) {
            best = other;
            id = other_id;
        }
    };
    for (int bits = 16; bits > 0; bits /= 2) {
        float other = __shfl_xor_sync(FULL_WARP, best, bits);
        unsigned other_id = __shfl_xor_sync(FULL_WARP, id, bits);
        keep(other, other_id);
    }
    unsigned* words = reinterpret_cast<unsigned*>(shared.scratch);
    if (threadIdx.x % 32 == 0) {
        words[2 * (threadIdx.x / 32)] = __float_as_uint(best);
        words[2 * (threadIdx.x / 32) + 1] = id;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) {
        keep(__uint_as_float(words[2 * warp]), words[2 * warp + 1]);
    }
    __syncthreads();
    return id < vocab ? id : 0;
}

// Adds masses to their bins: those of a warp that go to one bin as one, for a few bins.
DEVICE void add_masses(const Shared& shared, bool mine, unsigned bin, uint64_t mass) {
    unsigned long long* masses = shared.masses + threadIdx.x / 32 % COPIES * BINS;
    for (int turn = 0; turn < 4; turn++) {
        unsigned left = __ballot_sync(FULL_WARP, mine);
        if (left == 0) return;
        int leader = __ffs(left) - 1;
        bool own = bin == __shfl_sync(FULL_WARP, bin, leader) && mine;
        // A mass has 45 bits; sums of 32 of its parts fit a word.
        unsigned low = __reduce_add_sync(FULL_WARP, own ? unsigned(mass) & 0xffffff : 0);
        unsigned high = __reduce_add_sync(FULL_WARP, own ? unsigned(mass >> 24) : 0);
        if (int(threadIdx.x % 32) == leader) {
            atomicAdd(&masses[bin], low + (static_cast<unsigned long long>(high) << 24));
        }
        mine = mine && !own;
    }
    if (mine) atomicAdd(&masses[bin], static_cast<unsigned long long>(mass));
}

// The bin in which the sum from the highest bin on reaches `goal`: written to shared.found with
// what comes before it. One warp; lane l has the bins 255 - 8l down to 248 - 8l.
DEVICE void find_bin(const Shared& shared, bool by_count, uint64_t goal) {
    unsigned lane = threadIdx.x % 32;
    uint64_t bins[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        unsigned bin = 255 - 8 * lane - i;
        bins[i] = by_count ? shared.counts[bin] : 0;
        for (int copy = 0; copy < COPIES && !by_count; copy++) {
            bins[i] += shared.masses[copy * BINS + bin];
        }
        sum += bins[i];
    }
    uint64_t through = sum;
    for (int distance = 1; distance < 32; distance *= 2) {
        uint64_t other = __shfl_up_sync(FULL_WARP, through, distance);
        if (lane >= unsigned(distance)) through += other;
    }
    uint64_t before = through - sum;
    if (before >= goal || through < goal) return;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (!found && before + bins[i] >= goal) {
            shared.found[0] = 255 - 8 * lane - i;
            shared.found[1] = before;
            found = true;
        }
        before += bins[i];
    }
}

// The first place from the most likely token on where the count (the mass) reaches `goal`, which is
// at least 1 and at most that of all tokens. Tokens below the order `least` are not looked at.
DEVICE Place find_place(const float* logits, unsigned vocab, float best, const SampleRow& row,
                        const Shared& shared, bool by_count, uint64_t goal, unsigned least) {
    Place place = {0, 0, 0, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (unsigned i = threadIdx.x; i < COPIES * BINS; i += blockDim.x) shared.masses[i] = 0;
        for (unsigned i = threadIdx.x; i < BINS; i += blockDim.x) shared.counts[i] = 0;
        __syncthreads();
        for_logits(logits, vocab, [&](unsigned, float x, bool there) {
            unsigned key = order_of(x), bin = key >> shift & 255;
            bool mine = there && key >= least && (shift == 24 || key >> (shift + 8) == place.key);
            if (by_count) {
                if (mine) atomicAdd(&shared.counts[bin], 1u);
            } else {
                uint64_t mass = mine ? mass_of(x, best, row) : 0;
                add_masses(shared, mass != 0, bin, mass);
            }
        });
        __syncthreads();
        if (threadIdx.x < 32) find_bin(shared, by_count, goal - place.before);
        __syncthreads();
        place.key = place.key << 8 | unsigned(shared.found[0]);
        place.before += shared.found[1];
        __syncthreads();
    }
    place.mass = by_count ? 1 : mass_of(with_order(place.key), best, row);
    place.ties = (goal - place.before + place.mass - 1) / place.mass;
    return place;
}

// The first token by number at which the sum of `amount` reaches `goal`. Each warp has a run of
// tokens.
template <class Amount>
DEVICE unsigned find_by_id(unsigned vocab, const Shared& shared, uint64_t goal, Amount amount) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned run = (vocab + WARPS - 1) / WARPS;
    unsigned start = min(warp * run, vocab), end = min(start + run, vocab);
    uint64_t sum = 0;
    for (unsigned i = start + lane; i < end; i += 32) sum += amount(i);
    sum = warp_sum(sum);
    if (lane == 0) shared.scratch[warp] = sum;
    if (threadIdx.x == 0) shared.found[0] = 0;
    __syncthreads();
    uint64_t before = 0;
    for (unsigned i = 0; i < warp; i++) before += shared.scratch[i];
    if (before < goal && before + sum >= goal) {
        for (unsigned base = start; base < end; base += 32) {
            uint64_t own = base + lane < end ? amount(base + lane) : 0, through = own;
            for (int distance = 1; distance < 32; distance *= 2) {
                uint64_t other = __shfl_up_sync(FULL_WARP, through, distance);
                if (lane >= unsigned(distance)) through += other;
            }
            bool here = before + through >= goal && before + through - own < goal;
            if (here) shared.found[0] = base + lane;
            before += __shfl_sync(FULL_WARP, through, 31);
            if (before >= goal) break;
        }
    }
    __syncthreads();
    return unsigned(shared.found[0]);
}

// SplitMix64's finalizer over seed, choice and position in turn (Steele, Lea and Flood, 2014).
DEVICE uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

// In [0, 1).
DEVICE double uniform(const SampleRow& row) {
    uint64_t bits = mix(mix(mix(row.seed) ^ row.choice) ^ uint64_t(row.position) << 32);
    return double(bits >> 11) / 9007199254740992.0;
}

DEVICE uint64_t within(double goal, uint64_t most) {
    return goal < 1 ? 1 : min(uint64_t(goal), most);
}

DEVICE unsigned draw(const float* logits, unsigned vocab, float best, const SampleRow& row,
                     const Shared& shared) {
    auto mass = [&](unsigned i) { return mass_of(logits[i], best, row); };
    // Kept are the tokens above the order `least`, and so many that have it.
    unsigned least = 0;
    uint64_t ties = 0;
    if (row.top_k != 0 && row.top_k < vocab) {
        Place last = find_place(logits, vocab, best, row, shared, true, row.top_k, 0);
        least = last.key;
        ties = last.ties;
    }
    uint64_t kept = 0;
    for_logits(logits, vocab, [&](unsigned, float x, bool there) {
        if (there && (ties == 0 || order_of(x) > least)) kept += mass_of(x, best, row);
    });
    kept = block_sum(kept, reinterpret_cast<uint64_t*>(shared.scratch));
    if (ties != 0) kept += ties * mass_of(with_order(least), best, row);
    if (row.top_p < 1) {
        uint64_t goal = within(ceil(double(kept) * double(row.top_p)), kept);
        Place last = find_place(logits, vocab, best, row, shared, false, goal, least);
        least = last.key;
        kept = last.through();
    }
    uint64_t goal = within(floor(uniform(row) * double(kept)) + 1, kept);
    if (row.top_k == 0 && !(row.top_p < 1)) return find_by_id(vocab, shared, goal, mass);
    Place place = find_place(logits, vocab, best, row, shared, false, goal, least);
    auto tie = [&](unsigned i) { return uint64_t(order_of(logits[i]) == place.key); };
    return find_by_id(vocab, shared, place.ties, tie);
}

KERNEL __launch_bounds__(WARPS * 32)
    sample_rows(const float* logits, const SampleRow* rows, unsigned* tokens, unsigned vocab) {
    SHARED(memory);
    Shared shared(memory);
    SampleRow row = rows[blockIdx.x];
    logits += int64_t(blockIdx.x) * vocab;
    unsigned id = argmax(logits, vocab, shared);
    float best = logits[id];
    // Where not even the likeliest token has a weight, there is nothing to draw from.
    if (row.temperature != 0 && best - best == 0) id = draw(logits, vocab, best, row, shared);
    if (threadIdx.x == 0) tokens[blockIdx.x] = id;
}

KERNEL __launch_bounds__(WARPS * 32) check_finite(const float* x, unsigned* flags, unsigned width) {
    SHARED(scratch);
    x += int64_t(blockIdx.x) * width;
    unsigned bad = 0;
    for_logits(x, width, [&](unsigned, float x, bool there) { bad += there && !(x - x == 0); });
    bad = block_sum(bad, reinterpret_cast<unsigned*>(scratch));
    if (threadIdx.x == 0) flags[blockIdx.x] = bad != 0;
}

KERNELS(sample, ENTRY(sample_rows), ENTRY(check_finite))
