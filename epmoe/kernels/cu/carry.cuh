// How rows come in a fused round: pulled slot by slot.  Results go out by themselves (send.cuh).
//
// Constants as in exchange.cuh.
#pragma once
#include "exchange.cuh"

// LANES lanes of a carrying warp see to a row: it comes in in pieces of up to 7 KiB, one lane to a piece,
// and is written for its choices on this rank, one lane to a choice.  Two batches of rows are under
// way: one comes in while the one before it is written and the jobs of the next are looked up.  One
// thread with one row at a time cannot hide what it waits for: its list entry, its row, its stores and
// the fence before it says so took 10 us a row.
constexpr u32 BATCH_BYTES = RECORD > 14336 ? RECORD : 14336;
constexpr u32 CARRY_BYTES = 2 * BATCH_BYTES;  // of a warp
constexpr u32 CARRIERS = 200704 / CARRY_BYTES;
constexpr u32 PIECES = (RECORD + 7167) / 7168;
constexpr u32 PIECE = (RECORD + PIECES * 16 - 1) / (PIECES * 16) * 16;
constexpr u32 FIT = BATCH_BYTES / (PIECE * PIECES) ? BATCH_BYTES / (PIECE * PIECES) : 1;
constexpr u32 LANES = CHOICES > PIECES ? CHOICES : PIECES;
constexpr u32 MOST_AT_ONCE = LANES > 4 ? 32 / LANES : 8;  // a barrier each, beside the tables
constexpr u32 AT_ONCE = FIT < MOST_AT_ONCE ? FIT : MOST_AT_ONCE;  // rows of a batch
constexpr u32 CARRY_BARS = CARRIERS * CARRY_BYTES;            // one barrier a row and half
constexpr u32 CARRY_SHARED = CARRY_BARS + CARRIERS * 2 * AT_ONCE * 8;
static_assert(AT_ONCE * PIECES * PIECE <= BATCH_BYTES + 16 * PIECES, "a batch does not fit");

// What one warp pulls: lane n has row n / LANES of a batch, and there piece and choice n % LANES.
//
// Turns: a row each, slot by slot, so that a slot's first block is complete first; in a slot source by
// source (source_of).  Example, 2 ranks, rank 0, counts 2 (me) and 1 (rank 1) for a slot: rank 1's row
// is row 0 of the slot, mine are rows 1 and 2.  (One row of every source in turn left a turn empty
// wherever a source had fewer rows than the longest: with eight ranks 24 % of qwen3-30b's at 512 rows, 65
// at 16.)
//
// A batch is a run of turns, so that it needs few blocks of the ring; it is as short as lets all
// warps have one.
struct Carrier {
    const World& world;
    const Private& mine;
    const Tables& t;
    const u32 epoch, round;
    const bool together;  // rows are pulled once, not once a choice
    const u32 all;
    u32 step, turn;       // from one batch to the next; this lane's next turn, past all if it has none
    int slot = 0, left_slot = 0;
    bool broken = false;
    // Which row is next: its cell, as its source says, and where it goes if it is pulled for one choice.
    bool aimed = false;
    u32 next = NOWHERE, row = NOWHERE;
    // The job of this lane: a row to read, if there is one, and where to write it, if anywhere.
    u32 nth = 0, cell = NOWHERE, sibling = NOT_THEIRS;  // of the n-th source
    u64 from = 0, to = 0;
    u32* done = nullptr;  // counts the row when it has landed

    static constexpr u32 NOWHERE = ~0u;

    // Warp `index` of `warps`.
    inline Carrier(const World& world, const Private& mine, const Tables& t, u32 epoch, u32 round,
                   u32 index, u32 warps)
        : world(world), mine(mine), t(t), epoch(epoch), round(round), together(t.together()),
          all(t.turn[LOCAL]) {
        const u32 at = lane_index() / LANES;
        const u32 width = min(AT_ONCE, max((all + warps - 1) / warps, 1u));
        step = warps * width;
        turn = at < width ? index * width + at : NOWHERE;
    }

