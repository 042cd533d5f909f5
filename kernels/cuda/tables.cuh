// Pages of views, entries of tables, and which keys a row sees.
#pragma once
#include "device.cuh"

// A run of rows of a block as the view lists it.
struct alignas(16) Page {
    unsigned block, stored_position;
    uint16_t first_row, num_valid, active, segment;
};

// A run of rows as attention sees it.
struct alignas(16) TableEntry {
    unsigned row;        // of the cache, of its first key
    unsigned first;      // how many keys are visible before it
    int delta;           // a query at p turns to p - delta
    unsigned num_valid;  // its keys
};

// A part of a row's keys that one block works on.
struct alignas(16) SplitItem {
    unsigned row, split;
    unsigned entry;  // that holds the split's first key, counted from the sequence's first
    unsigned unused;
};

// The keys [first, end) a row sees.
struct Visible {
    unsigned first, end;
};

DEVICE Visible visible_keys(unsigned position, unsigned keys, unsigned window) {
    unsigned end = min(position + 1, keys);
    unsigned first = window != 0 && position + 1 > window ? position + 1 - window : 0;
    return {min(first, end), end};
}

// The entry that holds key `key`: the last one that begins at it or before.
DEVICE unsigned find_entry(const TableEntry* entries, unsigned count, unsigned key) {
    unsigned low = 0, high = count;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if (entries[middle].first <= key) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Lists the keys [start, end), of which `entry` holds the first: their rows of the cache, and by how
// much queries turn for them. Rows outside the cache become row 0 and set `bad`. `next` becomes the
// entry that holds key `end`. For all threads of a block; a barrier comes behind it.
DEVICE void list_keys(const TableEntry* entries, unsigned count, unsigned entry, unsigned start,
                      unsigned end, unsigned slots, unsigned* rows, int* deltas, unsigned* bad,
                      unsigned* next) {
    for (unsigned base = entry; base < count; base += blockDim.x) {
        unsigned i = base + threadIdx.x;
        if (i < count && entries[i].first < end) {
            TableEntry found = entries[i];
            unsigned first = max(found.first, start), found_end = found.first + found.num_valid;
            bool inside = uint64_t(found.row) + found.num_valid <= slots;
            if (!inside) *bad = 1;
            for (unsigned key = first; key < min(found_end, end); key++) {
                rows[key - start] = inside ? found.row + (key - found.first) : 0;
                deltas[key - start] = found.delta;
            }
            if (found_end >= end) *next = found_end == end ? i + 1 : i;
        }
        unsigned following = base + blockDim.x;
        if (following >= count || entries[following].first >= end) break;
    }
}
