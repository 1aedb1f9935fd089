// One round in one launch: from a rank's rows to its results, over the slabs of all ranks.
//
// The first COMM CTAs (whole clusters) tell, pull and push, while the others stage the rows and then
// run the tile loop over both GEMMs.  FC1 tiles wait for the rows of their block, FC2 tiles for the
// FC1 tiles of theirs, pushes for the FC2 tiles.  At the end everyone reduces.  Any wait may fail
// (signals.cuh): then nobody begins anything new, everyone leaves, and the output is NaN.
//
// Constants: those of exchange.cuh; INNER, ACT, BIAS, COUNTED, COMM, LAG; TALL as in grouped_gemm.cu.
#if TALL == 0
#include "many.cuh"
#else
#include "few.cuh"
#endif
#include "carry.cuh"
#include "reduce.cuh"

constexpr u32 FEEDS = GROUPS * 4, SCOUTS = FEEDS + 1;  // warps

// In shared memory where it fits: each acquire empties L1, so a table in global memory is slow.
constexpr u32 MOST_SHARED = 231296;  // what a CTA may have, less 1024 of the static word
constexpr u32 LIVE_WORDS = live_words(LOCAL, UNIT < BLOCK);
constexpr bool LIVE_SHARED = LIVE_AT + 4 * LIVE_WORDS <= MOST_SHARED;
// Shared memory of a CTA that communicates.
constexpr u32 TABLES_AT = (CARRY_SHARED + 127) / 128 * 128;
constexpr u32 LISTS_AT_END = TABLES_AT + sizeof(Tables);  // count and place while telling
static_assert(LISTS_AT_END + (2 * SLOTS + 2) * 4 <= MOST_SHARED, "the tables of the carriers do not fit");
static_assert(LIVE_AT <= MOST_SHARED, "the ring and the hands do not fit");

inline Live live_of(const Private& mine, u8* shared) {
    return Live(LIVE_SHARED ? reinterpret_cast<int*>(shared + LIVE_AT)
                            : mine.scratch + blockIdx.x * LIVE_WORDS,
                LOCAL, UNIT < BLOCK);
}

// Read anew wherever it is needed: kept in a register for the whole kernel it is one too many.
inline u32 epoch_now(const Private& mine) {
    return *const_cast<const volatile u32*>(mine.epoch + EPOCH);
}

inline int rows_of(const World& world, int l) {
    const int* counts = at<int>(world, world.rank, COUNTS_AT) + world.rank * LOCAL + l;
    int sum = 0;
    for (int r = 0; r < RANKS; ++r) sum += counts[r * SLOTS];
    return sum;
}

// One thread of a CTA that multiplies: weights of the first slots into L2 while the counts are not
// known yet and the memory is idle; they are most likely needed if a slot expects rows at all.
inline void prefetch_weights(const Private& mine, u32 rows) {
    constexpr u64 PART = 16384, MOST = 24 << 20;  // half of L2, 6 us of the memory's time
    if (rows * CHOICES * RANKS < 2 * SLOTS) return;
    const u64 end = min(mine.weight_bytes, MOST), step = (gridDim.x - COMM) * PART;
    for (u64 at = (blockIdx.x - COMM) * PART; at < end; at += step)
        prefetch_bulk(mine.weights + at, min(PART, end - at));
}

// The last CTA of the launch to get here opens the next one.
inline void leave(const World& world, const Private& mine, bool good) {
    __threadfence();
    if ((atomicAdd(mine.epoch + FINISHED, 1) + 1) % gridDim.x) return;
    mine.epoch[NEXT] = 0;
    mine.epoch[EPOCH] += 1;
    if (good) *reinterpret_cast<u64*>(world.round) += 1;
}

// All threads of a CTA: every rank's word `kind` of this round has come.  The values are only for
// those who check them: `asked` is filled from the words in any case.
inline bool words_came(const World& world, const Private& mine, Kind kind, u32 epoch, u32 round,
                       u32* asked) {
    if (blockIdx.x == 0) {
        const bool came = await_all(world, kind, round, asked);
        if (came && threadIdx.x == 0) add_release(mine.epoch + CAME, 1);
        return came;
    }
    bool came = true;
    if (threadIdx.x == 0) came = await_came(world, mine, 2 * epoch + 1 + (kind == WORD_Y));
    if (!__syncthreads_and(came)) return false;
    if (threadIdx.x < RANKS)
        asked[threadIdx.x] = (u32)load_acquire_system(cell_of(world, world.rank, kind, threadIdx.x)) & 0x7fffffff;
    __syncthreads();
    return true;
}

