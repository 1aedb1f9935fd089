// Rows from anywhere to anywhere by the copy engine: one thread of a warp drives a small ring.
//
// Measured on 8 GPUs: 8 to 16 blocks of such warps keep a link busy (326 to 330 GB/s of 338).
#pragma once
#include "ptx.cuh"

constexpr u32 PIECE = 7168;   // bytes under way in one stage: half a row of hidden 7168 in bf16
constexpr u32 DEPTH = 4;      // stages of a warp; up to three loads are in flight while one stores
constexpr u32 MOVERS = 7;     // warps of a block: 7 x 4 x 7 KiB of shared memory
constexpr u32 MOVER_BYTES = MOVERS * DEPTH * (PIECE + 8);

// The ring of one warp; only one thread of it may touch it.
struct Mover {
    u32 ring, bars;
    u32 loads = 0, stores = 0;

    inline Mover(u32 base, u32 warp)
        : ring(base + warp * DEPTH * PIECE), bars(base + MOVERS * DEPTH * PIECE + warp * DEPTH * 8) {
        for (u32 s = 0; s < DEPTH; ++s) bar_init(bars + 8 * s, 1);
        bar_init_done();
    }

    inline void load(const void* from, u32 bytes) {
        const u32 s = loads++ % DEPTH;
        bulk_wait_read<1>();  // what was stored from this stage has been read; one newer may not
        bar_expect(bars + 8 * s, bytes);
        bulk_load(ring + s * PIECE, from, bytes, bars + 8 * s);
    }

    inline void store(void* to, u32 bytes) {
        const u32 s = stores % DEPTH;
        bar_wait(bars + 8 * s, stores / DEPTH % 2);
        ++stores;
        bulk_store(to, ring + s * PIECE, bytes);
        bulk_commit();
    }
};

// Copies the rows that `next` names until it has none: next(from, to) -> bool.  One thread.
template <u32 bytes, typename Next>
inline void move_rows(Mover& mover, Next next) {
    constexpr u32 pieces = (bytes + PIECE - 1) / PIECE;
    struct Row {
        u64 from, to;
    } rows[DEPTH];
    u32 asked = 0, done = 0;  // pieces
    bool more = true;
    u32 row = 0;
    for (;;) {
        while (more && asked < done + DEPTH - 1) {
            const u32 piece = asked % pieces;
            if (piece == 0) {
                Row& fresh = rows[row % DEPTH];
                more = next(fresh.from, fresh.to);
                if (!more) break;
                ++row;
            }
            const u32 start = piece * PIECE, left = bytes - start;
            mover.load(reinterpret_cast<const void*>(rows[(row - 1) % DEPTH].from + start),
                       left < PIECE ? left : PIECE);
            ++asked;
        }
        if (done == asked) break;
        const u32 piece = done % pieces, start = piece * PIECE, left = bytes - start;
        mover.store(reinterpret_cast<void*>(rows[done / pieces % DEPTH].to + start),
                    left < PIECE ? left : PIECE);
        ++done;
    }
    bulk_wait<0>();
}
