// One stream of tiles through both GEMMs: FC2 of a group of rows comes LAG tiles behind its FC1.
//
// In waves (all FC1, then all FC2) every CTA would wait at the boundary, and pulls and results would
// meet there.  A tile depends only on tiles before it in the stream, and whoever holds those is
// running, so no order of execution can deadlock.
#pragma once
#include "tiles.cuh"

// The slots that have rows this round, in the caller's memory: counts of 0 cost nothing later.
// Units are the rows of one tile: BLOCK, or CHUNK on the narrow path.
struct Live {
    int* slot;    // [slots]
    int* rows;    // [slots]
    int* block;   // [slots + 1] blocks of the pool before it
    int* unit;    // [slots + 1] units before it; where a unit is a block, the same table
    int* count;   // [1] how many there are

    inline Live(int* at, int slots, bool smaller)
        : slot(at), rows(at + slots), block(at + 2 * slots),
          unit(smaller ? at + 3 * slots + 1 : block), count(at + (smaller ? 4 : 3) * slots + 2) {}
};
constexpr int live_words(int slots, bool smaller) { return (smaller ? 4 : 3) * slots + 4; }

// One warp fills `live` from rows_of(slot); the caller makes it visible.
template <int slots, int unit_rows, typename Rows>
inline void find_live(const Live& live, Rows rows_of) {
    int blocks = 0, units = 0, found = 0;
#pragma unroll 1
    for (int first = 0; first < slots; first += 32) {
        const int s = first + lane_index(), rows = s < slots ? rows_of(s) : 0;
        const int b = scanned((rows + BLOCK - 1) / BLOCK), u = scanned((rows + unit_rows - 1) / unit_rows);
        const u32 has = __ballot_sync(~0u, rows > 0);
        if (rows > 0) {
            const int i = found + __popc(has & ((1u << lane_index()) - 1));
            live.slot[i] = s;
            live.rows[i] = rows;
            live.block[i + 1] = blocks + b;
            live.unit[i + 1] = units + u;
        }
        found += __popc(has);
        blocks += __shfl_sync(~0u, b, 31);
        units += __shfl_sync(~0u, u, 31);
    }
    if (lane_index() == 0) live.block[0] = live.unit[0] = 0, *live.count = found;
}

// One thread: nothing to do in this round.
inline void none_live(const Live& live) { live.block[0] = live.unit[0] = *live.count = 0; }

// A group: up to GROUP units of one slot, whose tiles of one GEMM follow each other.
struct Cursor {
    int i = 0, at = 0;  // live slot, units of it already passed

    inline bool done(const Live& live) const { return i == *live.count; }
    inline int begin(const Live& live) const { return live.unit[i] + at; }
    inline int units(const Live& live) const {
        return min(GROUP, live.unit[i + 1] - live.unit[i] - at);
    }
    inline void next(const Live& live) {
        at += units(live);
        if (live.unit[i] + at == live.unit[i + 1]) ++i, at = 0;
    }
};

// Walks the stream forwards.  `per1`, `per2`: tiles of one unit in the two GEMMs; `lag` in tiles of
// the first.
template <int per1, int per2, int lag, int unit_rows>
struct Stream {
    Cursor one, two;         // the next groups of either GEMM
    u32 begin = 0, end = 0;  // the tiles of the current group
    int gemm = 0;            // 0: FC1, 1: FC2
    int slot, row, units;    // its slot, its first row of the pool, how many units
    int rows;                // rows of the slot from there on

    static inline u32 tiles(const Live& live) {
        return live.unit[*live.count] * (per1 + per2);
    }

    // Makes the group of tile t the current one, which is below tiles(live) and not below an earlier t.
    inline void to(const Live& live, u32 t) {
        while (t >= end) {
            gemm = one.done(live) ||
                   (one.begin(live) - two.begin(live) - two.units(live)) * per1 >= lag;
            Cursor taken = gemm ? two : one;  // a copy: a reference would put both into memory
            units = taken.units(live);
            begin = end;
            end += units * (gemm ? per2 : per1);
            slot = live.slot[taken.i];
            row = live.block[taken.i] * BLOCK + taken.at * unit_rows;
            rows = live.rows[taken.i] - taken.at * unit_rows;
            taken.next(live);
            if (gemm) two = taken;
            else one = taken;
        }
    }
};
