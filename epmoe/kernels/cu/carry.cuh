// How rows come in a fused round: pulled slot by slot.  Results go out by themselves (send.cuh).
//
// Constants as in exchange.cuh.
#pragma once
#include "exchange.cuh"

// The slot l >= from with before[l] <= n < before[l + 1]; there is one.
inline int at_or_after(const int* before, int from, u32 n) {
    if (n < (u32)before[from + 1]) return from;
    int low = from + 1, high = LOCAL;  // before[low] <= n < before[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if ((u32)before[middle] <= n) low = middle;
        else high = middle;
    }
    return low;
}

// Rows move in pieces of up to 7 KiB, one lane of a carrying warp to a piece.  Two batches of pieces
// are under way: one comes in while the one before it is written and the jobs of the next are looked
// up.  One thread with one row at a time cannot hide what it waits for: its list entry, its row, its
// stores and the fence before it says so took 10 us a row.
constexpr u32 BATCH_BYTES = RECORD > 14336 ? RECORD : 14336;
constexpr u32 CARRY_BYTES = 2 * BATCH_BYTES;  // of a warp
constexpr u32 CARRIERS = 200704 / CARRY_BYTES;
constexpr u32 PIECES = (RECORD + 7167) / 7168;
constexpr u32 PIECE = (RECORD + PIECES * 16 - 1) / (PIECES * 16) * 16;
constexpr u32 FIT = BATCH_BYTES / (PIECE * PIECES) ? BATCH_BYTES / (PIECE * PIECES) : 1;
constexpr u32 AT_ONCE = FIT * PIECES > 32 ? 32 / PIECES : FIT;  // rows of a batch
constexpr u32 CARRY_BARS = CARRIERS * CARRY_BYTES;              // one barrier a lane and batch
constexpr u32 CARRY_SHARED = CARRY_BARS + CARRIERS * 2 * 32 * 8;
static_assert(AT_ONCE * PIECES * PIECE <= BATCH_BYTES + 16 * PIECES, "a batch does not fit");

// What one warp pulls; every lane has its own row of a batch.
//
// Turns: slot by slot, sources in turn, beginning right of me, so that every link is busy and a
// slot's first block is complete first.  Example, 2 ranks, rank 0, counts 2 (me) and 1 (rank 1) for a
// slot: rank 1's row is row 0 of the slot, mine are rows 1 and 2.
//
// A batch is a run of turns, so that it needs few blocks of the ring; it is as short as lets all
// warps have one.
struct Carrier {
    const World& world;
    const Private& mine;
    const Tables& t;
    const u32 epoch, round;
    u32 step, turn;  // from one batch to the next; this lane's next turn, past all if it has none
    int slot = 0, left_slot = 0;
    bool broken = false;
    // Where the next row goes.
    bool aimed = false;
    u32 row = NOWHERE, source_rank = 0, entry = 0;
    // The job of this lane, if it has one.
    bool has = false;
    u64 from = 0, to = 0;
    u32* done = nullptr;  // counts the row when it has landed

    static constexpr u32 NOWHERE = ~0u;

    // Warp `index` of `warps`.
    inline Carrier(const World& world, const Private& mine, const Tables& t, u32 epoch, u32 round,
                   u32 index, u32 warps)
        : world(world), mine(mine), t(t), epoch(epoch), round(round) {
        const u32 all = t.turn[LOCAL], at = lane_index() / PIECES;
        const u32 width = min(AT_ONCE, max((all + warps - 1) / warps, 1u));
        step = warps * width;
        turn = at < width ? index * width + at : NOWHERE;
    }