    // All lanes: find the next batch.  False if it cannot come now; with `wait` only when all is done
    // or broken.
    inline bool find(bool wait) {
        from = 0;
        u64 started = 0;
        for (u32 look = 1; !broken && __any_sync(~0u, turn < all); ++look) {
            aim();
            if (room()) {
                take();
                return !broken;
            }
            if (!wait) return false;
            if (look % 64 == 0) broken = __any_sync(~0u, too_long(started));
        }
        return false;
    }

    inline bool too_long(u64& started) const {
        if (faulted(world)) return true;
        const u64 now = global_nanoseconds();
        if (!started) started = now;
        if (now - started <= *reinterpret_cast<const u64*>(world.limit)) return false;
        fail(world, STOPPED, world.rank, OWN_BLOCKS, round, turn, now - started);
        return true;
    }

    inline u32 source() const { return source_of(world, nth); }

    inline u32 rows_in(int slot, u32 block) const {  // `block` counted over all slots
        return min((u32)BLOCK, t.before[RANKS][slot] - (block - t.block[slot]) * BLOCK);
    }

    // The row of the pool for entry j of the source's list of this slot.
    inline u32 row_of(u32 slot, u32 j) const {
        return t.block[slot] * BLOCK + t.before[nth][slot] + j;
    }

    // Once a batch, before the one before it is done with: its list entries take a microsecond to come.
    inline void aim() {
        if (aimed) return;
        aimed = true;
        if (turn >= all) return;
        slot = at_or_after(t.turn, slot, turn);
        u32 j = turn - t.turn[slot];
        nth = 0;
#pragma unroll
        for (u32 n = 0; n + 1 < RANKS; ++n) {
            const u32 these = together ? t.pulled[n][slot] : t.count(n, slot);
            const bool past = nth == n && j >= these;
            nth += past;
            j -= past ? these : 0;
        }
        row = row_of(slot, j);
        next = at<u32>(world, world.rank, LISTS_AT)[(u64)source() * CELLS + t.first[nth][slot] + j];
    }

    // What was in the ring where the next batch goes is not needed any more.
    inline bool room() {
        if (together) return true;
        bool good = true;
        if (turn < all && row / BLOCK >= RING) {
            const u32 before = row / BLOCK - RING;
            left_slot = at_or_after(t.block, left_slot, before);
            good = load_acquire(progress(mine, epoch, WHOLE) + before) >=
                   tiles_of(1, rows_in(left_slot, before));
        }
        return __all_sync(~0u, good);
    }

    // Which row comes next.
    inline void take() {
        bool bad = false;
        if (turn < all) {
            cell = next;
            bad = cell >= CELLS;
            if (bad) fail(world, CORRUPT, source(), WORD_C, round, cell, 0);
            else from = world.slab[source()] + ROWS_AT + (u64)(cell / CHOICES) * RECORD;
        }
        if (turn != NOWHERE) turn += step;
        aimed = false;
        broken = __any_sync(~0u, bad);
    }

    // While it is on its way: where its choices go, of whom this lane has one.
    inline void ask() {
        if (!from || !together) return;
        const u32 mate = lane_index() % LANES;
        cell += mate - cell % CHOICES;
        if (mate < CHOICES)
            sibling = at<u32>(world, world.rank, SIBLINGS_AT)[(u64)source() * CELLS + cell];
    }

    // When that is known: before the next `aim`.
    inline void place() {
        const u32 mate = lane_index() % LANES;
        bool bad = false;
        to = 0;
        done = nullptr;
        if (from) {
            if (together ? mate >= CHOICES : mate) row = NOWHERE;
            else if (together) bad = !find_place();
            if (bad) fail(world, CORRUPT, source(), WORD_C, round, cell, 0);
            else if (row != NOWHERE) send_to();
        }
        broken = __any_sync(~0u, bad);
    }

