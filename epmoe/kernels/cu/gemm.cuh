// The tile loop: one warp feeds a ring of shared-memory stages, two warpgroups multiply from it.
//
// A tile is 128 rows x 256 columns; each warpgroup has 64 of the rows and keeps 64 x 256 sums in
// registers.  A stage holds 64 of the K: 16 KiB of rows and 32 KiB of weights.  (With -D WIDE=128 it
// is half as wide: for so few tiles that half of the SMs would have none.)  The two CTAs of a
// cluster share either the weights or the rows of their tiles: each loads half of what is shared
// and multicasts it, so that a CTA takes 32 or 40 KiB a stage from L2 instead of 48 (without this
// the loop asks L2 for 48 B a cycle and SM, which it cannot give).
//
// The warpgroups wait for stages on their own, so one may be in its epilogue while the other
// multiplies.  (Making one start two stages late changed nothing: 708 against 710 TFLOP/s.)
#pragma once
#include "order.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

#ifndef WIDE
#define WIDE 256
#endif
constexpr int TILE_N = WIDE;
constexpr int TILE_K = 64;
constexpr int STAGES = WIDE == 256 ? 4 : 6;
constexpr int GROUPS = 2;                          // consumer warpgroups
constexpr int THREADS = (GROUPS + 1) * 128;        // and one whose first warp feeds them
// 168 at launch; what the feeding group gives back lets epilogues live without spills.  It uses 34 of
// its own, but given 72 the assembler (CUDA 13.0 to 13.5) spills in every kernel with a bias.
constexpr int FEED_REGISTERS = 104;
constexpr int MULTIPLY_REGISTERS = 200;
constexpr u32 ROW_BYTES = BLOCK * TILE_K * 2;      // of one stage
constexpr u32 WEIGHT_BYTES = TILE_N * TILE_K * 2;
constexpr u32 STAGE_BYTES = ROW_BYTES + WEIGHT_BYTES;
constexpr u32 STAGING_BYTES = 2 * 64 * 64 * 2;     // a warpgroup's results on their way out

// Where things lie in shared memory, from a base that is a multiple of 1024.
constexpr u32 STAGING_AT = STAGES * STAGE_BYTES;
constexpr u32 BARS_AT = STAGING_AT + GROUPS * STAGING_BYTES;
constexpr u32 ORDER_AT = BARS_AT + 2 * STAGES * 8;
constexpr u32 TABLE_AT = ORDER_AT + ORDER_BYTES;

struct Ring {
    u32 base;      // shared address of stage 0
    u32 turn = 0;  // stages so far, modulo two rounds of the ring: one register for stage and parity

    inline u32 stage() const { return turn < STAGES ? turn : turn - STAGES; }
    inline u32 phase() const { return turn >= STAGES; }
    inline u32 rows() const { return base + stage() * STAGE_BYTES; }
    inline u32 weights() const { return rows() + ROW_BYTES; }
    inline u32 full() const { return base + BARS_AT + stage() * 8; }
    inline u32 empty() const { return full() + STAGES * 8; }
    inline void next() { turn = turn == 2 * STAGES - 1 ? 0 : turn + 1; }
};

// One thread; the caller syncs the cluster afterwards.
inline void ring_init(u32 base) {
    for (u32 s = 0; s < STAGES; ++s) {
        bar_init(base + BARS_AT + s * 8, 1);
        bar_init(base + BARS_AT + (STAGES + s) * 8, 2 * GROUPS * 4);  // every warp of both CTAs
    }
    bar_init_done();
}

// What somebody who feeds a tile has to see to: `await` returns when its rows may be read, `passes` is told
// before each stage how many are left, this one included.  A GEMM alone has nothing to do.
struct Unhurried {
    inline void await() const {}
    inline void passes(int) const {}
};

