// The words of a round on the GPU: publish, wait, leave in one of four ways, never trap.
//
// A word is round(32) | parity(1) | value(31), as in comm/words.py.  A wait polls this rank's own
// slab, so it costs no link.  It ends because the word came, because the host saw the peer's
// process end (`gone`), because the peer left (its leave word), or because nothing came within the
// limit.  The last three set `fault`, which every other wait and every later kernel looks at: they
// return, the output becomes NaN, and the host raises in check().
#pragma once
#include "ptx.cuh"

enum Kind { WORD_C, WORD_Y, WORD_LEAVE, OWN_BLOCKS };  // the last is no word: a wait inside a launch
enum Why { EXITED = 1, RAISED, STOPPED, CORRUPT, CLOSED, DIFFERS };  // comm/words.py HOWS, then ours

// What the host reads without stopping the GPU: page-locked memory, written once by who fails.
struct Report {
    u32 why;      // 0: nothing wrong
    u32 rank;     // whose word or mailbox it is
    u32 kind;     // which word was waited for, or which field of the heads differs
    u32 round;
    u64 word;     // what stood there
    u64 waited;   // nanoseconds
};

// By value in every launch.  `slab[r]` is the slab of rank r as this process sees it.
struct World {
    u64 slab[8];
    u64 round;    // address of the number of the round that comes next
    u64 fault;    // address of a word of device memory: 0, or the first Why
    u64 report;   // of a Report
    u64 gone;     // of one u32 for each rank, set by the host
    u64 limit;    // address of the longest wait in nanoseconds, a u64
    u32 rank, unused;
};

inline u64 load_acquire_system(const u64* p) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

inline u64 load_relaxed_system(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

inline void store_release_system(u64* p, u64 v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

inline void store_relaxed_system(u64* p, u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

inline u32 load_system(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Rows that ordinary stores wrote may be read by the copy engine, and the other way round.
inline void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

inline u64 word_of(u32 round, u32 value) {
    const u64 w = (u64)round << 32 | value;
    return w | (u64)(__popcll(w) & 1) << 31;
}

template <typename T>
inline T* at(const World& world, u32 rank, u64 offset) {
    return reinterpret_cast<T*>(world.slab[rank] + offset);
}

inline u64* cell_of(const World& world, u32 owner, u32 kind, u32 writer) {
    return at<u64>(world, owner, WORDS_AT) + kind * RANKS + writer;
}

inline u32 round_now(const World& world) { return (u32)*reinterpret_cast<const u64*>(world.round); }

inline bool faulted(const World& world) {
    return load_acquire(reinterpret_cast<const u32*>(world.fault)) != 0;
}

// The first fault is reported, later ones only leave.  Always false, for `return fail(...)`.
inline bool fail(const World& world, u32 why, u32 rank, u32 kind, u32 round, u64 word, u64 waited) {
    if (atomicCAS(reinterpret_cast<u32*>(world.fault), 0u, why) == 0) {
        volatile Report* report = reinterpret_cast<volatile Report*>(world.report);
        report->rank = rank;
        report->kind = kind;
        report->round = round;
        report->word = word;
        report->waited = waited;
        __threadfence_system();
        report->why = why;
    }
    return false;
}

// One thread, to every rank: what any thread wrote that this one knows of is seen before the word.
inline void publish_all(const World& world, u32 kind, u32 round) {
    __threadfence_system();
#pragma unroll
    for (u32 r = 0; r < RANKS; ++r)
        store_relaxed_system(cell_of(world, r, kind, world.rank), word_of(round, 0));
}

inline void publish(const World& world, u32 kind, u32 to, u32 round, u32 value) {
    store_release_system(cell_of(world, to, kind, world.rank), word_of(round, value));
}

// One thread: the word of `src` of this round.  False after a fault, its own or another's.
inline bool await(const World& world, u32 kind, u32 src, u32 round, u32& value) {
    const u64* cell = cell_of(world, world.rank, kind, src);
    const u64* leave = cell_of(world, world.rank, WORD_LEAVE, src);
    const u32* gone = reinterpret_cast<const u32*>(world.gone) + src;
    u64 started = 0, waited = 0, w;
    u32 why = 0;
    for (u32 turn = 0; !why; ++turn) {
        // Who is gone is read before the word: a word published just before the end still counts.
        const bool look = turn % 64 == 63;
        u32 ended = 0;
        if (look) {
            const u64 left = load_acquire_system(leave);
            if (left && (int)(round - (u32)(left >> 32)) >= 0) ended = (u32)left & 0x7fffffff;
            if (!ended && load_system(gone)) ended = EXITED;
        }
        w = load_acquire_system(cell);
        const u32 behind = round - (u32)(w >> 32);
        if (__popcll(w) & 1 || behind > 1) {
            why = CORRUPT;
        } else if (behind == 0) {
            value = (u32)w & 0x7fffffff;
            return true;
        } else if (look) {
            if (faulted(world)) return false;
            const u64 now = global_nanoseconds();
            if (!started) started = now;
            waited = now - started;
            why = ended ? ended : waited > *reinterpret_cast<const u64*>(world.limit) ? STOPPED : 0;
        }
    }
    return fail(world, why, src, kind, round, w, waited);
}

// One thread: the same, for those who leave it to another to ask who is gone and what a word says.
inline bool look_for(const World& world, u32 kind, u32 src, u32 round) {
    const u64* cell = cell_of(world, world.rank, kind, src);
    const u64 started = global_nanoseconds();
    for (u32 turn = 0; (u32)(load_relaxed_system(cell) >> 32) != round; ++turn) {
        __nanosleep(turn < 64 ? 50 : 500);
        if (turn % 64 != 63) continue;
        if (faulted(world)) return false;
        // Twice: the other gives up first and says why, unless it does not come to run.
        const u64 waited = global_nanoseconds() - started;
        if (waited > 2 * *reinterpret_cast<const u64*>(world.limit))
            return fail(world, STOPPED, src, kind, round, *cell, waited);
    }
    load_acquire_system(cell);
    return true;
}

// All threads of a block: every rank's word of this round; values in `values` (shared memory).
inline bool await_all(const World& world, u32 kind, u32 round, u32* values) {
    bool came = true;
    if (threadIdx.x < RANKS) came = await(world, kind, threadIdx.x, round, values[threadIdx.x]);
    return __syncthreads_and(came);
}

// Inside one launch, one thread: until `*count` has reached `target`.  Counts only grow.
inline bool await_count(const World& world, const u32* count, u32 target) {
    u64 started = 0;
    for (u32 turn = 0; (int)(load_acquire(count) - target) < 0; ++turn) {
        if (turn % 256 != 255) continue;
        if (faulted(world)) return false;
        const u64 now = global_nanoseconds();
        if (!started) started = now;
        if (now - started > *reinterpret_cast<const u64*>(world.limit))
            return fail(world, STOPPED, world.rank, OWN_BLOCKS, round_now(world), *count,
                        now - started);
    }
    return true;
}