    // Where a choice of the row is in the pool.  False if that cannot be.
    inline bool find_place() {
        row = NOWHERE;
        if (sibling == NOT_THEIRS) return true;
        const u32 slot = sibling >> 19, j = sibling & ((1 << 19) - 1);
        if (slot >= LOCAL || j >= (u32)t.count(nth, slot)) return false;
        row = row_of(slot, j);
        return true;
    }

    inline void send_to() {
        const u32 place = in_ring(row / BLOCK) * BLOCK + row % BLOCK;
        to = reinterpret_cast<u64>(mine.rows) + (u64)place * RECORD;
        done = progress(mine, epoch, ARRIVED) + row / BLOCK;
        mine.homes[place] = home_of(source(), cell);
        if (WEIGHT_IN_FC2) mine.scale[place] = at<float>(world, source(), WEIGHTS_AT)[cell];
    }
};

// One warp, `warp` of its CTA: all its rows.
inline void carry(Carrier& c, u32 base, u32 warp, Laps& laps) {
    const u32 mate = lane_index() % LANES, nth = lane_index() / LANES;
    const u32 stage = base + warp * CARRY_BYTES + nth * PIECES * PIECE;
    const u32 bar = base + CARRY_BARS + (warp * AT_ONCE + nth) * 16;  // of this half and the other
    const u32 start = mate * PIECE, bytes = RECORD - start < PIECE ? RECORD - start : PIECE;
    const bool first = mate == 0 && nth < AT_ONCE;
    if (first) {
        bar_init(bar, 1);
        bar_init(bar + 8, 1);
    }
    bar_init_done();
    __syncwarp();
    u32 turn = 0, phases = 0;  // which half is next; bit h: parity of half h
    // The batch that is coming in, and the counter of the one that is being written.
    u64 to = 0;
    u32 *done = nullptr, *written = nullptr;
    bool coming = false;
    const auto write = [&] {  // what came in goes out
        const u32 half = turn ^ 1;
        if (coming) {
            bar_wait(bar + half * 8, phases >> half & 1);
            phases ^= 1 << half;
            if (to) bulk_store(reinterpret_cast<void*>(to), stage + half * BATCH_BYTES, RECORD);
        }
        bulk_commit();
        __syncwarp();
        laps.lap(STORE);
    };
    const auto count = [&](u32* counter) {  // its rows have landed
        fence_async_global();
        __syncwarp();
        if (counter) add_release(counter, 1);
        laps.lap(LAND);
    };
    for (bool wait = true;;) {  // for the next batch, when none is under way
        const bool more = c.find(wait);
        laps.lap(wait ? IDLE : FIND_ROWS);
        if (!more && wait) break;
        wait = !more;
        if (wait) {
            write();
            bulk_wait<0>();
            count(written);
            count(done);
            coming = false;
            written = done = nullptr;
            continue;
        }
        const bool has = c.from;
        bulk_wait_read<0>();  // what this lane wrote of this half's last batch has left it
        if (has) fence_async_global();
        if (has && first) bar_expect(bar + turn * 8, RECORD);
        __syncwarp();
        if (has && mate < PIECES)
            bulk_load(stage + turn * BATCH_BYTES + start, reinterpret_cast<const void*>(c.from + start),
                      bytes, bar + turn * 8);
        __syncwarp();
        c.ask();
        laps.lap(LOAD);
        write();
        c.place();
        c.aim();
        laps.lap(FIND_ROWS);
        bulk_wait<1>();
        count(written);
        written = coming ? done : nullptr;
        coming = has;
        to = c.to;
        done = c.done;
        turn ^= 1;
    }
    __syncwarp();  // all have seen their rows come
    if (first) {
        bar_end(bar);
        bar_end(bar + 8);
    }
    __threadfence_system();
    laps.end();
}
