// Tables out of pages, and the list of splits that decode attention works on.
#include "tables.cuh"

// What the threads before this one have, and what all have. `scratch` holds a number per warp; all
// threads have left it when this returns.
DEVICE void block_scan(unsigned mine, unsigned* scratch, unsigned& before, unsigned& total) {
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    unsigned sum = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
        unsigned other = __shfl_up_sync(FULL_WARP, sum, distance);
        if (lane >= unsigned(distance)) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    before = sum - mine;
    total = 0;
    for (unsigned i = 0; i < warps; i++) {
        if (i < warp) before += scratch[i];
        total += scratch[i];
    }
    __syncthreads();
}

// A block per sequence.
KERNEL filter_view(const Page* pages, const unsigned* starts, const unsigned* ends,
                   unsigned max_pages, unsigned block_size, TableEntry* entries,
                   unsigned* num_entries, unsigned* num_keys) {
    SHARED(scratch);
    unsigned sequence = blockIdx.x;
    unsigned start = min(starts[sequence], max_pages), end = min(ends[sequence], max_pages);
    unsigned entries_before = 0, keys_before = 0;
    for (unsigned base = start; base < end; base += blockDim.x) {
        unsigned i = base + threadIdx.x;
        Page page = {};
        if (i < end) page = pages[i];
        bool kept = page.active != 0 && page.num_valid > 0;
        unsigned place, kept_count, first, keys;
        unsigned* words = reinterpret_cast<unsigned*>(scratch);
        block_scan(kept ? 1 : 0, words, place, kept_count);
        block_scan(kept ? page.num_valid : 0, words, first, keys);
        if (kept) {
            TableEntry entry;
            entry.row = page.block * block_size + page.first_row;
            entry.first = keys_before + first;
            entry.delta = static_cast<int>(entry.first) - static_cast<int>(page.stored_position);
            entry.num_valid = page.num_valid;
            entries[start + entries_before + place] = entry;
        }
        entries_before += kept_count;
        keys_before += keys;
    }
    if (threadIdx.x == 0) {
        num_entries[sequence] = entries_before;
        num_keys[sequence] = keys_before;
    }
}

// One block for all rows: their splits, one after another.
KERNEL __launch_bounds__(1024)
    split_plan(const unsigned* row_sequence, const unsigned* positions, const unsigned* num_keys,
               SplitItem* items, unsigned* starts, unsigned rows, unsigned max_splits,
               unsigned split, unsigned window) {
    SHARED(scratch);
    unsigned base = 0;
    for (unsigned first = 0; first < rows; first += blockDim.x) {
        unsigned row = first + threadIdx.x, count = 0;
        if (row < rows) {
            unsigned sequence = row_sequence ? row_sequence[row] : row;
            Visible keys = visible_keys(positions[row], num_keys[sequence], window);
            count = min((keys.end - keys.first + split - 1) / split, max_splits);
        }
        unsigned before, total;
        block_scan(count, reinterpret_cast<unsigned*>(scratch), before, total);
        if (row < rows) {
            starts[row] = base + before;
            for (unsigned i = 0; i < count; i++) {
                SplitItem item = {row, i, 0, 0};
                items[base + before + i] = item;
            }
        }
        base += total;
    }
    if (threadIdx.x == 0) starts[rows] = base;
}

// Where each split begins in its table: looked up once, not once per layer.
KERNEL split_entries(const unsigned* row_sequence, const unsigned* positions,
                     const TableEntry* entries, const unsigned* table_starts,
                     const unsigned* num_entries, const unsigned* num_keys, SplitItem* items,
                     const unsigned* starts, unsigned rows, unsigned split, unsigned window) {
    unsigned count = starts[rows];
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
        SplitItem item = items[i];
        unsigned sequence = row_sequence ? row_sequence[item.row] : item.row;
        Visible keys = visible_keys(positions[item.row], num_keys[sequence], window);
        unsigned key = keys.first + item.split * split;
        item.entry = find_entry(entries + table_starts[sequence], num_entries[sequence], key);
        items[i] = item;
    }
}

KERNELS(filter_view, ENTRY(filter_view), ENTRY(split_plan), ENTRY(split_entries))
