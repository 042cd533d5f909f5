// Rows of KV between the pool and a plain array, 16 bytes at a time; y of the grid is the frame.
#include "device.cuh"

// Words of 16 bytes a thread moves.
constexpr int WORDS = 4;

// Calls move(word of the pool or -1, word of the rows) for this thread's words.
template <class Move>
DEVICE void for_words(const unsigned* slots, int64_t frame_start, unsigned limit,
                      unsigned row_words, unsigned num_slots, Move move) {
    int64_t total = int64_t(num_slots) * row_words;
    for (int n = 0; n < WORDS; n++) {
        int64_t i = (int64_t(blockIdx.x) * WORDS + n) * blockDim.x + threadIdx.x;
        if (i >= total) return;
        unsigned slot = slots[i / row_words];
        int64_t place = frame_start + int64_t(slot) * row_words + i % row_words;
        move(slot < limit ? place : -1, int64_t(blockIdx.y) * total + i);
    }
}

KERNEL gather_kv(const uint4* pool, const unsigned* slots, uint4* rows, unsigned first,
                 int64_t frame_words, unsigned limit, unsigned row_words, unsigned num_slots) {
    int64_t start = (first + blockIdx.y) * frame_words;
    for_words(slots, start, limit, row_words, num_slots, [=](int64_t place, int64_t row) {
        rows[row] = place >= 0 ? pool[place] : make_uint4(0, 0, 0, 0);
    });
}

KERNEL scatter_kv(uint4* pool, const unsigned* slots, const uint4* rows, unsigned first,
                  int64_t frame_words, unsigned limit, unsigned row_words, unsigned num_slots) {
    int64_t start = (first + blockIdx.y) * frame_words;
    for_words(slots, start, limit, row_words, num_slots, [=](int64_t place, int64_t row) {
        if (place >= 0) pool[place] = rows[row];
    });
}

KERNEL poison_kv(uint4* pool, const unsigned* slots, int64_t frame_words, unsigned limit,
                 unsigned row_words, unsigned num_slots) {
    int64_t start = blockIdx.y * frame_words;
    constexpr unsigned NANS = 0x7fff7fff;
    for_words(slots, start, limit, row_words, num_slots, [=](int64_t place, int64_t) {
        if (place >= 0) pool[place] = make_uint4(NANS, NANS, NANS, NANS);
    });
}

KERNELS(move_rows, ENTRY(gather_kv), ENTRY(scatter_kv), ENTRY(poison_kv))