// All threads of a CTA that communicates.
inline void communicate(const World& world, const Private& mine, const Call& call, u32 base,
                        u8* shared, u32 epoch, u32 round, u32* asked, Laps& laps) {
    Tables& t = *reinterpret_cast<Tables*>(shared + TABLES_AT);
    int* count = reinterpret_cast<int*>(shared + LISTS_AT_END);
    bool good = !faulted(world);
    for (u32 p = blockIdx.x; good && p < RANKS; p += COMM) {
        const u32 peer = (world.rank + 1 + p) % RANKS, stagers = gridDim.x - COMM;
        const int total =
            tell(world, mine, peer, call.choices, call.rows, call.head, count, count + SLOTS);
        if (threadIdx.x == 0 && await_count(world, mine.epoch + STAGED, (epoch + 1) * stagers))
            publish(world, WORD_C, peer, round, total);
    }
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < PROGRESS * BLOCKS;
         i += COMM * blockDim.x)
        progress(mine, epoch + 1, ARRIVED)[i] = 0;
    laps.lap(TELL);
    good = words_came(world, mine, WORD_C, epoch, round, asked);
    laps.lap(WAIT_C);
    good = good && make_tables(world, t, asked, round);
    if (good && blockIdx.x == 0) check_heads(world, mine, round);
    if (good && (u32)t.block[LOCAL] > BLOCKS)
        good = fail(world, CORRUPT, world.rank, WORD_C, round, t.block[LOCAL], 0);
    __syncthreads();
    if (threadIdx.x == 0) add_release(mine.epoch + PLANNED, 1);
    laps.lap(PLAN);
    const u32 warp = threadIdx.x / 32;
    if (good && warp < CARRIERS) {
        Laps laps(mine.trace, warp ? LAST_CARRIER : FIRST_CARRIER,
                  lane_index() == 0 && (warp == 0 || warp == CARRIERS - 1));
        Carrier carrier(world, mine, t, epoch, round, warp * COMM + blockIdx.x, COMM * CARRIERS);
        carry(carrier, base, warp, laps);
    }
    __syncthreads();
    // Y is the promise to read no mailbox and no row of this round any more.
    if (threadIdx.x == 0 && (atomicAdd(mine.epoch + PUSHED, 1) + 1) % COMM == 0 &&
        await_count(world, mine.epoch + PLANNED, (epoch + 1) * gridDim.x) && !faulted(world)) {
        __threadfence_system();
        for (u32 r = 0; r < RANKS; ++r) publish(world, WORD_Y, r, round, 0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fused_round(const __grid_constant__ Maps maps, const __grid_constant__ World world,
                const __grid_constant__ Private mine, const __grid_constant__ Call call) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u32 asked[RANKS];
    const u32 base = smem(shared), warp = warp_index();
    Laps laps(mine.trace, WHOLE_CTA, threadIdx.x == 0);
    const bool multiplies = blockIdx.x >= COMM;
    if (multiplies && warp == FEEDS && lane_index() == 0) {
        init_tiles(base);
        prefetch_maps(maps);
        prefetch_weights(mine, call.rows);
    }
    if (multiplies && !faulted(world)) stage_rows(world, call.x, call.weights, call.rows, COMM);
    __syncthreads();
    if (multiplies && threadIdx.x == 0) add_release(mine.epoch + STAGED, 1);
    cluster_sync();
    laps.lap(STAGE);

    const u64 everyone = (u64)COMM * THREADS + (u64)(gridDim.x - COMM) * GROUPS * 128;
    if (!multiplies) {
        communicate(world, mine, call, base, shared, epoch_now(mine), round_now(world), asked, laps);
        laps.lap(WORK);
        const bool good = words_came(world, mine, WORD_Y, epoch_now(mine), round_now(world), asked) && !faulted(world);
        laps.lap(WAIT_Y);
        reduce_rows(world, call.choices, call.weights, call.shared, call.out, call.rows, good,
                    (u64)blockIdx.x * THREADS + threadIdx.x, everyone);
        __syncthreads();
        laps.lap(REDUCE);
        if (threadIdx.x == 0) leave(world, mine, good);
        laps.end();
        return;
    }
    bool good = words_came(world, mine, WORD_C, epoch_now(mine), round_now(world), asked);
    laps.lap(WAIT_C);
    if (warp == 0 && good) {
        const Live live = live_of(mine, shared);
        find_live<LOCAL, UNIT>(live, [&](int l) { return max(rows_of(world, l), 0); });
        __syncwarp();
        good = (u32)live.block[*live.count] <= BLOCKS;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x == 0) add_release(mine.epoch + PLANNED, 1);
    laps.lap(PLAN);
    if (warp >= FEEDS) {
        registers_down<FEED_REGISTERS>();
        if (warp == FEEDS) feed_stream(world, mine, maps, base, epoch_now(mine));
        if (warp == SCOUTS) scout_stream(world, mine, live_of(mine, shared), base, good);
        cluster_sync();
    } else {
        registers_up<MULTIPLY_REGISTERS>();
        multiply_stream(mine, maps, call, base, epoch_now(mine), warp / 4);
        laps.lap(WORK);
        if (threadIdx.x == 0)
            asked[0] = await_came(world, mine, 2 * epoch_now(mine) + 2) && !faulted(world);
        both_sync();
        const bool came = asked[0];
        laps.lap(WAIT_Y);
        reduce_rows(world, call.choices, call.weights, call.shared, call.out, call.rows, came,
                    (u64)COMM * THREADS + (u64)(blockIdx.x - COMM) * GROUPS * 128 + threadIdx.x, everyone);
        both_sync();
        laps.lap(REDUCE);
        if (threadIdx.x == 0) leave(world, mine, came);
        laps.end();
        __syncwarp();
        cluster_sync();  // a CTA that left could still be sent arrivals
    }
}
