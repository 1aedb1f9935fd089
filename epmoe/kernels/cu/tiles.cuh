// Which tile comes when: every role of every CTA derives the same order from the counts alone.
//
// Rows of a slot are contiguous in the pool and begin at a multiple of BLOCK rows; slots follow
// each other without a gap.  The numbers of whole blocks before each slot are all that is kept.
#pragma once
#include "ptx.cuh"

constexpr int BLOCK = 128;  // rows of a block: the tile of the wide path, the unit of arrival
constexpr int GROUP = 16;   // blocks that share a pass over the weights, so that rows stay in L2

inline int up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// before[s] = units of `unit` rows in slots 0 .. s-1, before[slots] = all of them.  One warp; the
// caller makes the result visible.  Example: counts 130, 0, 5 in units of 128 -> 0, 2, 2, 3.
template <int slots>
inline void count_units(const int* counts, int* before, int unit) {
    const int lane = lane_index();
    int base = 0;
    for (int first = 0; first < slots; first += 32) {
        const int slot = first + lane;
        int sum = slot < slots ? (counts[slot] + unit - 1) / unit : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (slot < slots) before[slot + 1] = base + sum;
        base += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) before[0] = 0;
}

// The slot s with before[s] * per <= t < before[s + 1] * per.  A whole warp together: 32 slots are
// looked at in one step, so that 512 slots cost no more than 16.
template <int slots>
inline int slot_of(const int* before, int t, int per) {
    for (int from = 0;; from += 32) {
        const int slot = from + (int)lane_index();
        const u32 hits = __ballot_sync(~0u, slot < slots && t < before[slot + 1] * per);
        if (hits) return from + __ffs(hits) - 1;
    }
}

// A tile of BLOCK rows x 256 columns, one of the two that a cluster of two CTAs works on together.
struct Tile {
    int slot;
    int block;       // block of rows, counted over the whole pool
    int column;      // tile of columns
    bool same_rows;  // both CTAs have this block, else both have this column
    bool none;       // past the last column: nothing to do for either
};

// Cluster tile `rest` of a group of `blocks` blocks, as CTA `rank` of the cluster sees it.
//
// A cluster takes two blocks of one slot and one column (they share the weights) and, where a
// group has an odd number of blocks, its last block with two columns (they share the rows): no CTA
// ever works on padding blocks.  Columns go in pairs: first all block pairs of one column, then of
// the next, then the odd block with both.  `blocks` cluster tiles make a pair of columns.
template <int columns>
inline Tile tile_in_group(int slot, int first, int blocks, int rest, int rank) {
    const int pairs = blocks / 2, pass = rest / blocks;
    rest -= pass * blocks;
    Tile tile;
    tile.slot = slot;
    tile.same_rows = rest == 2 * pairs;
    if (tile.same_rows) {
        tile.block = first + blocks - 1;
        tile.column = 2 * pass + rank;
        tile.none = false;
    } else {
        const int second = rest >= pairs;
        tile.block = first + 2 * (rest - second * pairs) + rank;
        tile.column = 2 * pass + second;
        tile.none = tile.column >= columns;
    }
    return tile;
}

// Cluster tile t of a GEMM with `columns` tiles of columns: slot by slot, group by group.
template <int slots, int columns>
inline Tile wide_tile(const int* before, int t, int rank) {
    constexpr int per = (columns + 1) / 2;  // cluster tiles of one block
    const int slot = slot_of<slots>(before, t, per), first = before[slot];
    const int rest = t - first * per, group = rest / (GROUP * per);
    const int blocks = min(GROUP, before[slot + 1] - first - group * GROUP);
    return tile_in_group<columns>(slot, first + group * GROUP, blocks, rest - group * (GROUP * per),
                                  rank);
}
