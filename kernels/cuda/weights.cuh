// Weights as products read them: a warp holds 16 columns (output features) of a group of 32 inputs
// in the shape of matrix instructions. Dense rows lie as they are; blocks of small integers are
// packed in that shape (gpu/quantized.rs draws it), and become exact numbers of 16 bits here.
//
// Lane l = 4 g + c has, for the two halves t of the columns and the two halves j of the inputs, the
// numbers of column 8 t + g for the inputs 16 j + 4 c ... 16 j + 4 c + 3: pairs p = 2 j and 2 j + 1
// of that column.
#pragma once
#include "device.cuh"

constexpr unsigned GROUP = 32;
constexpr unsigned COLUMNS = 16;

// (n, k)
struct Matrix {
    const void* values;
    unsigned n, k;
};

// Rows of 16-bit numbers, k a multiple of 4.
template <class T> struct Dense {
    using Number = T;
    static constexpr bool IS_SCALED = false;
    struct Raw {
        uint2 words[2][2];
    };

    static DEVICE Raw load(const Matrix& w, unsigned tile, unsigned group) {
        unsigned lane = threadIdx.x % 32;
        Raw raw;
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                unsigned column = tile * COLUMNS + 8 * t + lane / 4;
                unsigned at = group * GROUP + 16 * j + lane % 4 * 4;
                const T* from = static_cast<const T*>(w.values) + int64_t(column) * w.k + at;
                raw.words[t][j] =
                    column < w.n && at < w.k ? load_once_2(from) : make_uint2(0, 0);
            }
        }
        return raw;
    }

    static DEVICE unsigned pair(const Raw& raw, int t, int p) {
        return p % 2 ? raw.words[t][p / 2].y : raw.words[t][p / 2].x;
    }
};

// The scales of a lane's accumulators: of the columns 8 t + 2 c + e.
struct Scales {
    float of[2][2];
};

template <int BITS, int CENTER, bool HAS_OFFSET, bool HAS_FACTORS, int PARTS = 1> struct Blocks {
    using Number = F16;
    static constexpr bool IS_SCALED = true, IS_OFFSET = HAS_OFFSET;
    // Scales of a group.
    static constexpr int NUM_SCALES = PARTS;
    // Groups of a block.
    static constexpr unsigned GROUPS = HAS_FACTORS ? 8 : 1;
    struct Raw {
        unsigned codes[BITS == 8 ? 4 : 2];
        unsigned high;
        uint2 scale, offset;
        unsigned factors[PARTS], offset_factors;
    };

    static DEVICE Raw load(const Matrix& w, unsigned tile, unsigned group) {
        // Bytes of a lane's codes in a group, below and above their fourth bit.
        constexpr unsigned CODES = BITS == 8 ? 16 : 8, HIGH = BITS == 5 ? 2 : BITS == 6 ? 4 : 0;
        unsigned lane = threadIdx.x % 32, c = lane % 4, groups = w.k / GROUP;
        unsigned high = groups * 32 * CODES, scales = high + groups * 32 * HIGH;
        unsigned offsets = scales + groups / GROUPS * 32;
        unsigned factors = offsets + (HAS_OFFSET ? groups / GROUPS * 32 : 0);
        unsigned offset_factors = factors + (HAS_FACTORS ? groups * PARTS * 16 : 0);
        unsigned end = offset_factors + (HAS_FACTORS && HAS_OFFSET ? groups * 16 : 0);
        const char* base = static_cast<const char*>(w.values) + int64_t(tile) * end;
        auto word = [&](unsigned plane, unsigned at) {
            return *reinterpret_cast<const unsigned*>(base + plane + 4 * at);
        };
        auto halves = [&](unsigned plane) {
            const char* from = base + plane + 8 * (group / GROUPS * 4 + c);
            return *reinterpret_cast<const uint2*>(from);
        };
        unsigned place = group * 32 + lane;
        Raw raw = {};
        if constexpr (BITS == 8) {
            uint4 words = load_once(base + CODES * place);
            raw.codes[0] = words.x, raw.codes[1] = words.y;
            raw.codes[2] = words.z, raw.codes[3] = words.w;
        } else {
            uint2 words = load_once_2(base + CODES * place);
            raw.codes[0] = words.x, raw.codes[1] = words.y;
        }
        if constexpr (BITS == 5) {
            unsigned bits = *reinterpret_cast<const uint16_t*>(base + high + HIGH * place);
            raw.high = (bits & 0xff) << 4 | (bits & 0xff00) << 12;
        }
        if constexpr (BITS == 6) raw.high = word(high, place);
        raw.scale = halves(scales);
        if constexpr (HAS_OFFSET) raw.offset = halves(offsets);
        if constexpr (HAS_FACTORS) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                raw.factors[part] = word(factors, (group * PARTS + part) * 4 + c);
            }
            if constexpr (HAS_OFFSET) raw.offset_factors = word(offset_factors, group * 4 + c);
        }
        return raw;
    }

    // Two codes less the center, as numbers.
    static DEVICE unsigned pair(const Raw& raw, int t, int p) {
        unsigned both;
        if constexpr (BITS == 8) {
            both = __byte_perm(raw.codes[2 * t + p / 2], 0x64646464, p % 2 ? 0x4342 : 0x4140);
        } else {
            both = (raw.codes[t] >> (4 * p) & 0x000f000f) | 0x64006400;
            if constexpr (BITS == 5) both |= raw.high >> (4 * t + p) & 0x00100010;
            if constexpr (BITS == 6) both |= (raw.high >> (8 * t + 2 * p) & 0x00030003) << 4;
        }
        return less_1024<CENTER>(both);
    }

    static DEVICE Scales scales(const Raw& raw, int part) {
        Scales scales = widened(raw.scale);
        if constexpr (HAS_FACTORS) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned byte = raw.factors[part] >> (8 * i) & 0xff;
                // only the formats of six bits have signed factors
                int factor = BITS == 6 ? int(byte ^ 0x80) - 0x80 : int(byte);
                scales.of[i / 2][i % 2] *= float(factor);
            }
        }
        return scales;
    }

    static DEVICE Scales offsets(const Raw& raw) {
        Scales offsets = widened(raw.offset);
        if constexpr (HAS_FACTORS) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned byte = raw.offset_factors >> (8 * i) & 0xff;
                offsets.of[i / 2][i % 2] *= -float(byte);
            }
        }
        return offsets;
    }

    static DEVICE Scales widened(uint2 halves) {
        float2 first = unpack<F16>(halves.x), second = unpack<F16>(halves.y);
        return {{{first.x, first.y}, {second.x, second.y}}};
    }
};

using Q4_0 = Blocks<4, 8, false, false>;
using Q4_1 = Blocks<4, 0, true, false>;
using Q5_0 = Blocks<5, 16, false, false>;
using Q5_1 = Blocks<5, 0, true, false>;
using Q8_0 = Blocks<8, 128, false, false>;
using Q4_K = Blocks<4, 0, true, true>;
using Q5_K = Blocks<5, 0, true, true>;
using Q6_K = Blocks<6, 32, false, true, 2>;
