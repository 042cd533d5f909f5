// One token of a row of logits: greedy, or a draw behind min-p, top-k and top-p. A block per row.
//
// Tokens have masses: weights exp((logit - max) / temperature) in units of 2^-44, whole numbers, so
// that sums have no order. Top-k, top-p and the draw are one search: the first token, from the most
// likely one on, at which the count (the mass) from the beginning reaches a goal. It goes through
// the logits by eight bits of their order a pass, with a histogram each.
#include "device.cuh"

constexpr int BINS = 256;
constexpr int WARPS = 32;
constexpr double UNITS = 17592186044416.0;  // 2^44

struct SampleRow {
    float temperature, top_p, min_p;
    unsigned top_k;
    uint64_t seed;
    unsigned choice, position;
};

// A token in the order of likelihood: the bits of its logit, and how many with these bits are
// before it; what comes before all of them; and the mass of each.
struct Place {
    unsigned key;
    uint64_t before_count, before_mass, mass;
    uint64_t ties;  // that are needed to reach the goal
};

struct Shared {
    unsigned long long* masses;  // (BINS)
    unsigned* counts;            // (BINS)
    unsigned long long* scratch;  // (WARPS)
    unsigned long long* found;   // (4)

    DEVICE explicit Shared(unsigned char* memory) {
        masses = reinterpret_cast<unsigned long long*>(memory);
        scratch = masses + BINS;
        found = scratch + WARPS;
        counts = reinterpret_cast<unsigned*>(found + 8);
    }
};

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
    for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) {
        float x = logits[i];
        if (x > best || (x == best && i < id)) {
            best = x;
            id = i;
        }
    }
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

// The bin in which the sum from the highest bin on reaches `goal`: written to shared.found with
// what comes before it. One warp; lane l has the bins 255 - 8l down to 248 - 8l.
DEVICE void find_bin(const Shared& shared, bool by_count, uint64_t goal) {
    unsigned lane = threadIdx.x % 32;
    uint64_t count = 0, mass = 0;
    for (int i = 0; i < 8; i++) {
        count += shared.counts[255 - 8 * lane - i];
        mass += shared.masses[255 - 8 * lane - i];
    }
    uint64_t counts = count, masses = mass;
    for (int distance = 1; distance < 32; distance *= 2) {
        uint64_t other_count = __shfl_up_sync(FULL_WARP, counts, distance);
        uint64_t other_mass = __shfl_up_sync(FULL_WARP, masses, distance);
        if (lane >= unsigned(distance)) {
            counts += other_count;
            masses += other_mass;
        }
    }
    uint64_t with = by_count ? counts : masses, before = with - (by_count ? count : mass);
    if (before >= goal || with < goal) return;
    counts -= count;
    masses -= mass;
    for (int i = 0; i < 8; i++) {
        unsigned bin = 255 - 8 * lane - i;
        uint64_t next = by_count ? counts + shared.counts[bin] : masses + shared.masses[bin];
        if (next >= goal) {
            shared.found[0] = bin;
            shared.found[1] = counts;
            shared.found[2] = masses;
            return;
        }
        counts += shared.counts[bin];
        masses += shared.masses[bin];
    }
}

// The first place from the most likely token on where the count (the mass) reaches `goal`, which is
// at least 1 and at most that of all tokens.
DEVICE Place find_place(const float* logits, unsigned vocab, float best, const SampleRow& row,
                        const Shared& shared, bool by_count, uint64_t goal) {
    Place place = {0, 0, 0, 0, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (unsigned i = threadIdx.x; i < BINS; i += blockDim.x) {
            shared.masses[i] = 0;
            shared.counts[i] = 0;
        }
        __syncthreads();
        for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) {
            unsigned key = order_of(logits[i]);
            if (shift < 24 && key >> (shift + 8) != place.key) continue;
            unsigned bin = key >> shift & 255;
            atomicAdd(&shared.counts[bin], 1u);
            uint64_t mass = mass_of(logits[i], best, row);
            if (mass != 0) atomicAdd(&shared.masses[bin], static_cast<unsigned long long>(mass));
        }
        __syncthreads();
        uint64_t before = by_count ? place.before_count : place.before_mass;
        if (threadIdx.x < 32) find_bin(shared, by_count, goal - before);
        __syncthreads();
        place.key = place.key << 8 | unsigned(shared.found[0]);
        place.before_count += shared.found[1];
        place.before_mass += shared.found[2];
        __syncthreads();
    }
    place.mass = mass_of(with_order(place.key), best, row);
    uint64_t left = goal - (by_count ? place.before_count : place.before_mass);
    place.ties = by_count ? left : (left + place.mass - 1) / place.mass;
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
    uint64_t kept = 0;
    for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) kept += mass(i);
    kept = block_sum(kept, reinterpret_cast<uint64_t*>(shared.scratch));
    bool top_k = row.top_k != 0 && row.top_k < vocab;
    if (top_k) {
        Place last = find_place(logits, vocab, best, row, shared, true, row.top_k);
        kept = last.before_mass + last.ties * last.mass;
    }
    if (row.top_p < 1) {
        uint64_t goal = within(ceil(double(kept) * double(row.top_p)), kept);
        Place last = find_place(logits, vocab, best, row, shared, false, goal);
        kept = last.before_mass + last.ties * last.mass;
    }
    uint64_t goal = within(floor(uniform(row) * double(kept)) + 1, kept);
    if (row.top_k == 0 && !(row.top_p < 1)) return find_by_id(vocab, shared, goal, mass);
    Place place = find_place(logits, vocab, best, row, shared, false, goal);
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

KERNEL check_finite(const float* x, unsigned* flags, unsigned width) {
    SHARED(scratch);
    x += int64_t(blockIdx.x) * width;
    unsigned bad = 0;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) bad += !(x[i] - x[i] == 0);
    bad = block_sum(bad, reinterpret_cast<unsigned*>(scratch));
    if (threadIdx.x == 0) flags[blockIdx.x] = bad != 0;
}

KERNELS(sample, ENTRY(sample_rows), ENTRY(check_finite))