    // All lanes: find the next batch.  False if it cannot come now; with `wait` only when all is done
    // or broken.
    inline bool find(bool wait) {
        has = false;
        u64 started = 0;
        for (u32 look = 1; !broken && __any_sync(~0u, turn < (u32)t.turn[LOCAL]); ++look) {
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
        fail(world, STOPPED, world.rank, 3, round, turn, now - started);
        return true;
    }

    inline u32 source(u32 n) const { return (world.rank + 1 + n) % RANKS; }

    inline u32 rows_in(int slot, u32 block) const {  // `block` counted over all slots
        return min((u32)BLOCK, t.row[slot + 1] - t.row[slot] - (block - t.block[slot]) * BLOCK);
    }

    // Once a batch: where this lane's next row goes.
    inline void aim() {
        if (aimed) return;
        aimed = true;
        row = NOWHERE;
        if (turn >= (u32)t.turn[LOCAL]) return;
        slot = at_or_after(t.turn, slot, turn);
        const u32 n = turn - t.turn[slot], j = n / RANKS;
        source_rank = source(n);
        if (j >= (u32)t.count[source_rank][slot]) return;
        u32 place = 0;  // rows of this slot whose turn is before mine
#pragma unroll 1
        for (u32 i = 0; i < RANKS; ++i)
            place += min((u32)t.count[source(i)][slot], j + (i < n % RANKS));
        entry = t.first[source_rank][slot] + j;
        row = t.block[slot] * BLOCK + place;
    }

    // What was in the ring where the next batch goes is not needed any more.
    inline bool room() {
        if (RING == BLOCKS) return true;
        bool good = true;
        if (row != NOWHERE && row / BLOCK >= RING) {
            const u32 before = row / BLOCK - RING;
            left_slot = at_or_after(t.block, left_slot, before);
            good = load_acquire(progress(mine, epoch, WHOLE) + before) >=
                   tiles_of(HIDDEN, rows_in(left_slot, before));
        }
        return __all_sync(~0u, good);
    }

    inline void take() {
        bool bad = false;
        if (row != NOWHERE) {
            const u32 cell =
                at<u32>(world, world.rank, LISTS_AT)[(u64)source_rank * CELLS + entry];
            const u32 place = in_ring(row / BLOCK) * BLOCK + row % BLOCK;
            if (cell >= CELLS) {
                bad = true;
                fail(world, CORRUPT, source_rank, WORD_C, round, cell, 0);
            } else {
                has = true;
                from = world.slab[source_rank] + ROWS_AT + (u64)(cell / CHOICES) * RECORD;
                to = reinterpret_cast<u64>(mine.rows) + (u64)place * RECORD;
                done = progress(mine, epoch, ARRIVED) + row / BLOCK;
                if (lane_index() % PIECES == 0) {
                    mine.homes[place] = home_of(source_rank, cell);
                    if (WEIGHT_IN_FC2)
                        mine.scale[place] = at<float>(world, source_rank, WEIGHTS_AT)[cell];
                }
            }
        }
        if (turn != NOWHERE) turn += step;
        aimed = false;
        broken = __any_sync(~0u, bad);
    }
};

// One warp, `warp` of its CTA: all its rows.
inline void carry(Carrier& c, u32 base, u32 warp, Laps& laps) {
    const u32 lane = lane_index(), piece = lane % PIECES;
    const u32 stage = base + warp * CARRY_BYTES + lane * PIECE;
    const u32 bar = base + CARRY_BARS + (warp * 64 + lane) * 8;
    const u32 start = piece * PIECE, bytes = RECORD - start < PIECE ? RECORD - start : PIECE;
    bar_init(bar, 1);
    bar_init(bar + 256, 1);
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
            bar_wait(bar + half * 256, phases >> half & 1);
            phases ^= 1 << half;
            bulk_store(reinterpret_cast<void*>(to + start), stage + half * BATCH_BYTES, bytes);
        }
        bulk_commit();
        __syncwarp();
        laps.lap(STORE);
    };
    const auto count = [&](u32* counter) {  // its rows have landed
        fence_async_global();
        __syncwarp();
        if (counter && piece == 0) add_release(counter, 1);
        laps.lap(LAND);
    };
    bool more = c.find(true);
    laps.lap(IDLE);
    while (more) {
        const bool has = c.has;
        bulk_wait_read<0>();  // this half's last batch has left it
        if (has) {
            fence_async_global();
            bar_expect(bar + turn * 256, bytes);
            bulk_load(stage + turn * BATCH_BYTES, reinterpret_cast<const void*>(c.from + start), bytes,
                      bar + turn * 256);
        }
        __syncwarp();
        laps.lap(LOAD);
        write();
        bulk_wait<1>();
        count(written);
        written = coming ? done : nullptr;
        coming = has;
        to = c.to;
        done = has ? c.done : nullptr;
        turn ^= 1;
        more = c.find(false);
        laps.lap(FIND_ROWS);
        if (!more) {
            write();
            bulk_wait<0>();
            count(written);
            count(done);
            coming = false;
            written = done = nullptr;
            more = c.find(true);
            laps.lap(IDLE);
        }
    }
    bar_end(bar);
    bar_end(bar + 256);
    __threadfence_system();
    laps.end();
}