// Feeds one tile of `steps` stages, of whose rows `live` are any: the half of a warpgroup that has none
// stays where it is.  One thread.  Weights of as many stages as are free go first.
template <bool same_rows, typename Duties>
inline void feed_as(Ring& ring, const TensorMap& rows, const TensorMap& weights, const Tile& tile,
                    int live, u32 rank, int steps, Duties duties) {
    constexpr u32 half_rows = ROW_BYTES / 2, half_weights = TILE_N / 2 * TILE_K * 2;
    const int row = tile.block * BLOCK, column = tile.column * TILE_N;
    const u32 halves = live > BLOCK / 2 ? 2 : 1;
    const auto begin = [&](const Ring& to) {
        bar_expect(to.full(), halves * half_rows + 2 * half_weights);
    };
    const auto send_rows = [&](const Ring& to, int x) {
        if (same_rows) {
            if (rank < halves)
                tma_load_both(to.rows() + rank * half_rows, rows, to.full(), x,
                              row + rank * (BLOCK / 2), 0);
        } else {
            tma_load(to.rows(), rows, to.full(), x, row, 0);
            if (halves == 2)
                tma_load(to.rows() + half_rows, rows, to.full(), x, row + BLOCK / 2, 0);
        }
    };
    const auto send_weights = [&](const Ring& to, int x) {
        if (same_rows) {
            tma_load(to.weights(), weights, to.full(), x, column, tile.slot);
            tma_load(to.weights() + half_weights, weights, to.full(), x, column + TILE_N / 2,
                     tile.slot);
        } else {
            tma_load_both(to.weights() + rank * half_weights, weights, to.full(), x,
                          column + rank * (TILE_N / 2), tile.slot);
        }
    };
    Ring ahead = ring;
    int sent = 0, k = 0;
#pragma unroll 1
    for (; sent < min(steps, STAGES) && bar_test(ahead.empty(), ahead.phase() ^ 1); ahead.next()) {
        begin(ahead);
        send_weights(ahead, sent++ * TILE_K);
    }
    duties.await();
#pragma unroll 1
    for (; k < sent; ++k, ring.next()) {
        duties.passes(steps - k);
        send_rows(ring, k * TILE_K);
    }
    // This loop is the pace of tiles of 128 columns, down to its branches.
#pragma unroll 1
    for (; k < steps; ++k, ring.next()) {
        duties.passes(steps - k);
        bar_wait(ring.empty(), ring.phase() ^ 1);
        begin(ring);
        send_rows(ring, k * TILE_K);
        send_weights(ring, k * TILE_K);
    }
}

template <typename Duties>
inline void feed(Ring& ring, const TensorMap& rows, const TensorMap& weights, const Tile& tile,
                 int live, u32 rank, int steps, Duties duties) {
    if (tile.same_rows) feed_as<true>(ring, rows, weights, tile, live, rank, steps, duties);
    else feed_as<false>(ring, rows, weights, tile, live, rank, steps, duties);
}

// A warp gives a stage back to both CTAs: either may have multicast into it.
inline void release(u32 empty, u32 lane) {
    if (lane < 2) bar_arrive_at(empty, lane);
}

// Called before the first wait of a tile that would block, else in the course of its steps, if it has
// enough of them: the time to see to what an earlier tile left behind.  A GEMM alone has nothing to do.
// Before any wait, the second step's too: where CTAs share weights the mate may have sent those of one
// stage only, and wait for what we have not seen to yet (tests/model/test_feeding.py).
struct Nothing {
    inline void operator()() const {}
};

// Multiplies one tile into `sums`; warpgroup `group` has rows 64 * group .. + 63.
template <typename Between>
inline void multiply(Ring& ring, float (&sums)[TILE_N / 2], u32 group, int steps, Between between) {
    u32 before = 0;
    const u32 lane = lane_index();
    const bool late = !bar_test(ring.full(), ring.phase());
    if (late) between();
    for (int k = 0; k < steps; ++k, ring.next()) {
        if (!late && (k == 2 || (k == 1 && !bar_test(ring.full(), ring.phase())))) between();
        bar_wait(ring.full(), ring.phase());
        const u64 a = tile_descriptor(ring.rows() + group * (ROW_BYTES / 2));
        const u64 b = tile_descriptor(ring.weights());
        wgmma_begin();
#pragma unroll
        for (u32 i = 0; i < TILE_K / 16; ++i)
            Wgmma<TILE_N>::run(sums, a + 2 * i, b + 2 * i, (k | i) != 0);
        wgmma_commit();
        wgmma_wait<1>();  // the stage before this one has been read
        if (k) release(before, lane);
        before = ring.empty();
    }
    wgmma_wait<0>();
    release(before, lane);
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A warpgroup without live rows in this tile only keeps the ring turning.
inline void skip(Ring& ring, int steps) {
    const u32 lane = lane_index();
    for (int k = 0; k < steps; ++k, ring.next()) {
        bar_wait(ring.full(), ring.phase());
        release(ring.empty(), lane);
    }
}
